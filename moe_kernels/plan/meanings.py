"""Name what a node of a traced graph may stand for, besides a number or a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, repr=False)
class Image:
    """images * scale + shift, with scale and shift [C]; size [C, H, W]."""

    scale: Tensor
    shift: Tensor
    size: tuple[int, int, int]


@dataclass(frozen=True)
class Map:
    """A feature map: the number of its value and its size [C, H, W]."""

    value: int
    size: tuple[int, int, int]


@dataclass(frozen=True)
class Last:
    """A feature map whose channels are the last axis, [B, H, W, C]."""

    map: Map


@dataclass(frozen=True)
class Pooled:
    """The mean of a map over a grid of windows, [C, P, Q], not computed yet."""

    map: Map
    grid: tuple[int, int]


@dataclass(frozen=True)
class Flat:
    """A map flattened to features [C * P * Q], averaged to a grid first unless grid is None."""

    map: Map
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class BatchSize:
    """The size of the batch, as in `x.view(x.size(0), -1)`."""


@dataclass(frozen=True)
class Shape:
    """The shape of a map or an image, `x.shape` or `x.size()`."""


@dataclass(frozen=True)
class Window:
    """The windows of a pooling layer, as the module or the call gives them.

    ceil: the output's size is rounded up. unusual: another option changes the result.
    """

    kernel: Any
    stride: Any
    padding: Any
    ceil: bool
    unusual: bool


def num_features(value: Any) -> int:
    """How many numbers an image has after flattening; -1 of what is no map."""
    if isinstance(value, (Flat, Pooled)):
        C, H, W = value.map.size
        P, Q = value.grid or (H, W)
        return C * P * Q
    if isinstance(value, Map):
        C, H, W = value.size
        return C * H * W
    return -1
