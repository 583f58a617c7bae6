"""Permute the weights of a learned gate at random in every pass: the random switch gate.

    gate_logits'[b, e] = gate_logits[b, order[e]],   order a uniform permutation of the E experts

This equals a permutation of the rows of the gate's last layer. In train mode nothing is permuted.

Source: the random switch gates of arXiv:2402.18787.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from dwf.checks import ConfigError, check_choice, check_count
from dwf.models.mixture import Mixture
from dwf.models.seeded import seeded_weights

SCOPES = ("batch", "image", "off")


class LinearGate(nn.Module):
    """One linear layer on the flattened image: [B, C, H, W] to ``gate_logits`` [B, E].

    It starts at zero, so that training starts from equal weights 1/E (assumed).
    """

    def __init__(self, image_shape: Sequence[int], num_experts: int) -> None:
        super().__init__()
        check_count(num_experts, "num_experts")
        with seeded_weights(0):  # which zeros replace
            self.linear = nn.Linear(prod(image_shape), num_experts)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        gate_logits: Tensor = self.linear(images.flatten(1))
        return gate_logits


class RandomSwitch(nn.Module):
    """A gate whose logits are permuted anew at each pass in eval mode.

    Args:
        gate: images [B, C, H, W] to ``gate_logits`` [B, E].
        scope: one permutation for the "batch", one for each "image", or "off".
        top: permute only the ``top`` largest logits of each image (an ablation); all by default.

    Permutations come from torch's global generator of the images' device, which attacks and
    evaluations seed.
    """

    def __init__(self, gate: nn.Module, *, scope: str = "batch", top: int | None = None) -> None:
        super().__init__()
        check_choice(scope, SCOPES, "scope")
        if top is not None:
            check_count(top, "top", minimum=2)
        self.gate = gate
        self.scope = scope
        self.top = top

    def forward(self, images: Tensor) -> Tensor:
        gate_logits: Tensor = self.gate(images)
        if self.training or self.scope == "off":
            return gate_logits
        B, E = gate_logits.shape
        num_switched = E if self.top is None else min(self.top, E)
        num_draws = B if self.scope == "image" else 1
        # a random order of equally likely numbers; argsort because randperm draws one order only
        order = torch.rand(num_draws, num_switched, device=gate_logits.device).argsort(dim=1)
        order = order.expand(B, num_switched)
        if self.top is None:
            return gate_logits.gather(1, order)
        places = gate_logits.topk(num_switched, dim=1).indices
        return gate_logits.scatter(1, places, gate_logits.gather(1, places.gather(1, order)))


class UniformGate(nn.Module):
    """Equal weights 1/E for every image."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(images.shape[0], self.num_experts)


class FixedSwitch(nn.Module):
    """A gate whose logits are permuted in one way: gate_logits[:, order]."""

    def __init__(self, gate: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.gate = gate
        self.order = list(order)

    def forward(self, images: Tensor) -> Tensor:
        gate_logits: Tensor = self.gate(images)
        return gate_logits[:, self.order]


class SwitchedMixture(Mixture):
    """A mixture behind a random switch gate, and the deterministic models to compare it with.

    ``unpermuted()``, ``permuted(order)`` and ``uniform()`` make mixtures that share this one's
    weights and change nothing in it. They are controls: an attacker who knows the draw, or a
    defender without the learned gate.

    A plan draws one permutation for each gradient, as the model does for each pass. It may compute
    a large batch in parts, with one draw for each part.

    Arguments and errors are those of `Mixture`; gate is a RandomSwitch.
    """

    gate: RandomSwitch

    def unpermuted(self) -> Mixture:
        """The mixture with the learned gate as it was trained."""
        return self._with(self.gate.gate)

    def without_chance(self) -> Mixture:
        return self.unpermuted()

    def permuted(self, order: Sequence[int]) -> Mixture:
        """The mixture of one draw: expert e has the weight that was learned for ``order[e]``."""
        if sorted(order) != list(range(self.num_experts)):
            raise ConfigError(
                f"order: {list(order)}, expected a permutation of 0 to {self.num_experts - 1}"
            )
        return self._with(FixedSwitch(self.gate.gate, order))

    def uniform(self) -> Mixture:
        """The mean of the experts' logits."""
        return self._with(UniformGate(self.num_experts))

    def _with(self, gate: nn.Module) -> Mixture:
        return Mixture(self.experts, gate, self.normalize, expert_names=self.expert_names)
