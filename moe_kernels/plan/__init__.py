"""Fuse networks into one function of their images, with its gradient: see `Plan`."""

from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.plan import Plan

__all__ = ["CannotPlan", "Plan"]
