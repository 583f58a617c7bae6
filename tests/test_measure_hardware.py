"""Measurements of benchmarks/measure_hardware.py: their arithmetic, their kernel, their summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import measure_hardware
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dwf.models import build_network
from moe_kernels import lang

CPU = torch.device("cpu")


def test_convolutions_are_those_of_the_network() -> None:
    network = build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    stated = sum(conv.count * conv.gflop(1) for conv in measure_hardware.RESNET18)
    assert stated == pytest.approx(counted / 1e9, rel=1e-12)
    assert len(measure_hardware.RESNET18) == 11
    assert measure_hardware.RESNET18[1].gflop(2, groups=9) == pytest.approx(18 * 0.075497472)


def test_a_measurement_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_broken(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
        yield {"measurement": "first"}
        raise RuntimeError("no such instruction")

    def whole(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
        yield {"measurement": "second"}

    monkeypatch.setattr(measure_hardware, "MEASUREMENTS", [half_broken, whole])
    later = time.monotonic() + 60
    found = list(measure_hardware.measure(CPU, small=True, deadline=later))
    assert [x["measurement"] for x in found] == ["first", "half_broken", "second"]
    assert found[1]["skipped"] == "RuntimeError: no such instruction"
    found = list(measure_hardware.measure(CPU, small=True, deadline=time.monotonic() - 1))
    assert [x["skipped"] for x in found] == ["the time was up"] * 2


def test_summary_weighs_convolutions_as_they_occur() -> None:
    base = {"measurement": "conv bf16", "batch_size": 128, "pass_": "forward"}
    rows = [
        {**base, "conv": "a", "count": 3, "median_ms": 1.0, "tflop_per_s": 100.0},
        {**base, "conv": "b", "count": 1, "median_ms": 3.0, "tflop_per_s": 20.0},
        {"measurement": "cache_bandwidth", "skipped": "no Triton"},
    ]
    lines = measure_hardware.summarize(rows)
    assert lines[0] == "cache_bandwidth: skipped, no Triton"
    assert "60.0 TFLOP/s over the network (20.0 to 100.0; 2 of 11 kinds)" in lines[1]


@pytest.mark.gpu
@pytest.mark.real_gpu
def test_every_measurement_runs_on_a_gpu() -> None:
    later = time.monotonic() + 300
    found = measure_hardware.measure(torch.device("cuda", 0), small=True, deadline=later)
    assert [x for x in found if "skipped" in x] == []


@pytest.mark.skipif(lang.missing is not None, reason=f"{lang.missing}")
@pytest.mark.skipif(lang.interpreted, reason="the interpreter's kernels are not compiled")
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
def test_the_reading_kernel_compiles_and_bypasses_l1(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = measure_hardware.read_kernel
    types = ["*fp32", "*fp32", "i32", "i32", "constexpr"]
    source = ASTSource(
        kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs={"BLOCK": measure_hardware.READ_BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(2)},
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    compiled = lang.triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    assert loads
    assert all(".cg." in line and ".v4." in line for line in loads)
