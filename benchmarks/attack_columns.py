"""Build the contenders of an attack step: autograd, the best stock torch, toolboxes, ours."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from step_models import EPSILON, STEP_SIZE, PlainMixture, plain_model
from torch import Tensor, nn

import dwf
from dwf.attacks import attack_target
from dwf.bench import attack
from dwf.bench.attack import Attack, StockAttack
from dwf.bench.stock import first_that_runs, without_tf32
from moe_kernels.plan.choose import default_dtype


class Column(NamedTuple):
    """One contender. `precision` is that of the network: "float32" or "bfloat16"."""

    attack: Attack
    ran: str
    precision: str
    logits: Callable[[Tensor], Tensor] | None = None

    def in_full_float32(self) -> Column:
        """The same contender, with convolutions that never use TF32."""
        logits = None if self.logits is None else without_tf32(self.logits)
        return self._replace(attack=without_tf32(self.attack), logits=logits)


def eager_attack(model: nn.Module) -> Attack:
    """PGD as toolboxes write it, with the radius and step size of all cases."""
    return attack.eager_attack(model, EPSILON, STEP_SIZE)


def stock_attack(
    mixture: dwf.Mixture,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool,
    graphed: bool,
) -> StockAttack:
    """The attack of a good engineer on the mixture in stock torch ops, its experts compiled."""
    model = PlainMixture(mixture, torch.channels_last).eval()
    if compiled:
        model.compile_experts()
    budget = EPSILON, STEP_SIZE
    return StockAttack(model, images, *budget, dtype=dtype, compiled=compiled, graphed=graphed)


class OurAttack:
    """dwf.pgd on the model's plan. Weights are folded at every call, as in a training step."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        return dwf.pgd(
            attack_target(self._model, images, dtype=self._dtype),
            images,
            labels,
            epsilon=EPSILON,
            step_size=STEP_SIZE,
            num_steps=num_steps,
            random_start=False,
        )


# Columns ----------------------------------------------------------------------------------------


def eager_column(plain: PlainMixture) -> Column:
    """Float32 in full precision: the column that the others are compared with."""
    return Column(
        eager_attack(plain), "float32, NCHW, autograd", "float32", plain
    ).in_full_float32()


def eager_tf32_column(plain: PlainMixture) -> Column:
    """Convolutions in TF32, torch's default on a GPU; its gate is that of bfloat16."""
    return Column(eager_attack(plain), "as eager, with TF32", "bfloat16")


def stock_column(
    mixture: dwf.Mixture, images: Tensor, dtype: torch.dtype, *, compiles: bool
) -> Column:
    """StockAttack in the fastest variant that runs on this machine."""
    precision = str(dtype).removeprefix("torch.")
    build = functools.partial(stock_attack, mixture, images, dtype=dtype)
    stock, ran = first_that_runs(build, images.device, compiles=compiles)
    return Column(stock, f"{precision}, {ran}", precision, stock.logits)


def torchattacks_column(plain: PlainMixture) -> Column:
    """torchattacks.PGD; ImportError if it is not installed."""
    torchattacks = importlib.import_module("torchattacks")
    toolbox = torchattacks.PGD(plain, eps=EPSILON, alpha=STEP_SIZE, steps=1, random_start=False)

    def run(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        toolbox.steps = num_steps
        adversarial: Tensor = toolbox(images, labels)
        return adversarial

    return Column(run, "torchattacks.PGD", "float32").in_full_float32()


def foolbox_column(plain: PlainMixture, device: torch.device) -> Column:
    """foolbox's LinfPGD; ImportError if it is not installed."""
    foolbox = importlib.import_module("foolbox")
    adopted = foolbox.models.PyTorchModel(plain, bounds=(0, 1), device=device)

    def run(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        toolbox = foolbox.attacks.LinfPGD(
            abs_stepsize=STEP_SIZE, steps=num_steps, random_start=False
        )
        criterion = foolbox.criteria.Misclassification(labels)
        adversarial: Tensor = toolbox.run(adopted, images, criterion, epsilon=EPSILON)
        return adversarial

    return Column(run, "foolbox LinfPGD", "float32").in_full_float32()


def our_column(mixture: dwf.Mixture, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Column:
    """OurAttack, warmed up; RuntimeError if the mixture has no plan here."""
    target = attack_target(mixture, images, dtype=dtype)
    if target.plan is None:
        raise RuntimeError(f"the mixture has no plan: {target.reason}")
    ours = OurAttack(mixture, dtype)
    for _ in range(3):  # a graph is captured at the second step
        ours(images, labels, 2)
    ran = f"dwf.pgd, {target.plan.back_end}, {target.plan.graphs.status}"
    column = Column(ours, ran, str(dtype).removeprefix("torch."), target.plan)
    return column.in_full_float32() if dtype is torch.float32 else column


def attack_columns(
    mixture: dwf.Mixture, images: Tensor, labels: Tensor, *, compiles: bool = False
) -> dict[str, Callable[[], Column]]:
    """Return a builder for every contender; the others are compared with the first one.

    `compiles`: give torch.compile the time it takes on a CPU as well.
    """
    plain = plain_model(mixture)
    stock = functools.partial(stock_column, mixture, images, compiles=compiles)
    ours = functools.partial(our_column, mixture, images, labels)
    dtype = default_dtype(images.device)
    columns = {
        "eager": functools.partial(eager_column, plain),
        "stock": functools.partial(stock, dtype),
        "torchattacks": functools.partial(torchattacks_column, plain),
        "foolbox": functools.partial(foolbox_column, plain, images.device),
        "ours": functools.partial(ours, dtype),
    }
    if dtype is not torch.float32:
        columns["ours fp32"] = functools.partial(ours, torch.float32)
        if images.device.type == "cpu":
            columns["stock fp32"] = functools.partial(stock, torch.float32)
    if images.device.type == "cuda":
        columns["eager tf32"] = functools.partial(eager_tf32_column, plain)
    return columns
