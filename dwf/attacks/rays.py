"""RayS: search a ray from the image along which the decision boundary is close, by labels alone.

    ray        images + radius * d,  d in {-1, 1}^n, at first all ones
    step       flip the signs of a block of pixels; if the model is fooled at the radius known, keep
               the flip and bisect for a smaller radius
    blocks     the whole image, its halves, quarters, ... down to single pixels, then anew

It asks which class the model answers and nothing else, so flat, rounded or false outputs and
gradients do not hide from it. Pixels of a block follow each other in a flattened image.

Ours against the published code: with an epsilon the first question is whether the radius is already
inside, and an image is done when it is; queries are counted exactly and never exceeded. In L2 the
ray is d / |d|_2. Where the first ray fools the model nowhere, random ones are tried; draw r of them
is noise stream r.

Source: Chen and Gu, arXiv:2006.12792, algorithms 1 to 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks.losses import Model
from dwf.attacks.minimum_norm import Closest, without_plan
from dwf.attacks.norms import length, per_pixel
from dwf.attacks.setup import Setup, packed
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import check_count

# A bisection ends at this share of the image's range.
_TOLERANCE = 1e-3
# Rays tried, the first all ones, until one fools the model anywhere.
_NUM_STARTS = 60


def rays(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor | None = None,
    norm: str = "linf",
    num_queries: int = 1500,
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = True,
    report: AttackReport | None = None,
) -> Tensor:
    """Find a close image that fools the model along rays of signs, by the model's labels alone.

    A model's plan is not used: each decision is made by the model itself, in float32.

    Args:
        epsilon: only images within this radius count, and the first one ends the search; float or
            [B]. None for the closest.
        norm: "linf" or "l2".
        num_queries: decisions for each image at most, after the first one on the image itself.
        allow_probabilities: false refuses a model that returns probabilities or one-hot rows.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1]: the closest image found that fools the model; where there is
        none or ``images`` do so already, the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    num_queries = check_count(num_queries, "num_queries")
    given = {**locals(), "model": without_plan(model)}
    setup = packed(Setup, {**given, "epsilon": 1.0 if epsilon is None else epsilon})
    with setup.opened() as (batch, source):
        closest = Closest(batch, source, norm, bounded=epsilon is not None)
        if len(batch):
            _Search(closest, num_queries, seed).run()
        return closest.images if epsilon is None else setup.held(closest.images)


class _Search:
    """Signs [B, n], the radius [B] at which they fool the model, and queries used [B]."""

    def __init__(self, closest: Closest, num_queries: int, seed: int) -> None:
        self.closest = closest
        self.batch = closest.batch
        self.num_queries = num_queries
        self.seed = seed
        self.whole = closest.batch.high - closest.batch.low  # crosses the range
        self.signs = torch.ones_like(self.batch.images.flatten(1))
        self.num_pixels = self.signs.shape[1]
        if closest.norm == "l2":
            self.whole *= self.num_pixels**0.5
        self.radius = torch.full_like(self.batch.epsilon, torch.inf)
        self.used = torch.zeros_like(self.batch.labels)

    def run(self) -> None:
        """Flip block after block until every image is done or out of queries."""
        rows = self._open(torch.arange(len(self.batch), device=self.signs.device))
        for draw in range(_NUM_STARTS):
            open_ = self._open(rows[self.radius[rows].isinf()])
            self._improve(open_, self.signs[open_] if draw == 0 else self._drawn(open_, draw))
        level = 0
        while True:
            block = max(-(-self.num_pixels // 2**level), 1)
            for first in range(0, self.num_pixels, block):
                rows = self._open(rows)
                if len(rows) == 0:
                    return
                flipped = self.signs[rows].clone()
                flipped[:, first : first + block] *= -1
                self._improve(rows, flipped)
            level = level + 1 if block > 1 else 0

    def _drawn(self, rows: Tensor, draw: int) -> Tensor:
        """Random signs [R, n], in square cells of 1, 2, 4, ... pixels in turn."""
        C, H, W = self.batch.images.shape[1:]
        cell = 2 ** (draw % max(min(H, W), 1).bit_length())
        shape = C, -(-H // cell), -(-W // cell)
        index = self.batch.sample_index[rows]
        noise = moe_kernels.uniform_noise(self.seed, index, shape, restart=draw)
        noise = noise.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :H, :W]
        return torch.where(noise < 0.5, -1.0, 1.0).flatten(1)

    def _open(self, rows: Tensor) -> Tensor:
        left = self.closest.is_open(rows) & (self.used[rows] < self.num_queries)
        return rows[left]

    def _improve(self, rows: Tensor, signs: Tensor) -> None:
        """Keep the signs [R, n] of those rows that they bring nearer."""
        known = self.radius[rows].clamp(max=self.whole)
        fooled = self._fools(rows, signs, known)
        rows, signs, high = rows[fooled], signs[fooled], known[fooled]
        if len(rows) == 0:
            return
        self.signs[rows] = signs
        self._keep(rows, high)
        low = torch.zeros_like(high)
        if self.closest.bounded:  # inside the ball is enough
            goal = self.batch.epsilon[rows]
            inside = self._fools(rows, signs, goal)
            high, low = torch.where(inside, goal, high), torch.where(inside, low, goal)
            self._keep(rows, high)
        while True:
            wide = (high - low > _TOLERANCE * self.whole) & self.closest.is_open(rows)
            wide &= self.used[rows] < self.num_queries
            if not bool(wide.any()):
                return
            rows, signs, low, high = (x[wide] for x in (rows, signs, low, high))
            middle = (low + high) / 2
            fooled = self._fools(rows, signs, middle)
            high, low = torch.where(fooled, middle, high), torch.where(fooled, low, middle)
            self._keep(rows, high)

    def _at(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        images = self.batch.images[rows]
        size = radius if self.closest.norm == "linf" else radius / self.num_pixels**0.5
        moved = images + per_pixel(size) * signs.view_as(images)
        return moved.clamp(self.batch.low, self.batch.high)

    def _fools(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        """[R] bool; rows that are out of queries are not asked."""
        can = self.used[rows] < self.num_queries
        fooled = torch.zeros_like(can)
        if bool(can.any()):
            asked = rows[can]
            at = self._at(asked, signs[can], radius[can])
            fooled[can] = self.batch.subset(asked).are_fooled(self.closest.source, at)
            self.used[asked] += 1
        return fooled

    def _keep(self, rows: Tensor, radius: Tensor) -> None:
        """Note a smaller radius, and give `Closest` what counts."""
        nearer = radius < self.radius[rows]
        at = rows[nearer]
        self.radius[at] = radius[nearer]
        found = self._at(at, self.signs[at], self.radius[at])
        distance = length(found - self.batch.images[at], self.closest.norm)
        better = distance < self.closest.distance[at]
        if self.closest.bounded:
            better &= distance <= self.batch.epsilon[at] * (1 + 1e-6)
        at = at[better]
        self.closest.images[at] = found[better]
        self.closest.distance[at] = (
            torch.minimum(distance[better], self.batch.epsilon[at])
            if self.closest.bounded
            else distance[better]
        )
