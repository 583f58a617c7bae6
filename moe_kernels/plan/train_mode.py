"""Call a model in train mode with its networks computed by training plans, where those fit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_kernels.plan.training import TrainingPlan
from moe_kernels.select import named_implementation

log = logging.getLogger("moe_kernels")


class TrainMode(nn.Module):
    """A model whose networks run by `TrainingPlan` in calls that record gradients.

    Everything around them stays the model's own code. Networks are the outermost modules that plans
    fit: the model itself, or parts that read maps of the images' shape. In bfloat16 under CPU
    autocast to it, in float32 without autocast; everything else calls the model as it is.

    Args:
        module: the model; shared, not copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self._found: dict[tuple[Any, ...], list[TrainingPlan]] = {}

    def forward(self, images: Tensor, *args: Any, **options: Any) -> Any:
        dtype = _dtype()
        if dtype is None or not torch.is_grad_enabled() or images.dim() != 4 or not images.is_cpu:
            return self.module(images, *args, **options)
        key = dtype, tuple(images.shape[1:])
        if key not in self._found:
            self._found[key] = _plans(self.module, images, dtype)
        with contextlib.ExitStack() as stack:
            for plan in self._found[key]:
                stack.enter_context(_in_place_of_forward(plan))
            return self.module(images, *args, **options)


def _dtype() -> torch.dtype | None:
    """What products are computed in as the caller wants it, if a plan offers that."""
    if named_implementation() == "reference":
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32
    dtype = torch.get_autocast_dtype("cpu")
    return dtype if dtype is torch.bfloat16 else None


def _plans(module: nn.Module, images: Tensor, dtype: torch.dtype) -> list[TrainingPlan]:
    """Plans of the outermost modules that fit images like these."""
    if not any(isinstance(x, nn.BatchNorm2d) for x in module.modules()):
        return []
    plan = TrainingPlan(module, dtype)
    fault = plan.fault(images.detach().float())
    if fault is None:
        return [plan]
    log.debug("%s is not trained by compiled kernels: %s", type(module).__name__, fault)
    return [found for child in module.children() for found in _plans(child, images, dtype)]


@contextlib.contextmanager
def _in_place_of_forward(plan: TrainingPlan) -> Iterator[None]:
    """Let calls of the plan's network run the plan where it fits."""
    network = plan.network
    if "forward" in vars(network):  # reached by two ways
        yield
        return

    def forward(images: Tensor, *args: Any, **options: Any) -> Any:
        del network.forward  # the network as it is, also for who looks at it
        try:
            if not args and not options and plan.fits(images):
                return plan(images)
            return network.forward(images, *args, **options)
        finally:
            network.forward = forward

    network.forward = forward
    try:
        yield
    finally:
        del cast(Any, network).forward
