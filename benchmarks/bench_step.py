"""One PGD step of the mixture and one joint training step: toolboxes, the best stock torch, ours.

Every column has to move the images like the reference before it is timed: a red gate prints no
number. Networks are untrained, since the time of a step does not depend on the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from attack_columns import attack_columns
from bench import Bench
from gates import (
    build_all,
    first_update,
    gflop_per_image,
    judge_attack,
    judge_training,
    make_reference,
)
from step_models import EPSILON, STEP_SIZE, Case, make_inputs
from training_columns import EagerTraining, Training, training_columns

from moe_kernels.op import registry
from moe_kernels.plan.choose import default_dtype
from moe_kernels.timing import Timing, compare

# A compiler's remark about an unused feature must not end a measurement.
pytestmark = pytest.mark.filterwarnings("default")

PGD_CASES = [
    Case("resnet10", 8, 32, batch_size=8, num_steps=3, needs_gpu=False),
    Case("resnet6", 16, 8, batch_size=64, num_steps=8, needs_gpu=False),
    *(
        Case("resnet18", 64, 32, B, num_steps=steps, needs_gpu=False, takes_minutes=True)
        for B, steps in ((64, 1), (8, 4), (1, 4))
    ),
    *(Case("resnet18", 64, 32, B, num_steps=4, needs_gpu=True) for B in (128, 512, 256, 32)),
]
TRAINING_CASES = [
    Case("resnet10", 8, 16, batch_size=8, num_steps=3, needs_gpu=False),
    Case("resnet18", 64, 32, batch_size=8, num_steps=10, needs_gpu=False, takes_minutes=True),
    Case("resnet18", 64, 32, batch_size=128, num_steps=10, needs_gpu=True),
]


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a large product on this machine at this moment."""
    size = 8192 if device.type == "cuda" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    took = compare({"matmul": torch.matmul}, (a, b), min_samples=3, min_s=0.0)["matmul"]
    return 2 * size**3 / took.p20_ms / 1e9


def describe(
    times: Mapping[str, Timing],
    num_steps: int,
    batch_size: int,
    ran: Mapping[str, str],
    quality: Mapping[str, dict[str, float]],
) -> dict[str, dict[str, Any]]:
    """Per column, milliseconds of one step out of `num_steps` that were timed together."""
    columns = {}
    for name, time in times.items():
        median_ms = time.median_ms / num_steps
        columns[name] = {
            "median_ms": median_ms,
            "p20_ms": time.p20_ms / num_steps,
            "p80_ms": time.p80_ms / num_steps,
            "num_samples": time.num_samples,
            "ratio": time.ratio,
            "images_per_s": 1e3 * batch_size / median_ms,
            "ran": ran[name],
            **quality[name],
        }
    return columns


def facts(case: Case, device: torch.device) -> dict[str, Any]:
    """The part of a row that says what was run."""
    return {
        "bench": "step",
        "network": case.network,
        "width": case.width,
        "num_experts": case.num_experts,
        "batch_size": case.batch_size,
        "image_shape": [3, case.image_size, case.image_size],
        "num_steps": case.num_steps,
        "epsilon": EPSILON,
        "step_size": STEP_SIZE,
        "random_start": False,
        "bn_mode": "eval",
        "implementation": {
            "softmax_combine": registry()["softmax_combine"].selected(device, torch.bfloat16),
            "linf_step_": registry()["linf_step_"].selected(device, torch.float32),
        },
    }


def effort(device: torch.device) -> dict[str, Any]:
    """How long a case is timed: every call is a whole attack or training step."""
    if device.type == "cuda":
        return {"min_samples": 10, "min_s": 0.5}
    return {"min_samples": 5, "min_s": 0.0}


def measure_attack(case: Case, bench: Bench) -> dict[str, Any]:
    """The row of one case: every contender's attack of `num_steps` steps, judged and timed."""
    torch.compiler.reset()  # each case is compiled for its own shapes
    mixture, images, labels = make_inputs(case, bench.device)
    reference = make_reference(mixture, images, labels, case.num_steps)
    judge = functools.partial(
        judge_attack,
        reference=reference,
        mixture=mixture,
        images=images,
        labels=labels,
        num_steps=case.num_steps,
    )
    builders = attack_columns(mixture, images, labels, compiles=case.takes_minutes)
    columns, quality, skipped = build_all(builders, judge, bench.say)
    gflop = gflop_per_image(mixture, images, labels)
    dtype = default_dtype(bench.device)
    before = matmul_tflop_per_s(bench.device, dtype)
    times = bench.time(
        {name: column.attack for name, column in columns.items()},
        (images, labels, case.num_steps),
        **effort(bench.device),
    )
    ran = {name: column.ran for name, column in columns.items()}
    described = describe(times, case.num_steps, case.batch_size, ran, quality)
    # Before and after: the columns ran at clocks somewhere between.
    matmul = max(before, matmul_tflop_per_s(bench.device, dtype))
    for column_row in described.values():
        rate = gflop * column_row["images_per_s"] / 1e3
        column_row |= {"tflop_per_s": rate, "of_matmul": rate / matmul}
    return {
        **facts(case, bench.device),
        "case": f"pgd-step-{case}",
        "kind": "pgd step",
        "gflop_per_image": gflop,
        "matmul_tflop_per_s": matmul,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "columns": described,
        "skipped": skipped,
    }


def measure_training(case: Case, bench: Bench) -> dict[str, Any]:
    """The row of one case: every contender's joint training step, judged and timed."""
    torch.compiler.reset()
    mixture, images, labels = make_inputs(case, bench.device)
    # So long a schedule that the learning rate stays what it is while the clock runs.
    total_steps = 1_000_000
    expected = first_update(EagerTraining(mixture, case.num_steps, total_steps), images, labels)

    def judge(training: Training) -> dict[str, float]:
        return judge_training(training, first_update(training, images, labels), expected)

    builders = training_columns(mixture, case, images, total_steps)
    columns, quality, skipped = build_all(builders, judge, bench.say)
    times = bench.time(columns, (images, labels), **effort(bench.device))
    ran = {name: training.ran for name, training in columns.items()}
    return {
        **facts(case, bench.device),
        "case": f"training-step-{case}",
        "kind": "training step",
        "columns": describe(times, 1, case.batch_size, ran, quality),
        "skipped": skipped,
    }


@pytest.mark.parametrize("case", PGD_CASES, ids=str)
def test_pgd_step(case: Case, bench: Bench) -> None:
    bench.require(gpu=case.needs_gpu, minutes=case.takes_minutes)
    bench.record(measure_attack(case, bench))


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_training_step(case: Case, bench: Bench) -> None:
    bench.require(gpu=case.needs_gpu, minutes=case.takes_minutes)
    bench.record(measure_training(case, bench))
