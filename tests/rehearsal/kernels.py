"""Run the kernels of moe_kernels on the rehearsed device: compiled ones and Triton's.

A compiled kernel is computed by its CPU twin; the Hopper convolution, which has none, by the op's
definition. Triton's kernels run in its interpreter if TRITON_INTERPRET=1 is set, through the code
that launches them on a GPU; else they fail as they do without a driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rehearsal import graphs
from rehearsal.events import note, problem
from rehearsal.tensors import DeviceTensor, inner


def start() -> None:
    """Take the place of the functions that launch kernels, and time with few samples."""
    from moe_kernels import isolation, lang, native, timing
    from moe_kernels.ops import grouped_conv_sm90a

    native.module = _Compiled(native.module)
    native.call = _native_call(native)
    grouped_conv_sm90a._launch = _hopper_conv(grouped_conv_sm90a._launch)
    isolation.fault_in_child = lambda **_: None  # a child process has no rehearsed device
    timing.compare = _few_samples(timing.compare)
    timing._FLUSH_BYTES = 1
    if lang.interpreted:
        lang.interpreted = False  # the code takes the ways of a GPU
        _run_triton()


def _few_samples(compare: Callable[..., Any]) -> Callable[..., Any]:
    def run(columns: Any, inputs: Any, **options: Any) -> Any:
        return compare(columns, inputs, **{**options, "min_samples": 2, "min_s": 0.0})

    return run


class _Compiled:
    """The compiled module, whose kernels for GPUs are what `standing_in` last gave."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._kernel: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)  # only what the build has
        if self._kernel is None or not name.endswith(("_cuda", "conv_sm90a")):
            return found
        return lambda *, stream, dtype, **_: self._kernel()

    @contextlib.contextmanager
    def standing_in(self, kernel: Callable[[], None]) -> Iterator[None]:
        """Inside the block the launch of a GPU's kernel calls this."""
        self._kernel = kernel
        try:
            yield
        finally:
            self._kernel = None


def launch(name: str, call: Callable[[], Any], used: list[Tensor]) -> None:
    """Run a kernel that may write to any of its tensors, or record it."""
    if (graph := graphs.capturing()) is not None:
        graph.record(call, used, used)
    else:
        note("launches", name)
        call()


def _native_call(native: Any) -> Callable[..., Any]:
    original = native.call

    def call(
        name: str, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, **numbers: Any
    ) -> None:
        if not any(isinstance(x, DeviceTensor) for x in tensors.values()):
            original(name, tensors, dtype=dtype, **numbers)
            return
        for argument, x in tensors.items():
            if not isinstance(x, DeviceTensor):
                problem(f"the kernel {name}_cuda got {argument} on the CPU")
        held = {argument: inner(x) for argument, x in tensors.items()}

        def run() -> None:
            floats = {k: x.float() if x.dtype is dtype else x for k, x in held.items()}
            original(name, floats, dtype=torch.float32, **numbers)
            for argument, x in held.items():
                if floats[argument] is not x:
                    x.copy_(floats[argument])

        used = list(held.values())
        with native.module.standing_in(lambda: launch(f"native {name}", run, used)):
            original(name, tensors, dtype=dtype, **numbers)

    return call


def _hopper_conv(original: Callable[..., None]) -> Callable[..., None]:
    from moe_kernels import native, reference

    def conv(call: Any, clusters: bool) -> None:
        held = call._replace(**{k: inner(v) for k, v in call._asdict().items()})
        shared = (held.side, held.side_weight)
        strides = (held.stride, held.padding, held.side_stride)

        def run() -> None:
            if held.backward:
                size = held.y.shape[1:3]
                y = reference.grouped_conv_input_grad(
                    held.x, held.weight, held.residual, *shared, held.activation, *size, *strides
                )
            else:
                y = reference.grouped_conv(
                    held.x, held.weight, held.bias, held.residual, *shared, *strides, held.relu
                )
            held.y.copy_(y)

        name = f"{'clusters' if clusters else 'native'} conv_sm90a"
        used = [x for x in held if isinstance(x, Tensor)]
        with native.module.standing_in(lambda: launch(name, run, used)):  # type: ignore[attr-defined]
            original(call, clusters)

    return conv


def _run_triton() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        name = f"triton {self.fn.__name__}"
        if any(
            isinstance(_tensor(x), Tensor) and not isinstance(_tensor(x), DeviceTensor)
            for x in given
        ):
            problem(f"the kernel {name} got a tensor on the CPU")
        plain = [_plain(x) for x in args]
        options = {k: _plain(v) for k, v in kwargs.items()}
        used = [t for x in (*plain, *options.values()) if isinstance(t := _tensor(x), Tensor)]
        launch(name, lambda: original(self, *plain, grid=grid, warmup=warmup, **options), used)

    InterpretedFunction.run = run


def _tensor(x: Any) -> Any:
    """The tensor of a tensor descriptor; anything else as it is."""
    return x.base if hasattr(x, "block_shape") else x


def _plain(x: Any) -> Any:
    return dataclasses.replace(x, base=inner(x.base)) if hasattr(x, "block_shape") else inner(x)
