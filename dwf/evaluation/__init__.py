"""Evaluation: suites of attacks, tables of accuracy, findings."""

from dwf.evaluation.budget import Budget
from dwf.evaluation.evaluate import evaluate
from dwf.evaluation.record import EvaluationRecord, Finding, wilson_interval
from dwf.evaluation.result import Evaluation
from dwf.evaluation.store import NotStored, evaluate_into, results_name
from dwf.evaluation.suites import SUITES, AttackSpec, paper_suite, suite_in_turn
from dwf.evaluation.table import format_table, robustbench_json
from dwf.evaluation.validation import clean_and_robust_accuracy

__all__ = [
    "SUITES",
    "AttackSpec",
    "Budget",
    "Evaluation",
    "EvaluationRecord",
    "Finding",
    "NotStored",
    "clean_and_robust_accuracy",
    "evaluate",
    "evaluate_into",
    "format_table",
    "paper_suite",
    "results_name",
    "robustbench_json",
    "suite_in_turn",
    "wilson_interval",
]
