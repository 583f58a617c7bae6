"""What every mixture of experts shows of itself, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class ExpertModel(nn.Module, ABC):
    """A model made of experts that can be looked at, judged and attacked one by one.

    ``model(images)`` maps [B, C, H, W] in [0, 1] to logits [B, K]. ``expert_names`` are what tables
    and figures call the experts.
    """

    expert_names: list[str]

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    @abstractmethod
    def expert(self, index: int) -> nn.Module:
        """The model with one expert for every image: images to logits [B, K], weights shared."""

    @abstractmethod
    def gate_weights(self, images: Tensor) -> Tensor:
        """How much each expert counts for each image, [B, E] >= 0; rows sum to 1.

        One-hot, or k entries, where routing is hard.
        """

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        """Gate weights of a routing made soft, [B, E] >= 0; rows sum to 1.

        What an attack follows to move the gate: the experts in the gate's order, with a gradient
        that does not vanish. By default ``gate_weights``; models whose gate chooses, or may
        saturate, have their own, see `softened`.
        """
        return self.gate_weights(images)

    def without_chance(self) -> ExpertModel:
        """The model without the randomness of its gate, weights shared; itself if there is none."""
        return self


def softened(scores: Tensor) -> Tensor:
    """Softmax of each row of ``scores`` [B, E], brought to standard deviation 1.

    However sure a gate is, its gradient is of the size of the scores' own.
    """
    scores = scores.float()
    scores = scores - scores.detach().mean(dim=1, keepdim=True)
    spread = scores.detach().square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    return (scores / spread).softmax(dim=1)
