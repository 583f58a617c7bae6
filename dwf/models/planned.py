"""Models that offer attacks a plan of themselves, and a wrapper that offers one for any network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.plan import Plan


class PlanParts(NamedTuple):
    """What a plan is made of: modules from images to logits, and the gate that mixes them."""

    networks: Sequence[nn.Module]
    gate: nn.Module | None = None
    independent: bool = False


class Planned(nn.Module):
    """A module that can be attacked by a plan."""

    plan_type: type[Plan] = Plan

    def plan_parts(self) -> PlanParts:
        raise NotImplementedError

    def attack_plan(self, dtype: torch.dtype | None = None) -> Plan:
        """The plan of this model with the weights of this moment.

        One plan for each model: the next call refreshes it in place, so that its buffers and
        captured graphs stay. It is no part of the state dict, of copies or of pickles.

        Args:
            dtype: of activations and weights inside; by default bfloat16 where the processor
                multiplies it faster than float32.
        Raises:
            CannotPlan: torch.fx cannot follow a network.
        """
        networks, gate, independent = self.plan_parts()
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is not None and plan.fits(networks, gate, dtype):
            plan.refresh()
            return plan
        plan = self.plan_type(networks, gate, independent=independent, dtype=dtype)
        self.__dict__["_plan"] = plan
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


class Accelerated(Planned):
    """Any network on images in [0, 1], attacked by a plan where it can be planned."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def plan_parts(self) -> PlanParts:
        return PlanParts([self.network])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def accelerate(network: nn.Module) -> Accelerated:
    """A model like ``network`` whose attacks are fast: ResNets and VGGs, whoever wrote them.

    Returns a module that maps the same images to the same logits; the network is shared, not
    copied. What cannot be planned is attacked by autograd, and the log says why.
    """
    return Accelerated(network)
