"""ADVMoE: pathways and their router trained in turn, each against attacks on both.

    L(psi, phi) = CE(f(x), y) + beta * mean KL(p, p'),    psi: router, phi: everything else

| point               | the paper says         | its code does              | we assume            |
|---------------------|------------------------|----------------------------|----------------------|
| router's objective  | min over psi of        | beta (CE(s, y mod E) +     | ``objective``: that  |
|                     | L(psi, phi*(psi))      | mean KL(s, s'))            | of the paper, or     |
|                     |                        |                            | ``released``         |
| alternation         | in turn                | phi, then psi, same images | phi, then psi, each  |
|                     |                        |                            | on a new attack;     |
|                     |                        |                            | ``released`` as code |
| psi's batch         | -                      | phi's; a second loader is  | phi's                |
|                     |                        | there, unused              |                      |
| argmax's gradient   | -                      | straight through           | the same             |
| end of the router   | -                      | linear                     | then BatchNorm, see  |
|                     |                        |                            | below                |
| attack in training  | 2 steps of 5/255 on KL | on KL(p, p') + KL(s, s')   | on KL(p, p');        |
|                     |                        |                            | ``released`` as code |
| target of KL(s, s') | -                      | has a gradient: NaN from   | constant, from log-  |
|                     |                        | the third batch on         | probabilities        |
| scores of NaN       | -                      | pathway 0, silently        | ModelOutputError     |
| attack in testing   | PGD, AutoAttack        | also on CE(s, y mod E),    | without              |
|                     |                        | which weakens it           |                      |
| best checkpoint     | -                      | by test accuracy           | by validation        |
| normalization       | -                      | none, or of the network    | the same             |
| BatchNorm           | -                      | -                          | [x; x'] is one batch |

p, p' are softmax(f(x)), softmax(f(x')); s, s' the softmax of the router's scores for x and x'. That
the paper's objective means these two SGD steps a batch is assumed. With ``released`` psi's loss
does not depend on phi, and phi's gives psi no gradient, so that one backward makes both steps.

L says nothing about the size of scores, of which only the largest counts, and straight-through
gradients do not shrink as they grow. On digits the router left the range of float32 at rate 0.1,
and at 0.01 it sent all images to one pathway, which was the only one to learn. So with the paper's
objective scores pass a BatchNorm (``normalize_scores``): of mean 0 and variance 1 over a batch, so
that each pathway has its share from the first step on. That is ours, not the paper's.

Source: arXiv:2308.10110. TRADES, whose loss and attack these are: arXiv:1901.08573.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.losses import Loss, kl_divergence, kl_from
from dwf.checks import (
    ConfigError,
    ModelOutputError,
    check_choice,
    check_count,
    check_positive,
    first_index,
)
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch
from dwf.defenses import multi_step
from dwf.defenses.building import ModelFacts, model_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.multi_step import trades_attack
from dwf.defenses.phase import Phase, Step, StepResult, Update, pretrain_schedule
from dwf.models import RESNETS, Normalize, PathwayMixture, PathwayResNet, build_router
from dwf.models.networks import BasicBlock

GATE = "gate."


@dataclass(frozen=True)
class AdvMoeOptions(Options, defense="advmoe"):
    """Settings of ADVMoE.

    ``width_ratio``: channels of one pathway, as a share of the network's. ``router_width``:
    channels of the router's first stage. ``normalize``: pathways see normalized images.
    ``normalize_scores``: the router ends with a BatchNorm without weights; "auto" is with the
    objective ``trades_bilevel``.
    """

    num_pathways: int = 2
    width_ratio: float = 0.5
    beta: float = 6.0
    objective: Literal["trades_bilevel", "released"] = "trades_bilevel"
    router_width: int = 16
    normalize: bool = False
    normalize_scores: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        check_count(self.num_pathways, "options.num_pathways", minimum=2)
        check_count(self.router_width, "options.router_width")
        check_positive(self.width_ratio, "options.width_ratio")
        check_positive(self.beta, "options.beta", zero_allowed=True)
        check_choice(self.objective, ("trades_bilevel", "released"), "options.objective")
        wanted = self.normalize_scores
        check_choice(wanted, ("auto", "always", "never"), "options.normalize_scores")

    @property
    def has_normalized_scores(self) -> bool:
        wanted = self.normalize_scores
        return wanted == "always" or (wanted == "auto" and self.objective == "trades_bilevel")


def build(config: Config, facts: ModelFacts) -> PathwayMixture:
    """A ResNet with pathways and its router, which sees pixels."""
    options, name = options_of(config, AdvMoeOptions), config.model.network
    check_choice(name, list(RESNETS), "model.network")
    block, num_blocks = RESNETS[name]
    if block is not BasicBlock:
        raise ConfigError(f"model.network: pathways are for basic blocks, {name} has bottlenecks")
    in_channels = facts.image_shape[0]
    network = PathwayResNet(
        num_blocks,
        num_pathways=options.num_pathways,
        width_ratio=options.width_ratio,
        num_classes=facts.num_classes,
        width=config.model.width,
        in_channels=in_channels,
        seed=derive_seed(config.seed, "pathways"),
    )
    gate: nn.Module = build_router(
        options.num_pathways,
        width=options.router_width,
        in_channels=in_channels,
        seed=derive_seed(config.seed, "gate"),
    )
    if options.has_normalized_scores:
        gate = nn.Sequential(gate, nn.BatchNorm1d(options.num_pathways, affine=False))
    normalize = Normalize(facts.mean, facts.std) if options.normalize else None
    return PathwayMixture(network, gate, normalize)


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    options = options_of(config, AdvMoeOptions)
    model = model_of(model, config, PathwayMixture)
    schedule = pretrain_schedule(config)
    step: Step | list[Update]
    if options.objective == "released":
        step = partial(released_step, beta=options.beta)
    else:
        both = partial(bilevel_step, beta=options.beta)
        step = [Update(both, _in_pathways), Update(both, _in_router)]
    return [Phase("train", model, schedule, step, gate_prefix=GATE)]


def bilevel_step(
    model: nn.Module, forward: Callable[..., Any], batch: Batch, crafter: Crafter, *, beta: float
) -> StepResult:
    """L(psi, phi), on images attacked with the weights of this moment."""
    adversarial = trades_attack(crafter, model, batch)
    output = forward(torch.cat([batch.images, adversarial]), return_aux=True)
    check_gate_logits(output.gate_logits)
    loss = trades_loss(output.logits, batch.wanted, beta)
    return StepResult(loss, output.logits.detach(), batch.labels.repeat(2), len(batch.images))


def released_step(
    model: nn.Module, forward: Callable[..., Any], batch: Batch, crafter: Crafter, *, beta: float
) -> StepResult:
    """L for phi, and for psi the sum that the code has: beta (CE(s, y mod E) + mean KL(s, s'))."""
    assert isinstance(model, PathwayMixture)
    both = _WithGate(model)
    clean = crafter.logits(both, batch).tensor_split([-model.num_experts], dim=1)
    adversarial = crafter.pgd(both, batch, loss=_kl_from_both(*clean), random_start="normal")
    images = torch.cat([batch.images, adversarial])
    output = forward(images, return_aux=True, detach_gate=True)
    check_gate_logits(output.gate_logits)
    loss = trades_loss(output.logits, batch.wanted, beta)
    loss = loss + router_loss(output.gate_logits, batch.labels, beta)
    return StepResult(loss, output.logits.detach(), batch.labels.repeat(2), len(batch.images))


def trades_loss(logits: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """CE(f(x), y) + beta * mean KL(p, p') from the logits of [x; x'], [2B, K]."""
    clean, attacked = logits.float().chunk(2)
    return multi_step.trades_loss(clean, attacked, wanted, beta=beta)


def router_loss(gate_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """beta * (CE(s, y mod E) + mean KL(s, s')) from the scores of [x; x'], [2B, E].

    The target s of the KL is a constant.
    """
    clean, attacked = gate_logits.float().chunk(2)
    target = clean.detach().log_softmax(dim=1)
    kl = kl_divergence(target, attacked.log_softmax(dim=1))
    return beta * (F.cross_entropy(clean, labels % clean.shape[1]) + kl.mean())


def check_gate_logits(gate_logits: Tensor) -> None:
    """Require finite scores: argmax would turn NaN into a pathway, and training would go on.

    Raises:
        ModelOutputError: with the first score that is not finite.
    """
    gate_logits = gate_logits.detach()
    wrong = ~gate_logits.isfinite()
    if bool(wrong.any()):
        index = first_index(wrong)
        raise ModelOutputError(
            f"gate: {float(gate_logits[tuple(index)])} at {index} of gate_logits, expected finite "
            "numbers; lower the gate's learning rate; the last checkpoint stands"
        )


class _WithGate(nn.Module):
    """A mixture with the gate's logits beside its own, [B, K + E], for an attack on both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images, return_aux=True)
        return torch.cat([output.logits, output.gate_logits], dim=1)


def _kl_from_both(logits: Tensor, gate_logits: Tensor) -> Loss:
    of_logits, of_gate, K = kl_from(logits), kl_from(gate_logits), logits.shape[1]

    def loss(both: Tensor, labels: Tensor) -> Tensor:
        return of_logits(both[:, :K], labels) + of_gate(both[:, K:], labels)

    return loss


def _in_router(name: str) -> bool:
    return name.startswith(GATE)


def _in_pathways(name: str) -> bool:
    return not _in_router(name)
