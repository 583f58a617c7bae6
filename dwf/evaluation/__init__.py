"""Evaluation: suites of attacks, tables of accuracy, findings."""

from dwf.evaluation.accuracy import (
    Evaluation,
    clean_and_robust_accuracy,
    evaluate,
    format_table,
    wilson_interval,
)
from dwf.evaluation.suites import AttackSpec, paper_suite

__all__ = [
    "AttackSpec",
    "Evaluation",
    "clean_and_robust_accuracy",
    "evaluate",
    "format_table",
    "paper_suite",
    "wilson_interval",
]
