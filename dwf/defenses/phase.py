"""What a defense hands to the training loop: phases, each with a module, a schedule and a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import moe_kernels
from dwf.attacks import fgsm, pgd
from dwf.attacks.pgd import input_gradient
from dwf.attacks.source import Model
from dwf.attacks.views import AttackSpace, attack_space
from dwf.config import AttackConfig, PhaseConfig, derive_seed

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ModelFacts:
    """What a data set decides about a model: shape [C, H, W], classes, mean and std per channel."""

    image_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """``images`` [B, C, H, W] float32 in [0, 1], ``labels`` [B], ``sample_index`` [B]."""

    images: Tensor
    labels: Tensor
    sample_index: Tensor


class StepResult(NamedTuple):
    """``loss`` to minimize, and the rows behind it: ``logits`` [R, K], ``labels`` [R].

    The first ``num_clean`` rows are benign, the rest attacked.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    num_clean: int


@dataclass(frozen=True)
class Phase:
    """One stage of training.

    ``step(model, forward, batch, crafter)`` gives the loss of a batch. It attacks ``model``, the
    module itself, and trains through ``forward``, which may be its distributed wrapper.
    ``gate`` names the parameters (by prefix) that train with the gate's learning rate.
    """

    name: str
    module: nn.Module
    schedule: PhaseConfig
    step: Callable[[nn.Module, Model, Batch, Crafter], StepResult]
    gate_prefix: str | None = None


@dataclass(frozen=True)
class Crafter:
    """Crafts a training batch's adversarial images, with that batch's draws of strength.

    Draws depend on ``seed`` (the run's, the phase's and the step's) and nothing else, so they are
    the same on every process and after a resume.
    """

    attack: AttackConfig
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def draw(self, name: str, values: Sequence[Number], sample_index: Tensor) -> Number | Tensor:
        """One of ``values``, uniformly: for the whole batch, or [B], for each image its own."""
        shared = self.attack.draw == "batch"
        index = torch.zeros(1, dtype=torch.int64) if shared else sample_index
        noise = moe_kernels.uniform_noise(
            derive_seed(self.seed, name), index, (1,), device=index.device
        )
        choice = (noise.flatten() * len(values)).long().clamp_(max=len(values) - 1)
        if shared:
            return values[int(choice)]
        return torch.tensor(values, device=sample_index.device)[choice]

    def fgsm(self, model: nn.Module, batch: Batch, gradient: Tensor | None = None) -> Tensor:
        """FGSM with epsilon drawn from the configured set."""
        attack = self.attack
        space = self._space(model)
        adversarial = fgsm(
            space.model,
            space.enter(batch.images),
            batch.labels,
            epsilon=self.draw("fgsm_epsilon", attack.fgsm_epsilon, batch.sample_index),
            random_start=attack.fgsm_random_start,
            bn_mode=attack.bn_mode,
            seed=self.seed,
            sample_index=batch.sample_index,
            gradient=None if attack.fgsm_random_start else gradient,
            clamp=space.clamp,
        )
        return space.leave(adversarial)

    def pgd(self, model: nn.Module, batch: Batch, gradient: Tensor | None = None) -> Tensor:
        """PGD with the number of steps drawn from the configured set."""
        attack = self.attack
        space = self._space(model)
        adversarial = pgd(
            space.model,
            space.enter(batch.images),
            batch.labels,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            num_steps=self.draw("num_steps", attack.num_steps, batch.sample_index),
            random_start=attack.random_start,
            bn_mode=attack.bn_mode,
            seed=self.seed,
            sample_index=batch.sample_index,
            gradient=None if attack.random_start else gradient,
            clamp=space.clamp,
        )
        return space.leave(adversarial)

    def gradient(self, model: nn.Module, batch: Batch) -> Tensor:
        """The gradient at the benign images, which FGSM and PGD's first step share."""
        space = self._space(model)
        return input_gradient(
            space.model,
            space.enter(batch.images),
            batch.labels,
            bn_mode=self.attack.bn_mode,
            seed=self.seed,
            clamp=space.clamp,
        )

    def _space(self, model: nn.Module) -> AttackSpace:
        return attack_space(model, self.attack.protocol, self.attack.clamp, self.mean, self.std)
