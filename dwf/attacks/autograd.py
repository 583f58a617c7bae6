"""Differentiate a model that has no plan, by autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks.losses import LOSSES, Loss
from moe_kernels.graphs import Graphs


class Autograd:
    """Wrap a model as an `AttackPlan` for one attack; its weights are neither copied nor folded.

    Args:
        model: maps images [B, C, H, W] to logits [B, K].
    """

    deterministic = False  # as far as we know
    back_end = "autograd"

    def __init__(self, model: Callable[[Tensor], Any]) -> None:
        self._model = model
        self.graphs = Graphs()

    def __call__(self, images: Tensor) -> Any:
        """What the model returns."""
        return self._model(images)

    def gflop_per_image(self, image_shape: Sequence[int]) -> float | None:
        """None: not known."""
        return None

    @torch.enable_grad()
    def gradient(
        self, images: Tensor, labels: Tensor, loss: Loss | str = "ce"
    ) -> tuple[Tensor, Tensor]:
        """Gradient [B, C, H, W] float32 of the loss, summed over the batch, and the logits.

        Zero, with a warning, if autograd sees no way from the images to the loss.
        """
        leaf = images.detach().requires_grad_()
        logits = self._model(leaf)
        function = LOSSES[loss] if isinstance(loss, str) else loss
        total = function(logits, labels).sum()
        grad = None
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
        if grad is None:
            warnings.warn(
                "the model's output does not depend on its input as far as autograd can see "
                "(no_grad, detach or .data inside?): this attack has no gradient to follow",
                stacklevel=2,
            )
            return torch.zeros_like(leaf), logits.detach()
        return grad.detach().float().contiguous(), logits.detach()

    def reduced_gradient(
        self, images: Tensor, labels: Tensor, loss: Loss | str = "ce"
    ) -> tuple[Tensor, Tensor]:
        """`gradient`; for a module on a GPU under bfloat16 autocast.

        A callable that is no module may not tolerate bfloat16, so it keeps its precision.
        """
        if images.device.type != "cuda" or not isinstance(self._model, nn.Module):
            return self.gradient(images, labels, loss)
        # The cache of casts would hand a tensor of one capture to the next.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return self.gradient(images, labels, loss)
