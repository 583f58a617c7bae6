"""Networks as one function of their images, fused and without a tape: see `Plan`."""

from moe_kernels.plan.autograd import Autograd
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.plan import Plan

__all__ = ["Autograd", "CannotPlan", "Plan"]
