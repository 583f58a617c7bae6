"""Average the probabilities of several networks: an ensemble without a gate.

logits[b] = log( 1/E sum_e softmax(h_e(x))[b] ),     x = normalize(images)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from dwf.models.describe import Output
from dwf.models.experts import ModelOfNetworks


@dataclass(frozen=True, repr=False)
class AveragedOutput(Output):
    """Logits of one pass of an ensemble.

    Attributes:
        logits: [B, K] float32, log-probabilities of the ensemble.
        expert_logits: [E, B, K].
    """

    logits: Tensor
    expert_logits: Tensor


class AveragedExperts(ModelOfNetworks):
    """Networks of which each has an equal share in the probabilities.

    ``model(images)`` gives logits [B, K]; ``model(images, return_aux=True)`` an AveragedOutput.
    """

    def gate_weights(self, images: Tensor) -> Tensor:
        E = self.num_experts
        return torch.full((len(images), E), 1 / E, device=images.device)

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> AveragedOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | AveragedOutput:
        x = self.normalize(images)
        expert_logits = torch.stack([expert(x) for expert in self.experts])  # [E, B, K]
        log_p = expert_logits.float().log_softmax(dim=2)
        logits = log_p.logsumexp(dim=0) - math.log(self.num_experts)
        return AveragedOutput(logits, expert_logits) if return_aux else logits
