"""What an evaluation gives: rows of outcomes, worst cases, findings; as text and as files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwf.evaluation.diagnostics import Diagnostics, format_diagnostics
from dwf.evaluation.suites import AttackSpec
from dwf.evaluation.traces import Traces
from dwf.evaluation.verdict import Finding, verdict
from dwf.files import atomic_write_json


@dataclass
class Row:
    """One attack's outcome. Costs are what this row added to the rows before it.

    Of attacks in turn, ``correct`` is what stands after this one, ``num_attacked`` how many images
    it saw, and ``broken_by`` how many each part of it broke.
    """

    spec: AttackSpec
    correct: Tensor  # [N] bool
    num_non_finite: int = 0
    seconds: float = 0.0
    num_forwards: int = 0
    num_backwards: int = 0
    same_as: str | None = None
    num_attacked: int | None = None
    num_over_budget: int = 0
    num_disagree: int = 0
    broken_by: dict[str, int] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean()) if len(self.correct) else math.nan


@dataclass
class Evaluation:
    """A table of results. ``print(evaluation)`` shows it, ``write`` stores it.

    ``worst_case`` is per image over all attacks within epsilon, ``worst_case_all`` over all rows;
    ``curve`` has the worst case at each of several radii.
    """

    rows: list[Row]
    worst_case: dict[str, Any]
    worst_case_all: dict[str, Any]
    findings: list[Finding]
    facts: dict[str, Any]
    gate: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    diagnostics: Diagnostics | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    traces: Traces | None = None
    examples: dict[str, Any] = field(default_factory=dict)
    sample_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def clean_accuracy(self) -> float:
        return self.rows[0].accuracy

    @property
    def robust_accuracy(self) -> float:
        """Worst case per image over all attacks within epsilon; the headline."""
        return float(self.worst_case["accuracy"])

    @property
    def verdict(self) -> str:
        """VALID, SUSPECT or INVALID: the worst of the findings."""
        return verdict(self.findings)

    def to_dict(self) -> dict[str, Any]:
        attacks = []
        for row in self.rows:
            num_correct = int(row.correct.sum())
            attacks.append(
                {
                    **asdict(row.spec),
                    "num_images": len(row.correct),
                    "num_correct": num_correct,
                    "accuracy": row.accuracy,
                    "interval": list(wilson_interval(num_correct, len(row.correct))),
                    "num_non_finite": row.num_non_finite,
                    "seconds": round(row.seconds, 3),
                    "num_forwards": row.num_forwards,
                    "num_backwards": row.num_backwards,
                    "same_as": row.same_as,
                    "num_attacked": row.num_attacked,
                    "broken_by": row.broken_by,
                }
            )
        return {
            "schema": 1,
            **self.facts,
            "attacks": attacks,
            "worst_case": self.worst_case,
            "worst_case_all": self.worst_case_all,
            "curve": self.curve,
            "verdict": self.verdict,
            "findings": [finding.to_dict() for finding in self.findings],
            "gate": self.gate,
            "experts": self.experts,
            "diagnostics": self.diagnostics.table if self.diagnostics else None,
            "traces": self.traces.table if self.traces else None,
        }

    def write(self, path: Path) -> None:
        """Write the table as JSON and the outcome of each image beside it as .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "correct": torch.stack([row.correct for row in self.rows]).numpy(),
            "sample_index": self.sample_index.numpy(),
            **self.examples,
            **(self.diagnostics.arrays if self.diagnostics else {}),
            **(self.traces.arrays if self.traces else {}),
        }
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path.with_suffix(".npz"))
        atomic_write_json(path, self.to_dict())

    def __str__(self) -> str:
        return format_table(self.to_dict())


def worst_case(rows: list[Row], epsilon: float) -> dict[str, Any]:
    correct = torch.stack([row.correct for row in rows]).all(dim=0)
    num_correct = int(correct.sum())
    return {
        "epsilon": epsilon,
        "num_images": len(correct),
        "num_correct": num_correct,
        "accuracy": num_correct / max(len(correct), 1),
        "interval": list(wilson_interval(num_correct, len(correct))),
        "attacks": [row.spec.name for row in rows],
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion; (0, 1) when nothing was tried. Wilson, 1927."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def format_table(evaluation: dict[str, Any]) -> str:
    """The table as text, from an evaluation's JSON."""
    data = evaluation["data"]
    column = "stands" if evaluation.get("curve") else "accuracy"
    lines = [
        f"{evaluation.get('model', 'model')} on {data['name']} {data['split']}, "
        f"n = {data['num_images']}, protocol {evaluation['protocol']}, "
        f"BatchNorm {evaluation['bn_mode']}, {evaluation['precision']}, seed {evaluation['seed']}",
        f"attacks searched by: {evaluation.get('attack_path', 'autograd')}",
        "",
        f"{'attack':<26}{'epsilon':>10}{'step':>9}{column:>10}   95 % interval",
    ]
    for row in evaluation["attacks"]:
        note = f"   {row['num_non_finite']} not finite" if row["num_non_finite"] else ""
        if row["same_as"]:
            note += f"   = {row['same_as']}"
        if row.get("broken_by"):
            parts = (f"{part} {count}" for part, count in row["broken_by"].items())
            note += f"   ({', '.join(parts)})"
        step = "" if row["step_size"] is None else f"{row['step_size']:.4g}"
        epsilon = f"{row['epsilon']:.4g}" if row["epsilon"] else ""
        lines.append(
            f"{row['name']:<26}{epsilon:>10}{step:>9}{100 * row['accuracy']:>8.2f} %   "
            f"{_percent(row['interval'])}{note}"
        )
    curve = evaluation.get("curve") or []
    if len(curve) > 1:
        worst_cases = {f"worst case at {worst['epsilon']:.4g}": worst for worst in curve}
    else:
        worst_cases = {"worst case per image": evaluation["worst_case"]}
    if not curve:  # attacks in turn end with their worst case
        worst_cases["all rows"] = evaluation["worst_case_all"]
    for label, worst in worst_cases.items():
        lines.append(
            f"{label:<26}{worst['epsilon']:>10.4g}{'':>9}{100 * worst['accuracy']:>8.2f} %   "
            f"{_percent(worst['interval'])}"
        )
    for finding in evaluation["findings"]:
        lines.append(f"{finding['severity']}: {finding['message']}")
    if "verdict" in evaluation:
        lines.append(f"verdict: {evaluation['verdict']}")
    if evaluation.get("diagnostics"):
        lines += ["", format_diagnostics(evaluation["diagnostics"])]
    return "\n".join(lines)


def robustbench_json(evaluation: dict[str, Any], name: str) -> dict[str, Any]:
    """An evaluation, from its JSON, in the shape of RobustBench's model_info files."""
    clean, robust = (
        f"{100 * part['accuracy']:.2f}"
        for part in (evaluation["attacks"][0], evaluation["worst_case"])
    )
    return {
        "name": name,
        "dataset": evaluation["data"]["name"],
        "threat_model": {"linf": "Linf", "l2": "L2"}[evaluation["norm"]],
        "eps": evaluation["epsilon"],
        "clean_acc": clean,
        "reported": robust,
        "autoattack_acc": robust,
        "num_images": evaluation["data"]["num_images"],
        "verdict": evaluation["verdict"],
        "unreliable": evaluation["verdict"] != "VALID",
    }


def _percent(interval: list[float]) -> str:
    return f"{100 * interval[0]:6.2f} to {100 * interval[1]:6.2f}"
