"""Carlini-Wagner: minimize the L2 norm of a perturbation that fools the model, by Adam.

    minimize ||x(w) - x_0||_2^2 + c f(x(w)),    x(w) = (tanh(w) + 1) / 2

with a binary search for c; f is the margin, no smaller than -confidence. Draws no random numbers.

Source: Carlini and Wagner, arXiv:1608.04644.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dwf.attacks.losses import Model, margin
from dwf.attacks.minimum_norm import Closest
from dwf.attacks.norms import length, per_pixel
from dwf.attacks.setup import Setup, packed
from dwf.attacks.space import AttackSpace
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count, check_positive


def carlini_wagner(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor | None = None,
    norm: str = "l2",
    targets: Tensor | None = None,
    confidence: float = 0.0,
    num_searches: int = 9,
    num_steps: int = 1000,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Minimize the L2 norm of a perturbation that fools the model, by Adam on tanh variables.

    Takes up to ``num_searches * num_steps`` gradients; a descent ends early for an image whose loss
    has not fallen by 1e-4 of itself in a tenth of the steps.

    Args:
        epsilon: only images within this L2 radius count, float or [B]; None for the closest.
        norm: "l2" only. In L-inf the counterpart is PGD on the margin.
        targets: [B] wrong classes to be reached; by default any will do.
        confidence: the margin in logits by which the model is to be wrong.
        num_searches: values of c tried, from ``initial_c`` on.
        num_steps: steps of Adam for each c.
        learning_rate: of Adam, on the tanh variables.
        initial_c: first weight of the margin against the squared distance.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1]: the closest image found that fools the model in float32;
        where there is none or ``images`` do so already, the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`; LabelError also for targets that are the labels.
    """
    if norm != "l2":
        raise ConfigError(f"norm: {norm!r}, Carlini-Wagner is for 'l2'; in L-inf use PGD on margin")
    if isinstance(model, AttackSpace) and model.clamp == "none":
        raise ConfigError("clamp: 'none', but Carlini-Wagner needs a range to squash images into")
    check_count(num_searches, "num_searches")
    check_count(num_steps, "num_steps")
    check_positive(confidence, "confidence", zero_allowed=True)
    check_positive(learning_rate, "learning_rate")
    check_positive(initial_c, "initial_c")
    setup = packed(Setup, {**locals(), "epsilon": 1.0 if epsilon is None else epsilon})
    with setup.opened() as (batch, source):
        closest = Closest(batch, source, norm, bounded=epsilon is not None)
        rows = torch.nonzero(closest.is_open())[:, 0]
        c = batch.epsilon.new_full((len(batch),), initial_c)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(num_searches):
            rows = rows[closest.is_open(rows)]
            if len(rows) == 0:
                break
            reached = _descend(closest, rows, c, confidence, num_steps, learning_rate)
            high = torch.where(reached, torch.minimum(high, c), high)
            low = torch.where(reached, low, torch.maximum(low, c))
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        return closest.images


def _descend(
    closest: Closest,
    rows: Tensor,
    c: Tensor,
    confidence: float,
    num_steps: int,
    learning_rate: float,
) -> Tensor:
    """Minimize for one c [B] an image; true where the model was fooled on the way, [B]."""
    batch, source = closest.batch, closest.source
    reached = torch.zeros_like(batch.labels, dtype=torch.bool)
    middle, half = (batch.high + batch.low) / 2, (batch.high - batch.low) / 2
    targeted = batch.targets is not None
    wanted = batch.labels if batch.targets is None else batch.targets
    loss = functools.partial(_shortfall, targeted=targeted, confidence=confidence)
    images, classes = batch.images[rows], wanted[rows]
    # not quite to the ends, where the variables are infinite
    w = torch.atanh((images.clamp(batch.low, batch.high) - middle) / half * 0.999999)
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    before = torch.full_like(c, torch.inf)
    check_every = max(num_steps // 10, 1)
    for step in range(1, num_steps + 1):
        squashed = torch.tanh(w)
        x = middle + half * squashed
        grad, logits = source.gradient_and_logits(x, classes, loss)
        short = loss(logits, classes)
        fooled = (short <= -confidence) | ~logits.isfinite().all(dim=1)
        reached[rows] = closest.offer(rows, x, fooled) | reached[rows]

        finite = grad.flatten(1).isfinite().all(dim=1)
        grad = torch.where(per_pixel(finite), per_pixel(c[rows]) * grad, 0.0)
        grad_w = (2 * (x - images) + grad) * half * (1 - squashed**2)
        mean = 0.9 * mean + 0.1 * grad_w
        square = 0.999 * square + 0.001 * grad_w**2
        deviation = (square / (1 - 0.999**step)).sqrt() + 1e-8
        w = w - learning_rate * mean / (1 - 0.9**step) / deviation

        if step % check_every == 0:
            total = length(x - images, "l2") ** 2 + c[rows] * short
            falls = total <= 0.9999 * before[rows]
            before[rows] = total
            keep = falls & closest.is_open(rows)
            if not bool(keep.all()):
                rows, images, classes = rows[keep], images[keep], classes[keep]
                w, mean, square = w[keep], mean[keep], square[keep]
            if len(rows) == 0:
                break
    return reached


def _shortfall(logits: Tensor, classes: Tensor, *, targeted: bool, confidence: float) -> Tensor:
    """The paper's f, [B]: logits missing to be wrong, or to be the target; -confidence at least."""
    behind = margin(logits, classes)
    return (behind if targeted else -behind).clamp(min=-confidence)
