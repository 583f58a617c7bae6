"""Let a model offer attacks a plan; `accelerate` wraps any network in such a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dwf.models.describe import describe, one_line
from moe_kernels import CannotPlan, ComposedPlan, PartPlans, Plan, ReducedPlan
from moe_kernels.plan.modules import has_hooks

AnyPlan = Plan | ComposedPlan


class PlanParts(NamedTuple):
    """What a plan is made of.

    ``networks``, ``gate`` and ``independent`` are the arguments of `moe_kernels.Plan`. With
    ``composed`` the networks alone are planned, and the model's own forward combines them: see
    `moe_kernels.ComposedPlan`.
    """

    networks: Sequence[nn.Module]
    gate: nn.Module | None = None
    independent: bool = False
    composed: bool = False


class Planned(nn.Module):
    """A module that can be attacked by a plan made of its parts."""

    def plan_parts(self) -> PlanParts:
        """The modules whose plan computes what this model computes."""
        raise NotImplementedError

    def attack_plan(self, dtype: torch.dtype | None = None) -> AnyPlan:
        """The plan of this model with the weights of this moment.

        One plan for each model and dtype: the next call refreshes it in place, so that its buffers
        and captured graphs stay. It is no part of the state dict, of copies or of pickles.

        Args:
            dtype: of activations and weights inside; by default bfloat16 where the processor
                multiplies it faster than float32, but for networks of less than 32 channels.
        Raises:
            CannotPlan: something besides its parts decides what this model computes.
        """
        networks, gate, independent, composed = self.plan_parts()
        if not composed:
            self._check_forward()
        # a float32 training's own, and that of the validations in between
        plans: dict[torch.dtype | None, Any] = self.__dict__.setdefault("_plans", {})
        plan = plans.get(dtype)
        facts = (self, networks, dtype) if composed else (networks, gate, dtype)
        if plan is not None and plan.fits(*facts):
            plan.refresh()
        elif composed:
            shared = self.__dict__.setdefault("_part_plans", PartPlans())
            shared.keep(networks)
            plan = plans[dtype] = ComposedPlan(self, networks, dtype, shared=shared)
        else:
            plan = plans[dtype] = Plan(networks, gate, independent=independent, dtype=dtype)
        return cast(AnyPlan, plan)

    def _check_forward(self) -> None:
        """Raise CannotPlan if the model's forward may do more than its `plan_parts` say."""
        name = type(self).__name__
        if has_hooks(self):
            raise CannotPlan(f"{name} has hooks")
        if "forward" in vars(self) or _place(self, "forward") < _place(self, "plan_parts"):
            raise CannotPlan(
                f"{name} has a forward of its own, and the plan_parts of another class"
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_plans", "_part_plans", "_reduced")
        return {name: value for name, value in self.__dict__.items() if name not in kept}


def _place(model: nn.Module, method: str) -> int:
    """How far up among the classes of a model a method is defined."""
    return next(i for i, one in enumerate(type(model).__mro__) if method in vars(one))


class AroundNetworks(nn.Module):
    """A module that calls networks, attacked by autograd around their plans.

    Unlike a `Planned` module it keeps no plan of itself, which would hold the memory of captured
    steps: a suite makes hundreds of such modules. The plans of the networks are what costs.

    Args:
        module: maps images [B, C, H, W] to logits [B, K].
        networks: submodules of it, at any depth; those that it does not call do not matter.
        plans: theirs, for other modules as well.
    """

    def __init__(self, module: nn.Module, networks: Sequence[nn.Module], plans: PartPlans) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.__name__ = type(module).__name__  # messages are about the module
        self._networks = list(networks)
        self._plans = plans

    def attack_plan(self, dtype: torch.dtype | None = None) -> ComposedPlan:
        """A plan with the weights of this moment; arguments and errors as of `Planned`."""
        return ComposedPlan(self, self._networks, dtype, shared=self._plans)

    def around(self, module: nn.Module) -> AroundNetworks:
        """The same for another module that calls the same networks."""
        return AroundNetworks(module, self._networks, self._plans)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits


class Accelerated(Planned):
    """Any network on images in [0, 1], attacked by a plan where it can be planned.

    Its state dict is the network's: the same keys, saved from either and loaded into either.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.__name__ = type(network).__name__  # messages are about the network

    def __repr__(self) -> str:
        return one_line(self, describe(self.network))

    def plan_parts(self) -> PlanParts:
        return PlanParts([self.network])

    def autograd_plan(self) -> ReducedPlan:
        """The network by autograd with products in bfloat16, for attacks where there is no plan.

        Raises:
            CannotPlan: bfloat16 is not faster here, or the network has few large products.
        """
        plan = self.__dict__.get("_reduced")
        if plan is None or not plan.is_of(self.network):
            plan = self.__dict__["_reduced"] = ReducedPlan(self.network)
        return cast(ReducedPlan, plan)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.network.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.network.load_state_dict(*args, **options)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        # as a part of another module: torch goes on to look for its parts by their names
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}network.{key[len(prefix) :]}"] = state_dict.pop(key)


def planned(model: Any) -> Any:
    """The model, made to offer a plan if it is a module that offers none."""
    if isinstance(model, nn.Module) and not hasattr(model, "attack_plan"):
        return accelerate(model)
    return model


def accelerate(network: nn.Module) -> Accelerated:
    """A model like ``network`` whose attacks are fast: convolutional networks, whoever wrote them.

    Returns a module that maps the same images to the same logits, with the network's state dict;
    the network is shared, not copied. What cannot be planned is attacked by autograd, and the log
    says why. Evaluations do this by themselves.
    """
    return Accelerated(network)
