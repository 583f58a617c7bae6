"""Columns of benchmarks/bench_conv.py agree, and their gate rejects faults."""

from __future__ import annotations

import dataclasses
from typing import Any

import bench_conv
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dwf.models import build_network

CPU = torch.device("cpu")
SMALL_CONVS = [case for case in bench_conv.CASES if not case.needs_gpu]


@pytest.mark.parametrize("case", SMALL_CONVS, ids=str)
def test_convolutions_of_all_columns_are_the_same(case: Any) -> None:
    work = bench_conv.make_work(case, CPU)
    columns = {name: build() for name, build in bench_conv.builders(work).items()}
    assert set(columns) == {"eager", "ours"} | ({"grouped"} if not case.stem else set())
    assert bench_conv.judge(work, columns) == {}


@pytest.mark.parametrize("case", SMALL_CONVS, ids=str)
def test_the_gate_of_convolutions_rejects(case: Any) -> None:
    """What a layer adds to its sum left out, another expert's weights, and no result at all."""
    bare = dataclasses.replace(case, layer=case.layer._replace(residual=False, side=None))
    work, other = bench_conv.make_work(case, CPU), bench_conv.make_work(bare, CPU)
    ours = bench_conv.builders(work)["ours"]()
    left_out = bench_conv.builders(other)["ours"]()
    wrong = {"swapped": lambda: ours().flip(0), "none": lambda: torch.full_like(ours(), torch.nan)}
    if case.stem:
        wrong["swapped"] = lambda: ours().flip(1)  # images: experts share them
    if bare.layer != case.layer:
        wrong["left out"] = left_out
    assert set(bench_conv.judge(work, {"right": ours, **wrong})) == set(wrong)


def test_convolutions_timed_are_those_of_a_step() -> None:
    network = build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=0)
    leaf = torch.zeros(1, 3, 32, 32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        network.requires_grad_(False)(leaf).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    for backward, op in (
        (False, torch.ops.aten.convolution),
        (True, torch.ops.aten.convolution_backward),
    ):
        cases = [
            case
            for case in bench_conv.CASES
            if case.needs_gpu and case.num_images == 128 and case.backward is backward
        ]
        assert sum(case.count for case in cases) == 17
        gflop = sum(case.count * case.gflop for case in cases)
        assert gflop == pytest.approx(9 * 128 * counts[op] / 1e9, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.real_gpu
@pytest.mark.parametrize("case", SMALL_CONVS, ids=str)
def test_convolutions_in_graphs(case: Any) -> None:
    work = bench_conv.make_work(case, torch.device("cuda", 0))
    made = bench_conv.builders(work)
    names = {"ours", *work.stock, *bench_conv.tiles(work)}
    assert names <= set(made)
    graphs = {name: bench_conv.graphed(made[name]()) for name in names}
    assert bench_conv.judge(work, graphs) == {}
    work.inputs[0].mul_(2)  # a replay reads its inputs anew
    assert bench_conv.judge(work, {"ours": graphs["ours"]}) == {}
