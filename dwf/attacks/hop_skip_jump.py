"""HopSkipJump: walk along the decision boundary by the model's decisions alone.

    start: a random image that fools the model, moved to the boundary by bisection
    step:  estimate the boundary's normal from decisions at random points around the image,
           jump along it, as far as distance / sqrt(step) or a half, a quarter, ... of that,
           then bisect between the clean image and where the jump ended

It asks which class the model answers and nothing else, so a model may have no gradient, and may
return one-hot rows in place of logits.

Ours against the published code: the bisection's tolerance theta is 2^-14 where theirs is smaller,
as float32 is; random starts have cells of 1, 2, 4, ... pixels in turn, not of one pixel only; the
closest image of the walk comes back, not the last; num_queries is never exceeded.

Streams: draw d of the start is noise stream d; the points follow, a stream for each chunk of them.

Source: Chen, Jordan and Wainwright, arXiv:1904.02144, algorithm 2, and their code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks.losses import Model
from dwf.attacks.minimum_norm import Closest, without_plan
from dwf.attacks.norms import ascent, length, normal_quantiles, per_pixel, unit
from dwf.attacks.setup import Setup, packed
from dwf.attacks.space import AttackSpace
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, ImageError, check_count, check_images

# Random images tried as a start; a start for a target class is better given.
_NUM_STARTS = 200
# Decisions for one normal at most, and how often a jump is halved.
_MOST_POINTS, _MOST_HALVINGS = 10_000, 16
# Below this a bisection would compare roundings.
_SMALLEST_THETA = 2.0**-14
# Images in one pass through the model, unless the batch itself is larger.
_AT_ONCE = 128


def hop_skip_jump(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor | None = None,
    norm: str = "linf",
    num_queries: int = 5000,
    initial_points: int = 100,
    targets: Tensor | None = None,
    start: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = True,
    report: AttackReport | None = None,
) -> Tensor:
    """Follow the decision boundary to a close image that fools the model, by decisions alone.

    A model's plan is not used: each decision is made by the model itself, in float32.

    Args:
        epsilon: only images within this radius count, and the first one ends the search; float or
            [B]. None for the closest.
        norm: "linf" or "l2", of epsilon and of the distance that is minimized.
        num_queries: decisions for each image at most, after the first one on the image itself.
        initial_points: decisions for the first normal; step t takes sqrt(t) times as many, and the
            walk ends where the queries that are left are too few for that.
        targets: [B], classes that the images are to be taken for; only these count as wrong.
        start: [B, C, H, W], images to walk from, as others that the model takes for the targets.
            One that does not fool the model is replaced by random ones.
        allow_probabilities: false refuses a model that returns probabilities or one-hot rows.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1]: the closest image found that fools the model; where there is
        none or ``images`` do so already, the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    num_queries = check_count(num_queries, "num_queries")
    initial_points = check_count(initial_points, "initial_points")
    if isinstance(model, AttackSpace) and model.clamp == "none":
        raise ConfigError("clamp: 'none', but HopSkipJump needs a range to draw its start from")
    given = {**locals(), "model": without_plan(model)}
    setup = packed(Setup, {**given, "epsilon": 1.0 if epsilon is None else epsilon})
    with setup.opened() as (batch, source):
        if start is not None:
            check_images(start, "start")
            if start.shape != batch.images.shape:
                raise ImageError(
                    f"start: expected the images' {list(batch.images.shape)}, "
                    f"found {list(start.shape)}"
                )
            start = start.detach().to(batch.images)
        closest = Closest(batch, source, norm, bounded=epsilon is not None)
        _Walk(closest, num_queries, seed).run(initial_points, start)
        return closest.images if epsilon is None else setup.held(closest.images)


class _Walk:
    """Images on their way along the boundary, and the queries that each has used.

    Attributes:
        at: [B, C, H, W], where the walk is: an image that fools the model.
        used: [B] int64.
    """

    def __init__(self, closest: Closest, num_queries: int, seed: int) -> None:
        self.closest = closest
        self.batch = closest.batch
        self.norm = closest.norm
        self.num_queries = num_queries
        self.seed = seed
        self.at = closest.images.clone()
        self.used = torch.zeros_like(closest.batch.labels)
        self.num_pixels = max(math.prod(self.at.shape[1:]), 1)
        theta = self.num_pixels ** (-1.5 if self.norm == "l2" else -2.0)
        self.theta = min(max(theta, _SMALLEST_THETA), 0.5)
        self.num_bisections = math.ceil(-math.log2(self.theta))

    def run(self, initial_points: int, start: Tensor | None) -> None:
        """Walk until every image is done or out of queries; `Closest` has what was found."""
        rows = torch.nonzero(self.closest.is_open())[:, 0]
        rows = self._started(rows, start)
        stream = _NUM_STARTS
        for step in itertools.count(1):
            num_points = min(int(initial_points * math.sqrt(step)), _MOST_POINTS)
            rows = rows[self.closest.is_open(rows)]
            rows = self._can_pay(rows, num_points + _MOST_HALVINGS + self.num_bisections)
            if len(rows) == 0:
                break
            chunks = self._chunks(num_points)
            direction = ascent(self._normal(rows, chunks, step, stream), self.norm)
            self._to_boundary(rows, self._jump(rows, direction, step))
            stream += len(chunks)

    def _can_pay(self, rows: Tensor, queries: int) -> Tensor:
        return rows[self.used[rows] + queries <= self.num_queries]

    def _fools(self, rows: Tensor, images: Tensor) -> Tensor:
        """[R] bool: what the model decides about images [R, C, H, W] of these rows."""
        size = max(len(self.batch), _AT_ONCE)
        parts = zip(torch.split(rows, size), torch.split(images, size), strict=True)
        found = [self.batch.subset(r).are_fooled(self.closest.source, x) for r, x in parts]
        self.used.index_add_(0, rows, torch.ones_like(rows))
        return torch.cat(found)

    def _clamped(self, images: Tensor) -> Tensor:
        return images.clamp(self.batch.low, self.batch.high)

    # The start ----------------------------------------------------------------------------------

    def _started(self, rows: Tensor, start: Tensor | None) -> Tensor:
        """Bring rows to the boundary; those for which a start was found."""
        begun, left = [], rows
        for draw in range(-1 if start is not None else 0, _NUM_STARTS):
            left = self._can_pay(left, 1 + self.num_bisections)
            if len(left) == 0:
                break
            tried = start[left] if start is not None and draw < 0 else self._random(left, draw)
            fooled = self._fools(left, tried)
            if bool(fooled.any()):
                begun.append(left[fooled])
                self._to_boundary(left[fooled], tried[fooled])
                left = left[~fooled]
        return torch.cat(begun).sort().values if begun else rows[:0]

    def _random(self, rows: Tensor, draw: int) -> Tensor:
        """Uniform noise over the whole range, in square cells of 1, 2, 4, ... pixels in turn."""
        C, H, W = self.at.shape[1:]
        cell = 2 ** (draw % max(min(H, W), 1).bit_length())
        shape = C, -(-H // cell), -(-W // cell)
        index = self.batch.sample_index[rows]
        noise = moe_kernels.uniform_noise(self.seed, index, shape, restart=draw)
        noise = noise.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :H, :W]
        return self.batch.low + (self.batch.high - self.batch.low) * noise

    # A step -------------------------------------------------------------------------------------

    def _normal(self, rows: Tensor, chunks: Sequence[int], step: int, stream: int) -> Tensor:
        """The boundary's normal, toward images that fool the model, [R, C, H, W] of any length.

        It is the mean of random directions, each with the sign of its decision, less the mean
        decision (eq. 16 of the paper).
        """
        x, images = self.at[rows], self.batch.images[rows]
        index = self.batch.sample_index[rows]
        radius = self._probe_radius(length(x - images, self.norm), step)
        x, radius = x.unsqueeze(1), radius.view(-1, 1, 1, 1, 1)
        decided = torch.zeros_like(images, dtype=torch.float64)  # sum of decision * direction
        plain = torch.zeros_like(decided)
        balance = torch.zeros_like(self.closest.distance[rows], dtype=torch.float64)
        for i, count in enumerate(chunks):
            shape = count, *images.shape[1:]
            noise = moe_kernels.uniform_noise(self.seed, index, shape, restart=stream + i)
            noise = normal_quantiles(noise) if self.norm == "l2" else 2 * noise - 1
            directions = unit(noise.flatten(0, 1), "l2").view_as(noise)
            points = self._clamped(x + radius * directions)
            fooled = self._fools(rows.repeat_interleave(count), points.flatten(0, 1))
            sign = torch.where(fooled, 1.0, -1.0).view(-1, count)
            directions = (points - x) / radius  # as far as the clamp lets them
            decided += (directions * sign[:, :, None, None, None]).sum(dim=1, dtype=torch.float64)
            plain += directions.sum(dim=1, dtype=torch.float64)
            balance += sign.sum(dim=1, dtype=torch.float64)
        mean = per_pixel(balance / sum(chunks))
        # where all decisions agree the difference would be zero
        return torch.where(mean.abs() < 1, decided - mean * plain, decided).float()

    def _chunks(self, num_points: int) -> list[int]:
        """Points drawn at a time: by the image's size alone, so that no batch changes a draw."""
        size = min(max(2**16 // self.num_pixels, 1), 32)
        whole, rest = divmod(num_points, size)
        return [size] * whole + [rest] * (rest > 0)

    def _probe_radius(self, distance: Tensor, step: int) -> Tensor:
        """How far points lie from the image, [R]: delta of the paper."""
        if step == 1:
            return torch.full_like(distance, 0.1 * (self.batch.high - self.batch.low))
        power = 0.5 if self.norm == "l2" else 1.0
        radius: Tensor = distance * (self.theta * self.num_pixels**power)
        return radius

    def _jump(self, rows: Tensor, direction: Tensor, step: int) -> Tensor:
        """The first of ever shorter moves along a direction that fools the model."""
        x = self.at[rows]
        size = length(x - self.batch.images[rows], self.norm) / math.sqrt(step)
        moved, left = x.clone(), torch.arange(len(rows), device=rows.device)
        for halving in range(_MOST_HALVINGS):
            tried = x[left] + per_pixel(size[left] / 2**halving) * direction[left]
            tried = self._clamped(tried)
            fooled = self._fools(rows[left], tried)
            moved[left[fooled]] = tried[fooled]
            left = left[~fooled]
            if len(left) == 0:
                break
        return moved

    def _to_boundary(self, rows: Tensor, far: Tensor) -> None:
        """Bisect between the clean images and ``far`` [R, C, H, W], which fools; keep the end."""
        images = self.batch.images[rows]
        radius = length(far - images, self.norm)
        low, high, best = torch.zeros_like(radius), torch.ones_like(radius), far
        for _ in range(self.num_bisections):
            middle = (low + high) / 2
            tried = self._clamped(self._between(images, far, middle, radius))
            fooled = self._fools(rows, tried)
            best = torch.where(per_pixel(fooled), tried, best)
            low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
        self.at[rows] = best
        self._keep(rows, best)

    def _between(self, images: Tensor, far: Tensor, share: Tensor, radius: Tensor) -> Tensor:
        """A share [R] of the way: along the segment in L2, cut by a smaller cube in L-inf."""
        if self.norm == "l2":
            return images + per_pixel(share) * (far - images)
        cube = per_pixel(share * radius)
        return far.maximum(images - cube).minimum(images + cube)

    def _keep(self, rows: Tensor, found: Tensor) -> None:
        """Give `Closest` what is closer than it knows and counts."""
        distance = length(found - self.batch.images[rows], self.norm)
        nearer = distance < self.closest.distance[rows]
        if self.closest.bounded:
            nearer &= distance <= self.batch.epsilon[rows]
        at = rows[nearer]
        self.closest.images[at], self.closest.distance[at] = found[nearer], distance[nearer]
