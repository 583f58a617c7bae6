"""Compute networks and the gradients of their images: see `Plan`, or `ComposedPlan` for parts."""

from moe_kernels.plan.composed import ComposedPlan, PartPlans
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.plan import Plan
from moe_kernels.plan.reduced import ReducedPlan
from moe_kernels.plan.train_mode import TrainMode
from moe_kernels.plan.training import TrainingPlan

__all__ = [
    "CannotPlan",
    "ComposedPlan",
    "PartPlans",
    "Plan",
    "ReducedPlan",
    "TrainMode",
    "TrainingPlan",
]
