"""Divided We Fall: experts that each learned one kind of attack, then trained together.

| point                   | the paper says                            | we assume               |
|-------------------------|-------------------------------------------|-------------------------|
| experts                 | 1 benign, 4 FGSM, 4 PGD, all ResNet-18    | differ by seed only     |
| FGSM epsilon, training  | random in 0.01 to 0.09                    | from .01, .02, ..., .09 |
| PGD steps, training     | random among 10, 20, 30, 40, 50           | once per batch          |
| PGD epsilon, step size  | not stated                                | 8/255, 2/255            |
| random start            | not mentioned                             | none                    |
| end-to-end phase        | benign + FGSM + PGD batch, nothing frozen | one optimizer; the gate |
|                         |                                           | has its own first rate  |
| epochs, rates, batches  | not stated                                | see the presets         |
| attacked space          | not stated                                | pixels in [0, 1]        |

No code was released. Source: algorithms 1 to 3 of arXiv:2512.20821.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn

from dwf.attacks.losses import Model
from dwf.checks import ConfigError
from dwf.config import Config, ModelConfig, derive_seed
from dwf.data import Batch
from dwf.defenses.building import ModelFacts, model_of, network_of
from dwf.defenses.crafter import Craft, Crafter
from dwf.defenses.phase import Phase, StepResult
from dwf.defenses.side_by_side import Phases, SideBySide
from dwf.defenses.steps import cross_entropy_step, plain_step
from dwf.models import Mixture, MlpGate, Normalize

# how images are crafted for an expert of each kind; benign ones stay as they are
CRAFTS: dict[str, Craft] = {"fgsm": Crafter.fgsm, "pgd": Crafter.pgd}


def expert_kinds(model: ModelConfig) -> list[str]:
    """Kind of each expert in order: benign, then fgsm, then pgd."""
    return ["benign"] * model.num_benign + ["fgsm"] * model.num_fgsm + ["pgd"] * model.num_pgd


def build(config: Config, facts: ModelFacts) -> Mixture:
    """Untrained experts and gate behind one shared normalization; eqs. (1)-(2)."""
    kinds = expert_kinds(config.model)
    experts = [network_of(config, facts, "expert", e) for e in range(len(kinds))]
    gate = MlpGate(
        facts.image_shape,
        len(kinds),
        hidden=config.model.gate_hidden,
        seed=derive_seed(config.seed, "gate"),
    )
    names = [f"{e} {kind}" for e, kind in enumerate(kinds)]
    return Mixture(experts, gate, Normalize(facts.mean, facts.std), expert_names=names)


def phases(model: nn.Module, config: Config) -> Phases:
    """One phase for each expert, those of a kind side by side; then the end-to-end phase."""
    mixture = model_of(model, config, Mixture)
    result = pretraining(mixture, config)
    if config.joint is not None:
        result.append(Phase("joint", mixture, config.joint, joint_step, gate_prefix="gate."))
    return result


def pretraining(mixture: Mixture, config: Config) -> list[Phase | SideBySide]:
    """One phase for each expert, those of a kind side by side; none without ``pretrain``.

    Algorithm 1: epsilon ~ U{.01, ..., .09}; loss = CE(expert(fgsm(x)), y)
    Algorithm 2: num_steps ~ U{10, ..., 50}; loss = CE(expert(pgd(x)), y)
    """
    result: list[Phase | SideBySide] = []
    if config.pretrain is not None:
        kinds = expert_kinds(config.model)
        if len(kinds) != mixture.num_experts:
            raise ConfigError(
                f"model: a Mixture of {mixture.num_experts} experts, but the configuration "
                f"pretrains {len(kinds)}; set model.num_benign, num_fgsm and num_pgd, or "
                "pretrain=None"
            )
        for kind, places in groupby(range(len(kinds)), key=kinds.__getitem__):
            experts = {f"expert-{e}-{kind}": mixture.expert(e) for e in places}
            if kind in CRAFTS:
                result.append(SideBySide(experts, config.pretrain, CRAFTS[kind]))
            else:
                result += [
                    Phase(name, expert, config.pretrain, plain_step)
                    for name, expert in experts.items()
                ]
    return result


def joint_step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
    """Algorithm 3: x3 = [x; fgsm(x); pgd(x)], loss = CE(mixture(x3), [y; y; y]).

    Both attacks see the current mixture, through experts and gate. Without random start FGSM and
    the first step of PGD follow the same gradient, so it is computed once.
    """
    attack = crafter.attack
    target = crafter.target(model, batch)
    shared = not (attack.fgsm_random_start and attack.random_start)
    gradient = crafter.gradient(target, batch) if shared else None
    images = torch.cat(
        [
            batch.images,
            crafter.fgsm(target, batch, gradient),
            crafter.pgd(target, batch, gradient),
        ]
    )
    return cross_entropy_step(forward, images, batch.repeated(3).wanted, len(batch.images))
