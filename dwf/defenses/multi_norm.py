"""Train one network on attacks in L-inf and L2 at once: their maximum, average, or steepest step.

    max         CE(f(x'), y), x' the one of x'_inf and x'_2 of larger loss, image by image
    average     mean of CE(f(x'_inf), y) and CE(f(x'_2), y)
    msd         as max, but the choice is made at each step: from the same point one step of each
                norm, each brought back into its ball, and the one of larger loss goes on

`attack` has the radius and step in L-inf, the options those in L2.

| point       | the papers or their code        | here                            |
|-------------|---------------------------------|---------------------------------|
| norms       | L-inf, L2 and L1                | L-inf and L2                    |
| steps       | as many for each norm; msd 50   | ``attack.num_steps`` for each   |
| msd's start | the image                       | as there                        |

Sources: max and average, Tramer and Boneh, arXiv:1904.13000; msd, Maini et al., arXiv:1909.04068.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks import norms
from dwf.attacks.losses import Model
from dwf.attacks.space import AttackSpace
from dwf.checks import ConfigError, check_choice, check_positive
from dwf.config import Config, Options
from dwf.data import Batch
from dwf.defenses.adversarial_training import build
from dwf.defenses.building import options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, pretrain_schedule
from dwf.defenses.steps import cross_entropy_step

__all__ = ["build", "phases"]


@dataclass(frozen=True)
class MultiNormOptions(Options, defense="multi-norm"):
    """How the norms are combined, and the ball and step in L2, in units of [0, 1] pixels."""

    combine: Literal["max", "average", "msd"] = "max"
    l2_epsilon: float = 0.5
    l2_step_size: float = 0.1

    def __post_init__(self) -> None:
        check_choice(self.combine, ("max", "average", "msd"), "options.combine")
        check_positive(self.l2_epsilon, "options.l2_epsilon")
        check_positive(self.l2_step_size, "options.l2_step_size")


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``.

    Raises:
        ConfigError: ``attack.norm`` is not "linf".
    """
    if config.attack.norm != "linf":
        raise ConfigError("attack.norm: 'l2', but multi-norm takes L2 from its options")
    step = partial(multi_norm_step, options=options_of(config, MultiNormOptions))
    return [Phase("train", model, pretrain_schedule(config), step)]


def multi_norm_step(
    model: nn.Module, forward: Model, batch: Batch, crafter: Crafter, *, options: MultiNormOptions
) -> StepResult:
    """The loss of the module's docstring."""
    target = crafter.target(model, batch)
    if options.combine == "msd":
        images = steepest(crafter, target, batch, options)
        return cross_entropy_step(forward, images, batch.wanted, 0)
    in_l2 = crafter.changed(norm="l2", epsilon=options.l2_epsilon, step_size=options.l2_step_size)
    both = [crafter.pgd(target, batch), in_l2.pgd(target, batch)]
    if options.combine == "average":
        wanted = batch.repeated(2).wanted
        return cross_entropy_step(forward, torch.cat(both), wanted, 0)
    images = worse(crafter, target, batch, both)
    return cross_entropy_step(forward, images, batch.wanted, 0)


def steepest(
    crafter: Crafter, target: AttackSpace, batch: Batch, options: MultiNormOptions
) -> Tensor:
    """Images [B, C, H, W] after steps of which each takes the norm of larger loss."""
    attack, images = crafter.attack, batch.images
    balls = {
        "linf": (attack.epsilon, attack.step_size),
        "l2": (options.l2_epsilon, options.l2_step_size),
    }
    current = images
    count = crafter.draw("num_steps", attack.num_steps, batch.sample_index)
    steps = torch.as_tensor(count, device=images.device).expand(len(images))
    for k in range(int(steps.max())):
        gradient = crafter.gradient(target, batch._replace(images=current))
        candidates = []
        for norm, (epsilon, step_size) in balls.items():
            moved = current + step_size * norms.ascent(gradient, norm)
            radius = torch.full((len(images),), epsilon, device=images.device)
            candidates.append(norms.project(moved, images, radius, norm, 0.0, 1.0))
        moving = norms.per_pixel(k < steps)
        current = torch.where(moving, worse(crafter, target, batch, candidates), current)
    return current


def worse(crafter: Crafter, target: AttackSpace, batch: Batch, candidates: list[Tensor]) -> Tensor:
    """Of each image the candidate [B, C, H, W] of largest loss, the first of equal ones."""
    losses = [
        F.cross_entropy(
            crafter.logits(target, batch._replace(images=x)), batch.labels, reduction="none"
        )
        for x in candidates
    ]
    choice = torch.stack(losses).argmax(dim=0)
    return torch.stack(candidates)[choice, torch.arange(len(choice), device=choice.device)]
