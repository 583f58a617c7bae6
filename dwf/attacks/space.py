"""Models seen from another side, for an attack to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import ModelOutputError


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


class SubstituteGradient(nn.Module):
    """The value of one module with the gradient of another; see :func:`with_backward_pass_of`."""

    def __init__(self, value: Model, gradient: Model) -> None:
        super().__init__()
        self.value = value
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value: Tensor = self.value(x)
        gradient: Tensor = self.gradient(x)
        if gradient.shape != value.shape:
            raise ModelOutputError(
                f"backward_model: {list(gradient.shape)} for a forward_model's "
                f"{list(value.shape)}, expected the same shape"
            )
        # adds zero, bit for bit; NaN where the substitute is not finite
        return value + (gradient - gradient.detach())


def with_backward_pass_of(forward_model: Model, backward_model: Model) -> SubstituteGradient:
    """A module that computes what ``forward_model`` does, and differentiates ``backward_model``.

    For what has no useful gradient, as quantization or JPEG in front of a network: attack
    ``Sequential(with_backward_pass_of(quantize, Identity()), network)``, whose gradient is that of
    the network at the quantized image. Both map a tensor to one of the same shape; whole models
    will do as well. Let the model without a substitute judge.

    Source: backward pass differentiable approximation, arXiv:1802.00420.
    """
    return SubstituteGradient(forward_model, backward_model)
