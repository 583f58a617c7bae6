"""Where an attack gets its gradients from, and the promise that it leaves no trace.

An attack differentiates a model with respect to images only. While it does, parameters are frozen,
BatchNorm and dropout are in the mode the caller chose, and torch's random state is the attack's
own. Afterwards, also after an exception, every bit is as before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import moe_kernels
from dwf.attacks.losses import Loss, Model, TargetLoss, cross_entropy
from dwf.attacks.target import AttackPlan, AttackReport
from dwf.checks import check_choice, check_labels, check_logits
from moe_kernels.plan import Autograd

BN_MODES = ("eval", "train")


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
    randomness (expectation over transformation, Athalye et al., arXiv:1802.00420); a plan that has
    none needs one pass. The first pass checks what only a pass can show: that the model returns
    logits, and that labels name classes.

    ``passes`` counts image-passes: forward and backward each cost one per image and sample.
    """

    model: Model
    loss: Loss
    eot_samples: int = 1
    allow_probabilities: bool = False
    plan: AttackPlan | None = None  # autograd through the model by default
    reason: str | None = None  # why that
    passes: int = 0
    _checked: bool = False

    def __post_init__(self) -> None:
        self._plan = self.plan or Autograd(self.model)
        self._num_samples = 1 if self._plan.deterministic else self.eot_samples

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient [B, C, H, W] float32 of ``sum_b loss_b``, detached."""
        total: Tensor | None = None
        for _ in range(self._num_samples):
            grad, _ = self._plan.gradient(images, self._targets(labels), self._next_loss())
            self.passes += len(images)
            total = grad if total is None else total + grad
        assert total is not None
        return total if self._num_samples == 1 else total / self._num_samples

    def linf_step(
        self,
        adversarial: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        low: float,
        high: float,
    ) -> None:
        """One step of PGD, in place on ``adversarial``; see `moe_kernels.linf_step_`."""
        end = epsilon, step_size, low, high
        if self._checked and self._num_samples == 1:
            targets = self._targets(labels)
            self._plan.linf_step(adversarial, images, targets, *end, self._next_loss())
            self.passes += len(images)
        else:
            moe_kernels.linf_step_(adversarial, self(adversarial, labels), images, *end)

    @contextlib.contextmanager
    def reported(self, report: AttackReport | None, images: Tensor) -> Iterator[None]:
        """Fill a report, if one is wanted, with what happens inside the block."""
        if report is None:
            yield
            return
        _wait(images.device)
        passes, started = self.passes, time.perf_counter()
        yield
        _wait(images.device)
        report.seconds = time.perf_counter() - started
        report.passes = self.passes - passes
        report.num_images = len(images)
        report.back_end, report.graph = self._plan.back_end, self._plan.graph
        report.reason = self.reason
        report.gflop_per_image = self._plan.gflop_per_image(images.shape[1:])

    def _targets(self, labels: Tensor) -> Tensor:
        """What the plan gives the loss beside the logits, row by row."""
        return self.loss.targets if isinstance(self.loss, TargetLoss) else labels

    @property
    def _function(self) -> Loss:
        """The loss as a function of logits and those."""
        return self.loss.function if isinstance(self.loss, TargetLoss) else self.loss

    def _next_loss(self) -> Loss | None:
        """The loss; at the first pass one that looks at the logits, later a fused one if known."""
        if not self._checked:
            return self._checking_loss
        return None if self.loss is cross_entropy else self._function

    def _checking_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        check_logits(logits, len(targets), allow_probabilities=self.allow_probabilities)
        if not isinstance(self.loss, TargetLoss):
            check_labels(targets, len(targets), logits.shape[1])
        self._checked = True
        return self._function(logits, targets)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
