"""Describe a network as layers over numbered values, and say where their parameters are.

Value 0 holds the normalized images; every layer reads values that came before it and makes one.

Axes: E networks, B images, C input and O output channels, H W pixels of the input, P Q of the
output, R S filter taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """A 1x1 convolution that a Conv adds to its sum: ResNet's shortcut where the shape changes."""

    source: int
    in_channels: int
    stride: int


@dataclass(frozen=True)
class Conv:
    """output = relu?(conv(source) + bias + residual? + projection?), with BatchNorm folded in.

    A linear layer after flattening is one whose kernel covers the image.
    """

    name: str  # of the module in the network
    source: int
    output: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]  # R, S
    stride: int
    padding: int
    relu: bool
    residual: int | None = None
    projection: Projection | None = None


@dataclass(frozen=True)
class Pool:
    """output = maximum or mean over windows; padding counts as -inf, or as zeros."""

    name: str
    source: int
    output: int
    kind: str  # "max" or "mean"
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class Head:
    """logits = linear(mean over pixels of source): the last layer."""

    name: str
    source: int
    in_channels: int
    num_classes: int


Layer = Conv | Pool | Head


@dataclass(frozen=True, repr=False)
class Source:
    """Where a layer's parameters are in the network: names of submodules.

    `pooling` [P * Q, H * W] averages a map to the P x Q positions that a flattened linear layer was
    made for; `identity` marks a head that passes on what the layer before it computed.
    """

    module: str
    norm: str | None = None
    projection: str | None = None
    projection_norm: str | None = None
    pooling: Tensor | None = None
    identity: bool = False


@dataclass(frozen=True, repr=False)
class Traced:
    """The layers of one network for images of one size, and where each finds its parameters.

    scale, shift: [C] float32 on the CPU; the layers see images * scale + shift.
    """

    layers: tuple[Layer, ...]
    sources: tuple[Source, ...]
    scale: Tensor
    shift: Tensor


def read_beside(layer: Layer) -> list[int]:
    """The values that a layer adds to its sum: residual and the projection's source."""
    if not isinstance(layer, Conv):
        return []
    side = None if layer.projection is None else layer.projection.source
    return [x for x in (layer.residual, side) if x is not None]


def flop(layers: Sequence[Layer], size: tuple[int, int]) -> list[int]:
    """Floating-point operations of each layer's forward pass for one image [H, W].

    A multiplication and the addition that follows it count as 2; nothing else counts.
    """
    sizes = {0: size}
    counts = []
    for layer in layers:
        if isinstance(layer, Head):
            counts.append(2 * layer.in_channels * layer.num_classes)
            continue
        H, W = sizes[layer.source]
        R, S = layer.kernel if isinstance(layer, Conv) else (layer.kernel, layer.kernel)
        P = (H + 2 * layer.padding - R) // layer.stride + 1
        Q = (W + 2 * layer.padding - S) // layer.stride + 1
        sizes[layer.output] = (P, Q)
        products = 0
        if isinstance(layer, Conv):
            products = layer.in_channels * R * S
            if layer.projection is not None:
                products += layer.projection.in_channels
            products *= layer.out_channels
        counts.append(2 * P * Q * products)
    return counts
