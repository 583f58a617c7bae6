"""Gates: networks that weigh the experts of a mixture, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from dwf.checks import check_count
from dwf.models.seeded import seeded_weights


class MlpGate(nn.Module):
    """Multilayer perceptron on the raw image: flatten, linear, ReLU, linear to E logits.

    The last layer starts at zero, so that joint training starts from equal weights 1/E. The paper
    says "small" and gives no sizes; one hidden layer of 128 is assumed. ``seed`` fixes the first
    layer's weights without touching torch's RNG.

    Input [B, C, H, W]; output ``gate_logits`` [B, E], before the softmax.
    Source: eq. (2) of arXiv:2512.20821.
    """

    def __init__(
        self, image_shape: Sequence[int], num_experts: int, *, hidden: int = 128, seed: int = 0
    ) -> None:
        super().__init__()
        check_count(num_experts, "num_experts")
        check_count(hidden, "hidden")
        with seeded_weights(seed):
            self.layers = nn.Sequential(
                nn.Flatten(),
                nn.Linear(prod(image_shape), hidden),
                nn.ReLU(),
                nn.Linear(hidden, num_experts),
            )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, images: Tensor) -> Tensor:
        gate_logits: Tensor = self.layers(images)
        return gate_logits
