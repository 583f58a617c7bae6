"""Say which functions of torch and methods of tensors mean which layers.

A function of `FUNCTIONS` reads the arguments of one call, and tells the draft what it does; what is
not in the table is declined by its name. A new function is one function and one row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moe_kernels.plan.draft import Draft
from moe_kernels.plan.graph import CannotPlan, name_of
from moe_kernels.plan.layers import ACTIVATIONS, Activation
from moe_kernels.plan.meanings import (
    BatchSize,
    Flat,
    Image,
    Last,
    Map,
    Pooled,
    Shape,
    Window,
    num_features,
)
from moe_kernels.plan.vocabulary import activated, first_input, is_unusual


def function_meaning(draft: Draft, node: fx.Node) -> Any:
    """What a call of a function or of a tensor's method stands for; errors as `module_meaning`."""
    value = draft.meaning[first_input(node)]
    target: Any = node.target
    if getattr(target, "__module__", "") == "torchvision.ops.stochastic_depth":
        target = "stochastic_depth"  # known by name: torchvision may not be installed
    meaning = FUNCTIONS.get(target)
    if meaning is None:
        raise CannotPlan(f"it calls {name_of(target)}")
    if unknown := set(node.kwargs) - KEYWORDS.get(target, set()):
        raise CannotPlan(f"it calls {name_of(node.target)} with {', '.join(sorted(unknown))}")
    return meaning(draft, node, value)


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument given by keyword or by place."""
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def _activation(draft: Draft, node: fx.Node, value: Any) -> Map | Last:
    """Called as a function of torch or of torch.nn.functional, or as a method of a tensor."""
    name = name_of(node.target).rstrip("_")
    known = ACTIVATIONS[name]
    given = dict(zip(known, node.args[1:], strict=False))
    given |= {key: x for key, x in node.kwargs.items() if key in known}
    if not all(isinstance(x, int | float | str) for x in given.values()):
        raise CannotPlan(f"{node.name} has options that are no numbers")
    options = tuple((key, cast(Any, given[key])) for key in known if key in given)
    return activated(draft, node, node.name, Activation(name, options), value)


def _add(draft: Draft, node: fx.Node, value: Any) -> Image | Map | Last:
    """A residual sum; of the image and a number per channel, a shift."""
    a, b = _operands(draft, node)
    if isinstance(a, Image) or isinstance(b, Image):
        image, number = (a, b) if isinstance(a, Image) else (b, a)
        return draft.rescale(image, None, _per_channel(number, image, node), node.name)
    if isinstance(a, Last) and isinstance(b, Last):
        return Last(draft.add(node, a.map, b.map))
    return draft.add(node, a, b)


def _subtract(draft: Draft, node: fx.Node, value: Any) -> Image:
    image, number = _image_and_number(draft, node)
    return draft.rescale(image, None, -number, node.name)


def _multiply(draft: Draft, node: fx.Node, value: Any) -> Image | Map:
    """Two feature maps; or the image and numbers, a rescaling."""
    a, b = _operands(draft, node)
    for value, other, place in ((a, b, node.args[1]), (b, a, node.args[0])):
        if isinstance(value, Map) and isinstance(other, Tensor) and isinstance(place, fx.Node):
            if not _is_per_channel(other, value.size[0]):
                raise CannotPlan(f"{node.name} computes with more than one number per channel")
            return draft.scale(node, str(place.target), value)
    if not isinstance(a, Image) and not isinstance(b, Image):
        return draft.join(node.name, "product", [a, b])
    image, number = _image_and_number(draft, node)
    return draft.rescale(image, number, None, node.name)


def _divide(draft: Draft, node: fx.Node, value: Any) -> Image:
    image, number = _image_and_number(draft, node)
    return draft.rescale(image, 1 / number, None, node.name)


def _batch_norm(draft: Draft, node: fx.Node, value: Any) -> Map:
    """With the statistics and weights of one BatchNorm, as a class derived from it calls it."""
    names = ("running_mean", "running_var", "weight", "bias")
    name = _owner(draft, node, {key: i for i, key in enumerate(names, 1)})
    if _argument(node, 5, "training", False) or name is None:
        raise CannotPlan(f"{node.name} normalizes by other statistics than a module's own")
    module = draft.network.get_submodule(name)
    if (
        not isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
        or _argument(node, 7, "eps", 1e-5) != module.eps
    ):
        raise CannotPlan(f"{node.name} is not what {name or 'its module'} says")
    return draft.batch_norm(node, name, module, value)


def _owner(draft: Draft, node: fx.Node, places: dict[str, int]) -> str | None:
    """The name of the module whose tensors, all that it has of these names, a call takes.

    Args:
        places: of the arguments that are tensors of one module, by their names there.
    """
    given = {key: _argument(node, place, key) for key, place in places.items()}
    owned = {key: str(x.target) for key, x in given.items() if isinstance(x, fx.Node)}
    owners = {target.rpartition(".")[0] for target in owned.values()}
    if len(owners) != 1:
        return None
    (owner,) = owners
    module = draft.network.get_submodule(owner)
    known = {key for key in places if getattr(module, key, None) is not None}
    names = {key: target.rpartition(".")[2] for key, target in owned.items()}
    return owner if names == {key: key for key in known} else None


def _layer_norm(draft: Draft, node: fx.Node, value: Any) -> Last:
    """With the weights of one LayerNorm, as a class derived from it calls it."""
    name = _owner(draft, node, {"weight": 2, "bias": 3})
    module = None if name is None else draft.network.get_submodule(name)
    if (
        name is None
        or not isinstance(module, nn.LayerNorm)
        or tuple(cast(Sequence[int], _argument(node, 1, "normalized_shape")))
        != module.normalized_shape
        or _argument(node, 4, "eps", 1e-5) != module.eps
        or not isinstance(value, Last)
    ):
        raise CannotPlan(f"{node.name} is not a LayerNorm of channels with a module's own weights")
    return draft.layer_norm(name, module, value)


def _permute(draft: Draft, node: fx.Node, value: Any) -> Map | Last:
    axes = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "dims", ())
    if len(axes) == 1 and isinstance(axes[0], (tuple, list)):
        axes = axes[0]
    return draft.permute(node.name, tuple(cast(Sequence[int], axes)), value)


def _stochastic_depth(draft: Draft, node: fx.Node, value: Any) -> Any:
    if _argument(node, 3, "training", True):
        raise CannotPlan(f"{node.name} drops branches in eval mode, too")
    return value


def _operands(draft: Draft, node: fx.Node) -> tuple[Any, Any]:
    a, b = (draft.meaning.get(x) if isinstance(x, fx.Node) else x for x in node.args[:2])
    return a, b


def _image_and_number(draft: Draft, node: fx.Node) -> tuple[Image, Tensor]:
    image, other = _operands(draft, node)
    if not isinstance(image, Image):
        raise CannotPlan(f"{node.name} computes with something that is not the image")
    return image, _per_channel(other, image, node)


def _per_channel(value: Any, image: Image, node: fx.Node) -> Tensor:
    """One number, or one per channel in a shape that broadcasts over [B, C, H, W]."""
    if isinstance(value, (int, float)):
        return image.scale.new_tensor([float(value)])
    channels = image.size[0]
    if isinstance(value, Tensor) and (value.numel() == 1 or _is_per_channel(value, channels)):
        return value.detach().cpu().float().flatten()
    raise CannotPlan(f"{node.name} computes with more than one number per channel")


def _is_per_channel(value: Tensor, channels: int) -> bool:
    return value.shape[-3:] == (channels, 1, 1) and value.numel() == channels


def _concat(draft: Draft, node: fx.Node, value: Any) -> Map:
    if _argument(node, 1, "dim", 0) not in (1, -3):
        raise CannotPlan(f"{node.name} joins along another axis than that of channels")
    parts = cast(Sequence[Any], _argument(node, 0, "tensors"))
    values = [draft.meaning.get(x) if isinstance(x, fx.Node) else x for x in parts]
    return draft.join(node.name, "concat", values)


def _expand(draft: Draft, node: fx.Node, value: Any) -> Any:
    """Of a map of 1 x 1 pixels: a product repeats it anyway."""
    like = draft.meaning.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    if not isinstance(like, Map) or isinstance(value, Image):
        raise CannotPlan(f"{node.name} expands something other than a feature map to another")
    return value


def _max_pool(draft: Draft, node: fx.Node, value: Any) -> Any:
    return draft.pool(node.name, "max", value, _window_of_call(node))


def _mean_pool(draft: Draft, node: fx.Node, value: Any) -> Any:
    return draft.pool(node.name, "mean", value, _window_of_call(node))


def _window_of_call(node: fx.Node) -> Window:
    """The options of F.max_pool2d and F.avg_pool2d, which both begin with (input, kernel)."""
    kernel = _argument(node, 1, "kernel_size")
    stride = _argument(node, 2, "stride")
    return Window(
        kernel=kernel,
        stride=kernel if stride in (None, (), []) else stride,
        padding=_argument(node, 3, "padding", 0),
        ceil=bool(node.kwargs.get("ceil_mode", False)),
        unusual=len(node.args) > 4 or is_unusual(dict(node.kwargs)),
    )


def _adaptive_pool(draft: Draft, node: fx.Node, value: Any) -> Map | Pooled:
    return draft.pool_to(node.name, value, _argument(node, 1, "output_size"))


def _mean(draft: Draft, node: fx.Node, value: Any) -> Pooled | Flat:
    axes = _argument(node, 1, "dim")
    positions = sorted(axis % 4 for axis in axes) if isinstance(axes, (tuple, list)) else None
    if not isinstance(value, Map) or positions != [2, 3]:
        raise CannotPlan(f"{node.name} is not a mean over the pixels of a feature map")
    keep = _argument(node, 2, "keepdim", False)
    return Pooled(value, (1, 1)) if keep else Flat(value, (1, 1))


def _flatten(draft: Draft, node: fx.Node, value: Any) -> Flat:
    if (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)) != (1, -1):
        raise CannotPlan(f"{node.name} flattens other axes than those of one image")
    return draft.flatten(node.name, value)


def _view(draft: Draft, node: fx.Node, value: Any) -> Flat | Map:
    """A view that flattens each image, (B, -1), (B, features) or (-1, features), or that gives
    features back their pixel, (B, features, 1, 1)."""
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    first = draft.meaning.get(sizes[0]) if isinstance(sizes[0], fx.Node) else sizes[0]
    if isinstance(first, BatchSize) or first == -1:
        known = [num_features(value), *([-1] if isinstance(first, BatchSize) else [])]
        if len(sizes) == 2 and sizes[1] in known:
            return draft.flatten(node.name, value)
        if len(sizes) == 4 and sizes[1] in known and tuple(sizes[2:]) == (1, 1):
            return draft.one_pixel(node.name, value)
    raise CannotPlan(f"{node.name} is a view that does not flatten each image")


def _size(draft: Draft, node: fx.Node, value: Any) -> BatchSize | Shape:
    axis = node.args[1] if len(node.args) > 1 else None
    if axis is None:
        return Shape()
    if axis != 0:
        raise CannotPlan(f"{node.name} looks at the size of a map")
    return BatchSize()


def _attribute(draft: Draft, node: fx.Node, value: Any) -> Shape:
    if node.args[1] != "shape":
        raise CannotPlan(f"{node.name} reads .{node.args[1]}")
    return Shape()


def _item(draft: Draft, node: fx.Node, value: Any) -> BatchSize:
    if not isinstance(value, Shape) or node.args[1] != 0:
        raise CannotPlan(f"{node.name} takes a part of a tensor")
    return BatchSize()


def _dropout(draft: Draft, node: fx.Node, value: Any) -> Any:
    if _argument(node, 2, "training", True):
        raise CannotPlan(f"{node.name} drops values in eval mode, too")
    return value


def _nothing(draft: Draft, node: fx.Node, value: Any) -> Any:
    """A plan chooses layout and dtype itself."""
    return value


FunctionMeaning = Callable[[Draft, fx.Node, Any], Any]
# A function of torch or of Python, or the name of a tensor's method.
FUNCTIONS: dict[Any, FunctionMeaning] = {
    **{
        function: _activation
        for name in ACTIVATIONS
        for spelling in (name, f"{name}_")
        for function in (
            getattr(F, spelling, None),
            getattr(torch, spelling, None),
            spelling if hasattr(Tensor, spelling) else None,
        )
        if function is not None
    },
    torch.cat: _concat,
    torch.concat: _concat,
    "expand_as": _expand,
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    "add": _add,
    "add_": _add,
    operator.sub: _subtract,
    operator.isub: _subtract,
    torch.sub: _subtract,
    "sub": _subtract,
    "sub_": _subtract,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    "mul": _multiply,
    "mul_": _multiply,
    operator.truediv: _divide,
    operator.itruediv: _divide,
    torch.div: _divide,
    "div": _divide,
    "div_": _divide,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _mean_pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
    torch.mean: _mean,
    "mean": _mean,
    torch.flatten: _flatten,
    "flatten": _flatten,
    torch.reshape: _view,
    "reshape": _view,
    "view": _view,
    "size": _size,
    getattr: _attribute,
    operator.getitem: _item,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    torch.permute: _permute,
    "permute": _permute,
    "stochastic_depth": _stochastic_depth,
    "contiguous": _nothing,
    "float": _nothing,
}
_WINDOW = {"kernel_size", "stride", "padding", "ceil_mode"}
# What may be said by keyword; anything else (alpha, rounding_mode, out, dtype) changes the meaning.
KEYWORDS: dict[Any, set[str]] = {
    **{getattr(F, name): {"inplace", *options} for name, options in ACTIVATIONS.items()},
    torch.cat: {"dim", "tensors"},
    torch.concat: {"dim", "tensors"},
    F.max_pool2d: _WINDOW | {"dilation", "return_indices"},
    torch.max_pool2d: _WINDOW | {"dilation"},
    F.avg_pool2d: _WINDOW | {"count_include_pad", "divisor_override"},
    F.adaptive_avg_pool2d: {"output_size"},
    torch.mean: {"dim", "keepdim"},
    "mean": {"dim", "keepdim"},
    torch.flatten: {"start_dim", "end_dim"},
    "flatten": {"start_dim", "end_dim"},
    F.dropout: {"p", "training", "inplace"},
    F.layer_norm: {"normalized_shape", "weight", "bias", "eps"},
    torch.permute: {"dims"},
    "permute": {"dims"},
    F.batch_norm: {"running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"},
    "stochastic_depth": {"p", "mode", "training"},
    "contiguous": {"memory_format"},
    "float": {"memory_format"},
}
