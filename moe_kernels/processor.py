"""Say which instructions this machine's processor has, and what it multiplies fast."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def has_avx2_alone() -> bool:
    """Whether this CPU has AVX2 and not AVX-512."""
    return "avx2" in cpu_flags() and "avx512f" not in cpu_flags()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instructions of this machine's CPU by their Linux names; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())
