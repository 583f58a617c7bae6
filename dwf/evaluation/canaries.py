"""Broken models that a verdict must catch: an evaluation that finds them all may be believed.

Each canary takes one honest network or mixture and breaks it so that a naive evaluation shows a
robustness that is not there, or a number that means nothing. ``caught_by`` names the findings that
give it away; one of them is enough. :func:`judge_canary` runs the evaluation that users run, with
a small budget; ``dwf doctor --canaries`` does so for all.

Sources: Athalye et al., arXiv:1802.00420; Carlini et al., arXiv:1902.06705; Pintor et al.,
arXiv:2106.09947.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import ModelOutputError, PixelRangeError
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset
from dwf.data.batches import to_unit_range
from dwf.evaluation.budget import Budget
from dwf.evaluation.evaluate import evaluate
from dwf.evaluation.honest import EPSILON, Honest
from dwf.evaluation.record import Finding, verdict
from dwf.evaluation.zoo.parts import Wrapped
from dwf.models import ExpertModel, Mixture, RandomSwitch, SwitchedMixture

# -- ways to break a network ----------------------------------------------------------------------


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class _NoGradForward(Wrapped):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class _Counting(Wrapped):
    """A buffer counts the images seen, and the logits grow with it."""

    count: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        self.count += len(images)
        return super().forward(images)


class _AlwaysTraining(nn.BatchNorm2d):
    """BatchNorm that does not listen to eval()."""

    def train(self, mode: bool = True) -> _AlwaysTraining:
        super().train(True)
        return self


def _batch_statistics(network: nn.Module) -> nn.Module:
    broken = copy.deepcopy(network)
    for module in broken.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _AlwaysTraining
            module.train()
    return broken


def _quantize(images: Tensor) -> Tensor:
    return (images * 4).round() / 4  # 5 levels


def _jag(images: Tensor) -> Tensor:
    return images + 0.02 * (400 * images).sin()


def _drop(images: Tensor) -> Tensor:
    return F.dropout(images, 0.2, training=True)


def _noisy(logits: Tensor) -> Tensor:
    return logits + 2 * torch.randn_like(logits)


def _overflow(logits: Tensor) -> Tensor:
    return (logits.half() * 2.0**14).float()


def _nan(logits: Tensor) -> Tensor:
    return logits / (logits - logits)


def _only_first_class(logits: Tensor) -> Tensor:
    return logits + 1e3 * F.one_hot(logits.new_zeros(len(logits)).long(), logits.shape[1])


class _KWinnersTakeAll(nn.Module):
    """Each pixel excites a bank of units, and only the strongest passes, with its own slope.

    Discontinuous wherever another unit wins, so that no gradient holds for as far as a step goes.
    Source: Xiao et al., arXiv:1905.10510, broken in arXiv:2002.08347; there the layer is a hidden
    one of a network wide enough to shatter by itself.
    """

    def __init__(self, num_units: int = 32, slope: float = 3.0) -> None:
        super().__init__()
        self._levels = (torch.arange(num_units) + 0.5) / num_units
        generator = torch.Generator().manual_seed(0)
        self._slopes = slope * torch.randn(num_units, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        away = images.unsqueeze(-1) - self._levels.to(images)
        winner = (-away.detach().abs()).topk(1, dim=-1).indices
        passed = self._levels.to(images) + self._slopes.to(images) * away
        return passed.gather(-1, winner).squeeze(-1)


def _divided_again(dataset: ImageDataset) -> ImageDataset:
    """Images divided by 255 before they were stored."""
    return replace(dataset, images=to_unit_range(dataset.images).round().to(torch.uint8))


def _normalized(dataset: ImageDataset) -> ImageDataset:
    """Images normalized before they were stored, by the statistics of digits."""
    return replace(dataset, images=(to_unit_range(dataset.images) - 0.31) / 0.37)


# -- ways to break a mixture ----------------------------------------------------------------------


class _BrokenMixture(ExpertModel):
    """A mixture whose gate weights pass through a function."""

    def __init__(self, mixture: Mixture, break_gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mixture = mixture
        self.expert_names = list(mixture.expert_names)
        self._break_gate = break_gate

    def expert(self, index: int) -> nn.Module:
        return self.mixture.expert(index)

    def gate_weights(self, images: Tensor) -> Tensor:
        return self._break_gate(self.mixture.gate_weights(images))

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        return self.mixture.soft_gate_weights(images)

    def forward(self, images: Tensor) -> Tensor:
        expert_logits = self.mixture(images, return_aux=True).expert_logits
        return torch.einsum("be,ebk->bk", self.gate_weights(images), expert_logits)


class _NanRouter(_BrokenMixture):
    """The gate is NaN everywhere; argmax of NaN sends every image to expert 0."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(mixture, lambda weights: weights * torch.nan)

    def forward(self, images: Tensor) -> Tensor:
        chosen = self.gate_weights(images).argmax(dim=1)
        expert_logits = self.mixture(images, return_aux=True).expert_logits
        logits: Tensor = expert_logits[chosen, torch.arange(len(images), device=images.device)]
        return logits


def _one_hot(weights: Tensor) -> Tensor:
    return F.one_hot(weights.argmax(dim=1), weights.shape[1]).to(weights)


def _random_gate(mixture: Mixture) -> nn.Module:
    return SwitchedMixture(mixture.experts, RandomSwitch(mixture.gate), mixture.normalize)


# -- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canary:
    """A way to break an honest model.

    Attributes:
        caught_by: names of findings, and of errors that refuse the model before any attack; one
            of them, as more than a note, has caught it.
        make: from the honest network, or with ``of="mixture"`` the honest mixture, to the broken
            model; the honest one stays as it is.
        pipeline: what is fed to the model, from the data set.
        seen_through: the suite itself attacks through a view that undoes the break. So a number no
            higher than the honest model's is right as well, whatever its verdict.
    """

    description: str
    caught_by: frozenset[str]
    make: Callable[[Any], nn.Module]
    of: str = "network"
    pipeline: Callable[[ImageDataset], ImageDataset] = field(default=lambda dataset: dataset)
    seen_through: bool = False


MASKING = "zero_gradient noise_wins black_box_wins unbounded"


def _canary(
    description: str, caught_by: str, make: Callable[[Any], nn.Module], **more: Any
) -> Canary:
    return Canary(description, frozenset(caught_by.split()), make, **more)


CANARIES: dict[str, Canary] = {
    "gradient_killer": _canary(
        "a layer that passes images on and no gradient back",
        MASKING,
        lambda network: Wrapped(network, _WithoutGradient.apply),
    ),
    "no_grad_forward": _canary(
        "a forward under torch.no_grad()", MASKING, lambda network: _NoGradForward(network)
    ),
    "quantized_input": _canary(
        "images rounded to 5 levels", MASKING, lambda network: Wrapped(network, _quantize)
    ),
    "jagged_input": _canary(
        "x + 0.02 sin(400 x): gradients everywhere, and none that leads anywhere",
        "noise_wins black_box_wins unbounded epsilon_helps not_converged",
        lambda network: Wrapped(network, _jag),
    ),
    "k_winners_take_all": _canary(
        "the strongest of many units passes, all others are zero",
        "noise_wins black_box_wins unbounded epsilon_helps not_converged",
        lambda network: Wrapped(network, _KWinnersTakeAll()),
    ),
    "logits_x1000": _canary(
        "logits times 1000: the softmax is exactly 1",
        "vanishing_gradient",
        lambda network: Wrapped(network, after=lambda logits: 1000 * logits),
    ),
    "softmax_output": _canary(
        "probabilities for logits",
        "not_logits ModelOutputError",
        lambda network: Wrapped(network, after=lambda logits: logits.softmax(dim=1)),
    ),
    "batch_statistics": _canary(
        "BatchNorm that ignores eval()", "batch_dependent state_changed", _batch_statistics
    ),
    "dropout_on": _canary(
        "dropout that ignores eval()", "random", lambda network: Wrapped(network, _drop)
    ),
    "noisy_logits": _canary(
        "logits plus normal noise", "random", lambda network: Wrapped(network, after=_noisy)
    ),
    "counting_buffer": _canary(
        "a buffer that every pass changes", "state_changed", lambda network: _Counting(network)
    ),
    "nan_logits": _canary(
        "all logits NaN, whose argmax is class 0",
        "non_finite",
        lambda network: Wrapped(network, after=_nan),
    ),
    "half_overflow": _canary(
        "logits that overflow in half precision",
        "non_finite",
        lambda network: Wrapped(network, after=_overflow),
    ),
    "constant_class": _canary(
        "one class for all images",
        "constant_output",
        lambda network: Wrapped(network, after=_only_first_class),
    ),
    "dark_images": _canary(
        "images divided by 255 twice, and a first layer that undoes it",
        "input_scale",
        lambda network: Wrapped(network, lambda images: images * 255),
        pipeline=_divided_again,
    ),
    "normalized_clamp": _canary(
        "images normalized in the pipeline, attacked as if they were pixels",
        "PixelRangeError",
        lambda network: Wrapped(network, lambda z: z * 0.37 + 0.31),
        pipeline=_normalized,
    ),
    "nan_router": _canary(
        "gate weights NaN, whose argmax is expert 0", "non_finite", _NanRouter, of="mixture"
    ),
    "dead_gate": _canary(
        "a gate that trusts expert 0 only",
        "dead_gate",
        lambda mixture: _BrokenMixture(mixture, lambda w: _one_hot(w.new_ones(1, 1) - w * 0)),
        of="mixture",
    ),
    "detached_gate": _canary(
        "no gradient through the gate",
        "view_wins blind_gate",
        lambda mixture: _BrokenMixture(mixture, Tensor.detach),
        of="mixture",
    ),
    "hard_gate": _canary(
        "the argmax of the gate, without a gradient",
        "view_wins blind_gate",
        lambda mixture: _BrokenMixture(mixture, _one_hot),
        of="mixture",
        seen_through=True,
    ),
    "random_gate": _canary(
        "the gate's weights dealt anew at every pass",
        "random view_wins",
        _random_gate,
        of="mixture",
    ),
}


# -- judging them ---------------------------------------------------------------------------------


# Enough for every sign: the models are small, and their signs are not subtle.
BUDGET = Budget(num_steps=10, num_queries=100)


@dataclass(frozen=True)
class Trial:
    """The verdict on a model by the standard suite with a small budget.

    ``robust_accuracy`` is NaN for a model that was refused before any attack.
    """

    findings: list[Finding]
    robust_accuracy: float = math.nan

    @property
    def verdict(self) -> str:
        """VALID, SUSPECT or INVALID."""
        return verdict(self.findings)


def judge(model: Model, dataset: ImageDataset, *, epsilon: float = EPSILON) -> Trial:
    """Evaluate as a user would, with a small budget.

    A refusal becomes a finding of the name of its error: it is what a user meets.
    """
    settings = EvaluationConfig(epsilon=epsilon, step_size=epsilon / 5, diagnostic_images=0)
    try:
        with warnings.catch_warnings():
            # the finding zero_gradient says it
            warnings.filterwarnings("ignore", message="the model's output does not depend")
            result = evaluate(model, dataset, settings, suite="standard", budget=BUDGET)
    except (PixelRangeError, ModelOutputError) as error:
        return Trial([Finding(type(error).__name__, "invalid", str(error))])
    return Trial(result.findings, result.robust_accuracy)


def judge_canary(name: str, honest: Honest, dataset: ImageDataset) -> Trial:
    """Break the honest model in the way of this name, and judge it on images of digits."""
    canary = CANARIES[name]
    broken = canary.make(honest.mixture if canary.of == "mixture" else honest.network)
    return judge(broken, canary.pipeline(dataset))


def is_caught(name: str, trial: Trial, honest_accuracy: float) -> bool:
    """Whether the verdict is not VALID for a reason that belongs to this canary.

    ``honest_accuracy`` is the robust accuracy of the honest model that the canary was made of.
    """
    canary = CANARIES[name]
    reasons = {finding.name for finding in trial.findings if finding.severity != "note"}
    if reasons & canary.caught_by:
        return True
    return canary.seen_through and trial.robust_accuracy <= honest_accuracy
