"""Where an attack gets its gradients from, and the promise that it leaves no trace.

An attack differentiates a model with respect to images only. While it does, parameters are frozen,
BatchNorm and dropout are in the mode the caller chose, and torch's random state is the attack's
own. Afterwards, also after an exception, every bit is as before.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dwf.attacks.losses import Loss
from dwf.checks import check_choice, check_labels, check_logits

Model = Callable[[Tensor], Any]
BN_MODES = ("eval", "train")


def inner_model(model: Model) -> Model:
    """The module inside DistributedDataParallel, so that an attack starts no communication."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def undisturbed(
    model: Model, device: torch.device, *, bn_mode: str = "eval", seed: int = 0
) -> Iterator[None]:
    """Put a model into the state an attack needs, and put everything back afterwards.

    Inside: gradients enabled (also under ``no_grad`` and ``inference_mode``), parameters frozen,
    every module in eval mode, or BatchNorm in train mode with ``bn_mode="train"``; random models
    draw from ``seed``. Restored: mode of each module, buffers, ``requires_grad``, ``.grad``, and
    the random state of the CPU and of ``device``.
    """
    check_choice(bn_mode, BN_MODES, "bn_mode")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_own_random_state(device, seed))
        if isinstance(model, nn.Module):
            stack.enter_context(_restored(model))
            model.eval()
            if bn_mode == "train":
                for module in model.modules():
                    if isinstance(module, _BatchNorm):
                        module.train()
        yield


@contextlib.contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    # not torch.manual_seed: that would reseed every GPU, not only the one in use
    on_cuda = device.type == "cuda"
    seed &= 2**64 - 1  # any integer, as for the start noise
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                # .data: the bits are the old ones, so a graph that saved this buffer stays valid
                buffer.data.copy_(saved)
                setattr(module, name, buffer)  # the forward may have put another tensor there


@dataclass
class GradientSource:
    """Gradient of a summed loss with respect to images, counted.

    With ``eot_samples`` S it is the mean over S passes, each with fresh draws of the model's own
    randomness (expectation over transformation, Athalye et al., arXiv:1802.00420). The first pass
    checks what only a pass can show: that the model returns logits, and that labels name classes.

    ``passes`` counts image-passes: forward and backward each cost one per image and sample.
    """

    model: Model
    loss: Loss
    eot_samples: int = 1
    allow_probabilities: bool = False
    passes: int = 0
    _checked: bool = False

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient [B, C, H, W] float32 of ``sum_b loss_b``, detached."""
        total: Tensor | None = None
        for _ in range(self.eot_samples):
            grad = self._single(images, labels)
            total = grad if total is None else total + grad
        assert total is not None
        return total if self.eot_samples == 1 else total / self.eot_samples

    def _single(self, images: Tensor, labels: Tensor) -> Tensor:
        leaf = images.detach().requires_grad_()
        logits = self.model(leaf)
        if not self._checked:
            check_logits(logits, len(images), allow_probabilities=self.allow_probabilities)
            check_labels(labels, len(images), logits.shape[1])
            self._checked = True
        total = self.loss(logits, labels).sum()
        self.passes += len(images)
        grad = None
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
        if grad is None:
            warnings.warn(
                "the model's output does not depend on its input as far as autograd can see "
                "(no_grad, detach or .data inside?): this attack has no gradient to follow",
                stacklevel=2,
            )
            return torch.zeros_like(leaf)
        return grad.detach().float().contiguous()
