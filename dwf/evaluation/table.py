"""An evaluation as text, as HTML, and as an entry of RobustBench's leaderboard."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from dwf.evaluation.mixture_record import Diagnostics
from dwf.evaluation.record import AttackRow, Certified, EvaluationRecord, WorstCase


def format_table(evaluation: EvaluationRecord) -> str:
    """The table as text: a line for each attack, worst cases, bounds, findings, verdict."""
    lines = [
        _title(evaluation),
        f"attacks searched by: {evaluation.attack_path or 'autograd'}",
        "",
        f"{'attack':<26}{'epsilon':>10}{'step':>9}{_column(evaluation):>10}   95 % interval",
    ]
    for row in evaluation.attacks:
        step = "" if row.step_size is None else f"{row.step_size:.4g}"
        epsilon = f"{row.epsilon:.4g}" if row.epsilon else ""
        notes = "".join(f"   {note}" for note in _notes(row))
        lines.append(
            f"{row.name:<26}{epsilon:>10}{step:>9}{100 * row.accuracy:>8.2f} %   "
            f"{_percent(row.interval)}{notes}"
        )
    for label, worst in _worst_cases(evaluation):
        lines.append(
            f"{label:<26}{worst.epsilon or 0.0:>10.4g}{'':>9}{100 * worst.accuracy:>8.2f} %   "
            f"{_percent(worst.interval)}"
        )
    for label, bound in _bounds(evaluation):
        lines.append(
            f"{label:<26}{bound.epsilon:>10.4g}{'':>9}{100 * bound.accuracy:>8.2f} %   "
            f"{_percent(bound.interval)}   {_how(bound)}"
        )
    lines += [f"{finding.severity}: {finding.message}" for finding in evaluation.findings]
    lines.append(f"verdict: {evaluation.verdict}")
    if evaluation.diagnostics is not None:
        lines += ["", format_diagnostics(evaluation.diagnostics)]
    return "\n".join(lines)


def html_table(evaluation: EvaluationRecord) -> str:
    """The same table for a notebook, without the diagnostics of a mixture."""
    head = ("attack", "epsilon", _column(evaluation), "95 % interval", "")
    rows = [
        (
            row.name,
            f"{row.epsilon:.4g}" if row.epsilon else "",
            f"{100 * row.accuracy:.2f} %",
            _percent(row.interval),
            ", ".join(_notes(row)),
        )
        for row in evaluation.attacks
    ]
    rows += [
        (
            label,
            f"{worst.epsilon or 0.0:.4g}",
            f"{100 * worst.accuracy:.2f} %",
            _percent(worst.interval),
            "",
        )
        for label, worst in _worst_cases(evaluation)
    ]
    rows += [
        (
            label,
            f"{bound.epsilon:.4g}",
            f"{100 * bound.accuracy:.2f} %",
            _percent(bound.interval),
            _how(bound),
        )
        for label, bound in _bounds(evaluation)
    ]
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    findings = "".join(
        f"<li><b>{html.escape(finding.severity)}</b>: {html.escape(finding.message)}</li>"
        for finding in evaluation.findings
    )
    return (
        f"<p>{html.escape(_title(evaluation))}</p>"
        f"<table><thead><tr>{_cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"
        f"<ul>{findings}</ul><p>verdict: <b>{evaluation.verdict}</b></p>"
    )


def robustbench_json(evaluation: EvaluationRecord, name: str) -> dict[str, Any]:
    """The evaluation in the shape of RobustBench's model_info files."""
    clean, robust = evaluation.attacks[0], evaluation.worst_case
    return {
        "name": name,
        "dataset": evaluation.data.name,
        "threat_model": {"linf": "Linf", "l2": "L2"}[evaluation.norm],
        "eps": evaluation.epsilon,
        "clean_acc": f"{100 * clean.accuracy:.2f}",
        "reported": f"{100 * robust.accuracy:.2f}",
        "autoattack_acc": f"{100 * robust.accuracy:.2f}",
        "num_images": evaluation.num_images,
        "verdict": evaluation.verdict,
        "unreliable": evaluation.verdict != "VALID",
    }


def format_diagnostics(diagnostics: Diagnostics) -> str:
    """The diagnostics of a mixture as text."""
    return "\n".join(_diagnostics_lines(diagnostics))


def mean_cosine(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over pairs of different experts; None where no pair was measured."""
    pairs = [
        value
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i < j and value is not None
    ]
    return sum(pairs) / len(pairs) if pairs else None


def _title(evaluation: EvaluationRecord) -> str:
    data = evaluation.data
    return (
        f"{evaluation.model} on {data.name} {data.split}, n = {data.num_images}, "
        f"protocol {evaluation.protocol}, BatchNorm {evaluation.bn_mode}, "
        f"{evaluation.precision}, seed {evaluation.seed}"
    )


def _column(evaluation: EvaluationRecord) -> str:
    return "stands" if evaluation.in_turn else "accuracy"


def _notes(row: AttackRow) -> Iterator[str]:
    if row.num_non_finite:
        yield f"{row.num_non_finite} not finite"
    if row.same_as:
        yield f"= {row.same_as}"
    if row.broken_by:
        yield f"({', '.join(f'{part} {count}' for part, count in row.broken_by.items())})"
    if row.given_up is not None and row.given_up.num_images:
        its = row.given_up
        then = "" if its.num_left else "; all searched to the end"
        yield (
            f"gave up {its.num_images}; of {its.num_controls} searched to the end all the same "
            f"{its.num_fallen} fell{then}"
        )


def _worst_cases(evaluation: EvaluationRecord) -> Iterator[tuple[str, WorstCase]]:
    """The last lines of the table; attacks in turn end with their worst case over all rows."""
    if len(evaluation.curve) > 1:
        for worst in evaluation.curve:
            yield f"worst case at {worst.epsilon or 0.0:.4g}", worst
    else:
        yield "worst case per image", evaluation.worst_case
    if not evaluation.in_turn:
        yield "all rows", evaluation.worst_case_all


def _bounds(evaluation: EvaluationRecord) -> Iterator[tuple[str, Certified]]:
    """What is proven, below what attacks left: certified <= worst case <= clean."""
    for bound in evaluation.certified:
        yield "certified" if bound.of == "model" else "certified, smoothed", bound


def _how(bound: Certified) -> str:
    clean = "" if bound.clean is None else f"; clean {100 * bound.clean:.2f} %"
    return f"({bound.method}{clean})"


def _percent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:6.2f} to {100 * interval[1]:6.2f}"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _diagnostics_lines(found: Diagnostics) -> Iterator[str]:
    clean, attacked = found.gate.clean, found.gate.attacked
    yield (
        f"experts under attack: n = {found.num_images}, PGD-{found.num_steps}, "
        f"epsilon {found.epsilon:.4g}, step {found.step_size:.4g}; percent"
    )
    left = max(len(name) for name in ("expert", *found.names))
    # names of eight letters, as those of Divided We Fall, make lines of 80
    yield (
        f"{'':<{left}}{'':>7}{'attacked via':>17}{'mixture, on':>12}"
        f"{'gate weight':>18}{'preferred by gate':>18}"
    )
    yield (
        f"{'expert':<{left}}{'clean':>7}{'mixture':>9}{'itself':>8}{'its images':>12}"
        f"{'clean':>8}{'attacked':>10}{'clean':>8}{'attacked':>10}"
    )
    for e, name in enumerate(found.names):
        line = (
            f"{name:<{left}}{100 * found.accuracy.clean[e]:>7.1f}"
            f"{100 * found.accuracy.mixture_attacked[e]:>9.1f}"
            f"{100 * found.accuracy.self_attacked[e]:>8.1f}"
        )
        if e < len(found.names) - 1:
            line += (
                f"{100 * found.transfer[e][-1]:>12.1f}"
                f"{100 * clean.mean_weight[e]:>8.1f}{100 * attacked.mean_weight[e]:>10.1f}"
                f"{100 * clean.top_share[e]:>8.1f}{100 * attacked.top_share[e]:>10.1f}"
            )
            line += "  dead (clean)" if name in clean.dead else ""
            line += "  dead (attacked)" if name in attacked.dead else ""
        yield line
    flips = found.routing_flips
    again = f" ({100 * flips.again:.1f} % without one)" if flips.again else ""
    yield (
        f"the attack moves the gate's choice on {100 * flips.attacked:.1f} % of the images"
        f"{again}; gate entropy {clean.entropy:.2f} -> {attacked.entropy:.2f} nats"
    )
    cosine = mean_cosine(found.gradient_cosine)
    if cosine is not None:
        yield f"mean cosine of two experts' input gradients: {cosine:.2f}"
    yield (
        f"the mixture under all these attacks, worst case per image: {100 * found.worst_case:.1f} %"
    )
