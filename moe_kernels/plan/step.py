"""PGD steps that can be captured: a function of a gradient, on tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.graphs import Graphed
from moe_kernels.ops.linf_step import linf_step_

Loss = Callable[[Tensor, Tensor], Tensor]
# images, labels, loss -> gradient
Gradient = Callable[[Tensor, Tensor, Loss | None], Tensor]

# A graph keeps its activations: those of the last few batch sizes stay.
_MAX_GRAPHS = 4


class Steps:
    """PGD steps along a gradient; on a GPU each is one CUDA graph from the second on.

    There is a graph for each batch size, clamp and loss; radius, step length, labels and images may
    change from call to call. ``gradient`` has to read its model in the same memory every time.
    """

    def __init__(self, gradient: Gradient) -> None:
        self._gradient = gradient
        self._graphed: dict[Any, tuple[Graphed, tuple[Tensor, ...]]] = {}

    def forget(self) -> None:
        """Drop all graphs, because something they read has moved."""
        self._graphed.clear()

    @property
    def graph(self) -> str:
        """Whether the last steps were captured, or why not."""
        if not self._graphed:
            return "no graph: no step ran on a GPU"
        reason = next(reversed(self._graphed.values()))[0].reason
        return "captured" if reason is None else f"no graph: {reason}"

    def __call__(
        self,
        adversarial: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        low: float,
        high: float,
        loss: Loss | None,
    ) -> None:
        """One step in place on ``adversarial``; see `moe_kernels.linf_step_`."""
        state = adversarial, images, labels, epsilon, step_size
        if images.device.type != "cuda":
            self._step(state, low, high, loss)
            return
        key = (tuple(images.shape), low, high, loss)
        if key not in self._graphed:
            if len(self._graphed) >= _MAX_GRAPHS:
                del self._graphed[next(iter(self._graphed))]
            own = tuple(x.clone() for x in state)
            step = Graphed(lambda: self._step(own, low, high, loss), images.device)
            self._graphed[key] = step, own
        step, own = self._graphed[key]
        for mine, given in zip(own, state, strict=True):
            mine.copy_(given)
        step()
        adversarial.copy_(own[0])

    @torch.no_grad()
    def _step(self, state: tuple[Tensor, ...], low: float, high: float, loss: Loss | None) -> None:
        adversarial, images, labels, epsilon, step_size = state
        grad = self._gradient(adversarial, labels, loss)
        linf_step_(adversarial, grad, images, epsilon, step_size, low, high)
