"""Route each image to one expert, with a gate that learns all the same.

    logits[b] = expert_{e(b)}(x)[b],     e(b) = argmax_e gate(x)[b],     x = normalize(images)

The choice has no gradient. A straight-through gradient stands in for it, in training and in
attacks, so that an attack can also search for images that another expert answers.

Source: the top-1 mixtures and the dual model of arXiv:2502.06832; straight-through gradients of
Bengio et al., arXiv:1308.3432.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.checks import ConfigError, ImageError, check_count
from dwf.models.experts import ExpertModel, ModelOfNetworks, PlannedExperts, softened
from dwf.models.mixture import MixtureOutput
from dwf.models.seeded import seeded_weights
from dwf.models.wrap import PixelModel


def one_hot_choice(scores: Tensor) -> Tensor:
    """Rows of 0 with a 1 at the largest of ``scores`` [B, E], the first of equal ones."""
    return F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(scores)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, bit for bit, with the gradient of ``soft``; NaN where that is NaN."""
    return hard + (soft - soft.detach())


def combine(weights: Tensor, expert_logits: Tensor) -> Tensor:
    """Sum ``expert_logits`` [E, B, K] with ``weights`` [B, E] to [B, K]; exact for one-hot rows.

    Not a matrix product, because a GPU may round the operands of one.
    """
    return (weights.T.unsqueeze(2) * expert_logits).sum(dim=0)


def linear_router(image_shape: Sequence[int], num_experts: int, *, seed: int) -> nn.Module:
    """One linear layer from images [B, C, H, W] to ``gate_logits`` [B, E].

    Its initial weights are random, because a gate of zeros sends all images to one expert. ``seed``
    fixes them without touching torch's RNG.
    """
    check_count(num_experts, "num_experts")
    with seeded_weights(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(image_shape), num_experts))


class RoutedMixture(ModelOfNetworks):
    """A mixture whose gate picks one expert for each image.

    Every expert computes every image: the gate's gradient needs the answers of all, and BatchNorm
    sees the whole batch.

    Args:
        experts: modules that map images to logits [B, K].
        gate: module that maps the same images to ``gate_logits`` [B, E].
        normalize: first layer shared by experts and gate.
        expert_names: "expert 0" and so on by default.

    ``model(images, return_aux=True)`` gives a MixtureOutput whose ``gate_weights`` are one-hot and
    carry the gradient of softmax(gate_logits).

    Raises:
        ConfigError: no experts, one that is not a module, or not one name for each.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        gate: nn.Module,
        normalize: nn.Module | None = None,
        *,
        expert_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(experts, normalize, expert_names=expert_names)
        self.gate = gate

    def gate_logits(self, images: Tensor) -> Tensor:
        """Scores of the experts [B, E], float32; the largest is chosen."""
        gate_logits: Tensor = self.gate(self.normalize(images))
        return gate_logits.float()

    def gate_weights(self, images: Tensor) -> Tensor:
        return _routed(self.gate_logits(images))

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        return softened(self.gate_logits(images))

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> MixtureOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | MixtureOutput:
        x = self.normalize(images)
        expert_logits = torch.stack([expert(x) for expert in self.experts])  # [E, B, K]
        gate_logits = self.gate(x).float()
        gate_weights = _routed(gate_logits)
        logits = combine(gate_weights, expert_logits)
        if not return_aux:
            return logits
        return MixtureOutput(logits, gate_logits, gate_weights, expert_logits)


def _routed(gate_logits: Tensor) -> Tensor:
    return straight_through(one_hot_choice(gate_logits), gate_logits.softmax(dim=1))


class DualMixture(PlannedExperts):
    """A fixed blend of two mixtures' logits: (1 - alpha) standard(x) + alpha robust(x).

    Its experts are the experts of both. One expert of each mixture counts for an image, and its
    gate weight is the share of its mixture.

    Raises:
        ConfigError: alpha is not in [0, 1].
    """

    def __init__(self, standard: RoutedMixture, robust: RoutedMixture, *, alpha: float) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha: {alpha:g} is not in [0, 1]")
        self.alpha = alpha
        self.standard = standard
        self.robust = robust
        self.expert_names = [
            *(f"standard {name}" for name in standard.expert_names),
            *(f"robust {name}" for name in robust.expert_names),
        ]

    def expert(self, index: int) -> PixelModel:
        split = self.standard.num_experts
        return self.standard.expert(index) if index < split else self.robust.expert(index - split)

    def networks(self) -> Sequence[nn.Module]:
        return [*self.standard.networks(), *self.robust.networks()]

    def gate_weights(self, images: Tensor) -> Tensor:
        return self._join(self.standard.gate_weights(images), self.robust.gate_weights(images))

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        standard, robust = (x.soft_gate_weights(images) for x in (self.standard, self.robust))
        return self._join(standard, robust)

    def softened_inside(self, temperature: float | None) -> nn.Module:
        """Both mixtures mix the logits of all their experts."""
        return _SoftDual(self, temperature)

    def blend(self, standard: Tensor, robust: Tensor) -> Tensor:
        """Blend the logits [B, K] of the two mixtures."""
        return (1 - self.alpha) * standard + self.alpha * robust

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> MixtureOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | MixtureOutput:
        standard: MixtureOutput = self.standard(images, True)
        robust: MixtureOutput = self.robust(images, True)
        logits = self.blend(standard.logits, robust.logits)
        if not return_aux:
            return logits
        return MixtureOutput(
            logits,
            torch.cat([standard.gate_logits, robust.gate_logits], dim=1),
            self._join(standard.gate_weights, robust.gate_weights),
            torch.cat([standard.expert_logits, robust.expert_logits]),
        )

    def _join(self, standard: Tensor, robust: Tensor) -> Tensor:
        return torch.cat([(1 - self.alpha) * standard, self.alpha * robust], dim=1)


class _SoftDual(nn.Module):
    """A dual mixture with a softened choice in both halves."""

    def __init__(self, model: DualMixture, temperature: float | None) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        standard, robust = self.model.standard, self.model.robust
        return self.model.blend(self._half(standard, images), self._half(robust, images))

    def _half(self, half: RoutedMixture, images: Tensor) -> Tensor:
        output: MixtureOutput = half(images, True)
        if self.temperature is None:
            return combine(output.gate_logits.softmax(dim=1), output.expert_logits)
        spread = softened(output.gate_logits).log() / self.temperature
        return combine(spread.softmax(dim=1), output.expert_logits)


class ForcedExperts(nn.Module):
    """A model with a fixed choice of experts: image b goes through expert ``index[b]`` alone.

    Maps images [B, C, H, W] to logits [B, K]. Meant for eval mode: in train mode, each BatchNorm
    would see only the images of its expert.
    """

    def __init__(self, model: ExpertModel, index: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(model.expert(e) for e in range(model.num_experts))
        self._order = index.argsort(stable=True)
        self._back = self._order.argsort()
        self._counts = index.bincount(minlength=model.num_experts).tolist()

    def forward(self, images: Tensor) -> Tensor:
        check_rows(images, len(self._order))
        blocks = torch.split(images[self._order], self._counts)
        pairs = zip(self.experts, blocks, strict=True)
        logits = torch.cat([expert(block) for expert, block in pairs if len(block)])
        return logits[self._back]


def check_rows(images: Tensor, num_rows: int) -> None:
    """Require as many images as a module was made for; ImageError otherwise."""
    if len(images) != num_rows:
        raise ImageError(
            f"images: {len(images)} rows, but this module was made for {num_rows}, row by row; "
            "make it again after dropping rows"
        )
