"""Hold a mixture to what it says about itself: its answer follows from its gate and its experts.

Views attack a mixture through ``expert``, ``gate_weights`` and ``soft_gate_weights``. If these are
not what its forward computes, views attack another model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwf.attacks.door import ask
from dwf.evaluation.measures import answer_change
from dwf.models.experts import ExpertModel
from dwf.models.routed import combine

# Share of the spread of all answers; honest mixtures: at most 1e-5.
UNLIKE_ABOVE = 0.02


def unlike_its_statements(
    model: ExpertModel, images: Tensor, logits: Tensor, scale: float
) -> Tensor:
    """[N] bool: images whose ``logits`` [N, K] are not what gate and experts make.

    Three ways to mix are accepted: the sum of logits, the sum of probabilities (as logarithms), and
    the answer of an expert that has the whole weight. A mixture inside the network may mix
    features; then only images with one expert in charge can be compared.
    """
    weights = model.gate_weights(images)
    experts = torch.stack([ask(model.expert(e), images) for e in range(model.num_experts)]).float()
    summed = combine(weights.float(), experts)
    change = answer_change(summed, logits, scale)
    mixed = combine(weights.float(), experts.softmax(dim=2)).clamp(min=1e-38).log()
    as_log = logits.log_softmax(dim=1)
    change = torch.minimum(change, answer_change(mixed, as_log, scale))
    if not model.mixes_logits:
        in_charge = weights.amax(dim=1) > 0.999
        change = change.masked_fill(~in_charge, 0.0)
    return change > UNLIKE_ABOVE
