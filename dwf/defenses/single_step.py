"""Train one network at the price of one or two gradients a step: Free-AT and Fast-AT.

    free-at     `replays` updates a batch, with one backward pass each: its gradient at the weights
                changes the weights, its gradient g at the images changes the perturbation,
                    delta <- clip(x + clamp(delta + epsilon sign(g), -epsilon, epsilon), 0, 1) - x
                which starts at 0 and is carried from replay to replay and from batch to batch
    fast-at     FGSM from a uniform point of the ball, by a step longer than epsilon

| point                   | the papers or their code                | here                         |
|-------------------------|-----------------------------------------|------------------------------|
| Free-AT, a new batch    | row b starts with row b's delta of the  | as there; x + delta is       |
|                         | batch before, x + delta may leave [0, 1]| clipped to [0, 1] first      |
| Free-AT, learning rate  | changes with each replay                | with each batch              |
| Free-AT, processes      | several                                 | one: delta is not shared     |
| Fast-AT, BatchNorm      | batch statistics in the attack          | eval mode; `attack.bn_mode`  |
|                         |                                         | "train" for the other        |
| collapse                | Fast-AT's code may stop, if PGD-5       | any run warns, or stops by   |
|                         | accuracy on one training batch drops by | `on_collapse`; on the        |
|                         | over 20 points                          | validation images            |

Sources: Free-AT, Shafahi et al., arXiv:1904.12843; Fast-AT, Wong et al., arXiv:2001.03994, whose
code has both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import moe_kernels
from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_count, check_positive
from dwf.config import Config, Options
from dwf.data import Batch
from dwf.defenses.adversarial_training import build
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, Step, StepResult, Update, pretrain_schedule
from dwf.defenses.steps import TrainOn, attacked_step, cross_entropy_step

__all__ = ["build", "phases"]


@dataclass(frozen=True)
class FreeAtOptions(Options, defense="free-at"):
    """``replays``: updates on each batch. An epoch costs as much as so many of plain training."""

    replays: int = 8

    def __post_init__(self) -> None:
        check_count(self.replays, "options.replays")


@dataclass(frozen=True)
class FastAtOptions(Options, defense="fast-at"):
    """``step_size`` of the one step, in pixel units; that of `attack` is for validation."""

    step_size: float = 10 / 255

    def __post_init__(self) -> None:
        check_positive(self.step_size, "options.step_size")


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    schedule = pretrain_schedule(config)
    options = config.options
    if isinstance(options, FastAtOptions):
        craft = partial(fast_attack, step_size=options.step_size)
        step = partial(attacked_step, craft=craft)
        return [Phase("train", model, schedule, step)]
    assert isinstance(options, FreeAtOptions)
    if config.attack.protocol != "pixels":
        raise ConfigError(f"attack.protocol: {config.attack.protocol!r}, free-at attacks pixels")
    state: dict[str, Tensor] = {}
    updates = [Update(free_step(state))] * options.replays
    return [Phase("train", model, schedule, updates, state=state)]


def fast_attack(crafter: Crafter, model: nn.Module, batch: Batch, *, step_size: float) -> Tensor:
    """One step of PGD from a uniform point of the ball."""
    fast = crafter.changed(step_size=step_size, num_steps=(1,))
    return fast.pgd(model, batch, random_start=True)


def free_step(state: dict[str, Tensor], train_on: TrainOn = cross_entropy_step) -> Step:
    """CE(f(x + delta), y), or another loss, whose backward pass also moves ``state["delta"]``."""

    def step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
        epsilon, images = crafter.attack.epsilon, batch.images
        moved = torch.clamp(images + state.get("delta", torch.zeros_like(images)), 0, 1)
        adversarial = moved.clone().requires_grad_()

        # a hook, because the loop calls backward when this step is over
        def carry(gradient: Tensor) -> None:
            moe_kernels.linf_step_(moved, gradient, images, epsilon, epsilon)
            state["delta"] = moved - images

        adversarial.register_hook(carry)  # type: ignore[no-untyped-call]
        return train_on(forward, adversarial, batch.labels, 0)

    return step
