"""Build the contenders of an attack step: autograd, the best stock torch, toolboxes, ours."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from step_models import EPSILON, STEP_SIZE, PlainMixture, plain_model
from stock import COMPILE, captured, first_that_runs, without_tf32
from torch import Tensor, nn

import dwf
from dwf.attacks import attack_target

Attack = Callable[[Tensor, Tensor, int], Tensor]  # images, labels, num_steps -> adversarial


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
    """PGD as toolboxes write it."""

    def attack(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        adversarial = images.clone()
        for _ in range(num_steps):
            adversarial.requires_grad_()
            loss = F.cross_entropy(model(adversarial), labels)
            (grad,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial.detach() + STEP_SIZE * grad.sign()
            delta = (moved - images).clamp(-EPSILON, EPSILON)
            adversarial = (images + delta).clamp(0, 1)
        return adversarial

    return attack


def move_(adversarial: Tensor, gradient: Tensor, images: Tensor) -> None:
    """Sign, step, projection and clip, in place."""
    moved = adversarial + STEP_SIZE * gradient.sign()
    moved = torch.minimum(torch.maximum(moved, images - EPSILON), images + EPSILON)
    adversarial.copy_(moved.clamp(0, 1))


class StockAttack:
    """PGD as a good engineer writes it for one model and batch size, in stock torch.

    channels_last, bfloat16 weights under autocast (which would cast frozen float32 ones anew at
    every step), parameters frozen, experts and update compiled, a whole step in one CUDA graph.
    BatchNorm is not folded: compiled, it is part of the pass over memory that ReLU needs anyway.
    The image that moves stays float32.
    """

    def __init__(
        self,
        mixture: dwf.Mixture,
        images: Tensor,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool,
        graphed: bool,
    ) -> None:
        self.model = PlainMixture(mixture, torch.channels_last).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
        self._dtype = dtype
        self._move = move_
        if compiled:
            self.model.compile_experts()
            self._move = torch.compile(move_, **COMPILE)
        self.images = images.contiguous(memory_format=torch.channels_last).clone()
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.adversarial = self.images.clone()
        self.gradient = torch.empty_like(self.images)
        self.step: Callable[[], None] = self._step
        if graphed:
            self.step = captured(self._step)
        else:
            self._step()

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        self.load(images, labels)
        for _ in range(num_steps):
            self.step()
        return self.adversarial.clone()

    def load(self, images: Tensor, labels: Tensor) -> None:
        """Start from other images, in place: a graph knows addresses."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.adversarial.copy_(images)

    def follow(self, model: nn.Module) -> None:
        """Take over the weights and statistics of a model with the same layers, in place."""
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        with torch.no_grad():
            for dtype in {mine.dtype for mine, _ in pairs}:
                mine, theirs = zip(*(pair for pair in pairs if pair[0].dtype is dtype), strict=True)
                torch._foreach_copy_(mine, theirs)

    def logits(self, images: Tensor) -> Tensor:
        """As a step computes them, also by what was compiled for it: same layout, with a tape."""
        leaf = images.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        with torch.enable_grad():
            return self._logits(leaf).detach()

    def _logits(self, leaf: Tensor) -> Tensor:
        # The cache of casts would hand a tensor of one capture to the next.
        with torch.autocast(
            leaf.device.type,
            self._dtype,
            enabled=self._dtype is not torch.float32,
            cache_enabled=False,
        ):
            logits: Tensor = self.model(leaf)
        return logits.float()

    def _step(self) -> None:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            leaf = self.adversarial.detach().requires_grad_()
            loss = F.cross_entropy(self._logits(leaf), self.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        self.gradient.copy_(gradient)
        self._move(self.adversarial, self.gradient, self.images)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Floating parameters and buffers, in the order of the layers."""
    return [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]


class OurAttack:
    """dwf.pgd on the mixture's plan. Weights are folded at every call, as in a training step."""

    def __init__(self, mixture: dwf.Mixture, dtype: torch.dtype) -> None:
        self._mixture = mixture
        self._dtype = dtype

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        return dwf.pgd(
            attack_target(self._mixture, images, dtype=self._dtype),
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
    build = functools.partial(StockAttack, mixture, images, dtype=dtype)
    attack, ran = first_that_runs(build, images.device, compiles=compiles)
    return Column(attack, f"{precision}, {ran}", precision, attack.logits)


def torchattacks_column(plain: PlainMixture) -> Column:
    """torchattacks.PGD; ImportError if it is not installed."""
    torchattacks = importlib.import_module("torchattacks")
    attack = torchattacks.PGD(plain, eps=EPSILON, alpha=STEP_SIZE, steps=1, random_start=False)

    def run(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        attack.steps = num_steps
        adversarial: Tensor = attack(images, labels)
        return adversarial

    return Column(run, "torchattacks.PGD", "float32").in_full_float32()


def foolbox_column(plain: PlainMixture, device: torch.device) -> Column:
    """foolbox's LinfPGD; ImportError if it is not installed."""
    foolbox = importlib.import_module("foolbox")
    adopted = foolbox.models.PyTorchModel(plain, bounds=(0, 1), device=device)

    def run(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        attack = foolbox.attacks.LinfPGD(
            abs_stepsize=STEP_SIZE, steps=num_steps, random_start=False
        )
        criterion = foolbox.criteria.Misclassification(labels)
        adversarial: Tensor = attack.run(adopted, images, criterion, epsilon=EPSILON)
        return adversarial

    return Column(run, "foolbox LinfPGD", "float32").in_full_float32()


def our_column(mixture: dwf.Mixture, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Column:
    """OurAttack, warmed up; RuntimeError if the mixture has no plan here."""
    target = attack_target(mixture, images, dtype=dtype)
    if target.plan is None:
        raise RuntimeError(f"the mixture has no plan: {target.reason}")
    attack = OurAttack(mixture, dtype)
    for _ in range(3):  # a graph is captured at the second step
        attack(images, labels, 2)
    ran = f"dwf.pgd, {target.plan.back_end}, {target.plan.graphs.status}"
    column = Column(attack, ran, str(dtype).removeprefix("torch."), target.plan)
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
    columns = {
        "eager": functools.partial(eager_column, plain),
        "stock": functools.partial(stock, torch.bfloat16),
        "torchattacks": functools.partial(torchattacks_column, plain),
        "foolbox": functools.partial(foolbox_column, plain, images.device),
        "ours": functools.partial(ours, torch.bfloat16),
        "ours fp32": functools.partial(ours, torch.float32),
    }
    if images.device.type == "cuda":
        columns["eager tf32"] = functools.partial(eager_tf32_column, plain)
    else:
        columns["stock fp32"] = functools.partial(stock, torch.float32)
    return columns
