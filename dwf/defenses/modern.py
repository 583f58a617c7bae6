"""Divided We Fall with what the field has learned since: one joint objective on all images.

With f the mixture, w its gate's weights, f_e its E experts, x' the attacked image, over a batch:

    loss = TRADES, MART or CE(f(x'), y) of f
           - diversity * mean log det(M^T M + 1e-6 I) - gate_entropy * mean H(w)

    M [K - 1, E]: each expert's probabilities of the wrong classes for x', of length 1

**The rate of the experts.** The gradient of the loss to the logits of expert e is w_e times that to
the mixture's logits. Under a uniform gate it is an E-th of what the expert alone would see, so at a
mixture's learning rate each expert learns at an E-th of its own. With ``expert_rate`` "own" the
experts' learning rate is E times that of the schedule; with "shared" it is the schedule's. With
"gate" the gradient to the logits of expert e is divided by the mean of w_e over the batch instead,
so that what a gate leaves is made up for as it is, and weight decay stays the schedule's.

| point                   | Divided We Fall as published             | here                        |
|-------------------------|------------------------------------------|-----------------------------|
| loss                    | CE of benign, FGSM and PGD rows          | TRADES on all images        |
| experts' learning rate  | the mixture's                            | E times the mixture's       |
| experts before          | pre-trained by kind                      | untrained, if ``pretrain``  |
|                         |                                          | is None, as in the presets  |
| what is reported        | the last step                            | any average, by validation  |

Sources: Divided We Fall, arXiv:2512.20821; TRADES, arXiv:1901.08573; MART, Wang et al., ICLR 2020;
the diversity term, Pang et al., arXiv:1901.08846, here on attacked images and with 1e-6. The rate
of the experts is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels
from dwf.checks import ConfigError, check_choice, check_positive
from dwf.config import Config, Options
from dwf.data import Batch
from dwf.defenses.building import model_of, options_of
from dwf.defenses.crafter import Craft, Crafter
from dwf.defenses.divided_we_fall import build, pretraining
from dwf.defenses.multi_step import (
    madry_attack,
    mart_attack,
    mart_loss,
    trades_attack,
    trades_loss,
)
from dwf.defenses.phase import Phase, StepResult, Update
from dwf.defenses.side_by_side import Phases
from dwf.models import Mixture, MixtureOutput

__all__ = ["build", "phases"]

RIDGE = 1e-6
SMALLEST_WEIGHT = 0.01  # an expert that the gate hardly asks learns no faster than this allows


@dataclass(frozen=True)
class ModernOptions(Options, defense="dwf-modern"):
    """How the mixture is trained end to end; see the module.

    ``beta`` weighs the second term of TRADES (6 in its paper) and MART (5). ``trained``: "all",
    "gate" (the experts are frozen, their BatchNorm in eval mode), or "experts" (the gate stays at
    equal weights). Weights of 0 leave a term out; a negative ``gate_entropy`` rewards gates that
    choose.
    """

    objective: Literal["trades", "mart", "ce"] = "trades"
    beta: float = 6.0
    expert_rate: Literal["own", "gate", "shared"] = "own"
    trained: Literal["all", "gate", "experts"] = "all"
    diversity: float = 0.0
    gate_entropy: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.objective, ("trades", "mart", "ce"), "options.objective")
        check_choice(self.expert_rate, ("own", "gate", "shared"), "options.expert_rate")
        check_choice(self.trained, ("all", "gate", "experts"), "options.trained")
        check_positive(self.beta, "options.beta", zero_allowed=True)
        check_positive(self.diversity, "options.diversity", zero_allowed=True)
        check_positive(abs(self.gate_entropy), "options.gate_entropy", zero_allowed=True)


def phases(model: nn.Module, config: Config) -> Phases:
    """The experts on ``pretrain`` as `divided_we_fall` trains them, if it is given; then jointly.

    Raises:
        ConfigError: no joint phase; more experts than the diversity term can tell apart.
    """
    mixture = model_of(model, config, Mixture)
    options = options_of(config, ModernOptions)
    if config.joint is None:
        raise ConfigError("joint: None, but it is the schedule of dwf-modern")
    update = Update(partial(joint_step, options=options), _choice(options.trained))
    own = options.expert_rate == "own" and options.trained != "gate"
    joint = Phase(
        "joint",
        mixture,
        config.joint,
        [update],
        gate_prefix="gate.",
        rates={"experts.": float(mixture.num_experts)} if own else {},
    )
    return [*pretraining(mixture, config), joint]


def _choice(trained: str) -> Callable[[str], bool] | None:
    if trained == "all":
        return None
    return lambda name: name.startswith("gate.") == (trained == "gate")


def joint_step(
    model: nn.Module,
    forward: Callable[..., Any],
    batch: Batch,
    crafter: Crafter,
    *,
    options: ModernOptions,
) -> StepResult:
    """The loss of the module's docstring."""
    assert isinstance(model, Mixture)
    if options.trained == "gate":
        model.experts.eval()
    craft: Craft = {"trades": trades_attack, "mart": mart_attack, "ce": madry_attack}[
        options.objective
    ]
    adversarial = craft(crafter, model, batch)
    clean: MixtureOutput | None = None
    if options.objective != "ce":
        clean = forward(batch.images, return_aux=True)
    attacked: MixtureOutput = forward(adversarial, return_aux=True)
    own = options.expert_rate == "gate"
    logits = (made_up_for(attacked) if own else attacked.logits).float()
    if clean is None:
        loss = F.cross_entropy(logits, batch.wanted)
    else:
        of_both = trades_loss if options.objective == "trades" else mart_loss
        benign = (made_up_for(clean) if own else clean.logits).float()
        loss = of_both(benign, logits, batch.wanted, beta=options.beta)
    if options.diversity:
        apart = diversity(attacked.expert_logits, batch.labels)
        loss = loss - options.diversity * apart.mean()
    if options.gate_entropy:
        loss = loss - options.gate_entropy * entropy(attacked.gate_logits).mean()
    rows = [attacked.logits] if clean is None else [clean.logits, attacked.logits]
    labels = torch.cat([batch.labels] * len(rows))
    return StepResult(loss, torch.cat(rows).detach(), labels, len(labels) - len(batch.labels))


def made_up_for(output: MixtureOutput) -> Tensor:
    """The mixture's logits [B, K], whose gradient to expert e is divided by the mean of w_e."""
    factor = 1 / output.gate_weights.detach().mean(dim=0).clamp_min(SMALLEST_WEIGHT)  # [E]
    scaled = output.expert_logits * factor.view(-1, 1, 1)
    # the value of the logits, with the gradient of the scaled ones
    restored = output.expert_logits.detach() + (scaled - scaled.detach())
    return moe_kernels.softmax_combine(output.gate_logits, restored)


def diversity(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """log det(M^T M + 1e-6 I) of each image [B], from expert_logits [E, B, K]; at most about 0.

    It is 0 where the experts' probabilities of the wrong classes are orthogonal.

    Raises:
        ConfigError: more experts than wrong classes, whose M^T M has no inverse.
    """
    E, B, K = expert_logits.shape
    if E > K - 1:
        raise ConfigError(
            f"options.diversity: {E} experts, but it tells apart at most {K - 1} with {K} classes"
        )
    probabilities = expert_logits.float().softmax(dim=2)
    wrong = torch.ones(B, K, dtype=torch.bool, device=labels.device)
    wrong.scatter_(1, labels.unsqueeze(1), False)
    others = probabilities.transpose(0, 1)[wrong.unsqueeze(1).expand(B, E, K)].view(B, E, K - 1)
    others = F.normalize(others, dim=2)
    gram = others @ others.transpose(1, 2)  # [B, E, E]
    return torch.logdet(gram + RIDGE * torch.eye(E, device=gram.device))


def entropy(gate_logits: Tensor) -> Tensor:
    """Entropy of the gate's weights for each image [B], in nats, from gate_logits [B, E]."""
    log_weights = gate_logits.float().log_softmax(dim=1)
    return -(log_weights.exp() * log_weights).sum(dim=1)
