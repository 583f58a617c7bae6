"""Train a defense into a run folder: loop, steps, optimizer, records and checkpoints."""

from dwf.training.environment import environment
from dwf.training.loop import train
from dwf.training.run import Stopped, TrainingError

__all__ = ["Stopped", "TrainingError", "environment", "train"]
