"""Time functions fairly: the columns of one comparison take turns inside one run.

Clocks, heat and neighbors then hurt all columns alike, and ratios stay meaningful on a machine that
is shared. On CUDA a call is timed between two events after the L2 cache was overwritten, on
the CPU by `perf_counter`.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels import lang, native
from moe_kernels.processor import has_avx2_alone

# Larger than the L2 cache of any GPU so far (126 MB on B200).
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """One column: milliseconds per call, and its time as a multiple of the first column's."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    num_samples: int
    ratio: float


def compare(
    columns: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Any],
    *,
    min_samples: int = 100,
    min_s: float = 0.2,
    after_round: Callable[[Mapping[str, list[float]]], None] | None = None,
) -> dict[str, Timing]:
    """Time every function on the same inputs, in turns; a GPU if a tensor of `inputs` is on one.

    Each column is warmed up by three calls, then rounds of one call each go on until every column
    has `min_samples` samples and `min_s` seconds. `ratio` is the median over the rounds of its
    time divided by that of the first column in the same round. `after_round` is called with all
    samples so far, in milliseconds by column.
    """
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    sample = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    for function in columns.values():
        for _ in range(3):
            sample(function, inputs)
    samples: dict[str, list[float]] = {name: [] for name in columns}
    order = list(columns)
    while any(len(times) < min_samples or sum(times) < 1e3 * min_s for times in samples.values()):
        for name in order:
            samples[name].append(sample(columns[name], inputs))
        # Nobody always follows the same neighbor.
        order.append(order.pop(0))
        if after_round is not None:
            after_round(samples)
    return summarize(samples)


def summarize(samples: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Timings of columns with equally many samples, at least two; ratios are to the first one."""
    first = next(iter(samples.values()))
    return {name: _summarize(times, first) for name, times in samples.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, threads, commit and date of a measurement, as JSON values."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if lang.missing else lang.triton.__version__,
        "num_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        **_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "driver": driver_version()}
    return facts


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of this machine's CPU, and that it has AVX2 if nothing newer."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                return f"{name}, AVX2" if has_avx2_alone() else name
    return platform.processor() or platform.machine()


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown" where the kernel module does not tell."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit()), "unknown")


def device_slug(device: torch.device) -> str:
    """`device_name` as a part of file names: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _cpu_sample(function: Callable[..., Any], inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    function(*inputs)
    return 1e3 * (time.perf_counter() - start)


def _cuda_sampler(device: torch.device) -> Callable[[Callable[..., Any], Sequence[Any]], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    # Any: torch leaves this class without types.
    timed_event: Any = functools.partial(torch.cuda.Event, enable_timing=True)

    def sample(function: Callable[..., Any], inputs: Sequence[Any]) -> float:
        with torch.cuda.device(device):
            start, end = timed_event(), timed_event()
            # The host queues the call while this runs, so that launch gaps do not count.
            flush.zero_()
            start.record()
            function(*inputs)
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))

    return sample


def _summarize(times: Sequence[float], first: Sequence[float]) -> Timing:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times, first, strict=True))
    return Timing(statistics.median(times), p20, p80, len(times), ratio)


def _commit() -> dict[str, Any]:
    """The commit of the source, and whether it had changes: as they are, or as they were built."""
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    story = native.build_story() or {}
    return {"commit": story.get("commit"), "dirty": bool(story.get("dirty"))}


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():  # installed: a repository around it would be another's
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
