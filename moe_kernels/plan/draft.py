"""Collect the layers of a network while its graph is read.

BatchNorm, ReLU and residual sums join the convolution before them where nothing else reads its
output, and are layers of their own elsewhere; everything that a plan cannot hold raises CannotPlan
with the module's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import (
    RELU,
    Activation,
    Conv,
    Entry,
    Exit,
    Head,
    Join,
    Layer,
    Pointwise,
    Pool,
    Projection,
    Source,
    Traced,
    output_size,
    read_beside,
    reads,
    rectified,
)
from moe_kernels.plan.meanings import Flat, Image, Last, Map, Pooled, Window, num_features

BatchNorm = nn.BatchNorm2d | nn.BatchNorm1d
# Inputs of fewer channels are images, which bfloat16 does not round.
_MIN_MAP = 8


class Draft:
    """The layers found so far.

    Attributes:
        meaning: what each node of the graph that was read stands for.
        layers: in order, each with the place of its parameters.
        image: what the first convolution reads.
        logits: the node that is the output of the head.
    """

    def __init__(
        self, network: nn.Module, image_shape: tuple[int, int, int], *, maps: bool = False
    ) -> None:
        self.network = network
        self.image_shape = image_shape
        self.meaning: dict[fx.Node, Any] = {}
        self.layers: list[tuple[Layer, Source]] = []
        self.image: Image | None = None
        self.logits: fx.Node | None = None
        self._num_values = 1
        self._maps = maps

    def start(self, node: fx.Node) -> None:
        """Take a node for the images, or for the map that a part of a network reads."""
        channels = self.image_shape[0]
        zeros = torch.zeros(channels, dtype=torch.float32, device="cpu")
        self.image = self.meaning[node] = Image(zeros + 1, zeros, self.image_shape)
        if self._maps and channels >= _MIN_MAP:
            entry = Entry(node.name, 0, self._next(), channels)
            self.layers.append((entry, Source(node.name)))
            self.meaning[node] = Map(entry.output, self.image_shape)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The normalization [C] in front of the first layer."""
        if self.image is None or not self.layers:
            raise CannotPlan("it has no layers")
        return self.image.scale, self.image.shift

    def finish(self) -> Traced:
        """All layers, after the last node was read."""
        scale, shift = self.scale_and_shift()
        layers, sources = zip(*self.layers, strict=True)
        last = layers[-1]
        assert isinstance(last, Head | Exit)
        if any(last.source in reads(x) for x in layers[:-1]):
            raise CannotPlan(f"{last.name} is not the only layer that reads its input")
        return Traced(layers, sources, scale, shift)

    # Convolutions, and what joins them --------------------------------------------------------

    def convolve(self, name: str, module: nn.Conv2d, value: Any, padding: tuple[int, int]) -> Map:
        """A Conv2d with this padding along H and W."""
        stride, kernel = module.stride, (module.kernel_size[0], module.kernel_size[1])
        if max(module.dilation) != 1 or module.padding_mode != "zeros":
            raise CannotPlan(f"{name} is dilated or does not pad with zeros")
        if stride[0] != stride[1] or padding[0] != padding[1]:
            raise CannotPlan(f"{name} has another stride or padding along H than along W")
        whole = isinstance(value, Image) and module.groups == 1
        read = self._image(value, name) if whole else self._readable(value, name)
        layer = Conv(
            name=name,
            source=read.value,
            output=self._next(),
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=kernel,
            stride=stride[0],
            padding=padding[0],
            groups=module.groups,
        )
        return self._append_conv(layer, Source(name), read)

    def _append_conv(self, layer: Conv, source: Source, read: Map) -> Map:
        channels, *size = read.size
        P, Q = output_size(layer, (size[0], size[1]))
        if channels != layer.in_channels or min(P, Q) < 1:
            raise CannotPlan(
                f"{layer.name} cannot read a map of {channels} x {size[0]} x {size[1]}"
            )
        self.layers.append((replace(layer, name=self._unique(layer.name)), source))
        return Map(layer.output, (layer.out_channels, P, Q))

    def _image(self, value: Image, name: str) -> Map:
        """The image as a convolution reads it: all see it normalized alike."""
        if self.layers and value is not self.image:
            raise CannotPlan(
                f"{name} reads the image in another normalization than the first layer"
            )
        self.image = value
        return Map(0, value.size)

    def _readable(self, value: Any, name: str) -> Map:
        """The map that a layer reads; one that is no convolution reads a copy of the image."""
        if isinstance(value, Image):
            image = self._image(value, name)
            channels = image.size[0]
            copied = Conv(f"{name} (image)", 0, self._next(), channels, channels, (1, 1))
            return self._append_conv(copied, Source(name, identity=True), image)
        if isinstance(value, Pooled):
            value = self._mean_map(value, name)
        if not isinstance(value, Map):
            raise CannotPlan(f"{name} reads something that is not a feature map")
        return value

    def batch_norm(self, node: fx.Node, name: str, module: BatchNorm, value: Any) -> Map:
        """A BatchNorm, folded into the convolution before it if that is all that reads it."""
        if not module.track_running_stats or module.running_mean is None:
            raise CannotPlan(f"{name} keeps no running statistics")
        if isinstance(value, Image):
            value = self._readable(value, name)
        index = self._open(node, value)
        if index is not None:
            layer, source = self.layers[index]
            free = source.norm is None and source.scale is None
            if isinstance(layer, Conv) and free and not read_beside(layer):
                self.layers[index] = (layer, replace(source, norm=name))
                assert isinstance(value, Map)
                return value
        read = self._readable(value, name)
        if module.num_features != read.size[0]:
            raise CannotPlan(f"{name} cannot normalize {read.size[0]} channels")
        return self._append_pointwise(name, read, Source(name, norm=name), affine=True)

    def activate(self, node: fx.Node, name: str, activation: Activation, value: Any) -> Map:
        """An activation, joined to the layer before it; a ReLU after a ReLU changes nothing."""
        if isinstance(value, Image):
            value = self._readable(value, name)
        index = self._open(node, value)
        if index is not None:
            layer, source = self.layers[index]
            assert isinstance(value, Map)
            if isinstance(layer, Pointwise):
                self.layers[index] = (replace(layer, activation=activation), source)
                return value
            if activation == RELU:
                assert isinstance(layer, Conv)
                self.layers[index] = (replace(layer, relu=True), source)
                return value
        read = self._readable(value, name)
        if activation == RELU and self._is_rectified(read):
            return read
        return self._append_pointwise(name, read, Source(name), activation=activation)

    def layer_norm(self, name: str, module: nn.LayerNorm, value: Last) -> Last:
        """A LayerNorm over the channels of each pixel."""
        channels = value.map.size[0]
        if tuple(module.normalized_shape) != (channels,):
            raise CannotPlan(f"{name} normalizes over more than channels")
        source = Source(name, norm=name)
        epsilon = module.eps
        return Last(self._append_pointwise(name, value.map, source, affine=True, epsilon=epsilon))

    def scale(self, node: fx.Node, parameter: str, value: Map) -> Map:
        """A product with a parameter of one number for each channel, folded as a BatchNorm is."""
        index = self._open_conv(node, value)
        if index is not None:
            layer, source = self.layers[index]
            if source.scale is None and not read_beside(layer):
                self.layers[index] = (layer, replace(source, scale=parameter))
                return value
        source = Source(node.name, scale=parameter)
        return self._append_pointwise(node.name, value, source, affine=True)

    def permute(self, name: str, axes: tuple[int, ...], value: Any) -> Map | Last:
        """Channels to the end, or back."""
        positions = tuple(axis % 4 for axis in axes)
        if isinstance(value, Last) and positions == (0, 3, 1, 2):
            return value.map
        if isinstance(value, Map | Pooled) and positions == (0, 2, 3, 1):
            return Last(self._readable(value, name))
        raise CannotPlan(f"{name} permutes other axes than those of channels")

    def linear_over_channels(self, name: str, module: nn.Linear, value: Last) -> Last:
        """A linear layer of each pixel's channels: a 1x1 convolution."""
        read = value.map
        layer = Conv(
            name, read.value, self._next(), module.in_features, module.out_features, (1, 1)
        )
        return Last(self._append_conv(layer, Source(name), read))

    def _append_pointwise(
        self,
        name: str,
        read: Map,
        source: Source,
        *,
        affine: bool = False,
        activation: Activation | None = None,
        epsilon: float | None = None,
    ) -> Map:
        layer = Pointwise(
            self._unique(name), read.value, self._next(), read.size[0], affine, activation, epsilon
        )
        self.layers.append((layer, source))
        return Map(layer.output, read.size)

    def _unique(self, name: str) -> str:
        """A module called twice is two layers: the norms behind them may differ."""
        names = [layer.name for layer, _ in self.layers]
        calls = sum(known == name or known.startswith(f"{name} (call ") for known in names)
        return f"{name} (call {calls + 1})" if calls else name

    def _open(self, node: fx.Node, value: Any) -> int | None:
        """The index of the layer that made a value which nobody else reads, if an activation or a
        sum may still join it."""
        if not isinstance(value, Map) or self._is_read_beside(node, value):
            return None
        for index, (layer, _) in enumerate(self.layers):
            if not isinstance(layer, Head | Exit) and layer.output == value.value:
                open_ = (isinstance(layer, Conv) and not layer.relu) or (
                    isinstance(layer, Pointwise) and layer.activation is None
                )
                return index if open_ else None
        return None

    def _open_conv(self, node: fx.Node, value: Any) -> int | None:
        index = self._open(node, value)
        return index if index is not None and isinstance(self.layers[index][0], Conv) else None

    def _is_read_beside(self, node: fx.Node, value: Map) -> bool:
        """Whether a value, under any of its names, is read by something besides `node`."""
        names = [x for x, meaning in self.meaning.items() if meaning in (value, Last(value))]
        return any(user is not node and user not in names for x in names for user in x.users)

    def _is_rectified(self, value: Map) -> bool:
        return value.value in rectified([layer for layer, _ in self.layers])

    def add(self, node: fx.Node, a: Any, b: Any) -> Map:
        """A residual sum, joined to the convolution that made one of its operands."""
        if not isinstance(a, Map) or not isinstance(b, Map) or a.size != b.size:
            raise CannotPlan(f"{node.name} adds something other than two feature maps of one size")
        open_ = [self._open_conv(node, x) for x in (a, b)] if a != b else []
        free = [i for i in open_ if i is not None and not read_beside(self.layers[i][0])]
        if not free:
            return self.join(node.name, "sum", [a, b])
        # the other one, if it is a 1x1 convolution of its own, becomes part of the same sum
        free.sort(key=lambda i: _is_projection(*self.layers[i]))
        main = free[0]
        layer, source = self.layers[main]
        assert isinstance(layer, Conv)
        other = b if layer.output == a.value else a
        if layer.groups == 1 and len(free) == 2 and _is_projection(*self.layers[free[1]]):
            side, side_source = self.layers[free[1]]
            assert isinstance(side, Conv)
            layer = replace(
                layer, projection=Projection(side.source, side.in_channels, side.stride)
            )
            source = replace(
                source, projection=side_source.module, projection_norm=side_source.norm
            )
            dropped = sorted(free, reverse=True)
        else:
            layer = replace(layer, residual=other.value)
            dropped = [main]
        for index in dropped:
            del self.layers[index]
        self.layers.append((layer, source))  # last: what it adds has been computed
        return Map(layer.output, a.size)

    def join(self, name: str, kind: str, values: Sequence[Any]) -> Map:
        """The sum, the product or the concatenation of feature maps."""
        maps = [self._readable(x, name) for x in values]
        size = max(x.size[1:] for x in maps)
        pixels = {size} if kind != "product" else {size, (1, 1)}
        channels = tuple(x.size[0] for x in maps)
        fits = kind == "concat" or len(set(channels)) == 1
        if any(x.size[1:] not in pixels for x in maps) or not fits:
            raise CannotPlan(f"{name} joins feature maps of different sizes")
        layer = Join(name, kind, tuple(x.value for x in maps), self._next(), channels)
        self.layers.append((layer, Source(name)))
        return Map(layer.output, (sum(channels) if kind == "concat" else channels[0], *size))

    def rescale(self, value: Any, scale: Tensor | None, shift: Tensor | None, name: str) -> Image:
        """value * scale + shift of the image; each one number, or one per channel."""
        if not isinstance(value, Image):
            raise CannotPlan(f"{name} rescales something that is not the image")
        channels = value.size[0]
        a = value.scale.new_ones(1) if scale is None else scale.detach().cpu().float().flatten()
        b = value.shift.new_zeros(1) if shift is None else shift.detach().cpu().float().flatten()
        if a.numel() not in (1, channels) or b.numel() not in (1, channels):
            raise CannotPlan(f"{name} rescales the image by more than one number per channel")
        return replace(value, scale=value.scale * a, shift=value.shift * a + b)

    # Pooling and linear layers ----------------------------------------------------------------

    def pool(self, name: str, kind: str, value: Any, window: Window) -> Map | Pooled:
        """Pooling over windows; kind is "max" or "mean"."""
        kernel, stride, padding = (
            _square(x, name) for x in (window.kernel, window.stride, window.padding)
        )
        read = self._readable(value, name)
        C, H, W = read.size
        if window.unusual:
            raise CannotPlan(f"{name} dilates its window, or divides by another number than pixels")
        if kind == "mean" and (kernel, padding) == (H, 0) and H == W:
            return Pooled(read, (1, 1))
        if (kernel, stride, padding) == (1, 1, 0):
            return read
        layer = Pool(name, read.value, self._num_values, kind, kernel, stride, padding)
        up = replace(layer, ceil=window.ceil)
        P, Q = output_size(up, (H, W))
        if min(P, Q) < 1:
            raise CannotPlan(f"{name} has a larger window than the map")
        if (P, Q) != output_size(layer, (H, W)):
            if kind == "mean":
                raise CannotPlan(f"{name} averages over windows that leave the map")
            layer = up
        self._next()
        self.layers.append((layer, Source(name)))
        return Map(layer.output, (C, P, Q))

    def pool_to(self, name: str, value: Any, size: Any) -> Map | Pooled:
        """Adaptive mean pooling to a size: one number, or two, or None for the map's own."""
        read = self._readable(value, name)
        pair = (size, size) if size is None or isinstance(size, int) else tuple(size)
        H, W = read.size[1:]
        grid = (H if pair[0] is None else pair[0], W if pair[1] is None else pair[1])
        return read if grid == (H, W) and grid != (1, 1) else Pooled(read, grid)

    def _mean_map(self, value: Pooled, name: str) -> Map:
        """A pooled map that something other than a linear layer reads."""
        C, H, W = value.map.size
        if value.grid != (1, 1) or H != W:
            raise CannotPlan(f"{name} reads an adaptively pooled map")
        layer = Pool(f"{name} (mean)", value.map.value, self._next(), "mean", H, 1, 0)
        self.layers.append((layer, Source(name)))
        return Map(layer.output, (C, 1, 1))

    def flatten(self, name: str, value: Any) -> Flat:
        """Each image's map as one row of features."""
        if isinstance(value, Flat):
            return value
        if isinstance(value, Pooled):
            return Flat(value.map, value.grid)
        if isinstance(value, Map):
            return Flat(value, None)
        raise CannotPlan(f"{name} flattens something that is not a feature map")

    def one_pixel(self, name: str, value: Any) -> Map:
        """Features of each image as a map of 1 x 1 pixels, as they were before flattening."""
        if isinstance(value, Flat) and value.grid == (1, 1):
            value = Pooled(value.map, value.grid)
        elif isinstance(value, Flat):
            value = value.map
        read = self._readable(value, name)
        if read.size[1:] != (1, 1):
            raise CannotPlan(f"{name} makes one pixel of {read.size[1]} x {read.size[2]}")
        return read

    def linear(self, node: fx.Node, name: str, module: nn.Linear, value: Any) -> Map:
        """A linear layer: the last one is the head, others are convolutions over all pixels."""
        flat = value
        if isinstance(value, Map) and value.size[1:] == (1, 1) and self._is_linear(value):
            flat = Flat(value, None)
        if not isinstance(flat, Flat):
            raise CannotPlan(f"{name} reads something that was not flattened")
        features = num_features(flat)
        if features != module.in_features:
            raise CannotPlan(f"{name} expects {module.in_features} features, here are {features}")
        C, H, W = flat.map.size
        last = self._is_output(node)
        if not last and flat.grid == (1, 1) and H == W > 1:
            flat = Flat(self._mean_map(Pooled(flat.map, flat.grid), name), None)
            H = W = 1
        K = module.out_features
        if last and (flat.grid or (H, W)) == (1, 1):
            self._append_head(node, Head(name, flat.map.value, C, K), Source(name))
            return flat.map
        layer = Conv(name, flat.map.value, self._next(), C, K, (H, W))
        pooling = None if flat.grid is None else _averaging((H, W), flat.grid)
        made = self._append_conv(layer, Source(name, pooling=pooling), flat.map)
        if last:
            head = Head(f"{name} (as it is)", made.value, K, K)
            self._append_head(node, head, Source(name, identity=True))
        return made

    def end(self, node: fx.Node) -> None:
        """Take a node for the output: features of a linear layer, a mean over pixels, a map."""
        while self._passes_on(node):
            (node,) = node.all_input_nodes
        if node is self.logits:
            return
        value = self.meaning.get(node)
        if isinstance(value, Map) and value.size[1:] == (1, 1) and self._is_linear(value):
            value = Flat(value, None)  # rows that are no map, behind a BatchNorm1d, say
        if isinstance(value, Map) and self._maps:
            last = Exit(f"{node.name} (as it is)", value.value, value.size[0])
            self.layers.append((last, Source(node.name)))
            return
        if not isinstance(value, Flat) or (value.grid or value.map.size[1:]) != (1, 1):
            raise CannotPlan("its output is not that of a linear layer or a mean over pixels")
        channels = value.map.size[0]
        head = Head(f"{node.name} (as it is)", value.map.value, channels, channels)
        self._append_head(node, head, Source(node.name, identity=True))

    def _is_output(self, node: fx.Node) -> bool:
        """Whether the network returns what this node computes, and nothing else reads it."""
        return all(
            user.op == "output" or (self._passes_on(user) and self._is_output(user))
            for user in node.users
        )

    def _passes_on(self, node: fx.Node) -> bool:
        """Whether it returns what it reads."""
        if node.op != "call_module":
            return False
        return type(self.network.get_submodule(str(node.target))) in (nn.Identity, nn.Dropout)

    def _append_head(self, node: fx.Node, head: Head, source: Source) -> None:
        self.layers.append((head, source))
        self.logits = node

    def _is_linear(self, value: Map) -> bool:
        """Whether features were never a map: a linear layer's output, or an activation of one."""
        for layer, source in self.layers:
            if isinstance(layer, Conv | Pointwise) and layer.output == value.value:
                if isinstance(layer, Pointwise):
                    return self._is_linear(Map(layer.source, value.size))
                return not source.identity and isinstance(
                    self.network.get_submodule(source.module), nn.Linear
                )
        return False

    def _next(self) -> int:
        self._num_values += 1
        return self._num_values - 1


def _is_projection(layer: Layer, source: Source) -> bool:
    return (
        isinstance(layer, Conv)
        and (layer.kernel, layer.padding, layer.groups) == ((1, 1), 0, 1)
        and layer.source != 0  # of the image, which is no map like others
        and source.pooling is None
        and source.scale is None
    )


def _square(value: Any, name: str) -> int:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(set(pair)) != 1:
        raise CannotPlan(f"{name} pools another window along H than along W")
    return int(pair[0])


def _averaging(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[P * Q, H * W]: what adaptive mean pooling of an H x W map to P x Q multiplies by."""
    H, W = size
    unit = torch.eye(H * W, dtype=torch.float32, device="cpu").view(H * W, 1, H, W)
    return F.adaptive_avg_pool2d(unit, grid).view(H * W, -1).T.contiguous()
