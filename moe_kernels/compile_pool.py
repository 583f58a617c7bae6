"""Compile the Triton kernels that a computation will need, many at a time, before it needs them.

Triton compiles a kernel when it is first launched, one after the other: a first attack step on a
ResNet-18 waits for dozens. Here the computation is rehearsed on meta tensors, which have shapes and
no data; its launches are noted (lang.py), with all tiles that would be timed; and threads compile
them. A compiler holds Python's lock for less than a tenth of its time, so threads suffice.

What is compiled goes into Triton's cache on disk, where the first launch finds it, and nothing else
changes: where a rehearsal or a compiler fails, the kernel is compiled at its launch, as without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import lang, op, select
from moe_kernels.lang import Launch
from moe_kernels.native import FLOATS

log = logging.getLogger("moe_kernels")

Job = Callable[[], Any]

MAX_WORKERS = 16
_META = torch.device("meta")
# Below this a line about it would only be noise.
_WORTH_A_LINE_S = 2.0


def compile_ahead(device: torch.device, rehearse: Callable[[], Any], *, checks: bool = True) -> int:
    """Compile what a computation launches, if a GPU that Triton compiles for is to run it.

    Args:
        device: the GPU.
        rehearse: the computation on meta tensors; what it returns is dropped.
        checks: also what the ops check at their first use on this device.
    Returns:
        The number of launches that were looked at; 0 where there is nothing to compile.
    """
    if device.type != "cuda" or lang.missing or lang.interpreted:
        return 0
    if (name := select.named_implementation()) is not None and name != "triton":
        return 0
    try:
        launches = launches_of(rehearse, torch.cuda.get_device_capability(device), checks=checks)
    except Exception as error:
        # Whatever a network's code does with tensors that have no data.
        log.debug("nothing is compiled ahead: %s: %s", type(error).__name__, error)
        return 0
    with torch.cuda.device(device):
        return compile_all(launches)


def launches_of(
    rehearse: Callable[[], Any], capability: tuple[int, int], *, checks: bool = False
) -> list[Launch]:
    """The Triton kernels that a computation on meta tensors launches on such a GPU."""
    with lang.noted(capability) as launches, _Watch(checks=checks):
        rehearse()
    return launches


def launches_of_checks(capability: tuple[int, int], names: Sequence[str] = ()) -> list[Launch]:
    """What the checks of these ops launch in all dtypes; by default of all ops."""
    with lang.noted(capability) as launches:
        for name in names or op.registry():
            for dtype in FLOATS:
                _rehearse_check(op.registry()[name], dtype)
    return launches


def compile_all(launches: Sequence[Launch], workers: int | None = None) -> int:
    """Compile the kernels of these launches for the current device, each variant once.

    Args:
        workers: threads; by default one for each processor of this process, at most 16.
    Returns:
        The number of launches that were looked at; 0 where Triton compiles nothing.
    """
    # Interpreted kernels are none that Triton compiles.
    if lang.missing or not any(isinstance(x.kernel, lang.triton.JITFunction) for x in launches):
        return 0
    began = time.monotonic()
    try:
        jobs = _jobs(launches)
    except Exception as error:
        # A launch will say the same, and the op then does without this kernel.
        log.debug("nothing is compiled ahead: %s: %s", type(error).__name__, error)
        return 0
    with ThreadPoolExecutor(workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)) as pool:
        failed = [job for job, error in zip(jobs, pool.map(_error_of, jobs), strict=True) if error]
    # Python 3.11 raises SystemError where two threads parse at once; a second try tells it apart.
    for fault in filter(None, map(_error_of, failed)):
        log.debug("a kernel does not compile ahead: %s: %s", type(fault).__name__, fault)
    took = time.monotonic() - began
    if took > _WORTH_A_LINE_S:
        log.info("compiled %d kernels in %.1f s", len(jobs), took)
    return len(launches)


def _jobs(launches: Sequence[Launch]) -> list[Job]:
    """Compilations that these launches would wait for, which fill Triton's cache on disk."""
    # Not at the top: Triton may be missing.
    from triton.runtime._async_compile import active_mode

    collector = _Collector()
    token = active_mode.set(collector)
    try:
        for launch in launches:
            with contextlib.suppress(_Collected):
                # The grid is of no interest: nothing is launched.
                launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
    finally:
        active_mode.reset(token)
    return list(collector.jobs.values())


def _error_of(job: Job) -> Exception | None:
    try:
        job()
    except Exception as error:
        return error
    return None


class _Collected(Exception):
    """Ends a warm-up before Triton keeps a kernel in memory that is not compiled yet."""


class _Collector:
    """Stands in for Triton's asynchronous mode, which would keep failed compilations for good."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}

    def submit(self, key: str, compile_it: Job, finalize: Any) -> None:
        """Keep a compilation, once for each key."""
        self.jobs.setdefault(key, compile_it)
        raise _Collected


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every call of an op on meta tensors to its Triton implementation as well."""

    def __init__(self, *, checks: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._checks = checks
        self._ops = {one.overload: one for one in op.registry().values()}
        self._checked: set[tuple[Any, torch.dtype]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        one = self._ops.get(func)
        dtype = None if one is None else one.common_dtype(args, _META)
        if one is not None and dtype is not None:
            _rehearse(one, dtype, args)
            if self._checks and (func, dtype) not in self._checked:
                self._checked.add((func, dtype))
                _rehearse_check(one, dtype)
        return func(*args, **(kwargs or {}))


def _rehearse(one: op.Op, dtype: torch.dtype, args: Sequence[Any]) -> None:
    """Call the Triton implementation on meta tensors, as `Op` would on the GPU's."""
    for implementation in one.implementations:
        if implementation.name == "triton" and dtype in implementation.dtypes:
            implementation.function(
                *(x.contiguous() if isinstance(x, torch.Tensor) else x for x in args)
            )


def _rehearse_check(one: op.Op, dtype: torch.dtype) -> None:
    for args in one.example_inputs(_META, dtype):
        _rehearse(one, dtype, args)
