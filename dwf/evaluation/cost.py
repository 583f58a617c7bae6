"""What a model costs where it is used: its parameters, and the arithmetic of one image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dwf.attacks.losses import Model
from dwf.attacks.source import undisturbed
from dwf.evaluation.verdict import float32_verdicts


def inference_cost(model: Model, images: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """``num_parameters`` (None for what is no module) and ``flop_per_image`` of one forward pass.

    Counted are convolutions and matrix products, a multiplication and an addition as two, of what
    really runs on ``images`` [B, C, H, W]: experts that a router leaves out cost nothing. Where
    that depends on the image it is the mean.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else None
    device = images.device
    with undisturbed(model, device, seed=seed), torch.no_grad(), float32_verdicts(device):
        with FlopCounterMode(display=False) as counter:
            model(images)
    return {
        "num_parameters": None if parameters is None else sum(p.numel() for p in parameters),
        "flop_per_image": round(counter.get_total_flops() / len(images)),
    }
