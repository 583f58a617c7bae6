"""Networks as one function of their images, fused and without a tape: see `Plan`."""

from .eager import Autograd
from .plan import Plan
from .trace import CannotPlan

__all__ = ["Autograd", "CannotPlan", "Plan"]
