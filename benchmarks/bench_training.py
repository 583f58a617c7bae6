"""One training step of a single network: eager torch, the best stock torch, ours.

    DWF_BENCH_FULL=1 pytest benchmarks/bench_training.py

A step is forward, backward and SGD with momentum on images as they are ("steps 0"), or on images
that PGD attacked before, as adversarial training does. A column is timed only if its first update
points where eager's does. Networks are untrained, since the time of a step does not depend on the
weights. Ours is what `dwf.train` calls in a step, in either of its precisions.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_columns import OurAttack, eager_attack
from bench import Bench
from bench_architectures import IMAGE_SHAPE, make_network
from bench_step import describe, effort
from gates import build_all, first_update, judge_training
from step_models import EPSILON, LEARNING_RATE, MOMENTUM, STEP_SIZE, WEIGHT_DECAY, open_relus
from torch import Tensor, nn
from training_columns import Training

import dwf
from dwf.bench.attack import StockAttack
from dwf.bench.stock import COMPILE, first_that_runs, without_tf32
from moe_kernels import TrainMode
from moe_kernels.plan.choose import default_dtype

pytestmark = pytest.mark.filterwarnings("default")

# network, images of a batch, steps of PGD before the training step
CASES = [("resnet18", 64, 0), ("resnet18", 16, 10), ("preactresnet18", 64, 0), ("wrn16_4", 64, 0)]


class Step(Training):
    """A training step in one precision, of a forward that may be compiled, after an attack."""

    def __init__(
        self, network: nn.Module, num_steps: int, ran: str, precision: str, *, fused: bool = True
    ) -> None:
        self.model, self.ran, self.precision = network.train(), ran, precision
        self.num_steps = num_steps
        self.forward: Any = network
        self.attack: Any = None
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            LEARNING_RATE,
            MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=fused or None,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.num_steps:
            self.model.eval()
            images = self.attack(images, labels, self.num_steps)
            self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def eager_step(network: nn.Module, num_steps: int) -> Step:
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    step = Step(plain, num_steps, "float32, NCHW, autograd", "float32", fused=False)
    step.attack = eager_attack(plain)
    return step


def stock_step(
    network: nn.Module, num_steps: int, images: Tensor, dtype: torch.dtype, *, compiles: bool
) -> Step:
    """channels_last, compiled if that is wanted and runs; the attack without a tape for weights."""
    precision = str(dtype).removeprefix("torch.")
    images = images.contiguous(memory_format=torch.channels_last)

    def build(*, compiled: bool, graphed: bool) -> Step:
        model = copy.deepcopy(network).to(memory_format=torch.channels_last)
        step = Step(model, num_steps, precision, precision)
        if compiled:
            step.forward = torch.compile(model, **COMPILE)
            spare = torch.compile(copy.deepcopy(model), **COMPILE)  # for the code, not the weights
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                spare(images).float().sum().backward()
        if num_steps:
            attacked = copy.deepcopy(network).to(memory_format=torch.channels_last).eval()
            step.attack = _Following(
                StockAttack(
                    torch.compile(attacked, **COMPILE) if compiled else attacked,
                    images,
                    EPSILON,
                    STEP_SIZE,
                    dtype=dtype,
                    compiled=compiled,
                    graphed=graphed,
                ),
                model,
            )
        return step

    step, ran = first_that_runs(build, images.device, compiles=compiles)
    step.ran = f"{precision}, {ran}"
    return step


class _Following:
    """A stock attack on a copy that takes over the trained weights at each call."""

    def __init__(self, attack: StockAttack, model: nn.Module) -> None:
        self._attack, self._model = attack, model

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        self._attack.follow(self._model)
        return self._attack(images, labels, num_steps)


def our_step(network: nn.Module, num_steps: int, precision: str) -> Step:
    model = copy.deepcopy(network)
    # the plain optimizer, as `dwf.train` has it
    step = Step(model, num_steps, f"dwf's step, {precision}", precision, fused=False)
    step.forward = TrainMode(model)
    dtype = torch.float32 if precision == "float32" else None
    step.attack = OurAttack(dwf.accelerate(model), dtype)
    return step


@pytest.mark.parametrize("case", CASES, ids=lambda x: f"{x[0]}-B{x[1]}-steps{x[2]}")
def test_training_step(case: tuple[str, int, int], bench: Bench) -> None:
    name, batch_size, num_steps = case
    bench.require(gpu=False, minutes=True)
    torch.compiler.reset()
    network = open_relus(make_network(name)).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, *IMAGE_SHAPE, generator=generator)
    labels = torch.randint(10, (batch_size,), generator=generator)
    expected = first_update(without_tf32(eager_step)(network, num_steps), images, labels)

    def judge(step: Training) -> dict[str, float]:
        return judge_training(step, first_update(step, images, labels), expected)

    dtype = default_dtype(bench.device)
    stock = functools.partial(stock_step, network, num_steps, images)
    builders = {
        "eager": lambda: eager_step(network, num_steps),
        "stock": lambda: stock(dtype, compiles=True),
        "stock, not compiled": lambda: stock(dtype, compiles=False),
        "ours": lambda: our_step(network, num_steps, str(dtype).removeprefix("torch.")),
    }
    if dtype is not torch.float32:
        builders["stock, float32"] = lambda: stock(torch.float32, compiles=False)
        builders["ours, float32"] = lambda: our_step(network, num_steps, "float32")
    columns, quality, skipped = build_all(builders, judge, bench.say)
    times = bench.time(columns, (images, labels), **effort(bench.device))
    ran = {key: step.ran for key, step in columns.items()}
    bench.record(
        {
            "bench": "training",
            "case": f"{name}-B{batch_size}-steps{num_steps}",
            "network": name,
            "batch_size": batch_size,
            "image_shape": list(IMAGE_SHAPE),
            "num_steps": num_steps,
            "epsilon": EPSILON,
            "step_size": STEP_SIZE,
            "bn_mode": "eval",
            "columns": describe(times, 1, batch_size, ran, quality),
            "skipped": skipped,
        }
    )
