"""Synergy-of-Experts: adversarially trained sub-models, of which the most confident one answers.

| point            | its code does                              | we assume                        |
|------------------|--------------------------------------------|----------------------------------|
| loss             | weights by predicted confidence            | the same; the paper's smooth     |
|                  | ("predicted best"); "true best" is there,  | minimum is not available to us   |
|                  | commented out                              |                                  |
| confidence head  | linear on the pooled features, or on a     | linear on the pooled features    |
|                  | branch of layers of its own                |                                  |
| attack           | PGD of 10 steps on the prediction, or on   | the same                         |
|                  | each sub-model in turn ("one by one")      |                                  |
| mode in attacks  | train: batch statistics, and the attack    | eval                             |
|                  | moves running ones                         |                                  |
| order of images  | never shuffled                             | shuffled                         |
| optimizers       | one SGD for each sub-model, equal settings | one SGD; the same arithmetic     |
| batches          | clean and attacked images pass one after   | the same, so BatchNorm sees them |
|                  | the other, one backward                    | apart                            |
| epsilon          | .02; .03 in its script                     | .02                              |
| distilled images | feature distillation, an option            | left out                         |

Its main program imports a file that was not published. Source: Cui et al., Synergy-of-Experts:
Collaborate to Improve Adversarial Robustness (NeurIPS 2022), and its authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import check_choice, check_count, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch, classes_of
from dwf.defenses.building import ModelFacts, model_of, network_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, pretrain_schedule
from dwf.models import Group, Normalize, SynergyOfExperts
from dwf.models.soe import SoeOutput

WEIGHTINGS = ("predicted_best", "true_best", "equal")


@dataclass(frozen=True)
class SoeOptions(Options, defense="soe"):
    """``weighting``: how much each sub-model's cross-entropy counts for an image: softmax of
    ``temperature`` times its rectified confidence ("predicted_best"), softmax of minus its
    cross-entropy ("true_best"), or equally.

    ``confidence_weight`` (lambda) is that of the loss that teaches confidence. ``attack_each``:
    train on images attacked through each sub-model in turn, instead of through the prediction.
    """

    num_experts: int = 3
    weighting: Literal["predicted_best", "true_best", "equal"] = "predicted_best"
    temperature: float = 1.0
    confidence_weight: float = 1.0
    attack_each: bool = False

    def __post_init__(self) -> None:
        check_count(self.num_experts, "options.num_experts")
        check_choice(self.weighting, WEIGHTINGS, "options.weighting")
        check_positive(self.temperature, "options.temperature")
        check_positive(self.confidence_weight, "options.confidence_weight", zero_allowed=True)


def build(config: Config, facts: ModelFacts) -> SynergyOfExperts:
    """Untrained networks with confidence heads, behind one shared normalization."""
    networks = [
        network_of(config, facts, "expert", e)
        for e in range(options_of(config, SoeOptions).num_experts)
    ]
    seed = derive_seed(config.seed, "confidence")
    return SynergyOfExperts(networks, Normalize(facts.mean, facts.std), seed=seed)


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    soe = model_of(model, config, SynergyOfExperts)
    schedule = pretrain_schedule(config)
    options = options_of(config, SoeOptions)
    each = Group(soe.expert(e) for e in range(soe.num_experts)) if options.attack_each else None
    return [Phase("train", soe, schedule, partial(step, options=options, each=each))]


def step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    options: SoeOptions,
    each: Group | None = None,
) -> StepResult:
    """L(x, y) + L(x', y), where x' attacks the prediction, or each sub-model of a group."""
    attacked = batch if each is None else batch.repeated(len(each.networks))
    adversarial = crafter.pgd(model if each is None else each, attacked)
    clean: SoeOutput = forward(batch.images, return_aux=True)  # type: ignore[call-arg]
    robust: SoeOutput = forward(adversarial, return_aux=True)  # type: ignore[call-arg]
    return StepResult(
        synergy_loss(clean, batch.wanted, options) + synergy_loss(robust, attacked.wanted, options),
        torch.cat([clean.logits, robust.logits]).detach(),
        torch.cat([batch.labels, attacked.labels]),
        len(batch.images),
    )


def synergy_loss(output: SoeOutput, wanted: Tensor, options: SoeOptions) -> Tensor:
    """mean_b sum_i w_ib CE_ib + lambda * mean_ib BCE(m_ib a_ib, p_ib[y_b]).

    m_ib = max_k p_ib[k], without gradient where sub-model i is right: confidence must not pull down
    a right answer. The weights w and the aim of confidence p_ib[y_b] have no gradient. ``wanted``:
    classes y [B], or the share of each class [B, K], of which y is the largest.
    """
    logits = output.expert_logits.float()  # [E, B, K]
    labels = classes_of(wanted).expand(len(logits), -1)  # [E, B]
    every = torch.cat([wanted] * len(logits))
    losses = F.cross_entropy(logits.flatten(0, 1), every, reduction="none")
    losses = losses.view_as(labels)  # [E, B]
    probabilities = logits.softmax(dim=2)
    largest, guess = probabilities.max(dim=2)
    largest = torch.where(guess == labels, largest.detach(), largest)
    of_label = probabilities.gather(2, labels.unsqueeze(2)).squeeze(2).detach()
    with torch.autocast(logits.device.type, enabled=False):  # which refuses a BCE of probabilities
        confidence_loss = F.binary_cross_entropy(largest * output.confidence, of_label)
    weighted = (_weights(output, losses, options) * losses).sum(dim=0).mean()
    return weighted + options.confidence_weight * confidence_loss


def _weights(output: SoeOutput, losses: Tensor, options: SoeOptions) -> Tensor:
    """How much each sub-model counts for each image [E, B], without gradient; columns sum to 1."""
    if options.weighting == "predicted_best":
        return (options.temperature * output.rectified.detach()).softmax(dim=0)
    if options.weighting == "true_best":
        return (-losses.detach()).softmax(dim=0)
    return torch.full_like(losses, 1 / len(losses))
