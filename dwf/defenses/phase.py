"""What a defense hands to the training loop: phases, each with a module, a schedule and a step.

A step turns a batch into a loss. Attacks that several defenses train on are methods of Crafter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import moe_kernels
from dwf.attacks.ascent import Ascent, RandomStart, ascend, gradient_at_images
from dwf.attacks.losses import Loss, Model
from dwf.attacks.setup import Setup
from dwf.attacks.source import undisturbed
from dwf.attacks.space import AttackSpace, attack_space
from dwf.attacks.target import attack_target
from dwf.checks import ConfigError
from dwf.config import AttackConfig, Config, PhaseConfig, derive_seed
from dwf.models import ResNet, build_network

Number = TypeVar("Number", int, float)
# A method of Crafter: its images replace those of the batch.
Craft = Callable[["Crafter", nn.Module, "Batch"], Tensor]


@dataclass(frozen=True)
class ModelFacts:
    """What a data set decides about a model: shape [C, H, W], classes, mean and std per channel."""

    image_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def network_of(
    config: Config, facts: ModelFacts, *names: object, num_classes: int | None = None
) -> ResNet:
    """The network of ``config.model``; its weights depend on the run's seed and ``names``."""
    return build_network(
        config.model.network,
        num_classes=facts.num_classes if num_classes is None else num_classes,
        width=config.model.width,
        in_channels=facts.image_shape[0],
        seed=derive_seed(config.seed, *names),
    )


def pretrain_schedule(config: Config) -> PhaseConfig:
    """The schedule of a defense of one phase; ConfigError if there is none."""
    if config.pretrain is None:
        raise ConfigError(f"pretrain: None, but it is the schedule of {config.defense}")
    return config.pretrain


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


# ``step(model, forward, batch, crafter)`` gives the loss of a batch. It attacks ``model``, the
# module itself, and trains through ``forward``, which may be its distributed wrapper.
Step = Callable[[nn.Module, Model, "Batch", "Crafter"], StepResult]


class Update(NamedTuple):
    """One change of the weights: a step, and the names of the parameters that it changes."""

    step: Step
    trains: Callable[[str], bool] | None = None  # all


@dataclass(frozen=True)
class Phase:
    """One stage of training.

    Each batch makes one update of the weights by ``step``, or several by a sequence of Updates,
    each with its own gradient. ``gate_prefix`` names the parameters that train with the gate's
    learning rate.

    ``craft`` attacks the whole batch before ``step`` sees it. Phases with an equal craft and
    schedule, one after another and on modules that share no parameter, may be trained side by side:
    one attack then crafts the images of all of them.

    ``state`` holds tensors that steps keep from batch to batch, beside the weights; they may fill
    it, and checkpoints contain it. A phase with state trains on one process.
    """

    name: str
    module: nn.Module
    schedule: PhaseConfig
    step: Step | Sequence[Update]
    gate_prefix: str | None = None
    craft: Craft | None = None
    state: dict[str, Tensor] | None = None

    @property
    def updates(self) -> Sequence[Update]:
        return [Update(self.step)] if callable(self.step) else self.step


@dataclass(frozen=True)
class Crafter:
    """Crafts a training batch's adversarial images, with that batch's draws of strength.

    Draws depend on ``seed`` (the run's, the phase's and the step's) and nothing else, so they are
    the same on every process and after a resume. For a Group of E networks there are E seeds: each
    of E equal blocks of rows is attacked as a crafter with that seed alone would attack it.

    Attacks take a module, or a ``target`` made of one for several attacks. Plans of modules compute
    in ``plan_dtype``, by default the fastest one. ``epoch`` is that of the phase, for steps that
    begin with something else than they go on with.
    """

    attack: AttackConfig
    seed: int | tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    plan_dtype: torch.dtype | None = None
    epoch: int = 0

    def draw(self, name: str, values: Sequence[Number], sample_index: Tensor) -> Number | Tensor:
        """One of ``values``, uniformly: for the whole batch, or [B], for each image its own."""
        if isinstance(self.seed, int):
            return self._draw(self.seed, name, values, sample_index)
        blocks = sample_index.chunk(len(self.seed))
        drawn = [
            torch.as_tensor(self._draw(seed, name, values, block), device=block.device)
            for seed, block in zip(self.seed, blocks, strict=True)
        ]
        return torch.cat([x.expand(len(block)) for x, block in zip(drawn, blocks, strict=True)])

    def _draw(
        self, seed: int, name: str, values: Sequence[Number], sample_index: Tensor
    ) -> Number | Tensor:
        shared = self.attack.draw == "batch"
        index = torch.zeros(1, dtype=torch.int64) if shared else sample_index
        noise = moe_kernels.uniform_noise(derive_seed(seed, name), index, (1,), device=index.device)
        choice = (noise.flatten() * len(values)).long().clamp_(max=len(values) - 1)
        if shared:
            return values[int(choice)]
        return torch.tensor(values, device=sample_index.device)[choice]

    def target(self, model: nn.Module, batch: Batch) -> AttackSpace:
        """What attacks of this batch see: the model with the weights of this moment.

        Making it ready (folding its weights into a plan) is done once for all attacks of a step.
        """
        space = attack_space(model, self.attack.protocol, self.attack.clamp, self.mean, self.std)
        images = space.enter(batch.images)
        target = attack_target(
            space.model, images, bn_mode=self.attack.bn_mode, dtype=self.plan_dtype
        )
        return replace(space, model=target)

    def fgsm(
        self, model: nn.Module | AttackSpace, batch: Batch, gradient: Tensor | None = None
    ) -> Tensor:
        """FGSM with epsilon drawn from the configured set."""
        attack = self.attack
        space = self._space(model, batch)
        epsilon = self.draw("fgsm_epsilon", attack.fgsm_epsilon, batch.sample_index)
        how = Ascent(
            step_size=epsilon,
            num_steps=1,
            random_start=attack.fgsm_random_start,
            gradient=None if attack.fgsm_random_start else gradient,
            block_seeds=self._seeds,
        )
        return space.leave(ascend(self._setup(space, batch, epsilon), how))

    def pgd(
        self,
        model: nn.Module | AttackSpace,
        batch: Batch,
        gradient: Tensor | None = None,
        *,
        loss: str | Loss = "ce",
        random_start: RandomStart | None = None,
    ) -> Tensor:
        """PGD with the number of steps drawn from the configured set.

        ``loss`` and ``random_start`` are those of ``dwf.pgd``; by default cross-entropy, and what
        is configured.
        """
        attack = self.attack
        random_start = attack.random_start if random_start is None else random_start
        space = self._space(model, batch)
        how = Ascent(
            step_size=attack.step_size,
            num_steps=self.draw("num_steps", attack.num_steps, batch.sample_index),
            random_start=random_start,
            loss=loss,
            gradient=None if random_start else gradient,
            block_seeds=self._seeds,
        )
        return space.leave(ascend(self._setup(space, batch, attack.epsilon), how))

    def logits(self, model: nn.Module | AttackSpace, batch: Batch) -> Tensor:
        """Logits [B, K] of the benign images as attacks compute them, for a loss against them.

        By the same plan, if there is one, so that its rounding is no difference to them.
        """
        space = self._space(model, batch)
        images = space.enter(batch.images)
        target = attack_target(
            space.model, images, bn_mode=self.attack.bn_mode, dtype=self.plan_dtype
        )
        seed = self._seeds[0]
        with (
            undisturbed(target.model, images.device, bn_mode=self.attack.bn_mode, seed=seed),
            torch.no_grad(),
        ):
            logits: Tensor = (target.plan or target)(images)
        return logits.float()

    def gradient(self, model: nn.Module | AttackSpace, batch: Batch) -> Tensor:
        """The gradient at the benign images, which FGSM and PGD's first step share."""
        space = self._space(model, batch)
        return gradient_at_images(self._setup(space, batch))

    @property
    def _seeds(self) -> tuple[int, ...]:
        return (self.seed,) if isinstance(self.seed, int) else self.seed

    def _setup(self, space: AttackSpace, batch: Batch, epsilon: float | Tensor = 0.0) -> Setup:
        return Setup(
            model=space,
            images=space.enter(batch.images),
            labels=batch.labels,
            epsilon=epsilon,
            bn_mode=self.attack.bn_mode,
            seed=self._seeds[0],
            sample_index=batch.sample_index,
        )

    def _space(self, model: nn.Module | AttackSpace, batch: Batch) -> AttackSpace:
        return model if isinstance(model, AttackSpace) else self.target(model, batch)
