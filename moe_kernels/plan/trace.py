"""From a module's graph to the layers of a plan.

Understood are convolutions (dense, undilated), BatchNorm behind them, ReLU, residual sums, max and
mean pooling, dropout (eval mode: nothing), flattening and linear layers, with a per-channel
normalization of the image in front: ResNets and VGGs as kuangliu, torchvision and timm write them.
Everything else is declined with a reason that names the module; verify.py holds what was understood
against the module itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from moe_kernels.plan.graph import CannotPlan, inputs, name_of
from moe_kernels.plan.layers import Conv, Head, Layer, Pool, Projection


@dataclass(frozen=True)
class Source:
    """Where a layer's parameters are in the module: names of submodules.

    `pooling` [P, H * W] averages a map to the P positions that a flattened linear layer was made
    for; `identity` is a head that passes on what a layer before it computed.
    """

    module: str
    norm: str | None = None
    projection: str | None = None
    projection_norm: str | None = None
    pooling: Tensor | None = None
    identity: bool = False


@dataclass(frozen=True)
class Traced:
    """The layers of one network for images of one size, and where each finds its parameters.

    scale, shift: [C] float32; the layers see images * scale + shift.
    """

    layers: tuple[Layer, ...]
    sources: tuple[Source, ...]
    scale: Tensor
    shift: Tensor


# What a node of the graph may stand for -------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """images * scale + shift, both [C]."""

    scale: Tensor
    shift: Tensor
    size: tuple[int, int, int]


@dataclass(frozen=True)
class _Map:
    """A feature map: number of its value and size [C, H, W]."""

    value: int
    size: tuple[int, int, int]


@dataclass(frozen=True)
class _Pooled:
    """The mean of a map over a grid of windows, [C, P, Q], not computed yet."""

    map: _Map
    grid: tuple[int, int]


@dataclass(frozen=True)
class _Flat:
    """A map flattened to features, [C * P * Q]; grid None is the map as it is."""

    map: _Map
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class _Batch:
    """The size of the batch, as in `x.view(x.size(0), -1)`."""


@dataclass(frozen=True)
class _Shape:
    """The shape of a map or an image, `x.shape` or `x.size()`."""


def trace(network: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]) -> Traced:
    """The layers of a network for images [C, H, W].

    Raises:
        CannotPlan: naming the first module that a plan cannot hold.
    """
    reader = _Reader(network, image_shape)
    for node in graph.nodes:
        reader.read(node)
    return reader.finish()


def image_affine(
    network: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """The scale and shift of `trace` as they are now, without reading the layers again."""
    reader = _Reader(network, image_shape)
    for node in graph.nodes:
        reader.read(node)
        if reader.layers:
            break
    return reader.scale_and_shift()


class _Reader:
    """Reads nodes in order, and lets BatchNorm, ReLU and sums join the convolution before them."""

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self._network = network
        self._image_shape = image_shape
        self._meaning: dict[fx.Node, Any] = {}
        self.layers: list[tuple[Layer, Source]] = []
        self._num_values = 1
        self._logits: fx.Node | None = None
        self._image: _Image | None = None

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self._image is not None:
                if node.users:
                    raise CannotPlan(f"its forward takes a second input, {node.target}")
                return
            zeros = torch.zeros(self._image_shape[0], dtype=torch.float32, device="cpu")
            self._image = _Image(zeros + 1, zeros, self._image_shape)
            self._meaning[node] = self._image
        elif node.op == "output":
            self._output(node.args[0])
        elif node.op == "get_attr":
            self._meaning[node] = _attribute(self._network, node)
        elif node.op == "call_module":
            module = self._network.get_submodule(str(node.target))
            self._meaning[node] = self._module(node, module)
        else:
            self._meaning[node] = self._function(node)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        if self._image is None or not self.layers:
            raise CannotPlan("it has no layers")
        return self._image.scale, self._image.shift

    def finish(self) -> Traced:
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

    def _output(self, node: Any) -> None:
        if not isinstance(node, fx.Node) or node is not self._logits:
            raise CannotPlan("its output is not that of a linear layer")

    # Modules and functions --------------------------------------------------------------------

    def _module(self, node: fx.Node, module: nn.Module) -> Any:
        name = str(node.target)
        value = self._meaning[_input(node)]
        if hasattr(module, "channel_affine"):
            scale, shift = cast(Any, module).channel_affine()
            return self._affine(value, scale, shift, name)
        # a class derived from one of these may compute anything
        method = _MODULES.get(type_before_parametrizations(module))
        if method is None:
            raise CannotPlan(f"{name} is a {type(module).__name__}")
        if "forward" in vars(module):
            raise CannotPlan(f"{name} has a forward of its own")
        _check_parametrizations(name, module)
        return method(self, node, name, module, value)

    def _function(self, node: fx.Node) -> Any:
        value = self._meaning[_input(node)]
        method = _FUNCTIONS.get(node.target)
        if method is None:
            raise CannotPlan(f"it calls {name_of(node.target)}")
        if unknown := set(node.kwargs) - _KEYWORDS.get(node.target, set()):
            raise CannotPlan(f"it calls {name_of(node.target)} with {', '.join(sorted(unknown))}")
        return method(self, node, value)

    def _conv(self, node: fx.Node, name: str, module: nn.Conv2d, value: Any) -> _Map:
        padding, stride = module.padding, module.stride
        if isinstance(padding, str):
            same = module.padding == "same"
            padding = tuple((k - 1) // 2 if same else 0 for k in module.kernel_size)
            if same and any(k % 2 == 0 for k in module.kernel_size):
                raise CannotPlan(f'{name} pads "same" around an even kernel')
        if module.groups != 1 or max(module.dilation) != 1 or module.padding_mode != "zeros":
            raise CannotPlan(f"{name} is grouped, dilated or does not pad with zeros")
        if stride[0] != stride[1] or padding[0] != padding[1]:
            raise CannotPlan(f"{name} has another stride or padding along H than along W")
        source = self._convolvable(value, name)
        kernel = (module.kernel_size[0], module.kernel_size[1])
        return self._add_conv(
            Conv(
                *(name, source.value, self._next()),
                *(module.in_channels, module.out_channels, kernel),
                *(stride[0], padding[0], False),
            ),
            Source(name),
            source,
        )

    def _add_conv(self, layer: Conv, source: Source, read: _Map) -> _Map:
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
        return _Map(layer.output, (layer.out_channels, P, Q))

    def _convolvable(self, value: Any, name: str) -> _Map:
        if isinstance(value, _Image):
            if self.layers:
                raise CannotPlan(f"{name} reads the image, and it is not the first layer")
            self._image = value
            return _Map(0, value.size)
        if isinstance(value, _Pooled):
            value = self._mean_map(value, name)
        if not isinstance(value, _Map):
            raise CannotPlan(f"{name} reads something that is not a feature map")
        return value

    def _norm(self, node: fx.Node, name: str, module: nn.BatchNorm2d, value: Any) -> _Map:
        if not module.track_running_stats or module.running_mean is None:
            raise CannotPlan(f"{name} keeps no running statistics")
        index = self._open_conv(node, value)
        if index is None:
            raise CannotPlan(f"{name} does not follow a convolution of its own")
        layer, source = self.layers[index]
        if source.norm is not None or not _unadded(layer):
            raise CannotPlan(f"{name} does not follow a convolution of its own")
        self.layers[index] = (layer, replace(source, norm=name))
        assert isinstance(value, _Map)
        return value

    def _relu(self, node: fx.Node, name: str, value: Any) -> _Map:
        index = self._open_conv(node, value)
        if index is None:
            if isinstance(value, _Map) and self._is_rectified(value):
                return value
            raise CannotPlan(f"{name} is a ReLU that does not follow a layer of its own")
        layer, source = self.layers[index]
        assert isinstance(layer, Conv)
        assert isinstance(value, _Map)
        self.layers[index] = (replace(layer, relu=True), source)
        return value

    def _open_conv(self, node: fx.Node, value: Any) -> int | None:
        """The index of the convolution that made a value which nobody else reads, before a ReLU."""
        if not isinstance(value, _Map) or self._is_read_beside(node, value):
            return None
        for index, (layer, _) in enumerate(self.layers):
            if isinstance(layer, Conv) and layer.output == value.value and not layer.relu:
                return index
        return None

    def _is_read_beside(self, node: fx.Node, value: _Map) -> bool:
        """Whether a value, under any of its names, is read by something besides `node`."""
        names = [x for x, meaning in self._meaning.items() if meaning == value]
        return any(user is not node and user not in names for x in names for user in x.users)

    def _is_rectified(self, value: _Map) -> bool:
        return any(
            isinstance(layer, Conv) and layer.output == value.value and layer.relu
            for layer, _ in self.layers
        )

    def _sum(self, node: fx.Node, value: Any) -> Any:
        """A residual sum joins the convolution behind it; elsewhere it shifts the image."""
        operands = [self._meaning.get(x) if isinstance(x, fx.Node) else x for x in node.args[:2]]
        if any(isinstance(x, _Image) for x in operands):
            image, other = _image_first(operands)
            return self._affine(image, None, _per_channel(other, image, node), node.name)
        a, b = operands
        if not isinstance(a, _Map) or not isinstance(b, _Map) or a.size != b.size or a == b:
            raise CannotPlan(f"{node.name} adds something other than two feature maps")
        open_ = [self._open_conv(node, x) for x in (a, b)]
        free = [i for i in open_ if i is not None and _unadded(self.layers[i][0])]
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
        return _Map(layer.output, a.size)

    def _affine(self, value: Any, scale: Tensor | None, shift: Tensor | None, name: str) -> _Image:
        if not isinstance(value, _Image):
            raise CannotPlan(f"{name} rescales something that is not the image")
        channels = value.size[0]
        a = value.scale.new_ones(1) if scale is None else scale.detach().cpu().float().flatten()
        b = value.shift.new_zeros(1) if shift is None else shift.detach().cpu().float().flatten()
        if a.numel() not in (1, channels) or b.numel() not in (1, channels):
            raise CannotPlan(f"{name} rescales the image by more than one number per channel")
        return replace(value, scale=value.scale * a, shift=value.shift * a + b)

    def _product(self, node: fx.Node, value: Any) -> _Image:
        """Subtraction, multiplication and division of the image by one number per channel."""
        operands = [self._meaning.get(x) if isinstance(x, fx.Node) else x for x in node.args[:2]]
        image, other = operands
        if not isinstance(image, _Image):
            raise CannotPlan(f"{node.name} computes with something that is not the image")
        number = _per_channel(other, image, node)
        name = name_of(node.target)
        if "sub" in name:
            return self._affine(image, None, -number, node.name)
        return self._affine(image, number if "mul" in name else 1 / number, None, node.name)

    def _pool(self, node: fx.Node, name: str, kind: str, value: Any, **options: Any) -> Any:
        kernel, stride, padding = (_square(options[k], name) for k in ("kernel", "stride", "pad"))
        source = self._convolvable(value, name)
        if source.value == 0:
            raise CannotPlan(f"{name} pools the image")
        C, H, W = source.size
        if options["unusual"]:
            raise CannotPlan(f"{name} dilates its window, or divides by another number than pixels")
        if kind == "mean" and (kernel, padding) == (H, 0) and H == W:
            return _Pooled(source, (1, 1))
        if (kernel, stride, padding) == (1, 1, 0):
            return source
        P, Q = ((s + 2 * padding - kernel) // stride + 1 for s in (H, W))
        if options["ceil"] or min(P, Q) < 1:
            raise CannotPlan(f"{name} rounds its size up, or has a larger window than the map")
        layer = Pool(name, source.value, self._next(), kind, kernel, stride, padding)
        self.layers.append((layer, Source(name)))
        return _Map(layer.output, (C, P, Q))

    def _adaptive(self, name: str, value: Any, size: Any) -> Any:
        source = self._convolvable(value, name)
        pair = (size, size) if size is None or isinstance(size, int) else tuple(size)
        H, W = source.size[1:]
        grid = (H if pair[0] is None else pair[0], W if pair[1] is None else pair[1])
        return source if grid == (H, W) and grid != (1, 1) else _Pooled(source, grid)

    def _mean_map(self, value: _Pooled, name: str) -> _Map:
        """A pooled map that something other than a linear layer reads."""
        C, H, W = value.map.size
        if value.grid != (1, 1) or H != W:
            raise CannotPlan(f"{name} reads an adaptively pooled map")
        layer = Pool(f"{name} (mean)", value.map.value, self._next(), "mean", H, 1, 0)
        self.layers.append((layer, Source(name)))
        return _Map(layer.output, (C, 1, 1))

    def _mean(self, node: fx.Node, value: Any) -> Any:
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        positions = sorted(axis % 4 for axis in axes) if isinstance(axes, (tuple, list)) else None
        if not isinstance(value, _Map) or positions != [2, 3]:
            raise CannotPlan(f"{node.name} is not a mean over the pixels of a feature map")
        return _Pooled(value, (1, 1)) if keep else _Flat(value, (1, 1))

    def _flatten(self, node: fx.Node, value: Any) -> _Flat:
        if isinstance(value, _Flat):
            return value
        if isinstance(value, _Pooled):
            return _Flat(value.map, value.grid)
        if isinstance(value, _Map):
            return _Flat(value, None)
        raise CannotPlan(f"{node.name} flattens something that is not a feature map")

    def _flatten_method(self, node: fx.Node, value: Any) -> Any:
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        end = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
        if (start, end) != (1, -1):
            raise CannotPlan(f"{node.name} flattens other axes than those of one image")
        return self._flatten(node, value)

    def _view(self, node: fx.Node, value: Any) -> _Flat:
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        first = self._meaning.get(sizes[0]) if isinstance(sizes[0], fx.Node) else sizes[0]
        features = _features(value)
        if len(sizes) != 2 or not (isinstance(first, _Batch) or first == -1):
            raise CannotPlan(f"{node.name} is a view that does not flatten each image")
        if sizes[1] != (-1 if isinstance(first, _Batch) else features) and sizes[1] != features:
            raise CannotPlan(f"{node.name} is a view that does not flatten each image")
        return self._flatten(node, value)

    def _size(self, node: fx.Node, value: Any) -> Any:
        axis = node.args[1] if len(node.args) > 1 else None
        if axis is None:
            return _Shape()
        if axis != 0:
            raise CannotPlan(f"{node.name} looks at the size of a map")
        return _Batch()

    def _getattr(self, node: fx.Node, value: Any) -> Any:
        if node.args[1] != "shape":
            raise CannotPlan(f"{node.name} reads .{node.args[1]}")
        return _Shape()

    def _getitem(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, _Shape) or node.args[1] != 0:
            raise CannotPlan(f"{node.name} takes a part of a tensor")
        return _Batch()

    def _linear(self, node: fx.Node, name: str, module: nn.Linear, value: Any) -> _Map:
        """The last one is the head; others, and whole maps, are convolutions over all pixels."""
        flat = value
        if isinstance(value, _Map) and value.size[1:] == (1, 1) and self._is_linear(value):
            flat = _Flat(value, None)
        if not isinstance(flat, _Flat):
            raise CannotPlan(f"{name} reads something that was not flattened")
        features = _features(flat)
        if features != module.in_features:
            raise CannotPlan(f"{name} expects {module.in_features} features, here are {features}")
        C, H, W = flat.map.size
        if flat.map.value == 0:
            raise CannotPlan(f"{name} reads the image itself")
        last = all(user.op == "output" for user in node.users)
        K = module.out_features
        pixels = flat.grid or (H, W)
        if last and pixels == (1, 1):
            self.layers.append((Head(name, flat.map.value, C, K), Source(name)))
            self._logits = node
            return flat.map
        pooling = None if flat.grid is None else _averaging((H, W), flat.grid)
        layer = Conv(name, flat.map.value, self._next(), C, K, (H, W), 1, 0, False)
        made = self._add_conv(layer, Source(name, pooling=pooling), flat.map)
        if last:
            head = Head(f"{name} (as it is)", made.value, K, K)
            self.layers.append((head, Source(name, identity=True)))
            self._logits = node
        return made

    def _is_linear(self, value: _Map) -> bool:
        return any(
            isinstance(layer, Conv)
            and layer.output == value.value
            and isinstance(self._network.get_submodule(source.module), nn.Linear)
            for layer, source in self.layers
        )

    def _next(self) -> int:
        self._num_values += 1
        return self._num_values - 1


def _adaptive_size(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs["output_size"]


def _pool_options(node: fx.Node) -> dict[str, Any]:
    """The options of F.max_pool2d and F.avg_pool2d, which both begin with (input, kernel)."""
    names = ("kernel_size", "stride", "padding")
    found = dict(zip(names, node.args[1:4], strict=False)) | dict(node.kwargs)
    kernel = found["kernel_size"]
    stride = found.get("stride")
    return {
        "kernel": kernel,
        "stride": kernel if stride in (None, (), []) else stride,
        "pad": found.get("padding", 0),
        "ceil": found.get("ceil_mode", False),
        "unusual": len(node.args) > 4 or _unusual(found),
    }


def _unusual(options: dict[str, Any]) -> bool:
    return (
        options.get("dilation", 1) not in (1, (1, 1))
        or bool(options.get("return_indices", False))
        or not options.get("count_include_pad", True)
        or options.get("divisor_override") is not None
    )


def _pool_module(module: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    facts = {
        k: getattr(module, k)
        for k in ("dilation", "return_indices", "count_include_pad", "divisor_override")
        if hasattr(module, k)
    }
    return {
        "kernel": module.kernel_size,
        "stride": module.stride,
        "pad": module.padding,
        "ceil": module.ceil_mode,
        "unusual": _unusual(facts),
    }


def _same(reader: _Reader, node: fx.Node, value: Any) -> Any:
    return value


def _dropout(reader: _Reader, node: fx.Node, value: Any) -> Any:
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    if training:
        raise CannotPlan(f"{node.name} drops values in eval mode, too")
    return value


_Method = Callable[[_Reader, fx.Node, str, Any, Any], Any]
_MODULES: dict[type[nn.Module], _Method] = {
    nn.Conv2d: _Reader._conv,
    nn.BatchNorm2d: _Reader._norm,
    nn.ReLU: lambda r, node, name, module, value: r._relu(node, name, value),
    **dict.fromkeys(
        (nn.Identity, nn.Dropout, nn.Dropout2d), lambda r, node, name, module, value: value
    ),
    nn.MaxPool2d: lambda r, node, name, module, value: r._pool(
        node, name, "max", value, **_pool_module(module)
    ),
    nn.AvgPool2d: lambda r, node, name, module, value: r._pool(
        node, name, "mean", value, **_pool_module(module)
    ),
    nn.AdaptiveAvgPool2d: lambda r, node, name, module, value: r._adaptive(
        name, value, module.output_size
    ),
    nn.Flatten: lambda r, node, name, module, value: (
        r._flatten(node, value)
        if (module.start_dim, module.end_dim) == (1, -1)
        else _decline(f"{name} flattens other axes than those of one image")
    ),
    nn.Linear: _Reader._linear,
}
_FUNCTIONS: dict[Any, Callable[[_Reader, fx.Node, Any], Any]] = {
    **dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
        lambda r, node, value: r._relu(node, node.name, value),
    ),
    **dict.fromkeys(
        (operator.add, operator.iadd, torch.add, "add", "add_"),
        lambda r, node, value: r._sum(node, value),
    ),
    **dict.fromkeys(
        (
            *(operator.sub, operator.mul, operator.truediv, torch.sub, torch.mul, torch.div),
            *("sub", "mul", "div", "sub_", "mul_", "div_"),
            *(operator.isub, operator.imul, operator.itruediv),
        ),
        lambda r, node, value: r._product(node, value),
    ),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d),
        lambda r, node, value: r._pool(node, node.name, "max", value, **_pool_options(node)),
    ),
    F.avg_pool2d: lambda r, node, value: r._pool(
        node, node.name, "mean", value, **_pool_options(node)
    ),
    F.adaptive_avg_pool2d: lambda r, node, value: r._adaptive(
        node.name, value, _adaptive_size(node)
    ),
    **dict.fromkeys((torch.mean, "mean"), lambda r, node, value: r._mean(node, value)),
    **dict.fromkeys(
        (torch.flatten, "flatten"), lambda r, node, value: r._flatten_method(node, value)
    ),
    **dict.fromkeys(
        ("view", "reshape", torch.reshape), lambda r, node, value: r._view(node, value)
    ),
    "size": lambda r, node, value: r._size(node, value),
    getattr: lambda r, node, value: r._getattr(node, value),
    operator.getitem: lambda r, node, value: r._getitem(node, value),
    F.dropout: _dropout,
    "contiguous": _same,
    "float": _same,
}
# What may be said by keyword; anything else (alpha, rounding_mode, out, dtype) changes the meaning.
_KEYWORDS: dict[Any, set[str]] = {
    F.relu: {"inplace"},
    F.max_pool2d: {"kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"},
    torch.max_pool2d: {"kernel_size", "stride", "padding", "dilation", "ceil_mode"},
    F.avg_pool2d: {
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    },
    F.adaptive_avg_pool2d: {"output_size"},
    F.dropout: {"p", "training", "inplace"},
    **{x: {"dim", "keepdim"} for x in (torch.mean, "mean")},
    **{x: {"start_dim", "end_dim"} for x in (torch.flatten, "flatten")},
    **{x: {"memory_format"} for x in ("contiguous", "float")},
}


def _check_parametrizations(name: str, module: nn.Module) -> None:
    """Torch's own compute the same weights whenever they are asked; who knows about others."""
    if not is_parametrized(module):
        return
    for chain in cast(nn.ModuleDict, module.parametrizations).values():
        for one in cast(nn.ModuleList, chain):
            if not type(one).__module__.startswith("torch.nn.utils."):
                raise CannotPlan(f"{name} is parametrized by a {type(one).__name__}")


def _decline(reason: str) -> Any:
    raise CannotPlan(reason)


def _input(node: fx.Node) -> fx.Node:
    if not inputs(node):
        raise CannotPlan(f"{node.name} has no input")
    return inputs(node)[0]


def _attribute(network: nn.Module, node: fx.Node) -> Any:
    if "constant" in node.meta:
        return node.meta["constant"]
    path, _, last = str(node.target).rpartition(".")
    return getattr(network.get_submodule(path), last)


def _image_first(operands: Sequence[Any]) -> tuple[_Image, Any]:
    a, b = operands
    return (a, b) if isinstance(a, _Image) else (b, a)


def _per_channel(value: Any, image: _Image, node: fx.Node) -> Tensor:
    """One number, or one per channel in a shape that broadcasts over [B, C, H, W]."""
    if isinstance(value, (int, float)):
        return image.scale.new_tensor([float(value)])
    channels = image.size[0]
    if isinstance(value, Tensor) and (
        value.numel() == 1
        or (value.dim() >= 3 and value.shape[-3:] == (channels, 1, 1) and value.numel() == channels)
    ):
        return value.detach().cpu().float().flatten()
    raise CannotPlan(f"{node.name} computes with more than one number per channel")


def _unadded(layer: Layer) -> bool:
    return isinstance(layer, Conv) and layer.residual is None and layer.projection is None


def _is_projection(layer: Layer, source: Source) -> bool:
    return (
        isinstance(layer, Conv)
        and (layer.kernel, layer.padding) == ((1, 1), 0)
        and source.pooling is None
    )


def _reads(layer: Layer) -> list[int]:
    if not isinstance(layer, Conv):
        return [layer.source]
    side = None if layer.projection is None else layer.projection.source
    return [layer.source, *(x for x in (layer.residual, side) if x is not None)]


def _square(value: Any, name: str) -> int:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(set(pair)) != 1:
        raise CannotPlan(f"{name} pools another window along H than along W")
    return int(pair[0])


def _features(value: Any) -> int:
    if isinstance(value, (_Flat, _Pooled)):
        C, H, W = value.map.size
        P, Q = value.grid or (H, W)
        return C * P * Q
    if isinstance(value, _Map):
        C, H, W = value.size
        return C * H * W
    return -1


def _averaging(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[P * Q, H * W]: what adaptive mean pooling of an H x W map to P x Q multiplies by."""
    H, W = size
    unit = torch.eye(H * W, dtype=torch.float32, device="cpu").view(H * W, 1, H, W)
    return F.adaptive_avg_pool2d(unit, grid).view(H * W, -1).T.contiguous()
