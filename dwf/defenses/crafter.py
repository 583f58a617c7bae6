"""Craft the adversarial images of a training batch, each step with its own draws of strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import moe_kernels
from dwf.attacks.ascent import Ascent, RandomStart, ascend, gradient_at_images
from dwf.attacks.door import undisturbed
from dwf.attacks.losses import Loss
from dwf.attacks.setup import Setup
from dwf.attacks.space import AttackSpace, attack_space
from dwf.attacks.target import attack_target
from dwf.config import AttackConfig, derive_seed
from dwf.data import Batch

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Crafter:
    """Crafts a batch's adversarial images as the configuration says.

    Draws and start noise depend on the seed, the sample and nothing else, so they are the same on
    every process and after a resume. Attacks see ``model`` with the weights of this moment, and
    leave no trace in it. Pass ``target(model, batch)`` in its place to several attacks of one step:
    then it is made ready only once.

    Attributes:
        attack: radii, steps and protocol, and the sets that strengths are drawn from.
        seed: derived from the seeds of the run, the phase and the step. With E seeds the model is
            a Group of E networks, the rows are E equal blocks, and block e is attacked as a crafter
            with seed e would attack it alone.
        mean, std: per channel, in pixel units; they define the attacked space of the protocol
            "paper-compat".
        plan_dtype: activations of the attacked model's plan; None is the fastest.
        epoch: epoch of the phase, for steps that start otherwise than they go on.
        trusted: a step of this phase was made before, so nothing is checked again.
    """

    attack: AttackConfig
    seed: int | tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    plan_dtype: torch.dtype | None = None
    epoch: int = 0
    trusted: bool = False

    def changed(self, **settings: Any) -> Crafter:
        """The same crafter with other attack settings, say ``epsilon=4 / 255``."""
        return replace(self, attack=replace(self.attack, **settings))

    def draw(self, name: str, values: Sequence[Number], sample_index: Tensor) -> Number | Tensor:
        """Draw one of ``values``, uniformly: a number for the whole batch, or [B], one per image.

        ``name`` separates this draw from others of the same step. With E seeds the result is always
        [E * B].
        """
        if isinstance(self.seed, int):
            return self._draw(self.seed, name, values, sample_index)
        drawn = []
        for seed, block in zip(self.seed, sample_index.chunk(len(self.seed)), strict=True):
            value = self._draw(seed, name, values, block)
            if not isinstance(value, Tensor):
                value = torch.full((len(block),), value, device=block.device)
            drawn.append(value)
        return torch.cat(drawn)

    def _draw(
        self, seed: int, name: str, values: Sequence[Number], sample_index: Tensor
    ) -> Number | Tensor:
        shared = self.attack.draw == "batch"
        index = torch.zeros(1, dtype=torch.int64) if shared else sample_index
        noise = moe_kernels.uniform_noise(derive_seed(seed, name), index, (1,), device=index.device)
        choice = (noise.flatten() * len(values)).long().clamp_(max=len(values) - 1)
        if shared:
            return values[int(choice)]
        drawn = torch.full_like(choice, values[0], dtype=torch.tensor(values).dtype)
        for place, value in enumerate(values):  # a tensor of them would be a copy from the host
            drawn = torch.where(choice == place, value, drawn)
        return drawn

    def target(self, model: nn.Module, batch: Batch) -> AttackSpace:
        """Make the model ready for attacks on this batch: fold its weights into a plan, once."""
        space = attack_space(model, self.attack.protocol, self.attack.clamp, self.mean, self.std)
        images = space.enter(batch.images)
        target = attack_target(
            space.model, images, bn_mode=self.attack.bn_mode, dtype=self.plan_dtype
        )
        return replace(space, model=target)

    def fgsm(
        self, model: nn.Module | AttackSpace, batch: Batch, gradient: Tensor | None = None
    ) -> Tensor:
        """FGSM with epsilon drawn from ``attack.fgsm_epsilon``: images [B, C, H, W].

        ``gradient`` is that of :meth:`gradient`; it saves a pass where FGSM starts at the image.
        """
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
        """PGD with the number of steps drawn from ``attack.num_steps``: images [B, C, H, W].

        Args:
            gradient: that of :meth:`gradient`; it saves a pass where PGD starts at the image.
            loss: as in ``dwf.pgd``.
            random_start: as in ``dwf.pgd``; None is ``attack.random_start``.
        """
        attack = self.attack
        random_start = attack.random_start if random_start is None else random_start
        space = self._space(model, batch)
        how = Ascent(
            step_size=attack.step_size,
            num_steps=self.draw("num_steps", attack.num_steps, batch.sample_index),
            most_steps=max(attack.num_steps),
            random_start=random_start,
            loss=loss,
            gradient=None if random_start else gradient,
            block_seeds=self._seeds,
        )
        return space.leave(ascend(self._setup(space, batch, attack.epsilon), how))

    def gradient(self, model: nn.Module | AttackSpace, batch: Batch) -> Tensor:
        """Gradient [B, C, H, W] at the benign images: the first step of FGSM and of PGD."""
        return gradient_at_images(self._setup(self._space(model, batch), batch))

    def logits(self, model: nn.Module | AttackSpace, batch: Batch) -> Tensor:
        """Logits [B, K] float32 of the benign images, for a loss that compares with them.

        The attack's plan computes them, if there is one, so that its rounding is no difference.
        """
        bn_mode = self.attack.bn_mode
        space = self._space(model, batch)
        images = space.enter(batch.images)
        target = attack_target(space.model, images, bn_mode=bn_mode, dtype=self.plan_dtype)
        seed = self._seeds[0]
        with undisturbed(target.model, images.device, bn_mode=bn_mode, seed=seed), torch.no_grad():
            logits: Tensor = (target.plan or target)(images)
        return logits.float()

    @property
    def _seeds(self) -> tuple[int, ...]:
        return (self.seed,) if isinstance(self.seed, int) else self.seed

    def _setup(self, space: AttackSpace, batch: Batch, epsilon: float | Tensor = 0.0) -> Setup:
        """The attack's problem in this space; gradients need no epsilon."""
        return Setup(
            model=space,
            images=space.enter(batch.images),
            labels=batch.labels,
            epsilon=epsilon,
            norm=self.attack.norm,
            bn_mode=self.attack.bn_mode,
            seed=self._seeds[0],
            sample_index=batch.sample_index,
            trusted=self.trusted,
        )

    def _space(self, model: nn.Module | AttackSpace, batch: Batch) -> AttackSpace:
        return model if isinstance(model, AttackSpace) else self.target(model, batch)


# ``craft(crafter, model, batch)``: adversarial images [B, C, H, W] for those of the batch.
# ``Crafter.fgsm`` and ``Crafter.pgd`` are such functions.
Craft = Callable[[Crafter, nn.Module, Batch], Tensor]
