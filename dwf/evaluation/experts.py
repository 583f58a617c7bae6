"""What a mixture did while it was judged: who had the gate's trust, and who deserved it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwf.models import ExpertModel, Mixture


def look_inside(model: ExpertModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [B, K], gate_weights [B, E], expert_logits [E, B, K]) of a model in eval mode."""
    if isinstance(model, Mixture):  # all in one pass
        output = model(images, return_aux=True)
        return output.logits, output.gate_weights, output.expert_logits
    alone = [model.expert(e).eval()(images) for e in range(model.num_experts)]
    return model(images), model.gate_weights(images), torch.stack(alone)


class MixtureSums:
    """Gate weights by class and accuracy by expert, summed over batches."""

    def __init__(self, num_experts: int, num_classes: int) -> None:
        self.weights = torch.zeros(num_classes, num_experts, dtype=torch.float64)
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.entropy = 0.0
        self.correct = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, gate_weights: Tensor, expert_logits: Tensor, labels: Tensor) -> None:
        # an image whose gate failed trusts nobody, and a failed expert is never right
        weights = gate_weights.double().nan_to_num(0.0).cpu()
        classes = labels.cpu()
        self.weights.index_add_(0, classes, weights)
        self.count.index_add_(0, classes, torch.ones(len(classes), dtype=torch.float64))
        self.entropy += float(torch.special.entr(weights).sum())
        correct = (expert_logits.argmax(dim=2) == labels) & expert_logits.isfinite().all(dim=2)
        self.correct += correct.double().sum(dim=1).cpu()


def tables(aux: dict[str, MixtureSums], names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON values (gate, experts) from the sums of each attack; NaN-free, entropy in nats."""
    gate = {
        "attacks": list(aux),
        "experts": names,
        "mean_weights": {
            name: (sums.weights / sums.count.clamp(min=1).unsqueeze(1)).tolist()
            for name, sums in aux.items()
        },
        "entropy": {
            name: sums.entropy / max(float(sums.count.sum()), 1.0) for name, sums in aux.items()
        },
    }
    experts = {
        "names": names,
        "accuracy": {
            name: (sums.correct / sums.count.sum().clamp(min=1)).tolist()
            for name, sums in aux.items()
        },
    }
    return gate, experts
