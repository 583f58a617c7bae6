"""Differentiate a substitute where a model has no useful gradient (BPDA).

Source: backward pass differentiable approximation, Athalye et al., arXiv:1802.00420.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import ModelOutputError


class SubstituteGradient(nn.Module):
    """The value of one module with the gradient of another; see :func:`with_backward_pass_of`."""

    def __init__(self, value: Model, gradient: Model) -> None:
        super().__init__()
        self.value = value
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        """``value(x)``; ModelOutputError if ``gradient(x)`` has another shape."""
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

    Quantization or JPEG in front of a network have no useful gradient: attack
    ``Sequential(with_backward_pass_of(quantize, Identity()), network)``, whose gradient is that of
    the network at the quantized image. Let the model without a substitute judge.

    Both map a tensor to one of the same shape, else the first pass raises ModelOutputError; they
    may be parts of a model or whole models.
    """
    return SubstituteGradient(forward_model, backward_model)
