"""FAB: follow the linearized decision boundary to a closest image that fools the model.

    x <- clip((1 - a) (x + eta d(x)) + a (x_0 + eta d(x_0)))
    d(z): shortest way from z to the nearest linearized boundary inside the box; with targets, the
          boundary between the target and the class that leads
    a:    the smaller of ||d(x)|| / (||d(x)|| + ||d(x_0)||) and alpha_max
    where x fools the model: remember it, then x <- x_0 + beta (x - x_0)

The first start is the image. The noise of a later one is stream ``restart * 2^16 + rank of the
target class``.

Source: Croce and Hein, arXiv:1907.02044; the runs toward one class each and the settings are those
of arXiv:2003.01690, without the paper's final search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwf.attacks.losses import Loss, Model, Objective, TargetLoss, margin, parted
from dwf.attacks.minimum_norm import Closest, Seen
from dwf.attacks.norms import length, per_pixel, uniform_on_ball
from dwf.attacks.setup import AttackBatch, Frame, Setup, packed
from dwf.attacks.source import GradientSource, with_company
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count, check_positive

# FAB starts again this far away, times 1/2, if there is no epsilon and nothing was found yet.
_START_RADIUS = {"linf": 0.3, "l2": 1.0}
# Steps between removals of finished images: a plan pays more for a new batch shape than for a
# few steps.
_CHECK_EVERY = 10
# A run that gives up does so after this many steps, where the boundary that it follows is this far
# away, in radii: FAB's steps are largest at first.
_PATIENCE, _FAR_OUTSIDE = 20, 1.5
_NEWTON_STEPS = 16
# Stands for infinity where infinity times zero would be NaN.
_FAR = 1e30


def fab(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor | None,
    norm: str = "linf",
    targets: Tensor | None = None,
    num_target_classes: int | None = None,
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    eot_samples: int = 1,
    gives_up: bool = False,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Follow the linearized decision boundary to a closest image that fools the model.

    A step costs K - 1 gradients and a forward pass. With one class to go to, by ``targets`` or
    ``num_target_classes``, it costs one gradient.

    Args:
        epsilon: radius in units of [0, 1], float or [B]; None for the closest image wherever it is.
        norm: "linf" or "l2", of epsilon and of the distance that is minimized.
        targets: [B], classes that the images are to be taken for; only these count as wrong.
        num_target_classes: without targets, a run toward each of this many wrong classes, the
            likeliest ones; any wrong class counts. None: toward the nearest boundary of all.
        num_restarts: runs, all but the first from a random point at half the radius. More runs
            never give a worse result.
        alpha_max: largest weight a of the step taken from the original image, in [0, 1].
        eta: overshoot over the boundary.
        beta: backward step to the image, in (0, 1].
        gives_up: an image leaves a run that after 20 steps still walks far outside of its ball.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1]: an image that fools the model in float32, within epsilon if
        there is one; where none was found or ``images`` do so already, the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    if targets is not None and num_target_classes is not None:
        raise ConfigError("num_target_classes: classes are chosen by targets already")
    if num_target_classes is not None:
        num_target_classes = check_count(num_target_classes, "num_target_classes")
    num_steps = check_count(num_steps, "num_steps")
    num_restarts = check_count(num_restarts, "num_restarts")
    alpha_max = check_positive(alpha_max, "alpha_max", zero_allowed=True)
    eta, beta = check_positive(eta, "eta"), check_positive(beta, "beta")
    if alpha_max > 1 or beta > 1:
        raise ConfigError(f"alpha_max {alpha_max}, beta {beta}: expected at most 1")
    setup = packed(Setup, {**locals(), "epsilon": 1.0 if epsilon is None else epsilon})
    with setup.opened() as (batch, source):
        closest = Closest(batch, source, norm, bounded=epsilon is not None)
        rows = torch.nonzero(closest.is_open())[:, 0]
        given_up = torch.zeros_like(batch.labels, dtype=torch.bool)
        if report is not None and gives_up:
            report.given_up = given_up
        if len(rows) == 0:
            return closest.images
        runs = _runs(batch.subset(rows), source, num_target_classes)
        for restart in range(num_restarts):
            for rank, boundaries in enumerate(runs):
                open_ = closest.is_open(rows)
                if not bool(open_.any()):
                    break
                its = rows[open_]
                aims = [boundary.subset(open_) for boundary in boundaries]
                start = _start(closest, its, seed, restart, rank)
                how = _Step(
                    boundary=parted(aims[0], batch.labels)[0],
                    norm=norm,
                    alpha_max=float(alpha_max),
                    eta=float(eta),
                    beta=float(beta),
                    frame=batch.frame,
                )
                left = _walk(closest, its, aims, start, how, num_steps, gives_up=gives_up)
                given_up[left] = True
        given_up &= closest.is_open()
        return closest.images if epsilon is None else setup.held(closest.images)


def _runs(
    batch: AttackBatch, source: GradientSource, num_target_classes: int | None
) -> list[list[TargetLoss]]:
    """The boundaries that each run looks at, as functions that are positive beyond them."""
    if batch.targets is not None:
        return [[TargetLoss(_lead, batch.targets)]]
    logits = source.logits(batch.images).scatter(1, batch.labels[:, None], -torch.inf)
    likeliest = logits.argsort(dim=1, descending=True, stable=True)[:, :-1]
    boundaries = [
        TargetLoss(_logit_difference, torch.stack([batch.labels, other], dim=1))
        for other in likeliest.unbind(dim=1)
    ]
    if num_target_classes is None:
        return [boundaries]
    return [[boundary] for boundary in boundaries[:num_target_classes]]


def _start(closest: Closest, rows: Tensor, seed: int, restart: int, rank: int) -> Tensor:
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
    closest: Closest,
    rows: Tensor,
    boundaries: list[TargetLoss],
    x: Tensor,
    how: _Step,
    num_steps: int,
    *,
    gives_up: bool,
) -> Tensor:
    """One run of FAB over rows of the batch, towards the nearest of these boundaries.

    Returns the rows that it gave up.
    """
    source, batch = closest.source, closest.batch.subset(rows)
    given_up = torch.zeros_like(closest.batch.labels, dtype=torch.bool)
    for first in range(0, num_steps, _CHECK_EVERY):
        if first > 0:
            open_ = closest.is_open(rows)
            if gives_up and closest.bounded and first >= _PATIENCE:
                far = length(x - batch.images, how.norm) > _FAR_OUTSIDE * batch.epsilon
                given_up[rows[open_ & far]] = True
                open_ &= ~given_up[rows]
            keep = with_company(open_)
            if not bool(keep.any()):
                break
            if not bool(keep.all()):
                rows, x, batch = rows[keep], x[keep], batch.subset(keep)
                boundaries = [boundary.subset(keep) for boundary in boundaries]
        seen = closest.nothing_seen(rows)
        images, labels, _, targets = batch.tensors
        given = images, labels, targets, seen.known, seen.limit
        state = x, *seen.state
        with source.loop(how, state, (*given, *(b.targets for b in boundaries))) as (take_step, _):
            for _ in range(first, min(first + _CHECK_EVERY, num_steps)):
                take_step()
        closest.ask(rows, seen)
    return given_up.nonzero().squeeze(1)


@dataclass(frozen=True)
class _Step:
    """A step of FAB; see `dwf.attacks.source.Step`.

    Tensors: x [B, C, H, W] and the state of `Seen`; then images, labels, targets, what is known and
    the limit, and the rows of each boundary.
    """

    boundary: Objective
    norm: str
    alpha_max: float
    eta: float
    beta: float
    frame: Frame

    def __call__(
        self,
        source: GradientSource,
        x: Tensor,
        nearest: Tensor,
        seen_distance: Tensor,
        surest: Tensor,
        surest_margin: Tensor,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        known: Tensor,
        limit: Tensor,
        *rows: Tensor,
    ) -> None:
        seen = Seen(nearest, seen_distance, surest, surest_margin, known, limit)
        boundaries = [self.boundary.of(its) for its in rows]
        difference, normal = _nearest_boundary(source, x, labels, boundaries, self.norm)
        at_images = difference + _row_sums(normal * (images - x))
        move, image_move = to_hyperplane(
            torch.cat([x, images]),
            torch.cat([normal, normal]),
            -torch.cat([difference, at_images]),
            self.norm,
            self.frame.low,
            self.frame.high,
        ).chunk(2)
        ways = (length(m, self.norm).clamp(min=1e-8) for m in (move, image_move))
        distance, image_distance = ways
        alpha = per_pixel((distance / (distance + image_distance)).clamp(max=self.alpha_max))
        ahead = (1 - alpha) * (x + self.eta * move) + alpha * (images + self.eta * image_move)
        x.copy_(ahead.clamp(self.frame.low, self.frame.high))
        logits = source.logits(x)
        batch = self.frame.batch(images, labels, limit, targets)
        fooled = batch.fooled(logits)
        seen.note(x, length(x - images, self.norm), fooled, batch.margin(logits))
        x.copy_(torch.where(per_pixel(fooled), images + self.beta * (x - images), x))


def _logit_difference(logits: Tensor, pairs: Tensor) -> Tensor:
    """Logit of the second class less that of the first, [B]; pairs [B, 2]."""
    own, other = logits.float().gather(1, pairs).unbind(dim=1)
    return other - own


def _lead(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the target less the largest other one, [B]."""
    return -margin(logits, targets)


def _nearest_boundary(
    source: GradientSource, x: Tensor, labels: Tensor, boundaries: Sequence[Loss], norm: str
) -> tuple[Tensor, Tensor]:
    """f [B] and gradient of f [B, C, H, W], where f is zero at the nearest boundary.

    Nearest in the linear approximation, |f| / (dual norm of the gradient). Where nothing is finite
    both are zero, which moves nothing.
    """
    best = torch.full_like(labels, torch.inf, dtype=torch.float32)
    difference, normal = torch.zeros_like(best), torch.zeros_like(x)
    for boundary in boundaries:
        grad, logits = source.gradient_and_logits(x, labels, boundary)
        f = boundary(logits, labels)
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
    Newton's iteration for the t that covers the gap climbs to it in finitely many steps, nearly
    always less than ten; it stops after 16, at most a little short. Unlike a sort and a cumulative
    sum it has the same bits in torch's deterministic mode.

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
    for _ in range(_NEWTON_STEPS):
        free = level * slope < most
        steepness = _row_sums(slope * free)[:, None]
        rest = needed - _row_sums(most * ~free)[:, None]
        climbed = torch.maximum(level, rest / steepness)
        climbed = torch.where(steepness > 0, climbed, _FAR).clamp(max=_FAR)
        if not level.is_cuda and not bool((climbed > level).any()):
            break  # a GPU would have to wait to know; more steps change nothing
        level = climbed
    move = torch.minimum(level * speed, room) * w.sign()
    return move.view_as(points)


def _row_sums(values: Tensor) -> Tensor:
    """[B] float32; summed in float64, so that the batch around a row changes no bit."""
    return values.flatten(1).sum(dim=1, dtype=torch.float64).float()
