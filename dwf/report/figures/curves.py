"""Draw accuracy and loss against epsilon and steps, and the accuracies of several defenses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dwf.evaluation.record import EvaluationRecord, Score, Traces
from dwf.report.figures.canvas import (
    MARKERS,
    PERCENT_TICKS,
    SERIES,
    WIDE,
    Cell,
    Figure,
    NotMeasured,
    accuracy_axis,
    array,
    draw_figure,
    step_axis,
)
from dwf.report.words import norm_name, percent, radius, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

OVER_EPSILON, OVER_STEPS = "Robust accuracy against epsilon", "Robust accuracy against steps"
SCORE_COLUMNS = ["accuracy", "interval_low", "interval_high", "num_images"]
CONVERGED = (
    "A curve that still falls at its right end has not converged: more steps would break more "
    "images."
)


def accuracy_over_epsilon(evaluation: EvaluationRecord) -> Figure | NotMeasured:
    """Accuracy from epsilon 0 on: the worst case at each radius, or FGSM and one worst case."""
    if evaluation.in_turn:
        return _worst_case_over_epsilon(evaluation)
    fgsm = sorted((r for r in evaluation.attacks if r.kind == "fgsm"), key=lambda r: r.epsilon)
    if not fgsm:
        return NotMeasured(OVER_EPSILON, f"Suite {evaluation.suite!r} holds no FGSM row.")
    clean = evaluation.clean
    rows = [clean, *fgsm] if clean else fgsm
    worst = evaluation.worst_case

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        _line(axes, 0, [r.epsilon for r in rows], rows, "FGSM")
        if worst.epsilon is not None:
            _line(axes, 1, [worst.epsilon], [worst], "worst case of all attacks")
        accuracy_axis(axes)
        axes.set_xlabel(f"epsilon ({unit(evaluation)})")
        axes.legend(loc="best")

    shown = "; ".join(f"{r.epsilon:g}: {percent(r.accuracy)}" for r in rows)
    return draw_figure(
        "accuracy_over_epsilon",
        OVER_EPSILON,
        draw,
        alt=f"Line chart of accuracy under FGSM by epsilon: {shown}.",
        caption="One gradient step per image (FGSM); bars are 95 % intervals. The curve must fall "
        "as epsilon grows; the worst case is at most the lowest attack at its epsilon.",
        columns=["attack", "epsilon", *SCORE_COLUMNS],
        rows=[
            *([row.name, row.epsilon, *_cells(row)] for row in rows),
            ["worst case", worst.epsilon, *_cells(worst)],
        ],
    )


def _worst_case_over_epsilon(evaluation: EvaluationRecord) -> Figure:
    clean = evaluation.clean
    points: list[tuple[str, float, Score]] = [("clean", 0.0, clean)] if clean else []
    points += [("worst case", part.epsilon or 0.0, part) for part in evaluation.curve]
    x = [epsilon for _, epsilon, _ in points]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        y = [score.accuracy for _, _, score in points]
        low, high = zip(*(score.interval for _, _, score in points), strict=True)
        several = len(evaluation.curve) > 1  # between two points nothing is known
        if several:
            axes.fill_between(x, low, high, color=SERIES[0], alpha=0.18, linewidth=0)
        axes.errorbar(
            x,
            y,
            yerr=None if several else [np.subtract(y, low).clip(0), np.subtract(high, y).clip(0)],
            color=SERIES[0],
            marker=MARKERS[0],
            markersize=4.5,
            linewidth=1.6,
            linestyle="-" if several else "",
            elinewidth=1,
            capsize=2.5,
        )
        accuracy_axis(axes)
        axes.set_xlim(-0.03 * x[-1], 1.03 * x[-1])
        axes.set_xlabel(f"epsilon ({norm_name(evaluation.norm)}, {unit(evaluation)})")

    shown = "; ".join(f"{epsilon:g}: {percent(score.accuracy)}" for _, epsilon, score in points)
    return draw_figure(
        "accuracy_over_epsilon",
        OVER_EPSILON,
        draw,
        alt=f"Line chart of worst-case accuracy by epsilon: {shown}.",
        caption="Share of images that stand under every attack within epsilon; at 0 without an "
        "attack. Band or bars: 95 % interval at the measured radii.",
        columns=["attack", "epsilon", *SCORE_COLUMNS],
        rows=[[name, epsilon, *_cells(score)] for name, epsilon, score in points],
    )


def accuracy_over_steps(evaluation: EvaluationRecord) -> Figure | NotMeasured:
    """Accuracy under PGD against its steps: a line per epsilon or random start."""
    if evaluation.traces:
        return _accuracy_of_traces(evaluation.traces, evaluation)
    pgd = [r for r in evaluation.attacks if r.kind == "pgd"]
    longer = [r for r in evaluation.attacks if r.kind in ("multi_start", "adaptive")]
    if not pgd:
        return NotMeasured(OVER_STEPS, _no_traces(evaluation))
    rows = sorted(pgd, key=lambda r: (r.epsilon, r.num_steps)) + longer

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        epsilons = sorted({r.epsilon for r in pgd})
        for i, epsilon in enumerate(epsilons):
            line = [r for r in rows if r.kind == "pgd" and r.epsilon == epsilon]
            label = f"PGD, epsilon {radius(epsilon, of_255=evaluation.of_255)}"
            _line(axes, i, [r.num_steps for r in line], line, label)
        for i, row in enumerate(longer, start=len(epsilons)):
            _line(axes, i, [row.num_steps], [row], row.name)
        accuracy_axis(axes)
        step_axis(axes, 1.08 * max(r.num_steps for r in rows))
        axes.legend(loc="best")

    shown = "; ".join(f"{r.name}: {percent(r.accuracy)}" for r in rows)
    return draw_figure(
        "accuracy_over_steps",
        OVER_STEPS,
        draw,
        alt=f"Line chart of accuracy under PGD by number of steps: {shown}.",
        caption=f"{CONVERGED} Bars are 95 % intervals.",
        columns=["attack", "kind", "epsilon", "num_steps", "num_restarts", *SCORE_COLUMNS],
        rows=[[r.name, r.kind, r.epsilon, r.num_steps, r.num_restarts, *_cells(r)] for r in rows],
    )


def _accuracy_of_traces(traces: Traces, evaluation: EvaluationRecord) -> Figure:
    steps = range(traces.num_steps + 1)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for r, values in enumerate(array(traces.accuracy)):
            color, marker = _color_and_marker(r)
            label = "first start" if r == 0 else f"and start {r + 1}"
            axes.plot(steps, values, color=color, linewidth=1.6, label=label)
            axes.plot(steps[-1:], values[-1:], color=color, marker=marker, markersize=4.5)
        accuracy_axis(axes)
        step_axis(axes, 1.03 * max(traces.num_steps, 1))
        axes.legend(loc="best")

    ends = ", ".join(percent(row[-1]) for row in traces.accuracy)
    return draw_figure(
        "accuracy_over_steps",
        "Robust accuracy against steps and restarts",
        draw,
        alt=f"Line chart of accuracy under PGD by number of steps, one line for each random start; "
        f"at the end {ends}.",
        caption=f"PGD on {traces.num_images} images, epsilon "
        f"{radius(traces.epsilon, of_255=evaluation.of_255)}, step size {traces.step_size:.4g}. "
        f"What stands at every step so far, of this start and of those before it. {CONVERGED}",
        columns=["restart", "step", "accuracy"],
        rows=[[r, step, row[step]] for r, row in enumerate(traces.accuracy) for step in steps],
    )


def loss_over_steps(evaluation: EvaluationRecord) -> Figure | NotMeasured:
    """Cross-entropy after each step of PGD: the mean, and the band of 80 % of the images."""
    title, traces = "Loss against steps", evaluation.traces
    if traces is None:
        return NotMeasured(title, _no_traces(evaluation))
    loss = traces.loss
    mean, low, high = array([loss.mean, loss.low, loss.high])
    steps = range(traces.num_steps + 1)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.fill_between(
            steps, low, high, color=SERIES[0], alpha=0.18, linewidth=0, label="80 % of the images"
        )
        axes.plot(steps, mean, color=SERIES[0], linewidth=1.6, label="mean")
        step_axis(axes, max(traces.num_steps, 1))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("cross-entropy")
        axes.legend(loc="best")

    first, last = (f"{v:.3g}" if math.isfinite(v) else "not finite" for v in (mean[0], mean[-1]))
    return draw_figure(
        "loss_over_steps",
        title,
        draw,
        alt=f"Line chart of the mean cross-entropy under PGD: {first} at the start, {last} after "
        f"{traces.num_steps} steps.",
        caption=f"Cross-entropy after each step of PGD, {traces.num_restarts} random starts of "
        f"{traces.num_images} images; band: 10 to 90 %. A loss that jumps about, or does not rise "
        "at all, is a sign of masked gradients.",
        columns=["step", "mean", "low", "high"],
        rows=[[step, loss.mean[step], loss.low[step], loss.high[step]] for step in steps],
    )


def _no_traces(evaluation: EvaluationRecord) -> str:
    if evaluation.in_turn:
        return "evaluation.diagnostic_images was 0, or the evaluation is older than traces."
    return f"Suite {evaluation.suite!r} does not follow PGD step by step."


@dataclass(frozen=True)
class Bar:
    """A mean accuracy and the ends of its error bar; fractions."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bars:
    """One defense in a comparison: clean accuracy, if it was measured, and the worst case."""

    name: str
    clean: Bar | None
    worst: Bar


def clean_and_worst_case(defenses: Sequence[Bars]) -> Figure:
    """Clean accuracy and worst case of several defenses, the most robust on top."""
    defenses = sorted(defenses, key=lambda bars: -bars.worst.mean)
    series: dict[str, list[Bar | None]] = {
        "clean": [bars.clean for bars in defenses],
        "worst case": [bars.worst for bars in defenses],
    }

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, (label, bars) in enumerate(series.items()):
            known = [(y, bar.mean, bar.low, bar.high) for y, bar in enumerate(bars) if bar]
            if not known:
                continue
            y, mean, low, high = (np.array(column) for column in zip(*known, strict=True))
            color, marker = _color_and_marker(i)
            axes.errorbar(
                mean,
                y,
                xerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
                color=color,
                marker=marker,
                markersize=5,
                linestyle="none",
                elinewidth=1,
                capsize=2.5,
                label=label,
            )
        axes.set_yticks(range(len(defenses)), [bars.name for bars in defenses])
        axes.set_ylim(len(defenses) - 0.4, -0.6)
        axes.set_xlim(0, 1.02)
        axes.set_xticks(list(PERCENT_TICKS), PERCENT_TICKS.values())
        axes.set_xlabel("accuracy")
        axes.grid(visible=True, axis="both")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)

    shown = "; ".join(
        f"{bars.name}: clean {percent(bars.clean.mean if bars.clean else None)}, "
        f"worst case {percent(bars.worst.mean)}"
        for bars in defenses
    )
    return draw_figure(
        "clean_and_worst_case",
        "Clean accuracy and worst case",
        draw,
        width=WIDE,
        height=1.1 + 0.3 * len(defenses),
        alt=f"Dot plot of clean accuracy and worst case by defense: {shown}.",
        caption="Worst case per image over all attacks within epsilon. Bars are the standard "
        "deviation over seeds, or of a single run the 95 % interval.",
        columns=["defense", "series", "mean", "low", "high"],
        rows=[
            [bars.name, label, *((bar.mean, bar.low, bar.high) if bar else (None, None, None))]
            for label, points in series.items()
            for bars, bar in zip(defenses, points, strict=True)
        ],
    )


def _cells(score: Score) -> list[Cell]:
    return [score.accuracy, *score.interval, score.num_images]


def _color_and_marker(index: int) -> tuple[str, str]:
    """A shape as well as a color for each line."""
    return SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]


def _line(axes: Axes, index: int, x: Sequence[float], scores: Sequence[Score], label: str) -> None:
    """Draw accuracies with their intervals."""
    color, marker = _color_and_marker(index)
    below = [max(0.0, score.accuracy - score.interval[0]) for score in scores]
    above = [max(0.0, score.interval[1] - score.accuracy) for score in scores]
    axes.errorbar(
        x,
        [score.accuracy for score in scores],
        yerr=[below, above],
        color=color,
        marker=marker,
        markersize=4.5,
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
        label=label,
    )
