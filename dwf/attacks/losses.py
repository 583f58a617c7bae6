"""Losses that an attack maximizes: logits [B, K] and labels [B] to one loss an image, [B]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class TargetLoss:
    """A loss that compares each image's logits with something else than a label.

    ``targets`` [B, ...] has a row for each image, which goes with it where a plan takes a batch in
    parts. ``function(logits, targets)`` gives the losses; as a Loss, it does not see the labels.
    """

    function: Loss
    targets: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.function(logits, self.targets)


def kl_from(clean_logits: Tensor) -> TargetLoss:
    """KL(p, q) of each image [B]: p from ``clean_logits`` [B, K], q from the attacked logits.

    Without a gradient to p. Rows of a batch keep their order, so it serves attacks without
    restarts, which drop rows.
    """
    return TargetLoss(_kl_from, clean_logits.detach().float().log_softmax(dim=1))


def _kl_from(logits: Tensor, log_p: Tensor) -> Tensor:
    return kl_divergence(log_p, logits.float().log_softmax(dim=1))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) = sum_k p_k (log p_k - log q_k) of each row [B], from log-probabilities [B, K].

    Differentiable in both; finite where p underflows to 0, also its gradient.
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
