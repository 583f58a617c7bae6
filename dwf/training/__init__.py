"""Training: the loop, the optimizer, the average of the weights."""

from dwf.training.environment import environment
from dwf.training.loop import Stopped, TrainingError, train

__all__ = ["Stopped", "TrainingError", "environment", "train"]
