"""Say which modules of torch mean which layers; functions.py says it of functions.

A function of `MODULES` reads the options of one module, and tells the draft what it does; what is
not in the table is declined by its name. A new module is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from moe_kernels.plan.draft import Draft
from moe_kernels.plan.graph import CannotPlan, inputs
from moe_kernels.plan.layers import ACTIVATIONS, Activation
from moe_kernels.plan.meanings import (
    Flat,
    Last,
    Map,
    Pooled,
    Window,
)


def module_meaning(draft: Draft, node: fx.Node) -> Any:
    """What a call of a module stands for.

    Raises:
        CannotPlan: of a kind, or with an option, that a plan does not hold.
    """
    name = str(node.target)
    module = draft.network.get_submodule(name)
    value = draft.meaning[first_input(node)]
    if hasattr(module, "channel_affine"):
        scale, shift = cast(Any, module).channel_affine()
        return draft.rescale(value, scale, shift, name)
    # a class derived from one of these may compute anything, but for one that says it does not
    kind = type_before_parametrizations(module)
    meaning = MODULES.get(getattr(kind, "evaluates_as", kind))
    if meaning is None:
        raise CannotPlan(f"{name} is a {type(module).__name__}")
    if "forward" in vars(module):
        raise CannotPlan(f"{name} has a forward of its own")
    _check_parametrizations(name, module)
    return meaning(draft, node, module, value)


def _check_parametrizations(name: str, module: nn.Module) -> None:
    """Torch's own compute the same weights whenever they are asked; who knows about others."""
    if not is_parametrized(module):
        return
    for chain in cast(nn.ModuleDict, module.parametrizations).values():
        for one in cast(nn.ModuleList, chain):
            if not type(one).__module__.startswith("torch.nn.utils."):
                raise CannotPlan(f"{name} is parametrized by a {type(one).__name__}")


def first_input(node: fx.Node) -> fx.Node:
    if not inputs(node):
        raise CannotPlan(f"{node.name} has no input")
    return inputs(node)[0]


# Modules ----------------------------------------------------------------------------------------


def _conv_module(draft: Draft, node: fx.Node, module: nn.Conv2d, value: Any) -> Map:
    name, padding = str(node.target), module.padding
    if isinstance(padding, str):
        same = padding == "same"
        if same and any(k % 2 == 0 for k in module.kernel_size):
            raise CannotPlan(f'{name} pads "same" around an even kernel')
        padding = tuple((k - 1) // 2 if same else 0 for k in module.kernel_size)
    return draft.convolve(name, module, value, (padding[0], padding[1]))


def _norm_module(draft: Draft, node: fx.Node, module: nn.BatchNorm2d, value: Any) -> Map:
    return draft.batch_norm(node, str(node.target), module, value)


def _activation_module(draft: Draft, node: fx.Node, module: nn.Module, value: Any) -> Map | Last:
    name = _ACTIVATION_MODULES[type(module)]
    options = tuple((option, getattr(module, option)) for option in ACTIVATIONS[name])
    return activated(draft, node, str(node.target), Activation(name, options), value)


def _nothing_module(draft: Draft, node: fx.Node, module: nn.Module, value: Any) -> Any:
    """Identity, and dropout in eval mode."""
    return value


def activated(
    draft: Draft, node: fx.Node, name: str, activation: Activation, value: Any
) -> Map | Last:
    if isinstance(value, Last):
        return Last(draft.activate(node, name, activation, value.map))
    return draft.activate(node, name, activation, value)


def _layer_norm_module(draft: Draft, node: fx.Node, module: nn.LayerNorm, value: Any) -> Last:
    if not isinstance(value, Last):
        raise CannotPlan(f"{node.target} is a LayerNorm of something other than channels")
    return draft.layer_norm(str(node.target), module, value)


def _max_pool_module(draft: Draft, node: fx.Node, module: nn.MaxPool2d, value: Any) -> Any:
    return draft.pool(str(node.target), "max", value, _window_of(module))


def _mean_pool_module(draft: Draft, node: fx.Node, module: nn.AvgPool2d, value: Any) -> Any:
    return draft.pool(str(node.target), "mean", value, _window_of(module))


def _adaptive_module(
    draft: Draft, node: fx.Node, module: nn.AdaptiveAvgPool2d, value: Any
) -> Map | Pooled:
    return draft.pool_to(str(node.target), value, module.output_size)


def _flatten_module(draft: Draft, node: fx.Node, module: nn.Flatten, value: Any) -> Flat:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise CannotPlan(f"{node.target} flattens other axes than those of one image")
    return draft.flatten(node.name, value)


def _linear_module(draft: Draft, node: fx.Node, module: nn.Linear, value: Any) -> Map | Last:
    if isinstance(value, Last):
        return draft.linear_over_channels(str(node.target), module, value)
    return draft.linear(node, str(node.target), module, value)


def _window_of(module: nn.MaxPool2d | nn.AvgPool2d) -> Window:
    facts = {
        k: getattr(module, k)
        for k in ("dilation", "return_indices", "count_include_pad", "divisor_override")
        if hasattr(module, k)
    }
    return Window(
        kernel=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        ceil=module.ceil_mode,
        unusual=is_unusual(facts),
    )


def is_unusual(options: dict[str, Any]) -> bool:
    """Whether a pooling option changes what a window means."""
    return (
        options.get("dilation", 1) not in (1, (1, 1))
        or bool(options.get("return_indices", False))
        or not options.get("count_include_pad", True)
        or options.get("divisor_override") is not None
    )


_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.SELU: "selu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.LeakyReLU: "leaky_relu",
    nn.Softplus: "softplus",
    nn.Hardtanh: "hardtanh",
}

ModuleMeaning = Callable[[Draft, fx.Node, Any, Any], Any]
MODULES: dict[type[nn.Module], ModuleMeaning] = {
    nn.Conv2d: _conv_module,
    nn.BatchNorm2d: _norm_module,
    nn.BatchNorm1d: _norm_module,
    nn.Identity: _nothing_module,
    nn.Dropout: _nothing_module,
    nn.Dropout2d: _nothing_module,
    nn.MaxPool2d: _max_pool_module,
    nn.AvgPool2d: _mean_pool_module,
    nn.AdaptiveAvgPool2d: _adaptive_module,
    nn.Flatten: _flatten_module,
    nn.Linear: _linear_module,
    nn.LayerNorm: _layer_norm_module,
    **dict.fromkeys(_ACTIVATION_MODULES, _activation_module),
}
