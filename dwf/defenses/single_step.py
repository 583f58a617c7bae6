"""Train one network at the price of one or two gradients a step: Free-AT, Fast-AT and N-FGSM.

    free-at     `replays` updates a batch, with one backward pass each: its gradient at the weights
                changes the weights, its gradient g at the images changes the perturbation,
                    delta <- clip(x + clamp(delta + epsilon sign(g), -epsilon, epsilon), 0, 1) - x
                which starts at 0 and is carried from replay to replay and from batch to batch
    fast-at     FGSM from a uniform point of the ball, by a step longer than epsilon
    n-fgsm      x0 = clip(x + noise epsilon U(-1, 1)), x' = clip(x0 + step epsilon sign(gradient)):
                a wider start, and x' is not brought back into the ball

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
code has both; N-FGSM, de Jorge et al., arXiv:2202.01181, whose noise is 2 epsilon and step epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import moe_kernels
from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_count, check_positive
from dwf.config import Config, Options, derive_seed
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


@dataclass(frozen=True)
class NFgsmOptions(Options, defense="n-fgsm"):
    """The start's noise and the step's length, both in units of ``attack.epsilon``."""

    noise: float = 2.0
    step: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.noise, "options.noise", zero_allowed=True)
        check_positive(self.step, "options.step")


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    schedule = pretrain_schedule(config)
    options = config.options
    if isinstance(options, FastAtOptions):
        craft = partial(fast_attack, step_size=options.step_size)
        step = partial(attacked_step, craft=craft)
        return [Phase("train", model, schedule, step)]
    check_pixels(config)
    if isinstance(options, NFgsmOptions):
        craft = partial(noisy_attack, options=options)
        return [Phase("train", model, schedule, partial(attacked_step, craft=craft))]
    assert isinstance(options, FreeAtOptions)
    state: dict[str, Tensor] = {}
    updates = [Update(free_step(state))] * options.replays
    return [Phase("train", model, schedule, updates, state=state)]


def fast_attack(crafter: Crafter, model: nn.Module, batch: Batch, *, step_size: float) -> Tensor:
    """One step of PGD from a uniform point of the ball."""
    fast = crafter.changed(step_size=step_size, num_steps=(1,))
    return fast.pgd(model, batch, random_start=True)


def noisy_attack(
    crafter: Crafter, model: nn.Module, batch: Batch, *, options: NFgsmOptions
) -> Tensor:
    """N-FGSM: noise around the image, then one step that is not brought back into the ball."""
    assert isinstance(crafter.seed, int)
    epsilon, images = crafter.attack.epsilon, batch.images
    seed, shape = derive_seed(crafter.seed, "noise"), tuple(images.shape[1:])
    noise = moe_kernels.uniform_noise(seed, batch.sample_index, shape, device=images.device)
    start = torch.clamp(images + options.noise * epsilon * (2 * noise - 1), 0, 1)
    gradient = crafter.gradient(model, batch._replace(images=start))
    return torch.clamp(start + options.step * epsilon * gradient.sign(), 0, 1)


def check_pixels(config: Config) -> None:
    """Require attacks on pixels in L-inf, which these methods write out; ConfigError."""
    attack = config.attack
    if (attack.protocol, attack.norm) != ("pixels", "linf"):
        raise ConfigError(
            f"attack: protocol {attack.protocol!r} and norm {attack.norm!r}, but {config.defense} "
            "attacks pixels in linf"
        )


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
        return train_on(forward, adversarial, batch.wanted, 0)

    return step
