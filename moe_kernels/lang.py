"""Import `triton` and its language `tl`, or stand-ins where Triton is missing; launch kernels.

With the stand-ins a module that defines Triton kernels still imports. Its kernels never run: then
`missing` says why. Kernels are started by `launch`, so that a rehearsal on tensors without data can
note which variants a computation will need (compile_pool.py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class _StandIn:
    """Has the names that a kernel's signature and decorator use; the body never runs."""

    constexpr = object

    @staticmethod
    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return function or (lambda decorated: decorated)


missing: str | None = None
triton: Any = _StandIn
tl: Any = _StandIn
try:
    triton, tl = (importlib.import_module(name) for name in ("triton", "triton.language"))
except ImportError as error:
    missing = f"Triton cannot be imported: {error}"

# Triton reads the variable when a kernel is defined, so it is read once here as well.
interpreted: bool = missing is None and os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """A kernel and what it was to be started with."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Notes(NamedTuple):
    capability: tuple[int, int]
    launches: list[Launch]


_notes: ContextVar[_Notes | None] = ContextVar("launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **kwargs: Any) -> None:
    """Start a kernel; inside `noted` write down what would be started."""
    notes = _notes.get()
    if notes is None:
        kernel[grid](*args, **kwargs)
    else:
        notes.launches.append(Launch(kernel, args, kwargs))


@contextlib.contextmanager
def noted(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Inside the block nothing is launched: the list that it yields gets all launches.

    Args:
        capability: of the GPU that they are for; the tensors are on no GPU.
    """
    launches: list[Launch] = []
    token = _notes.set(_Notes(capability, launches))
    try:
        yield launches
    finally:
        _notes.reset(token)


def noting() -> bool:
    """Whether launches are written down here and not started."""
    return _notes.get() is not None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, or of the one for which launches are noted here."""
    notes = _notes.get()
    return torch.cuda.get_device_capability(device) if notes is None else notes.capability
