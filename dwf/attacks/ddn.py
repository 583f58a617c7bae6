"""DDN: find the smallest L2 perturbation that fools a model, with direction and norm apart.

    delta <- x - x_0 + alpha_k g / ||g||_2          g = gradient of the loss at x
    radius <- (1 - gamma) radius where x fools the model, (1 + gamma) radius where it does not
    x <- clip(x_0 + radius delta / ||delta||_2)     alpha_k: from 1 to 0.01 along a cosine

Draws no random numbers. Source: Rony et al., arXiv:1811.09600. As in their code, each step goes on
from the clipped image, and no radius exceeds the distance to the farthest corner of the range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dwf.attacks.losses import Model, cross_entropy, margin
from dwf.attacks.minimum_norm import Closest, Seen
from dwf.attacks.norms import length, per_pixel, unit
from dwf.attacks.setup import Setup, packed
from dwf.attacks.source import GradientSource, with_company
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count, check_positive

_LEAST_STEP = 0.01
_NUM_LOOPS = 10


def ddn(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor | None = None,
    norm: str = "l2",
    targets: Tensor | None = None,
    num_steps: int = 300,
    first_radius: float = 1.0,
    gamma: float = 0.05,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Find the smallest L2 perturbation that fools the model, with direction and norm apart.

    Takes ``num_steps`` gradients of the cross-entropy.

    Args:
        epsilon: only images within this L2 radius count, float or [B]; None for the closest.
        norm: "l2" only.
        targets: [B] wrong classes to be reached; by default any will do.
        num_steps: gradients for each image; the paper takes 100, 300 and 1000.
        first_radius: the L2 norm that the search begins with, in pixels.
        gamma: by how much of itself the radius changes in a step, in (0, 1).

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1]: the closest image found that fools the model in float32;
        where there is none or ``images`` do so already, the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    if norm != "l2":
        raise ConfigError(f"norm: {norm!r}, DDN is for 'l2'; in L-inf use FAB")
    num_steps = check_count(num_steps, "num_steps")
    first_radius = check_positive(first_radius, "first_radius")
    if not 0 < gamma < 1:
        raise ConfigError(f"gamma: {gamma:g} is not in (0, 1)")
    setup = packed(Setup, {**locals(), "epsilon": 1.0 if epsilon is None else epsilon})
    with setup.opened() as (batch, source):
        closest = Closest(batch, source, norm, bounded=epsilon is not None)
        _search(closest, num_steps, first_radius, gamma)
        return closest.images if epsilon is None else setup.held(closest.images)


def _search(closest: Closest, num_steps: int, first_radius: float, gamma: float) -> None:
    """Look for closer images in ``num_steps`` steps; the model is shown them every tenth."""
    batch, source = closest.batch, closest.source
    rows = torch.nonzero(closest.is_open())[:, 0]
    if len(rows) == 0:
        return
    wanted = batch.labels if batch.targets is None else batch.targets
    images = batch.images[rows]
    farthest = length(torch.maximum(images - batch.low, batch.high - images), "l2")
    radius = farthest.clamp(max=first_radius)
    state: tuple[Tensor, ...] = images.clone(), radius
    sizes = radius.new_tensor([_step_size(k, num_steps) for k in range(num_steps)])
    step = _Step(Ascended(batch.targets is not None), gamma, batch.low, batch.high)
    check_every = -(-num_steps // _NUM_LOOPS)
    for first in range(0, num_steps, check_every):
        seen = closest.nothing_seen(rows)
        at = torch.full((1,), first, dtype=torch.int64, device=radius.device)
        given = images, wanted[rows], farthest, sizes, seen.known, seen.limit
        with source.loop(step, (*state, at, *seen.state), given) as (take_step, _):
            for _ in range(first, min(first + check_every, num_steps)):
                take_step()
        closest.ask(rows, seen)
        still = with_company(closest.is_open(rows))
        if not bool(still.any()):
            break
        if not bool(still.all()):
            rows, images, farthest = rows[still], images[still], farthest[still]
            state = tuple(x[still] for x in state)


def _step_size(index: int, num_steps: int) -> float:
    """From 1 to `_LEAST_STEP` along half a cosine."""
    share = (1 + math.cos(math.pi * index / num_steps)) / 2
    return _LEAST_STEP + (1 - _LEAST_STEP) * share


@dataclass(frozen=True)
class Ascended:
    """What DDN ascends, [B]: the cross-entropy, or minus that of the targets."""

    targeted: bool

    def __call__(self, logits: Tensor, classes: Tensor) -> Tensor:
        loss = cross_entropy(logits, classes)
        return -loss if self.targeted else loss


@dataclass(frozen=True)
class _Step:
    """A step of DDN; see `dwf.attacks.source.Step`."""

    loss: Ascended
    gamma: float
    low: float
    high: float

    def __call__(
        self,
        source: GradientSource,
        x: Tensor,
        radius: Tensor,
        at: Tensor,
        nearest: Tensor,
        seen_distance: Tensor,
        surest: Tensor,
        surest_margin: Tensor,
        images: Tensor,
        classes: Tensor,
        farthest: Tensor,
        sizes: Tensor,
        known: Tensor,
        limit: Tensor,
    ) -> None:
        grad, logits = source.gradient_and_logits(x, classes, self.loss)
        ahead = margin(logits, classes)
        if self.loss.targeted:
            ahead = -ahead
        fooled = (ahead >= 0) | ~logits.isfinite().all(dim=1)
        seen = Seen(nearest, seen_distance, surest, surest_margin, known, limit)
        seen.note(x, length(x - images, "l2"), fooled, ahead)

        delta = x - images + sizes.index_select(0, at) * unit(grad.nan_to_num(0.0), "l2")
        radius.copy_(torch.where(fooled, (1 - self.gamma) * radius, (1 + self.gamma) * radius))
        radius.copy_(torch.minimum(radius, farthest))
        moved = images + per_pixel(radius) * unit(delta, "l2")
        x.copy_(moved.clamp(self.low, self.high))
        at.add_(1)
