"""Differentiate a model that has no plan, by autograd."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks.door import ask
from dwf.attacks.losses import LOSSES, Loss
from moe_kernels.graphs import Graphs
from moe_kernels.plan.modules import kept_tensors, structure

_MAX_MODELS = 8  # whose graphs are kept; a graph keeps its activations


class Autograd:
    """Wrap a model as an `AttackPlan` for one attack; its weights are neither copied nor folded.

    Args:
        model: maps images [B, C, H, W] to logits [B, K].
        dtype: bfloat16 or float16 for autocast in gradients of a module on a GPU; None for the
            precision of the model and the caller. A callable that is no module may not tolerate
            less than its own precision, so it keeps that.
    """

    deterministic = False  # as far as we know
    back_end = "autograd"

    def __init__(self, model: Callable[[Tensor], Any], dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype if isinstance(model, nn.Module) and dtype in _REDUCED else None
        self._graphs: Graphs | None = None

    @property
    def graphs(self) -> Graphs:
        """Those of earlier attacks on this module, unless it has become something else."""
        if self._graphs is None:
            self._graphs = _kept_graphs(self._model)
        return self._graphs

    def __call__(self, images: Tensor) -> Any:
        """What the model returns."""
        return ask(self._model, images)

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
        leaf, logits, total = self._forward(images, labels, loss)
        grad: Tensor | None = None
        if total.requires_grad:
            try:
                (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower():
                    raise
                # reentrant checkpoints allow nothing else
                leaf, logits, total = self._forward(images, labels, loss)
                total.backward()  # type: ignore[no-untyped-call]
                grad = leaf.grad
        if grad is None:
            warnings.warn(
                "the model's output does not depend on its input as far as autograd can see "
                "(no_grad, detach or .data inside?): this attack has no gradient to follow",
                stacklevel=2,
            )
            return torch.zeros_like(leaf), logits.detach()
        return grad.detach().float().contiguous(), logits.detach()

    def _forward(
        self, images: Tensor, labels: Tensor, loss: Loss | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The images as a leaf, the logits, and the summed loss."""
        leaf = images.detach().requires_grad_()
        with self._autocast(images.device):
            logits = ask(self._model, leaf)
            function = LOSSES[loss] if isinstance(loss, str) else loss
            return leaf, logits, function(logits, labels).sum()

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None or device.type != "cuda":
            return contextlib.nullcontext()
        # The cache of casts would hand a tensor of one capture to the next.
        return torch.autocast("cuda", self._dtype, cache_enabled=False)


_REDUCED = (torch.bfloat16, torch.float16)
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Graphs]] = weakref.WeakKeyDictionary()


def _kept_graphs(model: Any) -> Graphs:
    """The graphs of this module; new ones if a graph would not compute what it computes now."""
    if not isinstance(model, nn.Module):
        return Graphs()  # what a function computes may change without a sign
    addresses = [x.data_ptr() for x in kept_tensors(model)]
    now = structure(model), [module.training for module in model.modules()], addresses
    before, graphs = _kept.pop(model, (None, Graphs()))
    if before is not None and before != now:
        graphs.forget()
    while len(_kept) >= _MAX_MODELS:
        del _kept[next(iter(_kept))]
    _kept[model] = now, graphs
    return graphs
