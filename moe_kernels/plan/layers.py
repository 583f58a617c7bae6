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

    A linear layer after flattening is one whose kernel covers the image. With `groups` each output
    channel reads the input channels of its own group alone.
    """

    name: str  # of the module in the network
    source: int
    output: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]  # R, S
    stride: int = 1
    padding: int = 0
    relu: bool = False
    residual: int | None = None
    projection: Projection | None = None
    groups: int = 1


@dataclass(frozen=True)
class Activation:
    """A function of torch.nn.functional from each number to another, and its options by name."""

    name: str
    options: tuple[tuple[str, float | str], ...] = ()


RELU = Activation("relu")
# Activations by their name in torch.nn.functional, with the options that say which function it is.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "relu": (),
    "relu6": (),
    "silu": (),
    "mish": (),
    "selu": (),
    "hardswish": (),
    "hardsigmoid": (),
    "sigmoid": (),
    "tanh": (),
    "gelu": ("approximate",),
    "elu": ("alpha",),
    "celu": ("alpha",),
    "leaky_relu": ("negative_slope",),
    "softplus": ("beta", "threshold"),
    "hardtanh": ("min_val", "max_val"),
}


@dataclass(frozen=True)
class Pointwise:
    """output = activation?(source * scale + shift), with a scale and a shift for each channel.

    A BatchNorm that could not be folded into a convolution, an activation that no convolution
    applies itself, or both. Without `affine` there is no scale and no shift. With `epsilon` each
    pixel is normalized over its channels first, as LayerNorm does.
    """

    name: str
    source: int
    output: int
    channels: int
    affine: bool
    activation: Activation | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class Join:
    """output = the sum, the product or the channels side by side ("concat") of several values.

    A factor of 1 x 1 pixels multiplies all pixels, as in squeeze-and-excitation. `channels` are
    those of each source.
    """

    name: str
    kind: str  # "sum", "product" or "concat"
    sources: tuple[int, ...]
    output: int
    channels: tuple[int, ...]


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
    ceil: bool = False  # whether the output's size is rounded up


@dataclass(frozen=True)
class Head:
    """logits = linear(mean over pixels of source): the last layer."""

    name: str
    source: int
    in_channels: int
    num_classes: int


@dataclass(frozen=True)
class Entry:
    """The first layer of a network that reads a feature map in place of an image: value 0 as the
    back end lays out its values."""

    name: str
    source: int
    output: int
    channels: int


@dataclass(frozen=True)
class Exit:
    """The last layer of a network that returns a feature map: source as it is."""

    name: str
    source: int
    channels: int


Layer = Conv | Pool | Pointwise | Join | Head | Entry | Exit


@dataclass(frozen=True, repr=False)
class Source:
    """Where a layer's parameters are in the network: names of submodules.

    `pooling` [P * Q, H * W] averages a map to the P x Q positions that a flattened linear layer was
    made for; `scale` is a parameter that multiplies the channels; `identity` marks a head or a
    convolution that passes on what it reads.
    """

    module: str
    norm: str | None = None
    projection: str | None = None
    projection_norm: str | None = None
    pooling: Tensor | None = None
    scale: str | None = None
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


def reads(layer: Layer) -> list[int]:
    """All values that a layer reads."""
    if isinstance(layer, Join):
        return list(layer.sources)
    return [layer.source, *read_beside(layer)]


def read_beside(layer: Layer) -> list[int]:
    """The values that a convolution adds to its sum: residual and the projection's source."""
    if not isinstance(layer, Conv):
        return []
    side = None if layer.projection is None else layer.projection.source
    return [x for x in (layer.residual, side) if x is not None]


def rectified(layers: Sequence[Layer]) -> frozenset[int]:
    """The values that a ReLU made: their gradient is zero where they are not positive."""
    return frozenset(
        x.output
        for x in layers
        if (isinstance(x, Conv) and x.relu) or (isinstance(x, Pointwise) and x.activation == RELU)
    )


def output_size(layer: Conv | Pool, size: tuple[int, int]) -> tuple[int, int]:
    """The pixels [P, Q] of the output for a source of [H, W]."""
    P, Q = (_positions(layer, *pair) for pair in zip(size, _kernel(layer), strict=True))
    return P, Q


def _kernel(layer: Conv | Pool) -> tuple[int, int]:
    return layer.kernel if isinstance(layer, Conv) else (layer.kernel, layer.kernel)


def _positions(layer: Conv | Pool, size: int, taps: int) -> int:
    room = size + 2 * layer.padding - taps
    if isinstance(layer, Conv) or not layer.ceil:
        return room // layer.stride + 1
    count = -(-room // layer.stride) + 1
    # a window must begin inside the map or its first padding
    return count - 1 if (count - 1) * layer.stride >= size + layer.padding else count


def flop(layers: Sequence[Layer], size: tuple[int, int]) -> list[int]:
    """Floating-point operations of each layer's forward pass for one image [H, W].

    A multiplication and the addition that follows it count as 2; only those of convolutions and
    linear layers count.
    """
    sizes = {0: size}
    counts = []
    for layer in layers:
        products = 0
        if isinstance(layer, Head):
            products = layer.in_channels * layer.num_classes
        elif isinstance(layer, Exit):
            pass
        elif isinstance(layer, Join):
            sizes[layer.output] = max(sizes[x] for x in layer.sources)
        elif isinstance(layer, Pointwise | Entry):
            sizes[layer.output] = sizes[layer.source]
        else:
            P, Q = sizes[layer.output] = output_size(layer, sizes[layer.source])
            if isinstance(layer, Conv):
                R, S = layer.kernel
                products = layer.in_channels // layer.groups * R * S
                if layer.projection is not None:
                    products += layer.projection.in_channels
                products *= layer.out_channels * P * Q
        counts.append(2 * products)
    return counts
