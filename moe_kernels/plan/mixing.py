"""Mix the logits of a plan's networks by the gate, and differentiate a loss of the result.

Axes: E networks, B images, K classes. Results have a leading axis of the blocks of the batch: E if
each network has its own block of images (independent networks), else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.ops.softmax_combine import softmax_combine, softmax_combine_cross_entropy
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.modules import RandomState, evaluated

# `loss(logits, labels)` to [B]; "ce" is the cross-entropy, which is fused with what is around it.
Loss = Callable[[Tensor, Tensor], Tensor] | Literal["ce"]


class GateRun(NamedTuple):
    """One run of the gate that can be differentiated: the images as its leaf, and gate_logits."""

    images: Tensor
    gate_logits: Tensor

    def image_gradient(self, grad_gate: Tensor | None) -> Tensor:
        """Gradient [B, C, H, W] of the images from that of gate_logits."""
        return gradients(self.gate_logits, [self.images], grad_gate)[0]


class Mixing:
    """From the logits of E networks to those of the plan.

        softmax(gate(images)) . logits     with a gate
        each network's own logits          without one

    Args:
        gate: maps images [B, C, H, W] to gate_logits [B, E].

    Attributes:
        deterministic: whether the gate draws no random numbers; known after `check`.
    """

    def __init__(self, gate: nn.Module | None) -> None:
        self.gate = gate
        self.deterministic = True

    def check(self, images: Tensor, num_networks: int) -> None:
        """Run the gate once.

        Raises:
            CannotPlan: it does not return gate_logits of the right shape.
        """
        random_state = RandomState()
        gate_logits = self.gate_logits(images)
        if random_state.restore():
            self.deterministic = False
        expected = [len(images), num_networks]
        if self.gate is not None and list(getattr(gate_logits, "shape", [])) != expected:
            raise CannotPlan(f"the gate does not return gate_logits of shape {expected}")

    def gate_logits(self, images: Tensor) -> Tensor | None:
        """What the gate returns for images [B, C, H, W] in eval mode; None without a gate."""
        if self.gate is None:
            return None
        with evaluated(self.gate):
            gate_logits: Tensor = self.gate(images)
        return gate_logits

    def run_gate(self, images: Tensor) -> GateRun | None:
        """`gate_logits` to be differentiated with respect to the images."""
        if self.gate is None:
            return None
        with torch.enable_grad():
            leaf = (images.clone() if images.is_inference() else images.detach()).requires_grad_()
            gate_logits = self.gate_logits(leaf)
        return None if gate_logits is None else GateRun(leaf, gate_logits)

    def logits(self, gate_logits: Tensor | None, expert_logits: Tensor) -> Tensor:
        """Logits [1 or E, B, K] of the plan from those of the networks [E, B, K]."""
        if gate_logits is None:
            return expert_logits
        return softmax_combine(gate_logits.float(), expert_logits).unsqueeze(0)

    def gradients(
        self, gate_logits: Tensor | None, expert_logits: Tensor, labels: Tensor, loss: Loss
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits as above, and the gradients of gate_logits and of expert_logits [E, B, K].

        Args:
            labels: [1 or E, B, ...], what the loss compares logits with.
        """
        if not isinstance(loss, str):
            return self._gradients_of(loss, gate_logits, expert_logits, labels)
        if gate_logits is not None:
            gate = gate_logits.detach().float()
            _, grad_gate, grad = softmax_combine_cross_entropy(gate, expert_logits, labels[0])
            return self.logits(gate, expert_logits), grad_gate.to(gate_logits.dtype), grad
        # the cross-entropy of one network is that of a mixture of one
        flat = expert_logits.flatten(0, 1).unsqueeze(0)
        zeros = flat.new_zeros(flat.shape[1], 1)
        _, _, grad = softmax_combine_cross_entropy(zeros, flat, labels.flatten())
        return expert_logits, None, grad.view_as(expert_logits)

    def _gradients_of(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        gate_logits: Tensor | None,
        expert_logits: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        with torch.enable_grad():
            experts = expert_logits.detach().requires_grad_()
            gate_leaf = None if gate_logits is None else gate_logits.detach().requires_grad_()
            logits = self.logits(gate_leaf, experts)
            total = loss(logits.flatten(0, 1), labels.flatten(0, 1)).sum()
            leaves = [experts] if gate_leaf is None else [experts, gate_leaf]
            grads = gradients(total, leaves)
        return logits.detach(), (grads[1] if len(grads) == 2 else None), grads[0]


def gradients(
    output: Tensor, leaves: Sequence[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Of an output with respect to its leaves; zeros for those that it does not depend on."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(x) for x in leaves)
    return torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
