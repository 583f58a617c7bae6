"""Measure the ceilings of a machine: memory, L2 cache, launches, matrix products, cuDNN.

    python benchmarks/measure_hardware.py --out measurements.jsonl [--minutes 3]

These are the ceilings that kernels are designed and judged by. Inputs are random, because zeros
draw less power and run faster. One JSON line per measurement, written at once; what does not work,
or no longer fits into the time, says so. `--small` runs everything at sizes that prove nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch starts its threads: spinning ones cost a whole time slice each on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from moe_kernels import lang
from moe_kernels.lang import tl, triton
from moe_kernels.timing import Timing, compare, environment

MIB = 2**20
CACHE_MIB = (8, 16, 24, 32, 40, 48, 64, 96, 256)
READ_BLOCK = 4096  # floats that a program loads at once: four 16-byte loads a thread
READS = 2**33  # bytes that one launch reads, many times over the working set
CONV_BATCHES = (128, 256, 1152)  # the paper's; twice it; nine experts' worth

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conv:
    """One kind of convolution of the CIFAR ResNet-18; `count` of them in the network."""

    in_channels: int
    out_channels: int
    size: int  # of the input
    kernel: int
    stride: int
    count: int

    def gflop(self, batch_size: int, groups: int = 1) -> float:
        out_size = self.size // self.stride
        per_pixel = 2 * self.in_channels * self.out_channels * self.kernel**2
        return groups * batch_size * out_size**2 * per_pixel / 1e9

    def __str__(self) -> str:
        return (
            f"{self.in_channels}->{self.out_channels} {self.kernel}x{self.kernel} at {self.size}, "
            f"stride {self.stride}"
        )


RESNET18 = [
    Conv(3, 64, 32, 3, 1, 1),
    Conv(64, 64, 32, 3, 1, 4),
    Conv(64, 128, 32, 3, 2, 1),
    Conv(64, 128, 32, 1, 2, 1),
    Conv(128, 128, 16, 3, 1, 3),
    Conv(128, 256, 16, 3, 2, 1),
    Conv(128, 256, 16, 1, 2, 1),
    Conv(256, 256, 8, 3, 1, 3),
    Conv(256, 512, 8, 3, 2, 1),
    Conv(256, 512, 8, 1, 2, 1),
    Conv(512, 512, 4, 3, 1, 3),
]


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(data_ptr, sums_ptr, num_blocks, num_reads, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads blocks spread over the whole array and stores the sum of what it read."""
    program = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_reads):
        block = (program + i * tl.num_programs(0)) % num_blocks
        offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        # .cg: past the L1 cache, which would answer for a working set of its own size.
        sums += tl.load(data_ptr + offsets, cache_modifier=".cg")
    tl.store(sums_ptr + program, tl.sum(sums, axis=0))


def time_call(function: Callable[..., Any], *inputs: Any) -> Timing:
    return compare({"it": function}, inputs, min_samples=10, min_s=0.02)["it"]


def row(measurement: str, took: Timing, **facts: Any) -> Row:
    return {
        "measurement": measurement,
        **facts,
        "median_ms": took.median_ms,
        "p20_ms": took.p20_ms,
        "p80_ms": took.p80_ms,
        "num_samples": took.num_samples,
    }


def copy_bandwidth(device: torch.device, small: bool) -> Iterator[Row]:
    """Device memory, in bytes read plus bytes written."""
    num_bytes = MIB if small else 2**32
    if device.type == "cuda":
        num_bytes = min(num_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.rand(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    took = time_call(target.copy_, source)
    rate = 2 * source.nbytes / took.median_ms / 1e6
    yield row("memory copy", took, mib=source.nbytes // MIB, gb_per_s=rate)


def cache_bandwidth(device: torch.device, small: bool) -> Iterator[Row]:
    """Reads of a working set, over and over, that bypass the L1 caches."""
    if device.type != "cuda":
        raise NotImplementedError("its kernel is written in Triton, for GPUs")
    if lang.missing:
        raise NotImplementedError(lang.missing)
    # Four programs on every multiprocessor, all resident: latency is hidden by the others.
    num_programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    for mib in CACHE_MIB[:1] if small else CACHE_MIB:
        num_blocks = mib * MIB // (4 * READ_BLOCK)
        num_reads = READS // (4 * READ_BLOCK * num_programs)
        data = torch.rand(num_blocks * READ_BLOCK, device=device)
        sums = torch.empty(num_programs, device=device)

        def read(
            data: Tensor, sums: Tensor, num_blocks: int = num_blocks, num_reads: int = num_reads
        ) -> None:
            options = {"num_warps": 8, "enable_fp_fusion": False}
            read_kernel[(len(sums),)](data, sums, num_blocks, num_reads, READ_BLOCK, **options)

        read(data, sums)
        # Every block is read equally often, or one time more: the mean tells whether all were.
        mean = float(sums.double().sum()) / (num_programs * num_reads * READ_BLOCK)
        if abs(mean - 0.5) > 0.01:
            raise ArithmeticError(f"the mean of what was read is {mean:.4f}, expected 0.5")
        took = time_call(read, data, sums)
        num_bytes = 4 * READ_BLOCK * num_programs * num_reads
        yield row("cache read", took, mib=mib, gb_per_s=num_bytes / took.median_ms / 1e6)


def launch_cost(device: torch.device, small: bool) -> Iterator[Row]:
    """Many tiny kernels: launched one by one, and as nodes of one CUDA graph."""
    count = 10 if small else 1000
    value = torch.zeros(1024, device=device)

    def launches(value: Tensor) -> None:
        for _ in range(count):
            value.add_(1.0)

    took = time_call(launches, value)
    yield row("launch", took, num_kernels=count, us_per_kernel=1e3 * took.median_ms / count)
    if device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches(value)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launches(value)
    # The tensor tells `compare` that this runs on the GPU.
    took = time_call(lambda value: graph.replay(), value)
    yield row("graph node", took, num_kernels=count, us_per_kernel=1e3 * took.median_ms / count)


def matmul_rate(device: torch.device, small: bool) -> Iterator[Row]:
    """bfloat16 products of random matrices; with half of one's values zero, as after ReLU; and with
    all of them zero, which draws the least power."""
    for size in (64,) if small else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        for name, left in (("random", a), ("half zeros", a.relu()), ("zeros", a * 0)):
            took = time_call(torch.matmul, left, b)
            rate = 2 * size**3 / took.median_ms / 1e9
            yield row("matmul bf16", took, size=size, values=name, tflop_per_s=rate)


def conv_rate(device: torch.device, small: bool) -> Iterator[Row]:
    """bfloat16 channels_last convolutions of the ResNet-18: forward, and both gradients."""
    for batch_size in (2,) if small else CONV_BATCHES:
        for conv in RESNET18[-2:] if small else RESNET18:
            yield from _conv_rows(conv, batch_size, 1, device)


def grouped_conv_rate(device: torch.device, small: bool) -> Iterator[Row]:
    """The same for nine experts in one call with groups=9, which is what vmap makes of them."""
    for conv in RESNET18[-2:-1] if small else [x for x in RESNET18 if x.kernel == 3]:
        yield from _conv_rows(conv, 2 if small else 128, 9, device)


def _conv_rows(conv: Conv, batch_size: int, groups: int, device: torch.device) -> Iterator[Row]:
    def make(*shape: int) -> Tensor:
        value = torch.randn(shape, device=device).bfloat16()
        return value.to(memory_format=torch.channels_last)

    out_size, padding = conv.size // conv.stride, conv.kernel // 2
    images = make(batch_size, groups * conv.in_channels, conv.size, conv.size)
    weight = make(groups * conv.out_channels, conv.in_channels, conv.kernel, conv.kernel)
    grad = make(batch_size, groups * conv.out_channels, out_size, out_size)

    def forward(images: Tensor) -> Tensor:
        return torch.conv2d(images, weight, None, conv.stride, padding, 1, groups)

    def backward(images: Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad,
            images,
            weight,
            bias_sizes=None,
            stride=[conv.stride] * 2,
            padding=[padding] * 2,
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=groups,
            output_mask=mask,
        )

    passes: dict[str, Callable[[Tensor], Any]] = {
        "forward": forward,
        "grad_images": lambda images: backward(images, [True, False, False]),
        "grad_weight": lambda images: backward(images, [False, True, False]),
    }
    for name, function in passes.items():
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            took = time_call(function, images)
        yield row(
            "conv bf16" if groups == 1 else "grouped conv bf16",
            took,
            conv=str(conv),
            count=conv.count,
            pass_=name,
            batch_size=batch_size,
            groups=groups,
            tflop_per_s=conv.gflop(batch_size, groups) / took.median_ms,
        )


# Cheap ones and those that decide most first.
MEASUREMENTS: list[Callable[[torch.device, bool], Iterator[Row]]] = [
    copy_bandwidth,
    cache_bandwidth,
    launch_cost,
    matmul_rate,
    conv_rate,
    grouped_conv_rate,
]


def measure(device: torch.device, *, small: bool, deadline: float) -> Iterator[Row]:
    """All rows; a measurement that fails or no longer fits gives one with the reason."""
    for measurement in MEASUREMENTS:
        name = measurement.__name__
        rows = measurement(device, small)
        while True:
            if time.monotonic() > deadline:
                yield {"measurement": name, "skipped": "the time was up"}
                break
            try:
                yield next(rows)
            except StopIteration:
                break
            except Exception as error:
                # Whatever it is, the next measurement may work.
                yield {"measurement": name, "skipped": f"{type(error).__name__}: {error}"}
                break


def summarize(rows: list[Row]) -> list[str]:
    """A line for each measurement. Convolutions share one for each batch size and pass, weighted by
    how often they occur in the network."""
    lines = []
    passes: dict[tuple[str, int, str], list[Row]] = {}
    for x in rows:
        name = x["measurement"]
        if "skipped" in x:
            lines.append(f"{name}: skipped, {x['skipped']}")
        elif "conv" in x:
            passes.setdefault((name, x["batch_size"], x["pass_"]), []).append(x)
        elif "gb_per_s" in x:
            lines.append(f"{name}, {x['mib']} MiB: {x['gb_per_s']:.0f} GB/s")
        elif "us_per_kernel" in x:
            lines.append(f"{name}: {x['us_per_kernel']:.2f} us")
        elif "tflop_per_s" in x:
            lines.append(f"{name}, {x['size']}, {x['values']}: {x['tflop_per_s']:.1f} TFLOP/s")
    for (name, batch_size, pass_), found in passes.items():
        ms = sum(x["count"] * x["median_ms"] for x in found)
        tflop = sum(x["count"] * x["tflop_per_s"] * x["median_ms"] for x in found)
        slowest, fastest = (pick(x["tflop_per_s"] for x in found) for pick in (min, max))
        lines.append(
            f"{name}, N={batch_size}, {pass_}: {tflop / ms:.1f} TFLOP/s over the network "
            f"({slowest:.1f} to {fastest:.1f}; {len(found)} of {len(RESNET18)} kinds)"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to it")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--small", action="store_true", help="try everything, measure nothing")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows: list[Row] = []
    with options.out.open("a", encoding="utf-8") as file:
        facts = {"measurement": "environment", "small": options.small, **environment(device)}
        file.write(json.dumps(facts) + "\n")
        deadline = time.monotonic() + 60 * options.minutes
        for found in measure(device, small=options.small, deadline=deadline):
            rows.append(found)
            file.write(json.dumps(found) + "\n")
            file.flush()
    print("\n".join(summarize(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
