"""RT-ER, a robust top-1 mixture, and JTDMoE, a blend of one with a standard mixture.

| point            | paper and code say                         | we assume                        |
|------------------|--------------------------------------------|----------------------------------|
| mixture          | 4 ResNet-18, top-1 by one linear layer     | the same, on normalized images   |
| router           | a plain argmax: it gets no gradient        | straight-through of the softmax  |
| RT-ER            | CE(F(x'), y) + beta / B sum KL(f_e(x),     | the same, beta 6; both arguments |
|                  | f_e(x'_e)), e the second-ranked expert of  | of KL have a gradient, as in the |
|                  | x, x'_e attacked on it alone               | code                             |
| JTDMoE           | F_D = (1 - alpha) F_S + alpha F_R, alpha   | the same; blended logits         |
|                  | .7                                         |                                  |
| its first step   | F_R: CE(F_R(x'), y), x' attacked on F_R    | the same                         |
|                  | alone, + beta / B sum KL of every expert   |                                  |
| its second step  | CE(F_D(x), y) with F_R frozen; gradients   | the same, cleared; F_R in eval   |
|                  | of the first are not cleared               | mode: its statistics rest too    |
| attack           | PGD-10, 8/255, 2/255, from a random start  | the same from a start inside the |
|                  | that is shifted by -mean/std               | ball                             |
| mode in training | eval after the first attack                | train; all experts see all       |
|                  |                                            | images of a batch                |
| optimizer        | Adam, rate 5e-5 to 1e-4 and back every     | the same zigzag, rounded to      |
|                  | 1,000 steps                                | whole cycles                     |
| batch, epochs    | 512; 130 in the paper, 200 in the code     | 512; 130                         |
| augmentation     | flip, shift by 2, cutout of 8x8            | flip, shift by 2                 |

Source: Zhang et al., arXiv:2502.06832, and its authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf import distributed
from dwf.attacks.losses import Model, kl_divergence
from dwf.checks import ConfigError, check_count, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch
from dwf.defenses.building import ModelFacts, model_of, network_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, Update, pretrain_schedule
from dwf.models import Group, MixtureOutput, Normalize
from dwf.models.routed import DualMixture, ForcedExperts, RoutedMixture, linear_router


@dataclass(frozen=True)
class RtErOptions(Options, defense="rt-er"):
    """``beta`` weighs the robustness of single experts."""

    num_experts: int = 4
    beta: float = 6.0

    def __post_init__(self) -> None:
        check_count(self.num_experts, "options.num_experts", minimum=2)  # one is second-ranked
        check_positive(self.beta, "options.beta", zero_allowed=True)


@dataclass(frozen=True)
class JtdmoeOptions(Options, defense="jtdmoe"):
    """``num_experts`` of each of the two mixtures; ``alpha`` is the robust one's share."""

    num_experts: int = 4
    beta: float = 6.0
    alpha: float = 0.7

    def __post_init__(self) -> None:
        check_count(self.num_experts, "options.num_experts")
        check_positive(self.beta, "options.beta", zero_allowed=True)
        if not 0 < self.alpha < 1:
            raise ConfigError(f"options.alpha: {self.alpha:g} is not between 0 and 1")


def build(config: Config, facts: ModelFacts) -> RoutedMixture | DualMixture:
    """One untrained top-1 mixture for rt-er, two for jtdmoe."""
    if config.defense == "rt-er":
        return _mixture(config, facts, options_of(config, RtErOptions).num_experts, "robust")
    options = options_of(config, JtdmoeOptions)
    standard = _mixture(config, facts, options.num_experts, "standard")
    robust = _mixture(config, facts, options.num_experts, "robust")
    return DualMixture(standard, robust, alpha=options.alpha)


def _mixture(config: Config, facts: ModelFacts, num_experts: int, name: str) -> RoutedMixture:
    experts = [network_of(config, facts, name, "expert", e) for e in range(num_experts)]
    seed = derive_seed(config.seed, name, "gate")
    gate = linear_router(facts.image_shape, num_experts, seed=seed)
    return RoutedMixture(experts, gate, Normalize(facts.mean, facts.std))


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``; of two updates a batch for jtdmoe."""
    schedule = pretrain_schedule(config)
    if config.defense == "rt-er":
        routed = model_of(model, config, RoutedMixture)
        step = partial(rt_er_step, beta=options_of(config, RtErOptions).beta)
        return [Phase("train", routed, schedule, step, gate_prefix="gate.")]
    dual = model_of(model, config, DualMixture)
    if distributed.world_size() > 1:
        raise ConfigError("jtdmoe trains one half of the model at a time: one process, not several")
    experts = Group(dual.robust.expert(e) for e in range(dual.robust.num_experts))
    robust = partial(robust_step, beta=options_of(config, JtdmoeOptions).beta, experts=experts)
    updates = [Update(robust, _in_robust), Update(standard_step, _in_standard)]
    return [Phase("train", dual, schedule, updates)]


def _in_robust(name: str) -> bool:
    return name.startswith("robust.")


def _in_standard(name: str) -> bool:
    return name.startswith("standard.")


def rt_er_step(
    model: nn.Module, forward: Model, batch: Batch, crafter: Crafter, *, beta: float
) -> StepResult:
    """CE(F(x'), y) + beta * mean_b KL(f_e(x), f_e(x'_e)), e the second-ranked expert of x."""
    assert isinstance(model, RoutedMixture)
    B = len(batch.images)
    second = second_ranked(model, batch.images)
    adversarial = crafter.pgd(model, batch)
    attacked_expert = crafter.pgd(ForcedExperts(model, second), batch)
    images = torch.cat([batch.images, adversarial, attacked_expert])
    output: MixtureOutput = forward(images, return_aux=True)  # type: ignore[call-arg]
    clean, _, attacked = output.expert_logits.chunk(3, dim=1)  # [E, B, K]
    rows = torch.arange(B, device=second.device)
    loss = F.cross_entropy(output.logits[B : 2 * B].float(), batch.wanted)
    loss = loss + beta * _divergence(clean[second, rows], attacked[second, rows]).mean()
    return StepResult(loss, output.logits[: 2 * B].detach(), batch.labels.repeat(2), B)


@torch.no_grad()
def second_ranked(model: RoutedMixture, images: Tensor) -> Tensor:
    """The expert with the gate's second largest score for each image, [B] int64."""
    return model.gate_logits(images).topk(2, dim=1).indices[:, 1]


def robust_step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    beta: float,
    experts: Group,
) -> StepResult:
    """CE(F_R(x'), y) + beta * sum_e mean_b KL(f_e(x), f_e(x'_e)) over the robust mixture's experts.

    ``experts`` are those, as one group that one attack sees.
    """
    assert isinstance(model, DualMixture)
    B, E = len(batch.images), model.robust.num_experts
    adversarial = crafter.pgd(model.robust, batch)
    attacked = crafter.pgd(experts, batch.repeated(E))
    output: MixtureOutput = model.robust(torch.cat([batch.images, adversarial]), return_aux=True)
    clean = output.expert_logits[:, :B].flatten(0, 1)  # [E * B, K], as the group's rows
    logits = output.logits[B:]
    loss = F.cross_entropy(logits.float(), batch.wanted)
    loss = loss + beta * _divergence(clean, experts(attacked)).sum() / B
    return StepResult(loss, logits.detach(), batch.labels, 0)


def standard_step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
    """CE(F_D(x), y), to train the standard mixture beside the robust one as it is."""
    assert isinstance(model, DualMixture)
    model.robust.eval()
    with torch.no_grad():
        robust = model.robust(batch.images)
    model.robust.train()
    logits = model.blend(model.standard(batch.images), robust)
    loss = F.cross_entropy(logits.float(), batch.wanted)
    return StepResult(loss, logits.detach(), batch.labels, len(batch.images))


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(softmax(clean), softmax(attacked)) of each row."""
    return kl_divergence(clean.float().log_softmax(dim=1), attacked.float().log_softmax(dim=1))
