"""PGD without this package: as toolboxes write it, and as a good engineer does in stock torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.bench.stock import COMPILE, captured

Model = Callable[[Tensor], Tensor]  # images to logits
Attack = Callable[[Tensor, Tensor, int], Tensor]  # images, labels, num_steps -> adversarial


def eager_attack(model: Model, epsilon: float, step_size: float) -> Attack:
    """PGD in the L-inf ball from the images on, as toolboxes write it."""

    def attack(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        adversarial = images.clone()
        for _ in range(num_steps):
            adversarial.requires_grad_()
            loss = F.cross_entropy(model(adversarial), labels)
            (grad,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial.detach() + step_size * grad.sign()
            delta = (moved - images).clamp(-epsilon, epsilon)
            adversarial = (images + delta).clamp(0, 1)
        return adversarial

    return attack


def move_(
    adversarial: Tensor, gradient: Tensor, images: Tensor, epsilon: float, step_size: float
) -> None:
    """Sign, step, projection and clip, in place."""
    moved = adversarial + step_size * gradient.sign()
    moved = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon)
    adversarial.copy_(moved.clamp(0, 1))


class StockAttack:
    """PGD as a good engineer writes it for one model and batch size, in stock torch.

    channels_last, bfloat16 weights under autocast (which would cast frozen float32 ones anew at
    every step), parameters frozen, experts and update compiled, a whole step in one CUDA graph.
    BatchNorm is not folded: compiled, it is part of the pass over memory that ReLU needs anyway.
    The image that moves stays float32.

    Args:
        model: a copy in eval mode and channels_last that is the attack's own; its forward calls
            compiled modules if it is to.
        compiled: also compile the update of the images.
        graphed: capture a step into a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        epsilon: float,
        step_size: float,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool,
        graphed: bool,
    ) -> None:
        self.model = model.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
        self._dtype = dtype
        self._budget = epsilon, step_size
        self._move = torch.compile(move_, **COMPILE) if compiled else move_
        self.images = images.contiguous(memory_format=torch.channels_last).clone()
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.adversarial = self.images.clone()
        self.gradient = torch.empty_like(self.images)
        self.step: Callable[[], None] = self._step
        if graphed:
            self.step = captured(self._step)
        else:
            self._step()

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        self.load(images, labels)
        for _ in range(num_steps):
            self.step()
        return self.adversarial.clone()

    def load(self, images: Tensor, labels: Tensor) -> None:
        """Start from other images, in place: a graph knows addresses."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.adversarial.copy_(images)

    def follow(self, model: nn.Module) -> None:
        """Take over the weights and statistics of a model with the same layers, in place."""
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        with torch.no_grad():
            for dtype in {mine.dtype for mine, _ in pairs}:
                mine, theirs = zip(*(pair for pair in pairs if pair[0].dtype is dtype), strict=True)
                torch._foreach_copy_(mine, theirs)

    def logits(self, images: Tensor) -> Tensor:
        """As a step computes them, also by what was compiled for it: same layout, with a tape."""
        leaf = images.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        with torch.enable_grad():
            return self._logits(leaf).detach()

    def _logits(self, leaf: Tensor) -> Tensor:
        # The cache of casts would hand a tensor of one capture to the next.
        with torch.autocast(
            leaf.device.type,
            self._dtype,
            enabled=self._dtype is not torch.float32,
            cache_enabled=False,
        ):
            logits: Tensor = self.model(leaf)
        return logits.float()

    def _step(self) -> None:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            leaf = self.adversarial.detach().requires_grad_()
            loss = F.cross_entropy(self._logits(leaf), self.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        self.gradient.copy_(gradient)
        self._move(self.adversarial, self.gradient, self.images, *self._budget)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Floating parameters and buffers, in the order of the layers."""
    return [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
