"""Attacks that look for the smallest perturbation: FAB and Carlini-Wagner.

Both walk near the decision boundary and keep the closest image that fools the model. With an
epsilon, an image is done at the first one inside its ball; without, they tell how far the boundary
is, see :func:`minimum_norm`.

    fab              x <- clip((1 - a) (x + eta d(x)) + a (x_0 + eta d(x_0)));  d(z): shortest way
                     from z to the nearest linearized boundary inside the box;  a: the smaller of
                     ||d(x)|| / (||d(x)|| + ||d(x_0)||) and alpha_max;  x fools: remember it, then
                     x <- x_0 + beta (x - x_0)
    carlini_wagner   minimize ||x(w) - x_0||_2^2 + c f(x(w)), x(w) = (tanh(w) + 1) / 2, by Adam,
                     with a binary search for c; f is the margin, no smaller than -confidence

FAB's start noise is stream ``restart * 2^16 + rank of the target`` of the noise; the first start is
the image itself. Carlini-Wagner draws nothing.

Sources: Croce and Hein, arXiv:1907.02044 (targeted version and settings as in arXiv:2003.01690,
without the paper's final search); Carlini and Wagner, arXiv:1608.04644.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwf.attacks.losses import Model, TargetLoss, margin
from dwf.attacks.norms import NORMS, length, per_pixel, uniform_on_ball
from dwf.attacks.setup import Batch, searching
from dwf.attacks.source import GradientSource, judge
from dwf.attacks.target import AttackReport, AttackTarget, inner_model
from dwf.checks import (
    ConfigError,
    LabelError,
    check_choice,
    check_count,
    check_labels,
    check_positive,
)

# FAB starts again this far away, times 1/2, if there is no epsilon and nothing was found yet.
_START_RADIUS = {"linf": 0.3, "l2": 1.0}
# How often images that are done leave the batch: a new shape costs a plan more than a few steps.
_CHECK_EVERY = 10
# Stands for infinity where infinity times zero would be NaN.
_FAR = 1e30


def fab(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor | None,
    norm: str = "linf",
    targeted: bool = False,
    num_target_classes: int = 9,
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Follow the linearized decision boundary to a closest image that fools the model.

    A step costs K - 1 gradients and a forward pass; ``targeted=True`` costs one gradient, since it
    looks at one wrong class in a run, and has a run for each of the ``num_target_classes`` (or
    K - 1) likeliest ones.

    Args:
        epsilon: radius in units of [0, 1], float or [B]; None for the closest image wherever it is.
        norm: "linf" or "l2", of epsilon and of what is made small.
        num_restarts: runs, all but the first from a random point at half the radius. More of them
            never find less.
        alpha_max, eta, beta: greatest pull to the image, overshoot, backward step; as published.
    Returns:
        [B, C, H, W] float32 in [0, 1]: an image that fools the model in float32, within epsilon if
        there is one; where none was found or ``images`` do so already, the image itself.
    Raises:
        As :func:`pgd`. Other arguments are also those of :func:`pgd`.
    """
    check_choice(norm, NORMS, "norm")
    check_count(num_target_classes, "num_target_classes")
    check_count(num_steps, "num_steps")
    check_count(num_restarts, "num_restarts")
    for value, name in ((alpha_max, "alpha_max"), (eta, "eta"), (beta, "beta")):
        check_positive(value, name, zero_allowed=name == "alpha_max")
    if alpha_max > 1 or beta > 1:
        raise ConfigError(f"alpha_max {alpha_max}, beta {beta}: expected at most 1")
    with searching(
        model,
        images,
        labels,
        epsilon=1.0 if epsilon is None else epsilon,
        norm=norm,
        bn_mode=bn_mode,
        eot_samples=eot_samples,
        seed=seed,
        sample_index=sample_index,
        clamp=clamp,
        allow_probabilities=allow_probabilities,
        report=report,
    ) as (batch, source):
        closest = _Closest(batch, source, norm, bounded=epsilon is not None)
        rows = torch.nonzero(closest.is_open())[:, 0]
        if len(rows) == 0:
            return closest.images
        classes = _wrong_classes(source, batch.images[rows], batch.labels[rows])
        # a run of the targeted version sees one class of each image, [R, 1]
        runs = [classes[:, k, None] for k in range(classes.shape[1])] if targeted else [classes]
        for restart in range(num_restarts):
            for rank, its_classes in enumerate(runs[:num_target_classes]):
                open_ = closest.is_open(rows)
                if not bool(open_.any()):
                    return closest.images
                _walk(
                    closest,
                    rows[open_],
                    its_classes[open_],
                    _start(closest, rows[open_], seed, restart, rank),
                    num_steps=num_steps,
                    alpha_max=alpha_max,
                    eta=eta,
                    beta=beta,
                )
        return closest.images


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
    clamp: str = "pixels",
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
    Returns:
        [B, C, H, W] float32 in [0, 1]: the closest image found that fools the model in float32;
        where there is none or ``images`` do so already, the image itself.
    Raises:
        As :func:`pgd`. Other arguments are also those of :func:`pgd`.
    """
    if norm != "l2":
        raise ConfigError(f"norm: {norm!r}, Carlini-Wagner is for 'l2'; in L-inf use PGD on margin")
    if clamp == "none":
        raise ConfigError("clamp: 'none', but Carlini-Wagner needs a range to squash images into")
    check_count(num_searches, "num_searches")
    check_count(num_steps, "num_steps")
    check_positive(confidence, "confidence", zero_allowed=True)
    check_positive(learning_rate, "learning_rate")
    check_positive(initial_c, "initial_c")
    with searching(
        model,
        images,
        labels,
        epsilon=1.0 if epsilon is None else epsilon,
        norm=norm,
        bn_mode=bn_mode,
        eot_samples=eot_samples,
        seed=seed,
        sample_index=sample_index,
        clamp=clamp,
        allow_probabilities=allow_probabilities,
        report=report,
    ) as (batch, source):
        closest = _Closest(batch, source, norm, bounded=epsilon is not None, targets=targets)
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


class NearestAdversarial(NamedTuple):
    """Images [B, C, H, W] that fool a model and their distances [B], inf where none was found."""

    images: Tensor
    distance: Tensor


def minimum_norm(
    attack: Callable[..., Tensor],
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    **settings: Any,
) -> NearestAdversarial:
    """The smallest perturbation that an attack finds, whatever its size.

    ``attack`` is :func:`fab`, :func:`carlini_wagner`, or another that takes ``epsilon=None``;
    ``norm`` and ``settings`` go to it. The distance is 0 where the model is wrong already. It is an
    upper bound: a better attack may find less. With ``targets`` only these count as wrong.
    """
    found = attack(model, images, labels, epsilon=None, norm=norm, **settings)
    inner = model.model if isinstance(model, AttackTarget) else inner_model(model)
    target = AttackTarget(inner, reason="the model itself is the judge")
    shared = ("bn_mode", "eot_samples", "seed", "sample_index", "clamp", "allow_probabilities")
    options = {name: settings[name] for name in shared if name in settings}
    with searching(target, images, labels, epsilon=1.0, norm=norm, **options) as (batch, source):
        if len(batch) == 0:
            return NearestAdversarial(found, batch.epsilon)
        distance = length(found - batch.images, norm)
        # an image comes back as it is if nothing was found, and if there was nothing to look for
        logits = source.verdict_logits(batch.images, batch.labels)
        targets = settings.get("targets")
        targets = None if targets is None else targets.to(logits.device)
        nothing = (distance == 0) & ~_wrong(logits, batch.labels, targets)
        return NearestAdversarial(found, distance.masked_fill(nothing, torch.inf))


class _Closest:
    """For each image of a batch the closest one known to fool the model, and its distance."""

    def __init__(
        self,
        batch: Batch,
        source: GradientSource,
        norm: str,
        *,
        bounded: bool,
        targets: Tensor | None = None,
    ) -> None:
        self.batch = batch
        self.source = source
        self.norm = norm
        self.bounded = bounded
        if targets is not None:
            targets = check_labels(targets, len(batch), name="targets").to(batch.images.device)
        self.targets = targets
        self.images = batch.images.clone()
        self.distance = torch.full_like(batch.epsilon, torch.inf)
        if len(batch) == 0:
            return
        labels = batch.labels
        # also the first pass, which checks what comes out of the model
        logits = source.verdict_logits(batch.images, labels)
        if targets is not None:
            check_labels(targets, len(batch), logits.shape[1], "targets")
            if bool((targets == labels).any()):
                raise LabelError("targets: expected classes other than the labels")
        self.distance[_wrong(logits, labels, targets)] = 0.0

    def is_open(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Whether there is something left to find, [R] for these rows."""
        if self.bounded:
            return self.distance[rows] > self.batch.epsilon[rows]
        return self.distance[rows] > 0

    def offer(self, rows: Tensor, found: Tensor, fooled: Tensor) -> Tensor:
        """Keep what is closer and fools the model; true where nothing speaks against ``fooled``.

        The search says who is fooled, [R] for the rows; only what would be kept is worth asking the
        model itself.
        """
        distance = length(found - self.batch.images[rows], self.norm)
        closer = fooled & (distance < self.distance[rows])
        if self.bounded:
            closer &= distance <= self.batch.epsilon[rows]
        asked = torch.nonzero(closer)[:, 0]
        if len(asked) == 0:
            return fooled
        at = rows[asked]
        labels = self.batch.labels[at]
        targets = None if self.targets is None else self.targets[at]
        wrong = _wrong(self.source.verdict_logits(found[asked], labels), labels, targets)
        self.images[at[wrong]] = found[asked[wrong]]
        self.distance[at[wrong]] = distance[asked[wrong]]
        return fooled.index_fill(0, asked[~wrong], False)


def _wrong(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """[B] bool: not the label, or where there are targets that; or not finite."""
    correct, finite = judge(logits, labels)
    return ~correct if targets is None else (logits.argmax(dim=1) == targets) | ~finite


# FAB ------------------------------------------------------------------------------------------


def _wrong_classes(source: GradientSource, images: Tensor, labels: Tensor) -> Tensor:
    """All classes but the label, the likeliest first, [B, K - 1]."""
    logits = source.logits(images).scatter(1, labels[:, None], -torch.inf)
    return logits.argsort(dim=1, descending=True, stable=True)[:, :-1]


def _start(closest: _Closest, rows: Tensor, seed: int, restart: int, rank: int) -> Tensor:
    """The images, or points of the sphere of half the radius around them."""
    batch, norm = closest.batch, closest.norm
    images = batch.images[rows].clamp(batch.low, batch.high)
    if restart == 0:
        return images
    radius = batch.epsilon[rows]
    if not closest.bounded:
        radius = closest.distance[rows].clamp(max=_START_RADIUS[norm])
    index, stream = batch.sample_index[rows], restart * 2**16 + rank
    direction = uniform_on_ball(seed, index, images.shape[1:], norm, stream=stream)
    return (images + per_pixel(radius / 2) * direction).clamp(batch.low, batch.high)


def _walk(
    closest: _Closest,
    rows: Tensor,
    classes: Tensor,
    start: Tensor,
    *,
    num_steps: int,
    alpha_max: float,
    eta: float,
    beta: float,
) -> None:
    """One run of FAB over rows of the batch, towards the nearest boundary with ``classes``."""
    batch, source, norm = closest.batch, closest.source, closest.norm
    box = (norm, batch.low, batch.high)
    images, x, labels = batch.images[rows], start, batch.labels[rows]
    for step in range(num_steps):
        if step > 0 and step % _CHECK_EVERY == 0:
            keep = closest.is_open(rows)
            if not bool(keep.all()):
                rows, classes, x = rows[keep], classes[keep], x[keep]
                images, labels = images[keep], labels[keep]
            if len(rows) == 0:
                return
        difference, normal = _nearest_boundary(source, x, labels, classes, norm)
        move = to_hyperplane(x, normal, -difference, *box)
        at_images = difference + _row_sums(normal * (images - x))
        image_move = to_hyperplane(images, normal, -at_images, *box)
        distance, image_distance = (length(m, norm).clamp(min=1e-8) for m in (move, image_move))
        alpha = per_pixel((distance / (distance + image_distance)).clamp(max=alpha_max))
        x = (1 - alpha) * (x + eta * move) + alpha * (images + eta * image_move)
        x = x.clamp(batch.low, batch.high)
        fooled = closest.offer(rows, x, ~judge(source.logits(x), labels)[0])
        x = torch.where(per_pixel(fooled), images + beta * (x - images), x)


def _logit_difference(logits: Tensor, pairs: Tensor) -> Tensor:
    """Logit of the second class less that of the first, [B]; pairs [B, 2]."""
    own, other = logits.float().gather(1, pairs).unbind(dim=1)
    return other - own


def _nearest_boundary(
    source: GradientSource, x: Tensor, labels: Tensor, classes: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    """f [B] and gradient of f [B, C, H, W]: the logit difference to the class that is nearest.

    Nearest in the linear approximation, |f| / (dual norm of the gradient), among ``classes``
    [B, T]. Where nothing is finite both are zero, which moves nothing.
    """
    best = torch.full_like(labels, torch.inf, dtype=torch.float32)
    difference, normal = torch.zeros_like(best), torch.zeros_like(x)
    for column in classes.unbind(dim=1):
        pairs = torch.stack([labels, column], dim=1)
        loss = TargetLoss(_logit_difference, pairs)
        grad, logits = source.gradient_and_logits(x, labels, loss)
        f = _logit_difference(logits, pairs)
        steepness = _row_sums(grad.abs()) if norm == "linf" else length(grad, "l2")
        distance = f.abs() / (steepness + 1e-12)
        nearer = (distance < best) & steepness.isfinite()
        best = torch.where(nearer, distance, best)
        difference = torch.where(nearer, f, difference)
        normal = torch.where(per_pixel(nearer), grad, normal)
    return difference, normal


def to_hyperplane(
    points: Tensor, normal: Tensor, gap: Tensor, norm: str, low: float, high: float
) -> Tensor:
    """The shortest moves after which <normal, move> = gap, without leaving the box [low, high].

    Where the box does not reach the hyperplane, the move to the point of it that is nearest to the
    plane. Nothing moves where the normal is zero; points outside the box do not move out further.

    A move of level t is min(t |w|^p, room) in the direction of w, p = 0 for L-inf and 1 for L2; it
    covers sum_i min(t |w_i|^(p + 1), |w_i| room_i), which is concave and piecewise linear in t.
    Newton's iteration for the t that covers the gap is exact after finitely many steps: it climbs,
    and each step that is not the last takes pixels to the edge of the box for good. Unlike a sort
    and a cumulative sum it has the same bits in torch's deterministic mode.

    Args:
        points, normal: [B, ...] float32.
        gap: [B].
    """
    w = normal.flatten(1) * gap.sign()[:, None]
    scale = w.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    w = w / scale  # so that squares neither vanish nor overflow
    x = points.flatten(1)
    room = torch.where(w > 0, high - x, x - low).clamp(0.0, _FAR)
    weight = w.abs()
    speed = torch.ones_like(weight) if norm == "linf" else weight
    slope, most = speed * weight, weight * room
    needed = (gap.abs()[:, None] / scale).clamp(max=_FAR)
    level = torch.zeros_like(needed)
    while True:
        free = level * slope < most
        steepness = _row_sums(slope * free)[:, None]
        rest = needed - _row_sums(most * ~free)[:, None]
        climbed = torch.maximum(level, rest / steepness)
        climbed = torch.where(steepness > 0, climbed, _FAR).clamp(max=_FAR)
        if not bool((climbed > level).any()):
            break
        level = climbed
    move = torch.minimum(level * speed, room) * w.sign()
    return move.view_as(points)


def _row_sums(values: Tensor) -> Tensor:
    """[B] float32; summed in float64, so that the batch around a row changes no bit."""
    return values.flatten(1).sum(dim=1, dtype=torch.float64).float()


# Carlini-Wagner -------------------------------------------------------------------------------


def _descend(
    closest: _Closest,
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
    targeted = closest.targets is not None
    wanted = batch.labels if closest.targets is None else closest.targets
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
    """How far the logits are from what is wanted, [B], -confidence at least: f of the paper."""
    behind = margin(logits, classes)
    return (behind if targeted else -behind).clamp(min=-confidence)
