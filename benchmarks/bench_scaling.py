"""How an attack on the mixture grows with experts, images and steps: eager, stock torch, ours.

    pytest benchmarks/bench_scaling.py                      # the first point of each curve
    DWF_BENCH_FULL=1 pytest benchmarks/bench_scaling.py     # all points, stock compiled too

A column is timed only if its images stay in the ball and gain as much loss as eager's.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from attack_columns import attack_columns
from bench import Bench
from bench_step import describe
from gates import mean_loss
from step_models import EPSILON, Case, make_inputs, plain_model

pytestmark = pytest.mark.filterwarnings("default")  # a compiler's remark ends no measurement

CONTENDERS = ("eager", "stock", "stock fp32", "ours")
MIN_GAIN = 0.9
MIDDLE = Case("resnet10", 32, 32, batch_size=8, num_steps=4, needs_gpu=False)
# More images a step, fewer steps: a point takes seconds.
CURVES = {
    "experts": [replace(MIDDLE, num_experts=count) for count in range(1, 10)],
    "images": [
        replace(MIDDLE, num_experts=3, batch_size=size, num_steps=max(32 // size, 2))
        for size in (1, 2, 4, 8, 16, 32, 64, 128)
    ],
    "steps": [
        replace(MIDDLE, num_experts=3, batch_size=4, num_steps=steps)
        for steps in (1, 2, 5, 10, 20, 50)
    ],
}


def measure(curve: str, case: Case, bench: Bench, *, compiles: bool) -> dict[str, Any]:
    """The row of one point: every contender judged, then timed round by round."""
    torch.compiler.reset()
    mixture, images, labels = make_inputs(case, bench.device)
    builders = attack_columns(mixture, images, labels, compiles=compiles)
    columns = {name: builders[name]() for name in CONTENDERS if name in builders}
    if compiles:  # a compiler loses where most layers are small
        plainly = attack_columns(mixture, images, labels)
        columns["stock, not compiled"] = plainly["stock"]()
    reference = plain_model(mixture)
    before, gains = mean_loss(reference, images, labels), {}
    for name, column in columns.items():
        adversarial = column.attack(images, labels, case.num_steps)
        assert float((adversarial - images).abs().amax()) <= EPSILON + 1e-6, name
        gains[name] = mean_loss(reference, adversarial, labels) - before
        assert gains[name] >= MIN_GAIN * gains["eager"], f"{name} gains {gains[name]:.3g} of loss"
    times = bench.time(
        {name: column.attack for name, column in columns.items()},
        (images, labels, case.num_steps),
        min_samples=3,
        min_s=0.3,
    )
    ran = {name: column.ran for name, column in columns.items()}
    quality = {name: {"gain_over_eager": gain / gains["eager"]} for name, gain in gains.items()}
    return {
        "bench": "scaling",
        "curve": curve,
        "case": f"{curve}-E{case.num_experts}-B{case.batch_size}-S{case.num_steps}",
        "network": case.network,
        "width": case.width,
        "num_experts": case.num_experts,
        "batch_size": case.batch_size,
        "num_steps": case.num_steps,
        "image_shape": list(images.shape[1:]),
        "columns": describe(times, case.num_steps, case.batch_size, ran, quality),
    }


def _points() -> list[Any]:
    points = []
    for curve, cases in CURVES.items():
        for number, case in enumerate(cases):
            name = f"{curve}-E{case.num_experts}-B{case.batch_size}-S{case.num_steps}"
            points.append(pytest.param(curve, case, number == 0, id=name))
    return points


@pytest.mark.parametrize(("curve", "case", "is_first"), _points())
def test_point(curve: str, case: Case, is_first: bool, bench: Bench) -> None:
    bench.require(gpu=case.needs_gpu, minutes=not is_first)
    compiles = bool(os.environ.get("DWF_BENCH_FULL"))
    bench.record(measure(curve, case, bench, compiles=compiles))
