"""Choose the back end that a plan runs on.

On a CPU the order is fixed, so that another process computes the same bits: the compiled kernels
where they run, else stock torch. On a GPU those that are right are timed on the layers at hand, and
`moe_kernels.select` remembers the choice on disk; in torch's deterministic mode the order is fixed
there as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch

from moe_kernels.plan.back_ends.aten import AtenBackEnd
from moe_kernels.plan.back_ends.base import BackEnd
from moe_kernels.plan.back_ends.simd import SimdBackEnd
from moe_kernels.plan.back_ends.simd_calls import INSTRUCTIONS, available
from moe_kernels.plan.back_ends.slab import SlabBackEnd
from moe_kernels.plan.layers import Conv, Layer, flop
from moe_kernels.processor import bfloat16_is_fast


class Option(NamedTuple):
    """A back end that could run some layers, and whether it runs their networks together."""

    name: str
    together: bool
    make: Callable[[], BackEnd]


# Layers with fewer channels are narrow; networks with a larger share of their operations in such
# layers do not run in bfloat16 unasked. (The stem of a WideResNet has 16 channels.)
_MIN_CHANNELS, _MAX_NARROW = 32, 0.05
_named: ContextVar[str | None] = ContextVar("back_end", default=None)


@contextlib.contextmanager
def back_end(name: str) -> Iterator[None]:
    """Make plans inside the block on one of "avx512", "avx2", "aten" and "slab"; for tests."""
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def named_back_end() -> str | None:
    """The back end that all plans have to use here, if there is one."""
    return _named.get()


def obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why a back end cannot run here."""
    if name in INSTRUCTIONS:
        if device.type != "cpu":
            return "it runs on CPUs"
        return available(name, dtype)
    return None


def option(name: str, device: torch.device, dtype: torch.dtype) -> Option:
    """A back end by name."""
    makers: dict[str, Callable[[], BackEnd]] = {
        "aten": functools.partial(AtenBackEnd, device, dtype),
        "slab": functools.partial(SlabBackEnd, device, dtype),
    }
    makers |= {x: functools.partial(SimdBackEnd, dtype, x) for x in INSTRUCTIONS}
    return Option(name, name == "slab", makers[name])


def options(
    layers: Sequence[Layer],
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[Option]:
    """The back ends that could run these layers on images [H, W], the preferred one first."""
    dtype = dtype or default_dtype(device, layers, size)
    if (name := _named.get()) is not None:
        return [option(name, device, dtype)]
    names = [name for name in candidates(device) if obstacle(name, device, dtype) is None]
    if padded_cost(layers, size) > 1:
        names = [name for name in names if name != "avx512"]
    return [option(name, device, dtype) for name in names]


def candidates(device: torch.device) -> list[str]:
    """Back ends made for such a device; elsewhere slabs have nothing but their definition."""
    return ["slab", "aten"] if device.type == "cuda" else [*INSTRUCTIONS, "aten"]


def padded_cost(layers: Sequence[Layer], size: tuple[int, int]) -> float:
    """Roughly the time of compiled layers, as a multiple of that of stock torch.

    They fill channels up to 16 or 32, which is most of the work in the narrowest layers; attacks in
    AVX2 do not. The numbers are fits to networks of 8 to 64 channels on a Zen 4; no clock is read,
    since another process has to choose the same.
    """
    counts = flop(layers, size)
    cost = 0.0
    for layer, count in zip(layers, counts, strict=True):
        width = layer.out_channels if isinstance(layer, Conv) else 64
        cost += count * (0.5 if width > 16 else 0.65 if width > 8 else 3.0)
    return cost / max(sum(counts), 1)


def default_dtype(
    device: torch.device, layers: Sequence[Layer] = (), size: tuple[int, int] = (32, 32)
) -> torch.dtype:
    """bfloat16 where the processor multiplies it faster than float32, else float32.

    Networks that do much of their work on images [H, W] in narrow layers stay with float32:
    roundings average out over channels, and of networks of 16 PGD in bfloat16 left up to 0.4 % of
    images unbroken that it breaks in float32. They would gain little.
    """
    counts = flop(layers, size)
    narrow = sum(
        count
        for layer, count in zip(layers, counts, strict=True)
        if isinstance(layer, Conv) and layer.out_channels < _MIN_CHANNELS
    )
    if narrow > _MAX_NARROW * sum(counts) or not bfloat16_is_fast(device):
        return torch.float32
    return torch.bfloat16
