"""Hold a device's tensors: wrappers that say they are on the device, around tensors on the CPU.

`alive` counts the wrappers of each piece of memory. A graph keeps memory from being reused, but not
its wrappers: memory that nobody else holds is memory that a GPU would have given away.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

CPU = torch.device("cpu")
# The place of the dispatcher that torch keeps for back ends of others; code only sees "cuda".
NAME = "rehearsal"
# Where Python code is called back by a mode of torch, the mode is off and "cuda" would be CUDA's.
HERE = torch.device("privateuseone", 0)
CUDA = torch.device("cuda", 0)

alive: Counter[int] = Counter()


class CudaError(RuntimeError):
    """What torch raises for an error that CUDA returns."""


class DeviceTensor(Tensor):
    """A tensor on the rehearsed device, whose numbers are in `inner`."""

    inner: Tensor
    # Set by `start`. torch calls it where its modes are off, as in some threads of autograd.
    compute: ClassVar[Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]]

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=HERE,
        )
        made.hold(inner)
        return made

    def hold(self, inner: Tensor) -> None:
        """Become a wrapper of this tensor's memory."""
        self.inner = inner
        if address := memory_of(inner):
            alive[address] += 1
            weakref.finalize(self, alive.subtract, [address])

    def __repr__(self, **_: Any) -> str:
        return f"on the rehearsed device: {self.inner!r}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                new: Tensor = DeviceTensor(self.inner.clone())
            if getattr(self, "_is_param", False):
                new = torch.nn.Parameter(new, self.requires_grad)
            else:
                new.requires_grad_(self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CudaError("a rehearsed tensor cannot be pickled; copy it to the host first")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return cls.compute(func, args, kwargs or {})


def inner(x: Any) -> Any:
    """The tensor on the CPU in a wrapper; anything else as it is."""
    return x.inner if isinstance(x, DeviceTensor) else x


def wrapped(x: Any) -> Any:
    """A tensor on the CPU in a wrapper; anything else as it is."""
    return DeviceTensor(x) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) else x


def memory_of(x: Tensor) -> int:
    """Address of the memory of a tensor on the CPU; 0 if it has none."""
    return x.untyped_storage().data_ptr()


def fill_with_nan(x: Tensor) -> None:
    """Set every bit of a tensor's memory: NaN as a float, -1 as an integer."""
    storage = x.untyped_storage()
    torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).fill_(0xFF)
