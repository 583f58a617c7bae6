"""Build the contenders of a joint training step: algorithm 3 by line, best stock torch, ours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attack_columns import eager_attack, stock_attack
from step_models import (
    EPSILON,
    LEARNING_RATE,
    MEAN,
    MOMENTUM,
    STD,
    WEIGHT_DECAY,
    Case,
    PlainMixture,
    input_gradient,
    joint_config,
    plain_model,
)
from torch import Tensor, nn

import dwf
from dwf.bench.stock import COMPILE, first_that_runs, without_tf32
from dwf.defenses import Batch, Crafter, get
from dwf.training.optimizer import Optimizer
from moe_kernels import TrainMode
from moe_kernels.plan.choose import default_dtype


class Training:
    """One contender: a call takes one joint step of algorithm 3 and returns its loss, a scalar."""

    model: nn.Module
    ran: str
    precision: str

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class EagerTraining(Training):
    """Algorithm 3 line by line: float32, NCHW, each attack on its own."""

    ran, precision = "float32, NCHW, autograd", "float32"

    def __init__(self, mixture: dwf.Mixture, num_steps: int, total_steps: int) -> None:
        self.model = plain_model(mixture)
        self._attack = eager_attack(self.model)
        self._num_steps = num_steps
        self._optimizer, self._schedule = make_sgd(self.model, total_steps)

    @without_tf32
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.model.eval()
        gradient = input_gradient(self.model, images, labels)
        fgsm = (images + EPSILON * gradient.sign()).clamp(0, 1)
        pgd = self._attack(images, labels, self._num_steps)
        self.model.train()
        logits = self.model(torch.cat([images, fgsm, pgd]))
        loss = F.cross_entropy(logits, labels.repeat(3))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()


class StockTraining(Training):
    """Algorithm 3 in the best stock torch: StockAttack, whose first gradient serves FGSM as well;
    bfloat16 autocast, compiled experts and fused SGD in the training step.

    No graph around the training step: at its size the GPU is slower than the launches.
    """

    def __init__(
        self,
        mixture: dwf.Mixture,
        images: Tensor,
        num_steps: int,
        total_steps: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool,
        graphed: bool,
    ) -> None:
        self.model = PlainMixture(mixture, torch.channels_last).train()
        self._attack = stock_attack(
            mixture, images, dtype=dtype, compiled=compiled, graphed=graphed
        )
        self._dtype = dtype
        self._num_steps = num_steps
        self._optimizer, self._schedule = make_sgd(self.model, total_steps, fused=True)
        if compiled:
            self.model.compile_experts()
            # Compiles for all of them, and must not move the statistics of any.
            spare = torch.compile(copy.deepcopy(self.model.experts[0]), **COMPILE)
            rows = torch.cat([images] * 3).contiguous(memory_format=torch.channels_last)
            with self._autocast(images.device):
                spare(self.model.normalize(rows)).float().sum().backward()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        attack = self._attack
        attack.load(images, labels)
        attack.step()
        fgsm = (attack.images + EPSILON * attack.gradient.sign()).clamp(0, 1)
        for _ in range(self._num_steps - 1):
            attack.step()
        batch = torch.cat([attack.images, fgsm, attack.adversarial])
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self._autocast(images.device):
                logits = self.model(batch)
            loss = F.cross_entropy(logits.float(), labels.repeat(3))
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        attack.follow(self.model)
        return loss.detach()

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype is not torch.float32)


class OurTraining(Training):
    """The step of dwf.train, without the average of the weights, which no other column takes."""

    def __init__(self, mixture: dwf.Mixture, case: Case, precision: str, total_steps: int) -> None:
        config = joint_config(case, precision)
        self.model = copy.deepcopy(mixture)
        self.ran, self.precision = f"dwf's joint step, precision={config.precision}", precision
        (self._phase,) = get("dwf").phases(self.model, config)
        self._optimizer = Optimizer(self._phase, total_steps)
        dtype = torch.float32 if precision == "float32" else None
        self._crafter = Crafter(config.attack, 0, MEAN, STD, dtype)
        self._forward = TrainMode(self.model) if next(mixture.parameters()).is_cpu else self.model
        self._step = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        batch = Batch(images, labels, torch.arange(len(images), device=images.device))
        self._optimizer.set_step(self._step)
        self._step += 1
        self._optimizer.zero_grad()
        self.model.train()
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
            result = self._phase.step(self.model, self._forward, batch, self._crafter)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return result.loss.detach()


def make_sgd(
    model: nn.Module, total_steps: int, **options: Any
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR]:
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, **options
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


class WithoutTF32(Training):
    """Another training, in full float32."""

    def __init__(self, training: Training) -> None:
        self.model, self.ran, self.precision = training.model, training.ran, training.precision
        self._call = without_tf32(training)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._call(images, labels)


def stock_training(
    mixture: dwf.Mixture,
    num_steps: int,
    images: Tensor,
    total_steps: int,
    dtype: torch.dtype,
    *,
    compiles: bool = False,
) -> Training:
    """StockTraining in the fastest variant that runs on this machine; see `first_that_runs`."""
    build = functools.partial(StockTraining, mixture, images, num_steps, total_steps, dtype=dtype)
    training, ran = first_that_runs(build, images.device, compiles=compiles)
    training.precision = str(dtype).removeprefix("torch.")
    training.ran = f"{training.precision}, {ran}"
    return training


def our_full_float32(mixture: dwf.Mixture, case: Case, total_steps: int) -> Training:
    """OurTraining in float32, with convolutions that never use TF32."""
    return WithoutTF32(OurTraining(mixture, case, "float32", total_steps))


def training_columns(
    mixture: dwf.Mixture, case: Case, images: Tensor, total_steps: int
) -> dict[str, Callable[[], Training]]:
    """Return a builder for every contender; the others are compared with the first one."""
    stock = functools.partial(stock_training, mixture, case.num_steps, images, total_steps)
    ours = functools.partial(OurTraining, mixture, case, total_steps=total_steps)
    columns: dict[str, Callable[[], Training]] = {
        "eager": functools.partial(EagerTraining, mixture, case.num_steps, total_steps)
    }
    dtype = default_dtype(images.device)
    columns["stock"] = functools.partial(stock, dtype, compiles=case.takes_minutes)
    columns["ours"] = functools.partial(ours, precision=str(dtype).removeprefix("torch."))
    if dtype is torch.float32:
        return columns
    if images.device.type == "cuda":
        columns["ours fp32"] = functools.partial(our_full_float32, mixture, case, total_steps)
    else:
        columns["stock fp32"] = functools.partial(stock, torch.float32)
        columns["ours fp32"] = functools.partial(ours, precision="float32")
    return columns
