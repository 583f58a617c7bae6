"""Evaluation: suites of attacks, tables of accuracy, findings."""

from dwf.evaluation.accuracy import clean_and_robust_accuracy, evaluate
from dwf.evaluation.result import Evaluation, format_table, wilson_interval
from dwf.evaluation.suites import SUITES, AttackSpec, paper_suite, suite_in_turn

__all__ = [
    "SUITES",
    "AttackSpec",
    "Evaluation",
    "clean_and_robust_accuracy",
    "evaluate",
    "format_table",
    "paper_suite",
    "suite_in_turn",
    "wilson_interval",
]
