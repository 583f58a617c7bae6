"""Collect the layers of a network while its graph is read.

BatchNorm, ReLU and residual sums join the convolution before them where nothing else reads its
output; everything that a plan cannot hold raises CannotPlan with the module's name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import (
    Conv,
    Head,
    Layer,
    Pool,
    Projection,
    Source,
    Traced,
    read_beside,
)
from moe_kernels.plan.meanings import Flat, Image, Map, Pooled, Window, num_features


class Draft:
    """The layers found so far.

    Attributes:
        meaning: what each node of the graph that was read stands for.
        layers: in order, each with the place of its parameters.
        image: what the first convolution reads.
        logits: the node that is the output of the head.
    """

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self.network = network
        self.image_shape = image_shape
        self.meaning: dict[fx.Node, Any] = {}
        self.layers: list[tuple[Layer, Source]] = []
        self.image: Image | None = None
        self.logits: fx.Node | None = None
        self._num_values = 1

    def start(self, node: fx.Node) -> None:
        """Take a node for the images."""
        zeros = torch.zeros(self.image_shape[0], dtype=torch.float32, device="cpu")
        self.image = self.meaning[node] = Image(zeros + 1, zeros, self.image_shape)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The normalization [C] in front of the first layer."""
        if self.image is None or not self.layers:
            raise CannotPlan("it has no layers")
        return self.image.scale, self.image.shift

    def finish(self) -> Traced:
        """All layers, after the last node was read."""
        scale, shift = self.scale_and_shift()
        layers, sources = zip(*self.layers, strict=True)
        first = layers[0]
        readers = [x for x in layers if 0 in _reads(x)]
        if not isinstance(first, Conv) or readers != [first] or _reads(first) != [0]:
            raise CannotPlan("the image is read by more than one layer, or not by a convolution")
        head = layers[-1]
        if any(head.source in _reads(x) for x in layers[:-1]):
            raise CannotPlan(f"{head.name} is not the only layer that reads its input")
        return Traced(layers, sources, scale, shift)

    # Convolutions, and what joins them --------------------------------------------------------

    def convolve(self, name: str, module: nn.Conv2d, value: Any, padding: tuple[int, int]) -> Map:
        """A Conv2d with this padding along H and W."""
        stride, kernel = module.stride, (module.kernel_size[0], module.kernel_size[1])
        if module.groups != 1 or max(module.dilation) != 1 or module.padding_mode != "zeros":
            raise CannotPlan(f"{name} is grouped, dilated or does not pad with zeros")
        if stride[0] != stride[1] or padding[0] != padding[1]:
            raise CannotPlan(f"{name} has another stride or padding along H than along W")
        read = self._readable(value, name)
        layer = Conv(
            name=name,
            source=read.value,
            output=self._next(),
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=kernel,
            stride=stride[0],
            padding=padding[0],
            relu=False,
        )
        return self._append_conv(layer, Source(name), read)

    def _append_conv(self, layer: Conv, source: Source, read: Map) -> Map:
        channels, *size = read.size
        P, Q = (
            (s + 2 * layer.padding - k) // layer.stride + 1
            for s, k in zip(size, layer.kernel, strict=True)
        )
        if channels != layer.in_channels or min(P, Q) < 1:
            raise CannotPlan(
                f"{layer.name} cannot read a map of {channels} x {size[0]} x {size[1]}"
            )
        # a module called twice is two layers: the norms behind them may differ
        calls = sum(other.module == source.module for _, other in self.layers)
        layer = replace(layer, name=f"{layer.name} (call {calls + 1})" if calls else layer.name)
        self.layers.append((layer, source))
        return Map(layer.output, (layer.out_channels, P, Q))

    def _readable(self, value: Any, name: str) -> Map:
        """The map that a convolution or a pooling layer reads."""
        if isinstance(value, Image):
            if self.layers:
                raise CannotPlan(f"{name} reads the image, and it is not the first layer")
            self.image = value
            return Map(0, value.size)
        if isinstance(value, Pooled):
            value = self._mean_map(value, name)
        if not isinstance(value, Map):
            raise CannotPlan(f"{name} reads something that is not a feature map")
        return value

    def batch_norm(self, node: fx.Node, name: str, module: nn.BatchNorm2d, value: Any) -> Map:
        """A BatchNorm, folded into the convolution before it."""
        if not module.track_running_stats or module.running_mean is None:
            raise CannotPlan(f"{name} keeps no running statistics")
        index = self._open_conv(node, value)
        if index is None:
            raise CannotPlan(f"{name} does not follow a convolution of its own")
        layer, source = self.layers[index]
        if source.norm is not None or read_beside(layer):
            raise CannotPlan(f"{name} does not follow a convolution of its own")
        self.layers[index] = (layer, replace(source, norm=name))
        assert isinstance(value, Map)
        return value

    def relu(self, node: fx.Node, name: str, value: Any) -> Map:
        """A ReLU, joined to the convolution before it; after another ReLU it changes nothing."""
        index = self._open_conv(node, value)
        if index is None:
            if isinstance(value, Map) and self._is_rectified(value):
                return value
            raise CannotPlan(f"{name} is a ReLU that does not follow a layer of its own")
        layer, source = self.layers[index]
        assert isinstance(layer, Conv)
        assert isinstance(value, Map)
        self.layers[index] = (replace(layer, relu=True), source)
        return value

    def _open_conv(self, node: fx.Node, value: Any) -> int | None:
        """The index of the convolution that made a value which nobody else reads, before a ReLU."""
        if not isinstance(value, Map) or self._is_read_beside(node, value):
            return None
        for index, (layer, _) in enumerate(self.layers):
            if isinstance(layer, Conv) and layer.output == value.value and not layer.relu:
                return index
        return None

    def _is_read_beside(self, node: fx.Node, value: Map) -> bool:
        """Whether a value, under any of its names, is read by something besides `node`."""
        names = [x for x, meaning in self.meaning.items() if meaning == value]
        return any(user is not node and user not in names for x in names for user in x.users)

    def _is_rectified(self, value: Map) -> bool:
        return any(
            isinstance(layer, Conv) and layer.output == value.value and layer.relu
            for layer, _ in self.layers
        )

    def add(self, node: fx.Node, a: Any, b: Any) -> Map:
        """A residual sum, joined to the convolution that made one of its operands."""
        if not isinstance(a, Map) or not isinstance(b, Map) or a.size != b.size or a == b:
            raise CannotPlan(f"{node.name} adds something other than two feature maps")
        open_ = [self._open_conv(node, x) for x in (a, b)]
        free = [i for i in open_ if i is not None and not read_beside(self.layers[i][0])]
        if not free:
            raise CannotPlan(f"{node.name} adds two maps, neither of which a convolution just made")
        # the other one, if it is a 1x1 convolution of its own, becomes part of the same sum
        free.sort(key=lambda i: _is_projection(*self.layers[i]))
        main = free[0]
        layer, source = self.layers[main]
        assert isinstance(layer, Conv)
        other = b if layer.output == a.value else a
        if len(free) == 2 and _is_projection(*self.layers[free[1]]):
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
        if read.value == 0:
            raise CannotPlan(f"{name} pools the image")
        C, H, W = read.size
        if window.unusual:
            raise CannotPlan(f"{name} dilates its window, or divides by another number than pixels")
        if kind == "mean" and (kernel, padding) == (H, 0) and H == W:
            return Pooled(read, (1, 1))
        if (kernel, stride, padding) == (1, 1, 0):
            return read
        P, Q = ((s + 2 * padding - kernel) // stride + 1 for s in (H, W))
        if window.ceil or min(P, Q) < 1:
            raise CannotPlan(f"{name} rounds its size up, or has a larger window than the map")
        layer = Pool(name, read.value, self._next(), kind, kernel, stride, padding)
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
        if flat.map.value == 0:
            raise CannotPlan(f"{name} reads the image itself")
        last = all(user.op == "output" for user in node.users)
        K = module.out_features
        if last and (flat.grid or (H, W)) == (1, 1):
            self._append_head(node, Head(name, flat.map.value, C, K), Source(name))
            return flat.map
        layer = Conv(
            name=name,
            source=flat.map.value,
            output=self._next(),
            in_channels=C,
            out_channels=K,
            kernel=(H, W),
            stride=1,
            padding=0,
            relu=False,
        )
        pooling = None if flat.grid is None else _averaging((H, W), flat.grid)
        made = self._append_conv(layer, Source(name, pooling=pooling), flat.map)
        if last:
            head = Head(f"{name} (as it is)", made.value, K, K)
            self._append_head(node, head, Source(name, identity=True))
        return made

    def _append_head(self, node: fx.Node, head: Head, source: Source) -> None:
        self.layers.append((head, source))
        self.logits = node

    def _is_linear(self, value: Map) -> bool:
        return any(
            isinstance(layer, Conv)
            and layer.output == value.value
            and isinstance(self.network.get_submodule(source.module), nn.Linear)
            for layer, source in self.layers
        )

    def _next(self) -> int:
        self._num_values += 1
        return self._num_values - 1


def _is_projection(layer: Layer, source: Source) -> bool:
    return (
        isinstance(layer, Conv)
        and (layer.kernel, layer.padding) == ((1, 1), 0)
        and source.pooling is None
    )


def _reads(layer: Layer) -> list[int]:
    return [layer.source, *read_beside(layer)]


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
