"""Losses that an attack maximizes: logits [B, K] and labels [B] to one loss an image, [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Any]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image [B], in float32 whatever the precision of the logits.

    Attacks sum it over the batch: the same sign as the mean's gradient, and no underflow.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")
