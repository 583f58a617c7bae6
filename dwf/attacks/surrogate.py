"""Follow the gradients of one model, and let another one judge: a surrogate, a stand-in, a view.

    v_{k+1} = momentum * v_k + g(a_k) / mean(|g(a_k)|)
    a_{k+1} = clip(a_k + s_k * sign(v_{k+1}); images, epsilon), then clip to [0, 1]

g is the gradient of the surrogate's loss; in L2, v / |v|_2 stands for the sign. Step sizes s_k fall
from 0.4 epsilon to nearly zero along a cosine. Unlike PGD on the surrogate, an image does not stop
when the surrogate is fooled: it stops when the model is.

Random numbers: the start of restart r takes stream r of `moe_kernels.uniform_noise`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwf.attacks.losses import LOSSES, Model
from dwf.attacks.norms import ascent, length, per_pixel, project, uniform_in_ball
from dwf.attacks.setup import AttackBatch, Setup, packed
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import check_choice, check_count, check_positive

_FIRST_STEP = 0.4  # of epsilon
_LEVELS = 255
JUDGE_EVERY = 5  # steps after which the model is asked at the latest


def through_surrogate(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    surrogate: Model | AttackTarget,
    epsilon: float,
    norm: str = "linf",
    num_steps: int = 60,
    num_restarts: int = 1,
    loss: str = "margin",
    momentum: float = 0.75,
    judge_every: int = JUDGE_EVERY,
    eight_bits: bool = False,
    row_aligned: bool = False,
    eot_samples: int = 1,
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Ascend the loss of ``surrogate`` until ``model`` is fooled.

    Args:
        surrogate: what is differentiated; may be the model itself.
        num_restarts: the first begins at the image, the others at random points of the ball.
        loss: "margin" or "ce".
        judge_every: the model is asked at every so many steps, at the end, and where the surrogate
            is newly fooled.
        eight_bits: every state is rounded to multiples of 1/255, as an image file holds them.
        row_aligned: row b of the surrogate's input has to come from image b, so it is always given
            all rows, those that are broken already too.

    Other arguments are as in :func:`dwf.attacks.pgd`; ``report`` counts both models.

    Returns:
        [B, C, H, W] float32 in [0, 1] within epsilon of ``images``: the first state that fools the
        model, else the last one.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    check_count(num_steps, "num_steps")
    check_count(num_restarts, "num_restarts")
    check_count(judge_every, "judge_every")
    check_positive(momentum, "momentum", zero_allowed=True)
    check_choice(loss, ("margin", "ce"), "loss")
    objective = LOSSES[loss]
    given = {**locals(), "report": None}
    setup = packed(Setup, {**given, "report": report})
    with (
        setup.opened() as (batch, judging),
        packed(Setup, {**given, "model": surrogate}).opened() as (_, searching),
        torch.no_grad(),
    ):
        found = batch.images.clone()

        def keep(rows: Tensor, x: Tensor) -> None:
            """Take states [R, C, H, W] of the rows that stand, and see which of them fall."""
            left = stands[rows]
            rows, x = rows[left], x[left]
            found[rows] = x
            stands[rows] = ~batch.subset(rows).are_fooled(judging, x)

        every = torch.arange(len(batch), device=found.device)
        stands = torch.ones_like(every, dtype=torch.bool)
        if len(batch):
            stands = ~batch.are_fooled(judging, found)
        for restart in range(num_restarts):
            rows = every if row_aligned else every[stands]
            x = batch.subset(rows).images
            if restart:
                noise = uniform_in_ball(
                    seed, batch.sample_index[rows], x.shape[1:], norm, stream=restart
                )
                x = (x + epsilon * noise).clamp(batch.low, batch.high)
            velocity = torch.zeros_like(x)
            believed = torch.zeros_like(rows, dtype=torch.bool)
            for step in range(num_steps):
                if not bool(stands.any()):
                    break
                part = batch.subset(rows)
                grad, logits = searching.gradient_and_logits(x, part.labels, objective)
                claimed = part.fooled(logits)
                news = claimed & ~believed & stands[rows]
                if step and (step % judge_every == 0 or bool(news.any())):
                    keep(rows, x)
                    if not bool(stands.any()):
                        break
                    if not row_aligned:
                        left = stands[rows]
                        rows, x, velocity = rows[left], x[left], velocity[left]
                        grad, claimed = grad[left], claimed[left]
                        part = batch.subset(rows)
                believed = claimed
                size = grad.abs().flatten(1).mean(dim=1).clamp(min=1e-30)
                velocity = momentum * velocity + (grad / per_pixel(size)).nan_to_num(0.0)
                length_now = _FIRST_STEP * (1 + math.cos(math.pi * step / num_steps)) / 2 + 0.01
                x = x + epsilon * length_now * ascent(velocity, norm)
                x = project(x, part.images, part.epsilon, norm, batch.low, batch.high)
                if eight_bits:
                    x = on_eight_bits(x, part, norm)
            if bool(stands.any()):
                keep(rows, x)
    if report is not None:  # verdicts are in it; the search is added
        report.num_forwards += searching.num_forwards
        report.num_backwards += searching.num_backwards
        report.passes = report.num_backwards
    return setup.held(found)


def on_eight_bits(adversarial: Tensor, batch: AttackBatch, norm: str) -> Tensor:
    """The images rounded to multiples of 1/255 inside their balls; as they are where none is.

    In L-inf each pixel goes to the nearest multiple in its interval; in L2 pixels are rounded
    toward the clean image.
    """
    clean, radius = batch.images, per_pixel(batch.epsilon)
    if norm == "linf":
        slack = 1e-4  # multiples at the very end of the ball are in it
        low = ((clean - radius).clamp(min=0) * _LEVELS - slack).ceil()
        high = ((clean + radius).clamp(max=1) * _LEVELS + slack).floor()
        rounded = torch.minimum(torch.maximum((adversarial * _LEVELS).round(), low), high)
    else:
        scaled = adversarial * _LEVELS
        rounded = torch.where(adversarial > clean, (scaled + 1e-4).floor(), (scaled - 1e-4).ceil())
    rounded = rounded / _LEVELS
    inside = length(rounded - clean, norm) <= batch.epsilon + 1e-6
    return torch.where(per_pixel(inside), rounded, adversarial)
