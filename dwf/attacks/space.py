"""Attack a model in pixels, or in the normalized space of a published protocol.

space = attack_space(model, "paper-compat", "unit", mean, std)
adversarial = space.leave(pgd(space, space.enter(images), labels, ...))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwf.attacks.door import ask
from dwf.attacks.losses import Model

# The range [low, high] that an attacked tensor is clamped to. "pixels" is the usual one: images in
# [0, 1], checked. The other two reproduce published protocols (see `NormalizedSpace`): values are
# not checked, and results are clamped to [0, 1] ("unit") or not at all ("none").
CLAMPS = {"pixels": (0.0, 1.0), "unit": (0.0, 1.0), "none": (-torch.inf, torch.inf)}


class NormalizedSpace(nn.Module):
    """A pixel model as a function of normalized images z = (images - mean) / std.

    This protocol explains DWF's published tables best: z is made in the data pipeline, epsilon is
    in units of z, and attacked tensors are clamped to [0, 1], which is not the range of z. It is
    kept to reproduce those tables, never to claim robustness: after the clamp most pixels lie in
    [mean, mean + std].

    ``mean`` and ``std`` hold one number per channel, in pixel units.
    """

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Logits [B, K] of normalized images [B, C, H, W]."""
        logits: Tensor = ask(self.model, self.to_pixels(z))
        return logits

    def to_pixels(self, z: Tensor) -> Tensor:
        """Normalized images as pixels, both [B, C, H, W]."""
        return z * self._std.to(z) + self._mean.to(z)

    def from_pixels(self, images: Tensor) -> Tensor:
        """Pixels as normalized images, both [B, C, H, W]."""
        return (images - self._mean.to(images)) / self._std.to(images)


@dataclass(frozen=True)
class AttackSpace:
    """The space an attack acts in. Attacks take it in place of a model, and then points of it.

    Attributes:
        model: points of the space to logits; or an AttackTarget made of that.
        enter, leave: pixels to points, and back.
        clamp: the range of points, one of CLAMPS.
    """

    model: Model
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    clamp: str

    def __call__(self, points: Tensor) -> Tensor:
        logits: Tensor = ask(self.model, points)
        return logits


def attack_space(
    model: Model, protocol: str, clamp: str, mean: Sequence[float], std: Sequence[float]
) -> AttackSpace:
    """The space of a protocol: "pixels", or "paper-compat" for normalized images.

    ``clamp``, "unit" or "none", ``mean`` and ``std`` [C] are used by "paper-compat" alone.
    """
    if protocol == "pixels":
        return AttackSpace(model, _same, _same, "pixels")
    view = NormalizedSpace(model, mean, std)
    return AttackSpace(view, view.from_pixels, view.to_pixels, clamp)


def _same(images: Tensor) -> Tensor:
    return images
