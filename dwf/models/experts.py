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
