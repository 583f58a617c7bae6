"""Gate weights by class and accuracy by expert, measured while a mixture is judged."""

from __future__ import annotations

import torch
from torch import Tensor

from dwf.evaluation.mixture_record import Experts, Gate
from dwf.models import ExpertModel, Mixture


def look_inside(model: ExpertModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [B, K], gate_weights [B, E], expert_logits [E, B, K]) of a model in eval mode."""
    if isinstance(model, Mixture):  # all in one pass
        output = model(images, return_aux=True)
        return output.logits, output.gate_weights, output.expert_logits
    alone = [model.expert(e).eval()(images) for e in range(model.num_experts)]
    return model(images), model.gate_weights(images), torch.stack(alone)


class MixtureSums:
    """Sums over batches under one attack, float64 on the CPU.

    ``weights`` [K, E] and ``count`` [K] are by class; ``entropy`` is in nats; ``correct`` [E]
    counts the images that each expert gets right.
    """

    def __init__(self, num_experts: int, num_classes: int) -> None:
        self.weights = torch.zeros(num_classes, num_experts, dtype=torch.float64)
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.entropy = 0.0
        self.correct = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, gate_weights: Tensor, expert_logits: Tensor, labels: Tensor) -> None:
        """Add a batch: weights [B, E], logits [E, B, K], labels [B]."""
        # an image whose gate failed trusts nobody, and a failed expert is never right
        weights = gate_weights.double().nan_to_num(0.0).cpu()
        classes = labels.cpu()
        self.weights.index_add_(0, classes, weights)
        self.count.index_add_(0, classes, torch.ones(len(classes), dtype=torch.float64))
        self.entropy += float(torch.special.entr(weights).sum())
        correct = (expert_logits.argmax(dim=2) == labels) & expert_logits.isfinite().all(dim=2)
        self.correct += correct.double().sum(dim=1).cpu()


def tables(sums: dict[str, MixtureSums], names: list[str]) -> tuple[Gate, Experts]:
    """Means over the images of each attack; ``names`` are the experts'."""
    gate = Gate(
        attacks=list(sums),
        experts=names,
        mean_weights={
            attack: (own.weights / own.count.clamp(min=1).unsqueeze(1)).tolist()
            for attack, own in sums.items()
        },
        entropy={
            attack: own.entropy / max(float(own.count.sum()), 1.0) for attack, own in sums.items()
        },
    )
    experts = Experts(
        names=names,
        accuracy={
            attack: (own.correct / own.count.sum().clamp(min=1)).tolist()
            for attack, own in sums.items()
        },
    )
    return gate, experts
