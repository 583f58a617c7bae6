"""Compute what torch asks of the device, after refusing what CUDA would refuse.

Every op on a tensor of the device, and every op that makes one, comes to `compute`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rehearsal import graphs, names, streams
from rehearsal.events import note
from rehearsal.tensors import CPU, NAME, DeviceTensor, inner, wrapped

aten = torch.ops.aten

# The size of the result depends on the numbers, or the result is the host's.
_SYNCS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# torch.use_deterministic_algorithms: those that raise on CUDA, as its documentation lists them.
_NONDETERMINISTIC = {
    "adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "max_pool2d_with_indices_backward",
    "avg_pool3d_backward",
    "upsample_bilinear2d_backward",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "grid_sampler_2d_backward",
    "nll_loss2d_forward",
    "cumsum",
    "kthvalue",
    "median",
    "histc",
    "bincount",
    "put_",
}


class Dispatch(TorchDispatchMode):
    """Brings the ops that make tensors to `compute`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an op, on the device if one of its tensors is or if it is asked for there."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    asked = kwargs.get("device")
    here = asked is not None and torch.device(asked).type in (NAME, "cuda")
    if not here and not any(isinstance(x, DeviceTensor) for x in tensors):
        return func(*args, **kwargs)
    if func.namespace == "moe_kernels":
        # Its Python code chooses and launches kernels; torch switched the modes off to come here.
        with names.Names(), Dispatch():
            return _ops()[func._schema.name]._dispatch(*args, **kwargs)
    if _is_composite(func):  # called below autograd
        with torch._C.DisableTorchFunction(), Dispatch():
            return func.decompose(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to_copy(func, args[0], here if asked is not None else None, kwargs)
    if func is aten.copy_.default and isinstance(args[0], DeviceTensor) != isinstance(
        args[1], DeviceTensor
    ):
        _host_copy(func, args[1], non_blocking=args[2] if len(args) > 2 else False)
        inner(args[0]).copy_(inner(args[1]))
        return args[0]
    _check_devices(func, args, tensors)
    if func in _SYNCS:
        note("syncs", func)
        graphs.forbid(func)
    if torch.are_deterministic_algorithms_enabled():
        _check_deterministic(func)
    if here:
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": CPU}
    call: Callable[..., Any] = func
    if torch.Tag.nondeterministic_seeded in func.tags:
        call, kwargs = _drawing(func, kwargs)
    return _as_given(func, args, kwargs, _run(func, call, args, kwargs))


@functools.cache
def _ops() -> dict[str, Any]:
    from moe_kernels.op import registry

    return {f"moe_kernels::{name}": op for name, op in registry().items()}


@functools.cache
def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(func.has_kernel_for_dispatch_key(key))


def _to_copy(func: Any, source: Tensor, here: bool | None, kwargs: dict[str, Any]) -> Tensor:
    was_here = isinstance(source, DeviceTensor)
    here = was_here if here is None else here
    if here != was_here:
        _host_copy(func, source, kwargs.get("non_blocking"))
    ours = ("device", "non_blocking", "pin_memory")
    options = {k: v for k, v in kwargs.items() if k not in ours}
    made = _run(func, func, (source,), {**options, "device": CPU}, launches=here and was_here)
    return DeviceTensor(made) if here else made


def _host_copy(func: Any, source: Tensor, non_blocking: Any) -> None:
    direction = "to the host" if isinstance(source, DeviceTensor) else "to the device"
    what = f"copy {direction} {list(source.shape)}"
    note("copies", what)
    if not non_blocking:
        note("syncs", what)
    # Some copies of pinned memory could be captured; nobody here needs one.
    graphs.forbid(what)


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Only numbers may come from the host, and indices, which torch copies to the device."""
    foreign = [x for x in tensors if not isinstance(x, DeviceTensor)]
    if func in _INDEXED:
        indices = [x for x in args[1] if x is not None]
        for index in indices:
            if any(index is x for x in foreign):
                _host_copy(func, index, False)
        masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
        value = args[2] if len(args) > 2 else None
        number = value is not None and value.dim() == 0 and any(value is x for x in foreign)
        fills = number and len(indices) == len(masks) == 1 and True not in args[3:]
        if masks and not fills:
            note("syncs", f"{func} by a mask")
            graphs.forbid(f"{func} by a mask")
        if number and not fills:
            _host_copy(func, value, False)
        foreign = [x for x in foreign if not any(x is y for y in indices)]
    if any(x.dim() > 0 for x in foreign):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func})"
        )


def _check_deterministic(func: Any) -> None:
    name = func._schema.name.partition("::")[2]
    if name in _NONDETERMINISTIC and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(
            f"{name}_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'"
        )


def _drawing(func: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The op with the device's generator in place of the CPU's."""
    given = kwargs.get("generator")
    if given is not None and given.device.type == "cpu":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")

    def draw(*args: Any, **kwargs: Any) -> Any:
        with _device_random_state():
            return func(*args, **kwargs)

    return draw, {k: v for k, v in kwargs.items() if k != "generator"}


@contextlib.contextmanager
def _device_random_state() -> Iterator[None]:
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(streams.generator.get_state())
    try:
        yield
    finally:
        streams.generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


def _run(
    func: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    launches: bool = True,
) -> Any:
    """Compute on the CPU, in a capture for its graph; what `call` returns."""
    args, kwargs = tree_map(inner, args), tree_map(inner, kwargs)
    graph = graphs.capturing()
    if graph is None:
        if launches and _is_kernel(func):
            note("launches", func)
        return call(*args, **kwargs)
    written: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return graph.record(lambda: call(*args, **kwargs), used, written)


@functools.cache
def _is_kernel(func: Any) -> bool:
    """Neither a view, nor an allocation, nor a read of one number."""
    returns = func._schema.returns
    view = returns and all(x.alias_info and not x.alias_info.is_write for x in returns)
    return (
        not view
        and "empty" not in func._schema.name
        and func is not aten._local_scalar_dense.default
    )


def _as_given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    """Wrap results; where an op writes to an argument and returns it, that argument."""
    schema = func._schema
    outputs = tree_map(wrapped, outputs)
    if not schema.is_mutable or not schema.returns:
        return outputs
    results = list(outputs) if isinstance(outputs, tuple) else [outputs]
    for place, returned in enumerate(schema.returns):
        if returned.alias_info is None or not returned.alias_info.is_write:
            continue
        for number, argument in enumerate(schema.arguments):
            alias = argument.alias_info
            if alias is not None and alias.before_set & returned.alias_info.before_set:
                given = args[number] if number < len(args) else kwargs.get(argument.name)
                results[place] = results[place] if given is None else given
                break
    return tuple(results) if isinstance(outputs, tuple) else results[0]
