"""Any model as it is: gradients by autograd, for what has no plan.

On a GPU a module's whole step, forward and backward under bfloat16 autocast, is captured in a CUDA
graph and replayed; where it cannot be captured it runs as it is.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.plan.step import Loss, Steps


class Autograd:
    """A model for the time of one attack, during which its weights stay where they are.

    The methods are those of `Plan`.
    """

    deterministic = False  # as far as we know
    back_end = "autograd"

    def __init__(self, model: Callable[[Tensor], Any]) -> None:
        self._model = model
        this = weakref.proxy(self)  # no circle: graphs give their memory back at once
        self._steps = Steps(lambda *batch: this._reduced_gradient(*batch))

    def __call__(self, images: Tensor) -> Any:
        """What the model returns."""
        return self._model(images)

    def gflop_per_image(self, image_shape: Sequence[int]) -> float | None:
        """Not known."""
        return None

    @property
    def graph(self) -> str:
        """Whether steps are captured in a CUDA graph, or why not."""
        return self._steps.graph

    @torch.enable_grad()
    def gradient(
        self, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient [B, C, H, W] float32 of the loss, summed over the batch, and the logits.

        Zero, with a warning, if autograd sees no way from the images to the loss.
        """
        leaf = images.detach().requires_grad_()
        logits = self._model(leaf)
        total = (loss or _cross_entropy)(logits, labels).sum()
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

    def linf_step(
        self,
        adversarial: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        low: float,
        high: float,
        loss: Loss | None = None,
    ) -> None:
        """One step of PGD, in place on ``adversarial``; see `moe_kernels.linf_step_`."""
        self._steps(adversarial, images, labels, epsilon, step_size, low, high, loss)

    def _reduced_gradient(self, images: Tensor, labels: Tensor, loss: Loss | None) -> Tensor:
        """On a GPU a module runs in bfloat16; of anything else we do not know what it can bear."""
        if images.device.type != "cuda" or not isinstance(self._model, nn.Module):
            return self.gradient(images, labels, loss)[0]
        # The cache of casts would hand a tensor of one capture to the next.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return self.gradient(images, labels, loss)[0]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")
