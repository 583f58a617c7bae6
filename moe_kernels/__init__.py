"""Fused kernels for mixtures of networks, each held to its definition in plain torch.

Importing this package touches no GPU and compiles nothing.
"""

from moe_kernels.op import decompositions
from moe_kernels.ops.linf_step import linf_step_
from moe_kernels.ops.noise import uniform_noise
from moe_kernels.ops.softmax_combine import softmax_combine, softmax_combine_cross_entropy
from moe_kernels.plan import (
    CannotPlan,
    ComposedPlan,
    PartPlans,
    Plan,
    ReducedPlan,
    TrainingPlan,
    TrainMode,
)
from moe_kernels.select import implementation, named_implementation

__all__ = [
    "CannotPlan",
    "ComposedPlan",
    "PartPlans",
    "Plan",
    "ReducedPlan",
    "TrainMode",
    "TrainingPlan",
    "decompositions",
    "implementation",
    "linf_step_",
    "named_implementation",
    "softmax_combine",
    "softmax_combine_cross_entropy",
    "uniform_noise",
]
