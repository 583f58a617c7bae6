"""Carlini-Wagner: minimize the L2 norm of a perturbation that fools the model, by Adam.

    minimize ||x(w) - x_0||_2^2 + c f(x(w)),    x(w) = (tanh(w) + 1) / 2

with a binary search for c; f is the margin, no smaller than -confidence. Draws no random numbers.

Source: Carlini and Wagner, arXiv:1608.04644.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwf.attacks.losses import Model, margin
from dwf.attacks.minimum_norm import Closest, Seen
from dwf.attacks.norms import length, per_pixel
from dwf.attacks.setup import Setup, packed
from dwf.attacks.source import GradientSource, with_company
from dwf.attacks.space import AttackSpace
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count, check_positive

# Adam's first steps may raise the loss: to stop a descent there would find nothing.
_SETTLED = 50
_LEARNING_RATE, _WHOLE_RANGE = 0.01, 10.0


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
    learning_rate: float | None = None,
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
    has not fallen by 1e-4 of itself in a tenth of the steps, or in 50 if that is more.

    Args:
        epsilon: only images within this L2 radius count, float or [B]; None for the closest.
        norm: "l2" only. In L-inf the counterpart is PGD on the margin.
        targets: [B] wrong classes to be reached; by default any will do.
        confidence: the margin in logits by which the model is to be wrong.
        num_searches: values of c tried, from ``initial_c`` on.
        num_steps: steps of Adam for each c.
        learning_rate: of Adam, on the tanh variables. By default the paper's 0.01; in fewer than
            1000 steps as much more as takes a variable by 10, across a pixel's range: at 0.01 a
            hundred steps leave many images without any that fools.
        initial_c: first weight of the margin against the squared distance.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1]: the closest image found that fools the model in float32;
        where there is none or ``images`` do so already, the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    if norm != "l2":
        raise ConfigError(f"norm: {norm!r}, Carlini-Wagner is for 'l2'; in L-inf use PGD on margin")
    if isinstance(model, AttackSpace) and model.clamp == "none":
        raise ConfigError("clamp: 'none', but Carlini-Wagner needs a range to squash images into")
    num_searches = check_count(num_searches, "num_searches")
    num_steps = check_count(num_steps, "num_steps")
    confidence = check_positive(confidence, "confidence", zero_allowed=True)
    if learning_rate is None:
        learning_rate = max(_LEARNING_RATE, _WHOLE_RANGE / num_steps)
    learning_rate = check_positive(learning_rate, "learning_rate")
    initial_c = check_positive(initial_c, "initial_c")
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
        return closest.images if epsilon is None else setup.held(closest.images)


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
    wanted = batch.labels if batch.targets is None else batch.targets
    loss = Shortfall(batch.targets is not None, float(confidence))
    step = _Step(loss, float(learning_rate), batch.low, batch.high)
    images = batch.images[rows]
    # not quite to the ends, where the variables are infinite
    inside = images.clamp(batch.low, batch.high)
    w = torch.atanh((inside - step.middle) / step.half * 0.999999)
    state: tuple[Tensor, ...] = w, torch.zeros_like(w), torch.zeros_like(w)
    corrections = torch.tensor(
        [(1 - 0.9**k, 1 - 0.999**k) for k in range(1, num_steps + 1)],
        dtype=torch.float32,
        device=w.device,
    )
    before = torch.full_like(c, torch.inf)
    check_every = max(num_steps // 10, _SETTLED)
    for first in range(0, num_steps, check_every):
        seen, fooled = closest.nothing_seen(rows), torch.zeros_like(rows, dtype=torch.bool)
        at, total = corrections.new_full((1,), first, dtype=torch.int64), torch.zeros_like(c[rows])
        changed = *state, at, total, fooled, *seen.state
        given = images, c[rows], wanted[rows], corrections, seen.known, seen.limit
        with source.loop(step, changed, given) as (take_step, _):
            for _ in range(first, min(first + check_every, num_steps)):
                take_step()
        reached[rows] |= fooled & ~closest.ask(rows, seen)
        falls = total <= 0.9999 * before[rows]
        before[rows] = total
        keep = with_company(falls & closest.is_open(rows))
        if not bool(keep.any()):
            break
        if not bool(keep.all()):
            rows, images = rows[keep], images[keep]
            state = tuple(x[keep] for x in state)
    return reached


@dataclass(frozen=True)
class _Step:
    """A step of Adam on w; see `dwf.attacks.source.Step`."""

    loss: Shortfall
    learning_rate: float
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.high + self.low) / 2

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def __call__(
        self,
        source: GradientSource,
        w: Tensor,
        mean: Tensor,
        square: Tensor,
        at: Tensor,
        total: Tensor,
        fooled: Tensor,
        nearest: Tensor,
        seen_distance: Tensor,
        surest: Tensor,
        surest_margin: Tensor,
        images: Tensor,
        c: Tensor,
        classes: Tensor,
        corrections: Tensor,
        known: Tensor,
        limit: Tensor,
    ) -> None:
        squashed = torch.tanh(w)
        x = self.middle + self.half * squashed
        grad, logits = source.gradient_and_logits(x, classes, self.loss)
        short, distance = self.loss(logits, classes), length(x - images, "l2")
        total.copy_(distance**2 + c * short)
        now = (short <= -self.loss.confidence) | ~logits.isfinite().all(dim=1)
        fooled |= now
        seen = Seen(nearest, seen_distance, surest, surest_margin, known, limit)
        seen.note(x, distance, now, -short)

        finite = grad.flatten(1).isfinite().all(dim=1)
        grad = torch.where(per_pixel(finite), per_pixel(c) * grad, 0.0)
        grad_w = (2 * (x - images) + grad) * self.half * (1 - squashed**2)
        mean.copy_(0.9 * mean + 0.1 * grad_w)
        square.copy_(0.999 * square + 0.001 * grad_w**2)
        of_mean, of_square = corrections.index_select(0, at)[0].unbind()
        deviation = (square / of_square).sqrt() + 1e-8
        w.sub_(self.learning_rate * mean / of_mean / deviation)
        at.add_(1)


@dataclass(frozen=True)
class Shortfall:
    """The paper's f, [B]: logits missing to be wrong, or to be the target; -confidence at least."""

    targeted: bool
    confidence: float

    def __call__(self, logits: Tensor, classes: Tensor) -> Tensor:
        behind = margin(logits, classes)
        return (behind if self.targeted else -behind).clamp(min=-self.confidence)
