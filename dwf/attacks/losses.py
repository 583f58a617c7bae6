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


def kl_from(clean_logits: Tensor) -> Loss:
    """KL(p, q) of each image [B]: p from ``clean_logits`` [B, K], q from the attacked logits.

    The labels are not looked at. Rows of a batch keep their order, so it serves attacks that do not
    drop rows.
    """
    clean = clean_logits.detach().float().log_softmax(dim=1)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return kl_divergence(clean, logits.float().log_softmax(dim=1))

    return loss


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) = sum_k p_k (log p_k - log q_k) of each row [B], from log-probabilities [B, K].

    Differentiable in both; finite where p underflows to 0, also its gradient.
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
