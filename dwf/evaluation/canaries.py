"""Broken models that a verdict must catch: an evaluation that finds them all may be believed.

Each canary takes one honest network or mixture and breaks it so that a naive evaluation shows a
robustness that is not there, or a number that means nothing. ``caught_by`` names the findings that
give it away; one of them is enough. ``dwf doctor --canaries`` runs them all.

Sources: Athalye et al., arXiv:1802.00420; Carlini et al., arXiv:1902.06705; Pintor et al.,
arXiv:2106.09947.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks import pgd
from dwf.attacks.losses import Model, cross_entropy, margin
from dwf.attacks.source import float32_verdicts, judge, undisturbed
from dwf.checks import PixelRangeError
from dwf.data import ImageDataset, load
from dwf.data.batches import to_unit_range
from dwf.evaluation import model_findings
from dwf.evaluation.contracts import contracts
from dwf.evaluation.doubts import doubts
from dwf.evaluation.record import Finding, verdict
from dwf.models import ExpertModel, Mixture, RandomSwitch, SwitchedMixture
from dwf.models.gates import MlpGate
from dwf.models.views import attack_views

EPSILON = 0.2  # on digits, where 8/255 tests nothing
IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
NUM_EXPERTS = 3


# -- honest models --------------------------------------------------------------------------------


def build_small_network(
    seed: int,
    *,
    width: int = 16,
    image_shape: Sequence[int] = IMAGE_SHAPE,
    num_classes: int = NUM_CLASSES,
) -> nn.Sequential:
    """Two convolutions with BatchNorm and a linear layer; weights depend on ``seed`` alone."""
    channels, height, breadth = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * -(-height // 2) * -(-breadth // 2), num_classes),
        )


def honest_network(seed: int = 0, *, epsilon: float = EPSILON) -> nn.Module:
    """A small network for digits, adversarially trained in seconds; plainly with ``epsilon=0``."""
    return train_quickly(build_small_network(seed), seed=seed, epsilon=epsilon)


def honest_mixture(seed: int = 0, *, epsilon: float = EPSILON) -> Mixture:
    """Three such networks behind a soft gate, adversarially trained together."""
    experts = [build_small_network(seed + e, width=8) for e in range(NUM_EXPERTS)]
    gate = MlpGate(IMAGE_SHAPE, NUM_EXPERTS, hidden=32, seed=seed)
    last = gate.layers[-1]
    assert isinstance(last, nn.Linear)
    # A gate with an opinion of its own that training leaves alone: in a few epochs one that learns
    # would trust one expert with everything.
    last.weight.data = 2 * torch.randn(
        last.weight.shape, generator=torch.Generator().manual_seed(seed)
    )
    gate.requires_grad_(False)
    mixture = Mixture(experts, gate)
    train_quickly(mixture, seed=seed, epsilon=epsilon)
    return mixture


def train_quickly(
    model: nn.Module,
    dataset: ImageDataset | None = None,
    *,
    seed: int = 0,
    epsilon: float = EPSILON,
    num_epochs: int = 6,
    num_steps: int = 3,
    batch_size: int = 100,
) -> nn.Module:
    """Train in place on images attacked by PGD, on clean ones with ``epsilon=0``; return it in eval
    mode."""
    dataset = dataset or load("digits")
    images, labels = to_unit_range(dataset.images), dataset.labels
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    total = num_epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for _ in range(num_epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            x, y = images[part], labels[part]
            if epsilon > 0:
                # a short warm-up: the first steps learn nothing at the full radius
                radius = epsilon * min(1.0, 4 * (step + 1) / total)
                x = pgd(
                    model,
                    x,
                    y,
                    epsilon=radius,
                    step_size=radius / 3,
                    num_steps=num_steps,
                    random_start=True,
                    seed=step,
                    sample_index=part,
                )
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
    return model.eval()


# -- ways to break a network ----------------------------------------------------------------------


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class _Wrapped(nn.Module):
    """A network between a function of the images and one of the logits."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._before, self._after = before, after

    def forward(self, images: Tensor) -> Tensor:
        x = images if self._before is None else self._before(images)
        logits: Tensor = self.network(x)
        return logits if self._after is None else self._after(logits)


class _NoGradForward(_Wrapped):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class _Counting(_Wrapped):
    """A buffer counts the images seen, and the logits grow with it."""

    count: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("count", torch.zeros(()))

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
        caught_by: names of findings; a verdict that is not VALID for one of them has caught it.
        make: from the honest network, or with ``of="mixture"`` the honest mixture, to the broken
            model; the honest one stays as it is.
        images: what the broken pipeline feeds the model, from images in [0, 1].
    """

    description: str
    caught_by: frozenset[str]
    make: Callable[[Any], nn.Module]
    of: str = "network"
    images: Callable[[Tensor], Tensor] = field(default=lambda images: images)


MASKING = "zero_gradient noise_wins transfer_wins black_box_wins unbounded"


def _canary(
    description: str, caught_by: str, make: Callable[[Any], nn.Module], **more: Any
) -> Canary:
    return Canary(description, frozenset(caught_by.split()), make, **more)


CANARIES: dict[str, Canary] = {
    "gradient_killer": _canary(
        "a layer that passes images on and no gradient back",
        MASKING,
        lambda network: _Wrapped(network, _WithoutGradient.apply),
    ),
    "no_grad_forward": _canary(
        "a forward under torch.no_grad()", MASKING, lambda network: _NoGradForward(network)
    ),
    "quantized_input": _canary(
        "images rounded to 5 levels", MASKING, lambda network: _Wrapped(network, _quantize)
    ),
    "jagged_input": _canary(
        "x + 0.02 sin(400 x): gradients everywhere, and none that leads anywhere",
        "noise_wins transfer_wins black_box_wins unbounded epsilon_helps not_converged",
        lambda network: _Wrapped(network, _jag),
    ),
    "k_winners_take_all": _canary(
        "the strongest of many units passes, all others are zero",
        "noise_wins transfer_wins black_box_wins unbounded epsilon_helps not_converged",
        lambda network: _Wrapped(network, _KWinnersTakeAll()),
    ),
    "logits_x1000": _canary(
        "logits times 1000: the softmax is exactly 1",
        "vanishing_gradient",
        lambda network: _Wrapped(network, after=lambda logits: 1000 * logits),
    ),
    "softmax_output": _canary(
        "probabilities for logits",
        "not_logits",
        lambda network: _Wrapped(network, after=lambda logits: logits.softmax(dim=1)),
    ),
    "batch_statistics": _canary(
        "BatchNorm that ignores eval()", "batch_dependent state_changed", _batch_statistics
    ),
    "dropout_on": _canary(
        "dropout that ignores eval()", "random", lambda network: _Wrapped(network, _drop)
    ),
    "noisy_logits": _canary(
        "logits plus normal noise", "random", lambda network: _Wrapped(network, after=_noisy)
    ),
    "counting_buffer": _canary(
        "a buffer that every pass changes", "state_changed", lambda network: _Counting(network)
    ),
    "nan_logits": _canary(
        "all logits NaN, whose argmax is class 0",
        "non_finite",
        lambda network: _Wrapped(network, after=_nan),
    ),
    "half_overflow": _canary(
        "logits that overflow in half precision",
        "non_finite",
        lambda network: _Wrapped(network, after=_overflow),
    ),
    "constant_class": _canary(
        "one class for all images",
        "constant_output",
        lambda network: _Wrapped(network, after=_only_first_class),
    ),
    "dark_images": _canary(
        "images divided by 255 twice, and a first layer that undoes it",
        "input_scale",
        lambda network: _Wrapped(network, lambda images: images * 255),
        images=lambda images: images / 255,
    ),
    "normalized_clamp": _canary(
        "images normalized in the pipeline, attacked as if they were pixels",
        "pixel_range control_stands",
        lambda network: _Wrapped(network, lambda z: z * 0.37 + 0.31),
        images=lambda images: (images - 0.31) / 0.37,
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
    ),
    "random_gate": _canary(
        "the gate's weights dealt anew at every pass",
        "random view_wins",
        _random_gate,
        of="mixture",
    ),
}


# -- judging them ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Honest:
    """What canaries are made of, and an undefended twin."""

    network: nn.Module
    mixture: Mixture
    control: nn.Module


def honest_models(seed: int = 0) -> Honest:
    """All three, trained on digits: half a minute on one slow core."""
    return Honest(honest_network(seed), honest_mixture(seed), honest_network(seed, epsilon=0))


Suite = Callable[[Model, Tensor, Tensor, float], Tensor]


def pgd_suite(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_steps: int = 25,
    num_restarts: int = 2,
) -> Tensor:
    """[N] bool: what PGD by cross-entropy and by margin leave; the smallest suite there is."""
    correct = _right(model, images, labels)
    for loss in (cross_entropy, margin):
        left = torch.nonzero(correct)[:, 0]
        adversarial = pgd(
            model,
            images[left],
            labels[left],
            epsilon=epsilon,
            step_size=epsilon / 5,
            num_steps=num_steps,
            random_start=True,
            num_restarts=num_restarts,
            loss=loss,
            sample_index=left,
        )
        correct[left] = _right(model, adversarial, labels[left])
    return correct


def _right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    device = images.device
    with undisturbed(model, device), float32_verdicts(device), torch.no_grad():
        return judge(model(images), labels)[0]


def examine(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    suite: Suite = pgd_suite,
    sources: Mapping[str, Model] | None = None,
) -> list[Finding]:
    """Findings of contracts, a suite and the doubts after it, in this order.

    Attacks are not run where a contract is broken: their numbers would mean nothing. A mixture is
    also attacked through its views.
    """
    try:
        found = contracts(model, images, labels).findings()
    except PixelRangeError as error:
        return [model_findings.pixel_range(str(error))]
    if verdict(found) == "INVALID":
        return found
    with warnings.catch_warnings():
        # zero_gradient says it
        warnings.filterwarnings("ignore", message="the model's output does not depend")
        correct = suite(model, images, labels, epsilon)
    measured = doubts(
        model,
        images,
        labels,
        correct=correct,
        epsilon=epsilon,
        sources=sources,
        views=attack_views(model) if isinstance(model, ExpertModel) else (),
    )
    return found + measured.findings()


def examine_canary(
    name: str, honest: Honest, images: Tensor, labels: Tensor, *, suite: Suite = pgd_suite
) -> list[Finding]:
    """Break the honest model and judge what came of it; ``images`` in [0, 1], of digits."""
    canary = CANARIES[name]
    broken = canary.make(honest.mixture if canary.of == "mixture" else honest.network)
    return examine(
        broken,
        canary.images(images),
        labels,
        epsilon=EPSILON,
        suite=suite,
        sources={"the undefended twin": honest.control},
    )


def is_caught(name: str, found: Sequence[Finding]) -> bool:
    """Not VALID, and for a reason that belongs to this canary."""
    reasons = {finding.name for finding in found if finding.severity != "note"}
    return bool(reasons & CANARIES[name].caught_by)
