"""The figures of a report and of a comparison, each drawn from stored results."""

from dwf.report.figures.canvas import Figure, NotMeasured
from dwf.report.figures.curves import (
    Bar,
    Bars,
    accuracy_over_epsilon,
    accuracy_over_steps,
    clean_and_worst_case,
    loss_over_steps,
)
from dwf.report.figures.mixture import (
    expert_accuracy,
    experts_under_attack,
    gate_entropy,
    gate_weights,
)
from dwf.report.figures.pictures import example_grid, grad_cam
from dwf.report.figures.training import training_curves

__all__ = [
    "Bar",
    "Bars",
    "Figure",
    "NotMeasured",
    "accuracy_over_epsilon",
    "accuracy_over_steps",
    "clean_and_worst_case",
    "example_grid",
    "expert_accuracy",
    "experts_under_attack",
    "gate_entropy",
    "gate_weights",
    "grad_cam",
    "loss_over_steps",
    "training_curves",
]
