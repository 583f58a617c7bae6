"""Adaptive smoothing: a gate that mixes an accurate and a robust network image by image.

    f(x) = log( (1 - a(x)) softmax(g(x)) + a(x) softmax(h(x)) ),    a = sigmoid(gate(x))
    loss = share * CE(f(x'), y) + (1 - share) * CE(f(x), y),        x' by PGD on f

g, trained on images as they are, and h, trained by TRADES, are phases of their own on the schedule
``pretrain``; then the gate alone is trained on ``joint``, with both networks in eval mode. A user's
own two networks become a model without these phases:

    model = dwf.models.MixedModel(g, h, dwf.models.share_gate(image_shape))
    dwf.train(config with pretrain=None, "runs/mixed", model=model)

| point      | the paper or its code                      | here                              |
|------------|--------------------------------------------|-----------------------------------|
| the gate   | a ResNet on features of both networks      | an MLP on the images              |
| range of a | an interval that keeps h's certified radius| (0, 1); at first 0.95             |
| loss       | of both kinds of images, and a supervised  | of both kinds of images           |
|            | term on a                                  |                                   |

Source: Bai et al., arXiv:2301.12554. TRADES, arXiv:1901.08573.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch
from dwf.defenses.building import ModelFacts, model_of, network_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.multi_step import trades_attack, trades_objective
from dwf.defenses.phase import Phase, StepResult, Update
from dwf.defenses.steps import plain_step
from dwf.models import MixedModel, Normalize, PixelModel, share_gate

__all__ = ["build", "phases"]


@dataclass(frozen=True)
class AdaptiveSmoothingOptions(Options, defense="adaptive-smoothing"):
    """``beta`` of TRADES for the robust network; ``share`` of attacked rows in the gate's loss."""

    beta: float = 6.0
    share: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self.beta, "options.beta", zero_allowed=True)
        if not 0 <= self.share <= 1:
            raise ConfigError(f"options.share: {self.share:g} is not in [0, 1]")


def build(config: Config, facts: ModelFacts) -> MixedModel:
    """Two untrained networks, each with its normalization inside, and a gate."""
    accurate, robust = (
        PixelModel(Normalize(facts.mean, facts.std), network_of(config, facts, "expert", e))
        for e in range(2)
    )
    seed = derive_seed(config.seed, "gate")
    gate = share_gate(facts.image_shape, hidden=config.model.gate_hidden, seed=seed)
    return MixedModel(accurate, robust, gate)


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """The two networks on ``pretrain``, if it is given; then the gate on ``joint``.

    Raises:
        ConfigError: no joint phase, or a model without a gate.
    """
    mixed = model_of(model, config, MixedModel)
    options = options_of(config, AdaptiveSmoothingOptions)
    if config.joint is None or mixed.gate is None:
        raise ConfigError(f"{config.defense}: expected a joint schedule and a model with a gate")
    result = []
    if config.pretrain is not None:
        robust = partial(trades_step, beta=options.beta)
        result.append(Phase("accurate", mixed.expert(0), config.pretrain, plain_step))
        result.append(Phase("robust", mixed.expert(1), config.pretrain, robust))
    update = Update(partial(gate_step, share=options.share), _in_gate)
    return [*result, Phase("joint", mixed, config.joint, [update], gate_prefix="gate.")]


def _in_gate(name: str) -> bool:
    return name.startswith("gate.")


def trades_step(
    model: nn.Module, forward: Model, batch: Batch, crafter: Crafter, *, beta: float
) -> StepResult:
    """TRADES, for the robust network."""
    return trades_objective(forward, batch, trades_attack(crafter, model, batch), beta=beta)


def gate_step(
    model: nn.Module, forward: Model, batch: Batch, crafter: Crafter, *, share: float
) -> StepResult:
    """share * CE(f(x'), y) + (1 - share) * CE(f(x), y), with both networks as they are."""
    assert isinstance(model, MixedModel)
    model.experts.eval()
    adversarial = crafter.pgd(model, batch)
    logits: Tensor = forward(torch.cat([batch.images, adversarial]))
    clean, attacked = logits.float().chunk(2)
    loss = share * F.cross_entropy(attacked, batch.wanted)
    loss = loss + (1 - share) * F.cross_entropy(clean, batch.wanted)
    return StepResult(loss, logits.detach(), batch.labels.repeat(2), len(batch.images))
