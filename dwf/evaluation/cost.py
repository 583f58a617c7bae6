"""Parameters of a model, and the arithmetic that one image costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.source import float32_verdicts


@dataclass(frozen=True)
class Cost:
    """``num_parameters`` is None for a callable that is no module."""

    num_parameters: int | None
    flop_per_image: int


def inference_cost(model: Model, images: Tensor, *, seed: int = 0) -> Cost:
    """The cost of one forward pass over ``images`` [B, C, H, W].

    Convolutions and matrix products count, a multiplication and an addition as two operations.
    Experts that a router leaves out cost nothing. Where the cost depends on the image it is the
    mean.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else None
    device = images.device
    with undisturbed(model, device, seed=seed), torch.no_grad(), float32_verdicts(device):
        with FlopCounterMode(display=False) as counter:
            ask(model, images)
    return Cost(
        num_parameters=None if parameters is None else sum(p.numel() for p in parameters),
        flop_per_image=round(counter.get_total_flops() / len(images)),
    )
