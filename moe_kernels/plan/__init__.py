"""Networks as one function of their images, fused and without a tape: see `Plan`."""

from .eager import Autograd
from .graph import CannotPlan
from .plan import Plan

__all__ = ["Autograd", "CannotPlan", "Plan"]
