"""Count in the headline what diagnostics and traces broke: no part of a page knows a lower number.

Both attack some images once more, within the same epsilon, to show how the model behaves. An image
that falls there does not stand, whatever the suite found.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dwf.evaluation import findings, model_findings
from dwf.evaluation.job import Judged
from dwf.evaluation.measures import Seen, held
from dwf.evaluation.mixture_record import Diagnostics
from dwf.evaluation.record import Finding, Traces
from dwf.evaluation.result import Arrays, Row, worst_case
from dwf.evaluation.suites import AttackSpec


def counted(
    judged: Judged, diagnostics: Diagnostics | None, traces: Traces | None, arrays: Arrays
) -> Judged:
    """The outcome of a suite in turn with a row for each of the two, and their findings.

    A random model is judged anew at every look, so its looks are not counted.
    """
    more: list[Finding] = []
    rows = list(judged.rows)
    epsilon, norm = judged.worst_case.epsilon or 0.0, rows[-1].spec.norm
    if not judged.curve:
        return _counted_in_grid(judged, diagnostics, arrays, epsilon)
    is_random = any(finding.name == "random" for finding in judged.findings)
    if diagnostics is not None and not is_random:
        rows.append(_on_experts(diagnostics, rows[-1], arrays, epsilon, norm))
        broke = int((rows[-2].correct & ~rows[-1].correct).sum())
        seen = Seen(broke, len(rows[-1].correct))
        more += held(findings.view_wins(seen, view="its experts, each by itself"))
    if traces is not None and not is_random:
        spec = AttackSpec(
            f"PGD-{traces.num_steps} traced",
            "traces",
            epsilon,
            traces.step_size,
            traces.num_steps,
            traces.num_restarts,
            random_start=True,
            norm=norm,
        )
        stands = torch.from_numpy(arrays["trace_correct"]).flatten(0, 1).all(dim=0)
        rows.append(_row(spec, rows[-1], arrays, "trace_sample_index", stands))
    headline = worst_case(rows, epsilon)
    return replace(
        judged,
        rows=rows,
        worst_case=headline,
        worst_case_all=headline,
        curve=[*judged.curve[:-1], headline],
        findings=[*judged.findings, *more],
    )


def _counted_in_grid(
    judged: Judged, diagnostics: Diagnostics | None, arrays: Arrays, epsilon: float
) -> Judged:
    """The grid with a row for images crafted on experts, where these are within its radius."""
    is_random = any(finding.name == "random" for finding in judged.findings)
    if diagnostics is None or is_random or diagnostics.epsilon > epsilon + 1e-12:
        return judged
    row = _on_experts(diagnostics, judged.rows[0], arrays, epsilon, "linf")
    row.num_attacked = len(arrays["diagnostic_sample_index"])
    rows = [*judged.rows, row]
    within = [row for row in rows if row.spec.epsilon <= epsilon + 1e-12]
    largest = judged.worst_case_all.epsilon or epsilon
    return replace(
        judged,
        rows=rows,
        worst_case=worst_case(within, epsilon),
        worst_case_all=worst_case(rows, largest),
    )


def gate_findings(diagnostics: Diagnostics | None) -> list[Finding]:
    """What the diagnostics say about the gate."""
    if diagnostics is None:
        return []
    num_experts = len(diagnostics.names) - 1
    share = diagnostics.gate.clean.entropy / math.log(num_experts) if num_experts > 1 else 0.0
    return held(model_findings.uniform_gate(share))


def _on_experts(
    diagnostics: Diagnostics,
    before: Row,
    arrays: Arrays,
    epsilon: float,
    norm: str,
) -> Row:
    """The row of the images that diagnostics made on the experts, counted at ``epsilon``."""
    spec = AttackSpec(
        f"PGD-{diagnostics.num_steps} on experts",
        "experts",
        epsilon,
        diagnostics.step_size,
        diagnostics.num_steps,
        norm=norm,
    )
    stands = torch.from_numpy(arrays["diagnostic_correct"])[:, -1].all(dim=0)
    return _row(spec, before, arrays, "diagnostic_sample_index", stands)


def _row(spec: AttackSpec, before: Row, arrays: Arrays, index: str, stands: Tensor) -> Row:
    """The row before, without what fell; ``stands`` [M] bool is of the images at ``index`` [M]."""
    places, correct = torch.from_numpy(arrays[index]), before.correct.clone()
    correct[places] &= stands
    return Row(spec, correct, num_attacked=int(before.correct[places].sum()))
