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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

import moe_kernels
from dwf.attacks.losses import Model
from dwf.attacks.norms import per_pixel, unit
from dwf.attacks.prospect import is_hopeless
from dwf.attacks.setup import AttackBatch, Frame, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource, with_company
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count, plain

# After how many of 10,000 queries the share p of changed pixels is halved.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries between two verdicts: few at first, when most images fall, then as many as there are
# random numbers worth keeping. Each verdict changes the size of the batch, which is costly.
_SHORTEST, _LONGEST = 16, 256
# Nobody gives up before so many queries, nor before this share of them.
PATIENCE, MIN_SHARE = 400, 0.08


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
    gives_up: bool = False,
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
        gives_up: an image leaves a run whose progress says that it would not fool the model; see
            :mod:`dwf.attacks.prospect`.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        As :func:`dwf.attacks.pgd`; ConfigError also for a p_init outside (0, 1].
    """
    num_queries = check_count(num_queries, "num_queries")
    num_restarts = check_count(num_restarts, "num_restarts")
    p_init = plain(p_init)
    if isinstance(p_init, bool) or not isinstance(p_init, (int, float)) or not 0 < p_init <= 1:
        raise ConfigError(f"p_init: {p_init!r} is not possible, expected a share in (0, 1]")
    setup = packed(Setup, locals())
    with setup.opened() as (batch, source):
        best = batch.images.clone()
        if len(batch) == 0:
            return best
        best_loss = torch.full_like(batch.epsilon, torch.inf)
        still = (~batch.fooled(first_verdict(batch, source))).nonzero().flatten()
        given_up = torch.zeros_like(batch.labels, dtype=torch.bool)
        for restart in range(num_restarts):
            if len(still) == 0:
                break
            search = _Search(source, _GEOMETRIES[norm], num_queries, p_init, seed, gives_up)
            found = search.run(batch.subset(still), restart)
            better = found.fooled | (found.loss < best_loss[still])
            best[still[better]] = found.adversarial[better]
            best_loss[still[better]] = found.loss[better]
            given_up[still] |= found.given_up
            given_up[still[found.fooled]] = False
            still = still[~found.fooled]
        if report is not None and gives_up:
            report.given_up = given_up
        return setup.held(best)


class _Geometry(Protocol):
    """The changes of one norm, made from uniform noise in [0, 1)."""

    def start_shape(self, image_shape: Sequence[int]) -> Sequence[int]:
        """Shape of the noise that ``start`` takes, per image [C, H, W]."""

    def num_draws(self, image_shape: Sequence[int]) -> int:
        """How many numbers ``changed`` takes, per image."""

    def side(self, p: float, H: int, W: int) -> int:
        """Side of the square that has a share ``p`` of the pixels."""

    def bumps(self, sides: Sequence[int]) -> Tensor:
        """What ``changed`` reads for squares of these sides, [len(sides), ...]."""

    def start(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        """The first images [B, C, H, W], from noise [B, *start_shape]."""

    def changed(
        self, batch: AttackBatch, adversarial: Tensor, noise: Tensor, side: Tensor, bump: Tensor
    ) -> Tensor:
        """The images with one square changed, from noise [B, num_draws].

        ``side`` is [1] int64, and ``bump`` the row of ``bumps`` that belongs to it.
        """


class _Found(NamedTuple):
    adversarial: Tensor
    loss: Tensor
    fooled: Tensor
    given_up: Tensor


class _Search(NamedTuple):
    source: GradientSource
    geometry: _Geometry
    num_queries: int
    p_init: float
    seed: int
    gives_up: bool

    def run(self, batch: AttackBatch, restart: int) -> _Found:
        chunks, geometry, shape = _chunks(self.num_queries), self.geometry, batch.images.shape[1:]
        stream = restart * (len(chunks) + 1)
        best = geometry.start(batch, self._noise(batch, geometry.start_shape(shape), stream))
        loss = -batch.searched_margin(self.source, best)
        nobody = torch.zeros_like(loss, dtype=torch.bool)
        found = _Found(best.clone(), loss.clone(), nobody, nobody.clone())
        first_loss, done = loss.clone(), found.fooled.clone()
        rows = torch.arange(len(batch), device=loss.device)
        sides, places, bumps = self._schedule(shape, loss.device)
        step = _Query(geometry, batch.frame)
        for i, chunk in enumerate(chunks, start=1):
            fooled = self._verdict(best, loss, batch, ~done[rows])
            leaves = fooled.clone()
            if self.gives_up and chunk.start >= max(PATIENCE, MIN_SHARE * self.num_queries):
                hopeless = is_hopeless(first_loss[rows], loss) & ~done[rows] & ~fooled
                found.given_up[rows[hopeless]] = True
                leaves |= hopeless
            if bool(leaves.any()):
                _settle(found, rows[leaves], best[leaves], loss[leaves], fooled[leaves])
                done[rows[leaves]] = True
                keep = with_company(~done[rows])
                if not bool(keep.any()):
                    return found
                rows, best, loss, batch = rows[keep], best[keep], loss[keep], batch.subset(keep)
            noise = self._noise(batch, (len(chunk), geometry.num_draws(shape)), stream + i)
            queries = slice(chunk.start, chunk.stop)
            given = (
                *batch.tensors,
                _sized(noise, dim=1),
                _sized(sides[queries]),
                _sized(places[queries]),
                bumps,
            )
            count = torch.zeros(1, dtype=torch.int64, device=loss.device)
            with self.source.loop(step, (best, loss, count), given) as (take_step, _):
                for _ in chunk:
                    take_step()
        # all of them: the model may be fooled where the plan is not
        left = ~done[rows]
        rows, best, loss, batch = rows[left], best[left], loss[left], batch.subset(left)
        _settle(found, rows, best, loss, batch.are_fooled(self.source, best))
        return found

    def _schedule(
        self, image_shape: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each query the side of its square, and where its bump is; and all bumps."""
        _, H, W = image_shape
        shares = [share(query, self.num_queries, self.p_init) for query in range(self.num_queries)]
        sides = [self.geometry.side(p, H, W) for p in shares]
        kinds = sorted(set(sides))
        places = [kinds.index(side) for side in sides]
        return (
            torch.tensor(sides, device=device),
            torch.tensor(places, device=device),
            self.geometry.bumps(kinds).to(device),
        )

    def _noise(self, batch: AttackBatch, shape: Sequence[int], stream: int) -> Tensor:
        return moe_kernels.uniform_noise(self.seed, batch.sample_index, shape, restart=stream)

    def _verdict(self, images: Tensor, loss: Tensor, batch: AttackBatch, is_open: Tensor) -> Tensor:
        """Who of the open ones that fool the search fools the model, [B] bool."""
        claimed = (loss < 0) & is_open
        fooled = torch.zeros_like(claimed)
        rows = claimed.nonzero().flatten()
        if len(rows):
            fooled[rows] = batch.subset(rows).are_fooled(self.source, images[rows])
        # a plan that overflows where the model does not: nothing could ever improve on that
        loss[~fooled & (loss == -torch.inf)] = torch.inf
        return fooled


@dataclass(frozen=True)
class _Query:
    """One query, and the change it keeps; see `dwf.attacks.source.Step`."""

    geometry: _Geometry
    frame: Frame

    def __call__(
        self,
        source: GradientSource,
        best: Tensor,
        loss: Tensor,
        count: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        targets: Tensor,
        noise: Tensor,
        sides: Tensor,
        places: Tensor,
        bumps: Tensor,
    ) -> None:
        batch = self.frame.batch(images, labels, epsilon, targets)
        draws = noise.index_select(1, count)[:, 0]
        side, place = sides.index_select(0, count), places.index_select(0, count)
        tried = self.geometry.changed(batch, best, draws, side, bumps.index_select(0, place)[0])
        tried_loss = -batch.searched_margin(source, tried)
        better = tried_loss < loss
        best.copy_(tried.where(per_pixel(better), best))
        loss.copy_(tried_loss.where(better, loss))
        count.add_(1)


def _sized(chunk: Tensor, dim: int = 0) -> Tensor:
    """On a GPU as long as the longest chunk, so that all of them share a graph."""
    if not chunk.is_cuda:
        return chunk
    shape, count = list(chunk.shape), chunk.shape[dim]
    shape[dim] = _LONGEST
    long = chunk.new_zeros(shape)
    long.narrow(dim, 0, count).copy_(chunk)
    return long


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


@dataclass(frozen=True)
class _Linf:
    """Stripes at the start, then squares, in each channel at one end of the interval."""

    def start_shape(self, image_shape: Sequence[int]) -> Sequence[int]:
        C, _, W = image_shape
        return C, 1, W

    def num_draws(self, image_shape: Sequence[int]) -> int:
        return 2 + image_shape[0]

    def side(self, p: float, H: int, W: int) -> int:
        return min(max(round(math.sqrt(p * H * W)), 1), H, W)

    def bumps(self, sides: Sequence[int]) -> Tensor:
        return torch.zeros(len(sides), 0, dtype=torch.float32)

    def start(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        return self._at_the_ends(batch, noise)

    def changed(
        self, batch: AttackBatch, adversarial: Tensor, noise: Tensor, side: Tensor, bump: Tensor
    ) -> Tensor:
        H, W = adversarial.shape[2:]
        inside = _window(*_corner(noise[:, :2], side, H, W), side, H, W)
        ends = self._at_the_ends(batch, noise[:, 2:, None, None])
        return ends.where(inside, adversarial)

    def _at_the_ends(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        moved = batch.images + _sign(noise) * per_pixel(batch.epsilon)
        return moved.clamp_(batch.low, batch.high)


@dataclass(frozen=True)
class _L2:
    """Bumps: at the start a grid of them, then one at a time."""

    def start_shape(self, image_shape: Sequence[int]) -> Sequence[int]:
        C, H, W = image_shape
        tile = self._tile(H, W)
        return 1 + C, H // tile, W // tile

    def num_draws(self, image_shape: Sequence[int]) -> int:
        return 5 + image_shape[0]

    def side(self, p: float, H: int, W: int) -> int:
        side = max(round(math.sqrt(p * H * W)), 3)
        return min(side + (side + 1) % 2, H, W)  # odd

    def bumps(self, sides: Sequence[int]) -> Tensor:
        largest = max(sides)
        return torch.stack([pad(bump(side), (0, largest - side) * 2) for side in sides])

    def start(self, batch: AttackBatch, noise: Tensor) -> Tensor:
        B, C, H, W = batch.images.shape
        tile, (rows, columns) = self._tile(H, W), noise.shape[2:]
        # [B, 1 + C, rows, columns, 1, 1] against [tile, tile]
        noise = noise[..., None, None]
        lying = noise[:, :1] < 0.5
        one = bump(tile).to(noise.device)
        grid = one.t().where(lying, one) * _sign(noise[:, 1:])
        grid = grid.transpose(3, 4).reshape(B, C, rows * tile, columns * tile)
        delta = torch.zeros_like(batch.images)
        top, left = (H - rows * tile) // 2, (W - columns * tile) // 2
        delta[:, :, top : top + rows * tile, left : left + columns * tile] = grid
        return _at_distance(batch, delta)

    def changed(
        self, batch: AttackBatch, adversarial: Tensor, noise: Tensor, side: Tensor, bump: Tensor
    ) -> Tensor:
        C, H, W = adversarial.shape[1:]
        delta = adversarial - batch.images
        row, column = _corner(noise[:, :2], side, H, W)
        here = _window(row, column, side, H, W)
        both = here | _window(*_corner(noise[:, 2:4], side, H, W), side, H, W)
        squares = delta.square()
        norm_here = _sum(squares * here).sqrt()
        norm_left = per_pixel(batch.epsilon).square() - _sum(squares).sum(1, keepdim=True)
        norm_to_give = (norm_left.clamp(min=0) / C + _sum(squares * both)).sqrt()
        placed = self._placed(bump, row, column, noise[:, 4] < 0.5, side, H, W)
        fresh = _sign(noise[:, 5:, None, None]) * placed + delta * here / (norm_here + 1e-12)
        fresh = fresh * (norm_to_give / (_sum(fresh.square()).sqrt() + 1e-12))
        # zero outside of the first square, so the second goes back to the image
        return _at_distance(batch, fresh.where(both, delta))

    def _placed(
        self, bump: Tensor, row: Tensor, column: Tensor, lying: Tensor, side: Tensor, H: int, W: int
    ) -> Tensor:
        """The bump with its corner at (row, column), transposed where it lies, [B, 1, H, W]."""
        i = torch.arange(H, device=row.device).view(1, 1, H, 1) - row
        j = torch.arange(W, device=row.device).view(1, 1, 1, W) - column
        inside = (i >= 0) & (i < side) & (j >= 0) & (j < side)
        i, j = (torch.minimum(x.clamp(min=0), side - 1) for x in (i, j))
        lying = per_pixel(lying)
        return bump[j.where(lying, i), i.where(lying, j)] * inside

    def _tile(self, H: int, W: int) -> int:
        return max(min(H, W) // 5, 1)


_GEOMETRIES: dict[str, _Geometry] = {"linf": _Linf(), "l2": _L2()}


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


def _corner(noise: Tensor, side: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Row and column [B, 1, 1, 1] of a square's upper left corner, from uniform noise [B, 2]."""
    row, column = noise[:, 0] * (H - side + 1), noise[:, 1] * (W - side + 1)
    return per_pixel(row.long()), per_pixel(column.long())


def _window(row: Tensor, column: Tensor, side: Tensor, H: int, W: int) -> Tensor:
    """Mask [B, 1, H, W] of the square with this corner."""
    i = torch.arange(H, device=row.device).view(1, 1, H, 1) - row
    j = torch.arange(W, device=row.device).view(1, 1, 1, W) - column
    return ((i >= 0) & (i < side)) & ((j >= 0) & (j < side))


def _sign(noise: Tensor) -> Tensor:
    return torch.where(noise < 0.5, -torch.ones_like(noise), 1.0)


def _sum(values: Tensor) -> Tensor:
    """Over the pixels of each channel, [B, C, 1, 1]; in float64, so no batch changes a bit."""
    return values.sum(dim=(2, 3), keepdim=True, dtype=torch.float64).float()


def _at_distance(batch: AttackBatch, delta: Tensor) -> Tensor:
    """The image moved by epsilon in the direction delta, then clamped."""
    moved = batch.images + unit(delta, "l2") * per_pixel(batch.epsilon)
    return moved.clamp_(batch.low, batch.high)
