"""Square: random search by square-shaped changes, which needs logits and no gradient.

    loss = logit of the label minus the largest other one, the lower the better;
           with targets, the largest other logit minus that of the target
    start: vertical stripes of +-epsilon (linf), a grid of bumps of norm epsilon (l2)
    query: change one square of side sqrt(p * H * W); keep the change where it lowers the loss

p starts at p_init and is halved nine times, at fixed shares of the queries. In L-inf the square
takes +-epsilon in each channel. In L2 a bump is added to it; the norm that this needs comes from a
second square, which goes back to the image, and from what the budget has left.

Each image draws its own places and signs; the published code shares places in a batch. Its streams
are, for the restart r of a run with n chunks of queries: r * (n + 1) for the start, the following n
for the chunks.

Source: Andriushchenko et al., arXiv:1912.00049, algorithms 1 to 3.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks.losses import Model
from dwf.attacks.norms import per_pixel, unit
from dwf.attacks.setup import AttackBatch, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count

# After how many of 10,000 queries the share p of changed pixels is halved.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries between two verdicts: few at first, when most images fall, then as many as there are
# random numbers worth keeping. Each verdict changes the size of the batch, which is costly.
_SHORTEST, _LONGEST = 16, 256


def square(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    num_queries: int = 5000,
    p_init: float = 0.8,
    num_restarts: int = 1,
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Search the ball around each image for one that fools the model, by queries alone.

    The margin between logits needs no gradient, so what hides gradients does not hide from this.
    Searches by the plan if ``model`` offers one; the model itself judges, at a few checkpoints and
    at the end. An image that fools it comes back, and costs nothing from then on; the others keep
    the change of lowest loss.

    Args:
        norm: of the ball, "linf" or "l2".
        num_queries: logits of each image, start included, for each restart.
        p_init: share of the pixels in the first square.
        num_restarts: runs with other random numbers, of the images that still stand.
        targets: [B], classes that the images are to be taken for; only these count as wrong.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        As :func:`dwf.attacks.pgd`; ConfigError also for a p_init outside (0, 1].
    """
    check_count(num_queries, "num_queries")
    check_count(num_restarts, "num_restarts")
    if isinstance(p_init, bool) or not isinstance(p_init, (int, float)) or not 0 < p_init <= 1:
        raise ConfigError(f"p_init: {p_init!r} is not possible, expected a share in (0, 1]")
    with packed(Setup, locals()).opened() as (batch, source):
        best = batch.images.clone()
        if len(batch) == 0:
            return best
        best_loss = torch.full_like(batch.epsilon, torch.inf)
        still = (~batch.fooled(first_verdict(batch, source))).nonzero().flatten()
        for restart in range(num_restarts):
            if len(still) == 0:
                break
            search = _Search(source, _GEOMETRIES[norm](batch.images), num_queries, p_init, seed)
            found = search.run(batch.subset(still), restart)
            better = found.fooled | (found.loss < best_loss[still])
            best[still[better]] = found.adversarial[better]
            best_loss[still[better]] = found.loss[better]
            still = still[~found.fooled]
        return best


class _Geometry(Protocol):
    """The changes of one norm, made from uniform noise in [0, 1).

    Attributes:
        start_shape: of the noise that ``start`` takes, per image.
        num_draws: numbers that ``changed`` takes, per image.
    """

    start_shape: Sequence[int]
    num_draws: int

    def start(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        """The first images [B, C, H, W], from noise [B, *start_shape]."""

    def changed(self, batch: AttackBatch, adversarial: Tensor, noise: Tensor, p: float) -> Tensor:
        """The images with a share ``p`` of their pixels changed, from noise [B, num_draws]."""


class _Found(NamedTuple):
    adversarial: Tensor
    loss: Tensor
    fooled: Tensor


class _Search(NamedTuple):
    source: GradientSource
    geometry: _Geometry
    num_queries: int
    p_init: float
    seed: int

    def run(self, batch: AttackBatch, restart: int) -> _Found:
        chunks = _chunks(self.num_queries)
        stream = restart * (len(chunks) + 1)
        noise = self._noise(batch, self.geometry.start_shape, stream)
        best = self.geometry.start(batch, noise)
        loss = self._loss(best, batch)
        found = _Found(best.clone(), loss.clone(), torch.zeros_like(loss, dtype=torch.bool))
        rows = torch.arange(len(batch), device=loss.device)
        for i, chunk in enumerate(chunks, start=1):
            fooled = self._verdict(best, loss, batch)
            if bool(fooled.any()):
                _settle(found, rows, best, loss, fooled)
                keep = ~fooled
                rows, best, loss, batch = rows[keep], best[keep], loss[keep], batch.subset(keep)
                if len(batch) == 0:
                    return found
            noise = self._noise(batch, (len(chunk), self.geometry.num_draws), stream + i)
            for k, query in enumerate(chunk):
                p = share(query, self.num_queries, self.p_init)
                tried = self.geometry.changed(batch, best, noise[:, k], p)
                tried_loss = self._loss(tried, batch)
                better = tried_loss < loss
                best = tried.where(per_pixel(better), best)
                loss = tried_loss.where(better, loss)
        # all of them: the model may be fooled where the plan is not
        _settle(found, rows, best, loss, batch.are_fooled(self.source, best))
        return found

    def _noise(self, batch: AttackBatch, shape: Sequence[int], stream: int) -> Tensor:
        return moe_kernels.uniform_noise(self.seed, batch.sample_index, shape, restart=stream)

    def _loss(self, images: Tensor, batch: AttackBatch) -> Tensor:
        """[B]; below zero the search takes the model for fooled, also by logits not finite."""
        logits = self.source.logits(images)
        loss = -batch.margin(logits)
        return loss.where(logits.isfinite().all(dim=1), -torch.inf)

    def _verdict(self, images: Tensor, loss: Tensor, batch: AttackBatch) -> Tensor:
        """Who of those that fool the search fools the model, [B] bool."""
        claimed = loss < 0
        fooled = torch.zeros_like(claimed)
        rows = claimed.nonzero().flatten()
        if len(rows):
            fooled[rows] = batch.subset(rows).are_fooled(self.source, images[rows])
        # a plan that overflows where the model does not: nothing could ever improve on that
        loss[~fooled & (loss == -torch.inf)] = torch.inf
        return fooled


def _settle(found: _Found, rows: Tensor, best: Tensor, loss: Tensor, fooled: Tensor) -> None:
    found.adversarial[rows] = best
    found.loss[rows] = loss
    found.fooled[rows] = fooled


def _chunks(num_queries: int) -> list[range]:
    """The queries after the start, 1 to num_queries - 1, cut where verdicts are due."""
    chunks, first, length = [], 1, _SHORTEST
    while first < num_queries:
        chunks.append(range(first, min(first + length, num_queries)))
        first, length = first + length, min(2 * length, _LONGEST)
    return chunks


def share(query: int, num_queries: int, p_init: float) -> float:
    """The share p of an image's pixels that a query changes; the first query after the start is 1.

    The published schedule for 10,000 queries, stretched to as many as there are.
    """
    halvings = bisect_left(HALVED_AFTER, (query - 1) * 10_000 // num_queries)
    return math.ldexp(p_init, -halvings)


class _Linf:
    """Stripes at the start, then squares, in each channel at one end of the interval."""

    def __init__(self, images: Tensor) -> None:
        _, C, _, W = images.shape
        self.start_shape: Sequence[int] = (C, 1, W)
        self.num_draws = 2 + C

    def start(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        return self._at_the_ends(batch, noise)

    def changed(self, batch: AttackBatch, adversarial: Tensor, noise: Tensor, p: float) -> Tensor:
        H, W = adversarial.shape[2:]
        side = min(max(round(math.sqrt(p * H * W)), 1), H, W)
        inside = _window(*_corner(noise[:, :2], side, H, W), side, H, W)
        ends = self._at_the_ends(batch, noise[:, 2:, None, None])
        return ends.where(inside, adversarial)

    def _at_the_ends(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        moved = batch.images + _sign(noise) * per_pixel(batch.epsilon)
        return moved.clamp_(batch.low, batch.high)


class _L2:
    """Bumps: at the start a grid of them, then one at a time."""

    def __init__(self, images: Tensor) -> None:
        _, C, H, W = images.shape
        self.tile = max(min(H, W) // 5, 1)
        self.start_shape: Sequence[int] = (1 + C, H // self.tile, W // self.tile)
        self.num_draws = 5 + C
        self._bumps: dict[int, Tensor] = {}

    def start(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        B, C, H, W = batch.images.shape
        tile, rows, columns = self.tile, *self.start_shape[1:]
        # [B, 1 + C, rows, columns, 1, 1] against [tile, tile]
        noise = noise[..., None, None]
        lying = noise[:, :1] < 0.5
        bump = self._bump(tile, noise.device)
        grid = bump.t().where(lying, bump) * _sign(noise[:, 1:])
        grid = grid.transpose(3, 4).reshape(B, C, rows * tile, columns * tile)
        delta = torch.zeros_like(batch.images)
        top, left = (H - rows * tile) // 2, (W - columns * tile) // 2
        delta[:, :, top : top + rows * tile, left : left + columns * tile] = grid
        return _at_distance(batch, delta)

    def changed(self, batch: AttackBatch, adversarial: Tensor, noise: Tensor, p: float) -> Tensor:
        C, H, W = adversarial.shape[1:]
        side = max(round(math.sqrt(p * H * W)), 3)
        side = min(side + (side + 1) % 2, H, W)  # odd
        delta = adversarial - batch.images
        row, column = _corner(noise[:, :2], side, H, W)
        here = _window(row, column, side, H, W)
        both = here | _window(*_corner(noise[:, 2:4], side, H, W), side, H, W)
        squares = delta.square()
        norm_here = _sum(squares * here).sqrt()
        norm_left = per_pixel(batch.epsilon).square() - _sum(squares).sum(1, keepdim=True)
        norm_to_give = (norm_left.clamp(min=0) / C + _sum(squares * both)).sqrt()
        bump = self._placed(row, column, noise[:, 4] < 0.5, side, H, W)
        fresh = _sign(noise[:, 5:, None, None]) * bump + delta * here / (norm_here + 1e-12)
        fresh = fresh * (norm_to_give / (_sum(fresh.square()).sqrt() + 1e-12))
        # zero outside of the first square, so the second goes back to the image
        return _at_distance(batch, fresh.where(both, delta))

    def _placed(
        self, row: Tensor, column: Tensor, lying: Tensor, side: int, H: int, W: int
    ) -> Tensor:
        """The bump with its corner at (row, column), transposed where it lies, [B, 1, H, W]."""
        i = torch.arange(H, device=row.device).view(1, 1, H, 1) - row
        j = torch.arange(W, device=row.device).view(1, 1, 1, W) - column
        inside = (i >= 0) & (i < side) & (j >= 0) & (j < side)
        i, j = i.clamp(0, side - 1), j.clamp(0, side - 1)
        bump, lying = self._bump(side, row.device), per_pixel(lying)
        return bump[j.where(lying, i), i.where(lying, j)] * inside

    def _bump(self, side: int, device: torch.device) -> Tensor:
        if side not in self._bumps:
            self._bumps[side] = bump(side).to(device)
        return self._bumps[side]


_GEOMETRIES: dict[str, Callable[[Tensor], _Geometry]] = {"linf": _Linf, "l2": _L2}


def bump(side: int) -> Tensor:
    """[side, side] of norm 1: a positive upper and a negative lower half, each highest inside."""
    upper = side // 2
    halves = [_pyramid(upper, side), -_pyramid(side - upper, side)]
    lengths = [torch.linalg.vector_norm(half) for half in halves]
    whole = torch.cat([half / size for half, size in zip(halves, lengths, strict=True)])
    scaled: Tensor = whole / torch.linalg.vector_norm(whole)
    return scaled.float()


def _pyramid(height: int, width: int) -> Tensor:
    """A sum of nested rectangles: at distance d of the middle, sum of 1 / k^2 for k from d + 1."""
    rows = (torch.arange(height) - height // 2).abs().unsqueeze(1)
    columns = (torch.arange(width) - width // 2).abs().unsqueeze(0)
    distance = torch.maximum(rows, columns)
    levels = 1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64).square()
    sums = torch.cat([levels.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return sums[distance]


def _corner(noise: Tensor, side: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Row and column [B, 1, 1, 1] of a square's upper left corner, from uniform noise [B, 2]."""
    # by Python numbers: a tensor of them would make the host wait for the device at each query
    row, column = noise[:, 0] * (H - side + 1), noise[:, 1] * (W - side + 1)
    return per_pixel(row.long()), per_pixel(column.long())


def _window(row: Tensor, column: Tensor, side: int, H: int, W: int) -> Tensor:
    """Mask [B, 1, H, W] of the square with this corner."""
    i = torch.arange(H, device=row.device).view(1, 1, H, 1) - row
    j = torch.arange(W, device=row.device).view(1, 1, 1, W) - column
    return ((i >= 0) & (i < side)) & ((j >= 0) & (j < side))


def _sign(noise: Tensor) -> Tensor:
    return torch.where(noise < 0.5, -1.0, 1.0)


def _sum(values: Tensor) -> Tensor:
    """Over the pixels of each channel, [B, C, 1, 1]; in float64, so no batch changes a bit."""
    return values.sum(dim=(2, 3), keepdim=True, dtype=torch.float64).float()


def _at_distance(batch: AttackBatch, delta: Tensor) -> Tensor:
    """The image moved by epsilon in the direction delta, then clamped."""
    moved = batch.images + unit(delta, "l2") * per_pixel(batch.epsilon)
    return moved.clamp_(batch.low, batch.high)
