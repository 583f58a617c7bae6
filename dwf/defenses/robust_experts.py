"""Robust Experts: sparse mixture layers inside one network, trained adversarially.

| point            | the paper says      | its code does                 | we assume               |
|------------------|---------------------|-------------------------------|-------------------------|
| learning rate    | 0.01                | 0.1                           | 0.1                     |
| its decay        |                     | (1 - t)^0.9, once per epoch   | at every iteration      |
| images           | CIFAR-100           | 40,000 to train with          | all but 1,000           |
| augmentation     | crop, flip          | and color jitter              | crop, flip              |
| entropy loss     | the column entropy  | both formulas below           | both, default `entropy` |
| ConvMoE          | 4 convolutions      | 5 of conv5_x: the shortcut's  | 5; 4 by an option       |
| expert capacity  |                     | none on CIFAR-100             | none                    |
| attacked model   |                     | in train mode, gates noisy    | in eval mode, no noise  |
| NaN from a gate  |                     | weight 0                      | ModelOutputError        |
| std in formulas  |                     |                               | of the population       |
| divided batches  |                     |                               | balance of each part    |
| Free-AT's delta  |                     | balance counts twice          | follows the whole loss  |

The loss is CE + balance_weight * sum over the sparse layers of one of

    switch          E * sum_i f_i P_i - 1
    entropy         mean_t H(p_t) - H(P)
    column_entropy  -H(P)
    variance        switch - mean_i std_t(p_ti) + 1

with p_t the gate's probabilities of image t, P their mean over the batch, f_i the share of images
whose largest probability is i (no gradient), and H the entropy in nats. With ``entropy`` the gates
choose experts without noise, with the others they train under noise.

Source: arXiv:2509.05086, and facts of its released code where the text is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_choice, check_count, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import classes_of
from dwf.defenses.building import ModelFacts, model_of, network_of, options_of
from dwf.defenses.crafter import Craft, Crafter
from dwf.defenses.phase import Phase, Step, StepResult, Update, pretrain_schedule
from dwf.defenses.single_step import check_pixels, fast_attack, free_step
from dwf.defenses.steps import attacked_step, plain_step
from dwf.models import Normalize
from dwf.models.sparse import GATES, check_top_k
from dwf.models.sparse_network import PLACES, SparseModel, SparseOutput, make_sparse


def entropy(p: Tensor) -> Tensor:
    """-sum_i p_i log p_i over the last axis, in nats; its gradient is finite at p_i = 0 too."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


def switch_loss(p: Tensor) -> Tensor:
    """E * sum_i f_i P_i - 1: 0 if images spread evenly, E - 1 if one expert has them all."""
    T, E = p.shape
    share = p.detach().argmax(dim=1).bincount(minlength=E).to(p.dtype) / T
    return E * (share * p.mean(dim=0)).sum() - 1


def entropy_loss(p: Tensor) -> Tensor:
    """mean_t H(p_t) - H(P): sure of each image, even over the batch; -log E at best."""
    return entropy(p).mean() - entropy(p.mean(dim=0))


def column_entropy_loss(p: Tensor) -> Tensor:
    """-H(P): even over the batch, whatever each image gets."""
    return -entropy(p.mean(dim=0))


def variance_loss(p: Tensor) -> Tensor:
    """switch - mean_i std_t(p_ti) + 1: even, and different from image to image."""
    # of one image, or of equal ones, the root has no gradient
    variance = p.var(dim=0, correction=0)
    std = variance.clamp(min=torch.finfo(p.dtype).tiny).sqrt()
    return switch_loss(p) - std.mean() + 1


BALANCE: dict[str, Callable[[Tensor], Tensor]] = {
    "switch": switch_loss,
    "entropy": entropy_loss,
    "column_entropy": column_entropy_loss,
    "variance": variance_loss,
}
ATTACKS = ("pgd", "fast", "free", "none")


@dataclass(frozen=True)
class RobustExpertsOptions(Options, defense="robust-experts"):
    """Which layers are sparse, how they route, and what keeps their experts busy.

    ``moe``: "block", every residual block of the stage is a mixture; "residual", its last one
    alone; "conv", every convolution, those of shortcuts too unless ``exclude_shortcut``.
    ``stage``: 1 is the network's first; None is its last. ``top_k`` of ``num_experts`` compute an
    image. ``attack``: what every image of a batch is attacked by, within the radius of `attack`:
    "pgd", "fast" (one step of ``fast_step_size``) or "free" (``replays`` updates a batch).
    """

    moe: Literal["block", "residual", "conv"] = "block"
    stage: int | None = None
    num_experts: int = 4
    top_k: int = 1
    gate: Literal["gap_fc", "conv_gap"] = "gap_fc"
    balance: Literal["switch", "entropy", "column_entropy", "variance"] = "entropy"
    balance_weight: float = 0.5
    attack: Literal["pgd", "fast", "free", "none"] = "pgd"
    fast_step_size: float = 10 / 255
    replays: int = 8
    exclude_shortcut: bool = False

    def __post_init__(self) -> None:
        check_choice(self.moe, PLACES, "options.moe")
        check_choice(self.gate, list(GATES), "options.gate")
        check_choice(self.balance, list(BALANCE), "options.balance")
        check_choice(self.attack, ATTACKS, "options.attack")
        check_top_k(self.top_k, self.num_experts, "options.")
        if self.stage is not None:
            check_count(self.stage, "options.stage")
        check_positive(self.balance_weight, "options.balance_weight", zero_allowed=True)
        check_positive(self.fast_step_size, "options.fast_step_size")
        check_count(self.replays, "options.replays")
        if self.exclude_shortcut and self.moe != "conv":
            raise ConfigError(
                f"options.exclude_shortcut: true, but moe is {self.moe!r}, whose experts are whole "
                "blocks; it goes with moe=conv"
            )


def build(config: Config, facts: ModelFacts) -> SparseModel:
    """One network with sparse layers, untrained, behind its normalization."""
    options = options_of(config, RobustExpertsOptions)
    seed = derive_seed(config.seed, "sparse")
    network = network_of(config, facts, "sparse")
    subpath = make_sparse(
        network,
        options.moe,
        stage=options.stage,
        num_experts=options.num_experts,
        top_k=options.top_k,
        gate=options.gate,
        noisy=options.balance != "entropy",
        exclude_shortcut=options.exclude_shortcut,
        seed=seed,
    )
    model = SparseModel(Normalize(facts.mean, facts.std), network, subpath)
    with torch.no_grad():  # a gate that these images are too small for says so here
        model.eval()(torch.zeros(1, *facts.image_shape))
    return model.train()


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    options = options_of(config, RobustExpertsOptions)
    model = model_of(model, config, SparseModel)
    schedule = pretrain_schedule(config)
    train_on = partial(balanced_step, options)
    if options.attack == "free":
        check_pixels(config)
        state: dict[str, Tensor] = {}
        updates = [Update(free_step(state, train_on))] * options.replays
        return [Phase("train", model, schedule, updates, state=state)]
    step: Step
    if options.attack == "none":
        step = partial(plain_step, train_on=train_on)
    else:
        craft: Craft = Crafter.pgd
        if options.attack == "fast":
            craft = partial(fast_attack, step_size=options.fast_step_size)
        step = partial(attacked_step, craft=craft, train_on=train_on)
    return [Phase("train", model, schedule, step)]


def balanced_step(
    options: RobustExpertsOptions, forward: Model, images: Tensor, wanted: Tensor, num_clean: int
) -> StepResult:
    """CE(f(x), y) + balance_weight * the sum of all gates' balance losses."""
    output: SparseOutput = cast(Any, forward)(images, return_aux=True)
    balance = sum(BALANCE[options.balance](p) for p in output.probabilities.values())
    loss = F.cross_entropy(output.logits.float(), wanted) + options.balance_weight * balance
    return StepResult(loss, output.logits.detach(), classes_of(wanted), num_clean)
