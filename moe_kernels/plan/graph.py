"""Trace a module in eval mode with `torch.fx`, if the graph shows everything the module does.

A module is declined if the graph would hide something: hooks, random numbers, counters, or tensors
that are changed in place while others still read them.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from moe_kernels.plan.layers import ACTIVATIONS
from moe_kernels.plan.modules import RandomState, evaluated, has_global_hooks, has_hooks, structure

# torch.fx patches nn.Module for the time of a trace; two at once leave it patched.
_tracing = threading.Lock()


class CannotPlan(Exception):
    """A model has no plan; the message is one line that names the module and the reason."""


@contextlib.contextmanager
def naming_network(index: int, num_networks: int) -> Iterator[None]:
    """Let a CannotPlan raised inside the block say which of several networks it is about."""
    try:
        yield
    except CannotPlan as error:
        if num_networks == 1:
            raise
        raise type(error)(f"network {index}: {error}") from error


class _Proxy(fx.Proxy):
    """Records `a += b` as what it is; torch.fx by itself sees `a = a + b`."""

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    """While it works, calls of modules come here from all threads; those of others pass."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """What comes after the images has its default: a network is called with images alone."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        unwrapped = inspect.unwrap(root_fn)
        parameters = inspect.signature(unwrapped).parameters
        for i, name in enumerate(unwrapped.__code__.co_varnames[: len(args)]):
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            if i >= 2 and default is not inspect.Parameter.empty:
                args[i] = default
        return function, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = hasattr(m, "channel_affine") or hasattr(type(m), "evaluates_as")
        return known or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def graph_of(network: nn.Module) -> fx.Graph:
    """The graph of a network in eval mode; the network itself does not change.

    Raises:
        CannotPlan: torch.fx cannot follow the network, or the graph would hide something: hooks,
            random numbers, a count of its calls, a change of a tensor that others still read.
    """
    if has_global_hooks():
        raise CannotPlan("hooks are registered for all modules")
    for name, module in network.named_modules():
        if has_hooks(module):
            raise CannotPlan(f"{name or 'the model'} has hooks")
    if "forward" in vars(network):  # torch.fx reads that of the class
        raise CannotPlan("it has a forward of its own")
    with evaluated(network):
        for name, module in network.named_modules():
            if module.training:
                raise CannotPlan(f"{name or 'the model'} stays in train mode")
        graph = _traced_graph(network)
    _check_changes_in_place(network, graph)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph


def _traced_graph(network: nn.Module) -> fx.Graph:
    before, random_state = structure(network), RandomState()
    attributes = [(vars(module), dict(vars(module))) for module in network.modules()]
    try:
        with _tracing:
            graph = _Tracer().trace(network)
        # tensors that the forward made are left on the network; ours go to their nodes
        made = {x for x in vars(network) if x.startswith("_tensor_constant")} - attributes[0][
            1
        ].keys()
        constants = {name: vars(network).pop(name) for name in made}
        changed = structure(network) != before
    except Exception as error:  # torch.fx raises whatever the traced code does
        reason = (str(error).splitlines() or ["no message"])[0]
        raise CannotPlan(f"torch.fx cannot trace it: {type(error).__name__}: {reason}") from error
    finally:
        drew = random_state.restore()
        for now, then in attributes:
            now.clear()
            now.update(then)
    if drew:
        raise CannotPlan("it draws random numbers")
    if changed:
        raise CannotPlan("its forward changes the module")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            node.meta["constant"] = constants[node.target]
    return graph


def has_constants(graph: fx.Graph) -> bool:
    """Whether the forward made tensors out of others, whose changes the graph does not show."""
    return any("constant" in node.meta for node in graph.nodes)


def _check_changes_in_place(network: nn.Module, graph: fx.Graph) -> None:
    """Decline a tensor that is changed in place and read again under an older name."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    names: dict[fx.Node, list[fx.Node]] = {}  # of the memory that a node's result lies in
    for node in graph.nodes:
        sources = inputs(node)
        changes = _changes_in_place(network, node)
        shared = bool(sources) and (changes or _may_share(network, node))
        names[node] = names[sources[0]] if shared else []
        for older in names[node] if changes else []:
            again = any(place[user] > place[node] for user in older.users)
            if again or older.op in ("placeholder", "get_attr"):
                raise CannotPlan(f"{node.name} changes in place what is read elsewhere")
        names[node].append(node)


def _changes_in_place(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and not _drops_out(module)
    if node.op not in ("call_function", "call_method") or node.target is F.dropout:
        return False
    name = name_of(node.target)
    return (
        (name in ACTIVATIONS and any(x is True for x in node.args[1:]))  # `inplace` by position
        or (name.endswith("_") and not name.endswith("__"))
        or (node.target in (getattr(operator, x) for x in _IN_PLACE))
        or bool(node.kwargs.get("inplace", False))
    )


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")


def _may_share(network: nn.Module, node: fx.Node) -> bool:
    """Whether a result may be its input's memory under another name."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return isinstance(module, (nn.Identity, nn.Flatten)) or _drops_out(module)
    if node.op == "call_method":
        return True  # view, reshape, contiguous...: not worth a list
    return node.target in (F.dropout, torch.flatten, torch.reshape, operator.getitem, getattr)


def _drops_out(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's positional arguments, those in a list of tensors first."""
    several = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else ()
    return [x for x in (*several, *node.args) if isinstance(x, fx.Node)]


def name_of(function: Any) -> str:
    """The name of a function or method that a node calls."""
    return function if isinstance(function, str) else str(getattr(function, "__name__", function))
