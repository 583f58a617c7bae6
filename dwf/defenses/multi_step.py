"""Train one network on images attacked by several steps: PGD-AT, TRADES, MART, AWP.

With p = softmax(f(x)) and p' = softmax(f(x')) for the attacked image x', and means over the batch:

    madry-at    CE(p', y)                            x' by PGD on CE from a random point of the ball
    trades      CE(p, y) + beta KL(p, p')            x' by PGD on KL(p, p') from x + .001 N(0, 1)
    mart        BCE(p', y) + beta KL(p, p') (1 - p_y)    x' by PGD on CE from x + .001 N(0, 1)
                BCE(p', y) = -log p'_y - log(1.0001 - max_{k != y} p'_k)
    awp         madry-at's loss, and trades-awp TRADES's, with its gradient taken at the weights
                w + v, where v = gamma |w| g / |g| for each tensor w of more than one axis and g,
                the gradient of the same loss at w: the weights are attacked after the images

| point                     | the papers or their code           | here                          |
|---------------------------|------------------------------------|-------------------------------|
| BatchNorm in attacks      | AWP's PGD: batch statistics; TRADES| eval mode; `attack.bn_mode`   |
|                           | and MART: eval mode                | "train" for the other         |
| f(x) in the TRADES loss   | code: one pass for CE and one for  | one pass, so the running      |
|                           | KL, equal values                   | statistics move once less     |
| f(x), f(x') in training   | passes of their own                | as there: their batch         |
|                           |                                    | statistics do not mix         |
| normal start noise        | not cut off                        | cut off at epsilon and at 5   |
|                           |                                    | standard deviations           |
| p and 1 - p_y in the KL   | code: gradients go through both    | as there                      |
| MART: logarithms          | code: of p + 1e-12                 | log-softmax: finite anyway    |
| AWP: g                    | from one SGD step of a copy; the   | the gradient itself, same v   |
|                           | step's length cancels in v         | without its rounding          |
| AWP: running statistics   | those of f at w + v                | as there                      |
| AWP: warm-up of n epochs  | code: n - 1 epochs without         | n epochs without              |
| AWP on several processes  | one v for the whole batch          | as there; with `accumulation` |
|                           |                                    | one v for each part           |

Sources: Madry et al., arXiv:1706.06083; TRADES, arXiv:1901.08573; MART, Wang et al., ICLR 2020;
AWP, arXiv:2004.05884.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dwf import distributed
from dwf.attacks.losses import Model, kl_divergence, kl_from
from dwf.checks import check_count, check_positive
from dwf.config import Config, Options
from dwf.data import Batch, classes_of
from dwf.defenses.adversarial_training import build
from dwf.defenses.crafter import Craft, Crafter
from dwf.defenses.phase import Phase, Step, StepResult, pretrain_schedule
from dwf.defenses.steps import cross_entropy_step

__all__ = ["build", "phases"]

# ``objective(forward, batch, adversarial)``: the loss of a batch and its attacked images.
Objective = Callable[[Model, Batch, Tensor], StepResult]


@dataclass(frozen=True)
class TradesOptions(Options, defense="trades"):
    """``beta`` weighs KL(p, p') against the cross-entropy of benign images."""

    beta: float = 6.0

    def __post_init__(self) -> None:
        check_positive(self.beta, "options.beta", zero_allowed=True)


@dataclass(frozen=True)
class MartOptions(Options, defense="mart"):
    """``beta`` weighs KL(p, p') (1 - p_y) against the boosted cross-entropy."""

    beta: float = 5.0

    def __post_init__(self) -> None:
        check_positive(self.beta, "options.beta", zero_allowed=True)


@dataclass(frozen=True)
class AwpOptions(Options, defense="awp"):
    """``gamma`` is the length of a weight's perturbation, as a share of the weight's own.

    In the first ``warmup_epochs`` epochs weights are not perturbed.
    """

    gamma: float = 0.01
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        check_positive(self.gamma, "options.gamma")
        check_count(self.warmup_epochs, "options.warmup_epochs", minimum=0)


@dataclass(frozen=True)
class TradesAwpOptions(AwpOptions, defense="trades-awp"):
    """``beta`` as in TradesOptions; ``gamma`` and ``warmup_epochs`` as in AwpOptions."""

    gamma: float = 0.005
    warmup_epochs: int = 10
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.beta, "options.beta", zero_allowed=True)


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    schedule = pretrain_schedule(config)
    return [Phase("train", model, schedule, _step(config.options))]


def _step(options: Options | None) -> Step:
    craft: Craft = madry_attack
    objective: Objective = adversarial_objective
    if isinstance(options, TradesOptions | TradesAwpOptions):
        craft, objective = trades_attack, partial(trades_objective, beta=options.beta)
    elif isinstance(options, MartOptions):
        craft, objective = mart_attack, partial(mart_objective, beta=options.beta)

    def step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
        adversarial = craft(crafter, model, batch)
        if isinstance(options, AwpOptions) and crafter.epoch >= options.warmup_epochs:

            def loss(network: Model) -> Tensor:
                return objective(network, batch, adversarial).loss

            forward = perturbed(model, forward, weight_perturbation(model, loss, options.gamma))
        return objective(forward, batch, adversarial)

    return step


def madry_attack(crafter: Crafter, model: nn.Module, batch: Batch) -> Tensor:
    """PGD on the cross-entropy, started as configured."""
    return crafter.pgd(model, batch)


def trades_attack(crafter: Crafter, model: nn.Module, batch: Batch) -> Tensor:
    """PGD on KL(p, p'), from the image with some normal noise: at the image itself it is flat."""
    target = crafter.target(model, batch)
    return crafter.pgd(
        target, batch, loss=kl_from(crafter.logits(target, batch)), random_start="normal"
    )


def mart_attack(crafter: Crafter, model: nn.Module, batch: Batch) -> Tensor:
    """PGD on the cross-entropy, from the image with some normal noise."""
    return crafter.pgd(model, batch, random_start="normal")


def adversarial_objective(forward: Model, batch: Batch, adversarial: Tensor) -> StepResult:
    """CE(p', y)."""
    return cross_entropy_step(forward, adversarial, batch.wanted, 0)


def trades_objective(
    forward: Model, batch: Batch, adversarial: Tensor, *, beta: float
) -> StepResult:
    """CE(p, y) + beta KL(p, p')."""
    return _of_both(forward, batch, adversarial, partial(trades_loss, beta=beta))


def mart_objective(forward: Model, batch: Batch, adversarial: Tensor, *, beta: float) -> StepResult:
    """BCE(p', y) + beta KL(p, p') (1 - p_y)."""
    return _of_both(forward, batch, adversarial, partial(mart_loss, beta=beta))


def _of_both(
    forward: Model,
    batch: Batch,
    adversarial: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> StepResult:
    clean, attacked = forward(batch.images), forward(adversarial)
    return StepResult(
        loss(clean.float(), attacked.float(), batch.wanted),
        torch.cat([clean, attacked]).detach(),
        batch.labels.repeat(2),
        len(clean),
    )


def trades_loss(clean: Tensor, attacked: Tensor, wanted: Tensor, *, beta: float) -> Tensor:
    """TRADES's loss, a scalar, from logits [B, K] of benign and of attacked images.

    ``wanted``: classes [B], or the share of each class [B, K].
    """
    natural = F.cross_entropy(clean, wanted)
    divergence = kl_divergence(clean.log_softmax(dim=1), attacked.log_softmax(dim=1))
    return natural + beta * divergence.mean()


def mart_loss(clean: Tensor, attacked: Tensor, wanted: Tensor, *, beta: float) -> Tensor:
    """MART's loss, a scalar, from logits [B, K] of benign and of attacked images.

    ``wanted``: classes [B], or the share of each class [B, K]; of these only the cross-entropy in
    it takes all, y is the largest.
    """
    log_p, log_q = clean.log_softmax(dim=1), attacked.log_softmax(dim=1)
    right = classes_of(wanted).unsqueeze(1)
    strongest_wrong = log_q.exp().scatter(1, right, 0.0).amax(dim=1)
    natural = F.cross_entropy(attacked, wanted, reduction="none")
    boosted = natural - torch.log(1.0001 - strongest_wrong)
    unsure = 1 - log_p.gather(1, right).squeeze(1).exp()
    return (boosted + beta * kl_divergence(log_p, log_q) * unsure).mean()


def weight_perturbation(
    model: nn.Module, loss: Callable[[Model], Tensor], gamma: float
) -> dict[str, Tensor]:
    """v = gamma |w| g / |g| by name, for each parameter w of more than one axis; detached.

    ``loss`` maps a network to a scalar, g is its gradient at the weights of ``model``, over all
    processes. The network that it is given is a copy: running statistics of the model stay.
    """
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def copy(images: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, {**weights, **buffers}, (images,))
        return logits

    matrices = {name: w for name, w in weights.items() if w.ndim > 1}
    gradients = torch.autograd.grad(loss(copy), list(matrices.values()))
    found = {}
    for (name, w), gradient in zip(matrices.items(), gradients, strict=True):
        gradient = distributed.total(gradient)
        length = gradient.norm().clamp_min(1e-20)
        found[name] = gamma * (w.detach().norm() / length) * gradient
    return found


def perturbed(model: nn.Module, forward: Model, perturbation: dict[str, Tensor]) -> Model:
    """``forward`` with each weight w as w + v.

    The weights themselves do not move: the loss's gradient at w + v is what backward leaves at w.
    """
    assert isinstance(forward, nn.Module)
    # a distributed wrapper holds the model as its attribute "module"
    prefix = "" if forward is model else "module."
    parameters = dict(model.named_parameters())
    weights = {prefix + name: parameters[name] + v for name, v in perturbation.items()}

    def of_perturbed(images: Tensor) -> Tensor:
        logits: Tensor = functional_call(forward, weights, (images,))
        return logits

    return of_perturbed
