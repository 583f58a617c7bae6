"""Every convolution of a ResNet-18's attack step on a CPU, beside what its products allow.

The limit of a layer is the time that its products take at the rate of a large bfloat16 product,
measured in the same run; 3x3 convolutions of stride 1 run by Winograd's F(2x4, 3x3), which needs a
third of them. The rest of a step has no such limit: what moves images, pooling, head and loss.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench import Bench
from bench_step import matmul_tflop_per_s

from dwf.models import build_network
from moe_kernels import Plan
from moe_kernels.plan.back_ends.simd import SimdBackEnd
from moe_kernels.plan.layers import Conv, Layer
from moe_kernels.plan.program import Member
from moe_kernels.processor import bfloat16_is_fast

BATCH_SIZE = 64
NUM_ROUNDS = 2 if os.environ.get("DWF_BENCH_QUICK") else 9
WINOGRAD_SHARE = 1 / 3  # of the products; outputs of 2x4 from 4x6 products, not 8x9


class Watch:
    """Seconds of each convolution of a member, by layer and direction, one number a round."""

    def __init__(self, member: Member) -> None:
        self.seconds: dict[tuple[Conv, str], list[float]] = defaultdict(list)
        self._round: dict[tuple[Conv, str], float] = defaultdict(float)
        for name, way in (("conv", "forward"), ("conv_input_grad", "gradient")):
            setattr(member.back_end, name, self._timed(getattr(member.back_end, name), way))

    def _timed(self, function: Callable[..., Any], way: str) -> Callable[..., Any]:
        def run(layer: Conv, *args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            out = function(layer, *args, **options)
            self._round[layer, way] += time.perf_counter() - began  # of all parts of the batch
            return out

        return run

    def end_round(self) -> None:
        """Keep what the round took."""
        for key, seconds in self._round.items():
            self.seconds[key].append(seconds)
        self._round.clear()


def sizes(layers: list[Layer], image_size: int) -> dict[int, int]:
    """The side of each value's maps: convolutions of a ResNet keep it or divide it."""
    found = {0: image_size}
    for layer in layers:
        if isinstance(layer, Conv):
            found[layer.output] = found[layer.source] // layer.stride
    return found


def gflop(layer: Conv, pixels: int) -> float:
    """Of one image, with the projection that is added in the same pass."""
    taps = layer.in_channels * layer.kernel[0] * layer.kernel[1]
    if layer.projection is not None:
        taps += layer.projection.in_channels
    return 2 * taps * layer.out_channels * pixels**2 / 1e9


def measure(bench: Bench) -> dict[str, Any]:
    """The row: a step's convolutions grouped by what they are, each with its share of the limit."""
    network = build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH_SIZE, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (BATCH_SIZE,), generator=generator)
    plan = Plan([network], dtype=torch.bfloat16)
    plan.gradient(images, labels)
    (member,) = plan._program(images).members
    if not isinstance(member.back_end, SimdBackEnd):
        pytest.skip(f"convolutions run on {member.back_end.name}")
    watch, steps = Watch(member), []
    rate = matmul_tflop_per_s(bench.device)
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        plan.gradient(images, labels)
        steps.append(time.perf_counter() - began)
        watch.end_round()
    rate = max(rate, matmul_tflop_per_s(bench.device))
    step_ms = 1e3 * statistics.median(steps)
    layers = _by_kind(watch, sizes(list(member.layers), 32), rate)
    conv_ms = sum(x["ms"] for x in layers)
    limit_ms = sum(x["limit_ms"] for x in layers)
    bench.say(
        f"step {step_ms:.0f} ms: convolutions {conv_ms:.0f}, of which products allow "
        f"{limit_ms:.0f} at {1e3 * rate:.0f} GFLOP/s"
    )
    return {
        "bench": "layers",
        "case": f"resnet18-B{BATCH_SIZE}",
        "batch_size": BATCH_SIZE,
        "bf16_matmul_tflop_per_s": rate,
        "limit_ms": limit_ms,
        "layers": layers,
        "columns": {
            "ours": {"median_ms": step_ms, "ratio": 1.0},
            "convolutions": {"median_ms": conv_ms, "ratio": conv_ms / step_ms},
        },
    }


def _by_kind(watch: Watch, size_of: dict[int, int], rate: float) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (layer, way), seconds in watch.seconds.items():
        pixels = size_of[layer.output]
        winograd = layer.kernel == (3, 3) and layer.stride == 1 and layer.in_channels > 3
        work = BATCH_SIZE * gflop(layer, pixels)
        limit = work * (WINOGRAD_SHARE if winograd else 1.0) / rate  # GFLOP by TFLOP/s: ms
        shape = f"{layer.in_channels} -> {layer.out_channels} at {pixels}, stride {layer.stride}"
        if layer.projection is not None:
            shape += ", with projection"
        key = shape, way
        kind = found.setdefault(
            key,
            {"layer": shape, "way": way, "winograd": winograd, "count": 0}
            | {"ms": 0.0, "limit_ms": 0.0},
        )
        kind["count"] += 1
        kind["ms"] += 1e3 * statistics.median(seconds)
        kind["limit_ms"] += limit
    return list(found.values())


def test_share_of_the_limit(bench: Bench) -> None:
    bench.require(gpu=False)
    if not bfloat16_is_fast(bench.device):
        pytest.skip("this CPU has no instructions for bfloat16")
    bench.record(measure(bench))
