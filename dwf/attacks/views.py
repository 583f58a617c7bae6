"""Models seen from another side, for an attack to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwf.attacks.losses import Model


class NormalizedSpace(nn.Module):
    """A pixel model as a function of normalized images z = (images - mean) / std.

    This is the protocol that best explains DWF's published tables: z is made in the data pipeline,
    epsilon is in units of z, and attacked tensors are clamped to [0, 1] although z does not live
    there. It is kept to reproduce those tables, never to claim robustness: most of what the clamp
    leaves are pixels in [mean, mean + std].

    ``mean`` and ``std`` hold one number per channel, in pixel units.
    """

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model(self.to_pixels(z))
        return logits

    def to_pixels(self, z: Tensor) -> Tensor:
        return z * self._std.to(z) + self._mean.to(z)

    def from_pixels(self, images: Tensor) -> Tensor:
        return (images - self._mean.to(images)) / self._std.to(images)


class AttackSpace(NamedTuple):
    """Where an attack acts: the model seen from there, the ways in and out, and the clamp."""

    model: Model
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    clamp: str


def attack_space(
    model: Model, protocol: str, clamp: str, mean: Sequence[float], std: Sequence[float]
) -> AttackSpace:
    """Pixels, or for the protocol "paper-compat" normalized images clamped as ``clamp`` says."""
    if protocol == "pixels":
        return AttackSpace(model, _same, _same, "pixels")
    view = NormalizedSpace(model, mean, std)
    return AttackSpace(view, view.from_pixels, view.to_pixels, clamp)


def _same(images: Tensor) -> Tensor:
    return images
