"""The figures of a report: each drawn once, as SVG for the page and PNG for slides, with its data.

The SVG keeps text as text and takes its colors from the page's style sheet, so it is sharp at any
size and follows light, dark and print. matplotlib is imported only where something is drawn, and
never through pyplot, which would leave state behind. Accuracies are fractions in data, percent in
print.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dwf.report.results import (
    AttackRow,
    Diagnostics,
    Evaluation,
    Examples,
    Experts,
    Gate,
    Heatmaps,
    MetricsRow,
    Score,
    Traces,
    WorstCase,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's colors for all kinds of color vision, darkened where they are thin on white.
# In the SVG each becomes the CSS variable of that name, so that a dark page can use its own.
COLORS = {
    "ink": "#1c2127",
    "muted": "#59636e",
    "grid": "#d8dde3",
    "band": "#f1f3f6",
    "surface": "#fdfdfe",
    "series-1": "#005f9e",
    "series-2": "#c44e00",
    "series-3": "#007a5c",
    "series-4": "#a34a86",
}
SERIES = [COLORS[f"series-{i}"] for i in range(1, 5)]
MARKERS = ["o", "s", "^", "D"]
# inches at 72 points: on a phone the small one is shown at about its natural size
SMALL, WIDE = 4.2, 9.0
PNG_DPI = 160
# a heatmap cell narrower than this many inches has no room for its number
SMALLEST_LABELED_CELL = 0.3
MOST_COLUMN_LABELS = 12
# share of the scale above which a cell is dark enough for light text
LIGHT_TEXT_FROM = 0.7
# shares of the width of a wide figure: a phase with room for its name, and one character of it
SMALLEST_NAMED_PHASE, CHARACTER_SHARE = 0.02, 0.009
# more points than a wide figure has pixels only make the page heavy
MOST_POINTS = 800
# perturbations are shown this many times larger than they are
AMPLIFICATION = 10
MOST_EXAMPLES_IN_FIGURE = 8

# how much of a heatmap's strongest place is color
OVERLAY = 0.8
OVER_EPSILON, OVER_STEPS = "Robust accuracy against epsilon", "Robust accuracy against steps"
CONVERGED = (
    "A curve that still falls at its right end has not converged: more steps would break more "
    "images."
)

# kinds of accuracy in diagnostics, and their names on the page
ATTACKED_AS = {
    "clean": "clean",
    "mixture_attacked": "via mixture",
    "self_attacked": "via itself",
}

Cell = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """A drawing with its data. ``svg`` is None where the page shows something better."""

    name: str
    title: str
    alt: str
    caption: str
    png: bytes
    svg: str | None
    columns: list[str]
    rows: list[list[Cell]]
    wide: bool = False

    def csv(self) -> str:
        """The data; floats keep every digit they have in the evaluation."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return stream.getvalue()


@dataclass(frozen=True)
class NotMeasured:
    """What stands where a figure would, and a sentence that says why."""

    title: str
    reason: str


def percent(value: float | None, num_images: int = 0) -> str:
    """A fraction as percent; two decimals only where n gives them a meaning."""
    return "-" if value is None else f"{100 * value:.{2 if num_images >= 10_000 else 1}f} %"


def radius(epsilon: float, *, pixels: bool = True) -> str:
    """An epsilon or step size in pixel units of [0, 1], also as k/255 where it is one."""
    k = round(epsilon * 255)
    if pixels and k > 0 and abs(epsilon * 255 - k) < 1e-6:
        return f"{k}/255 = {epsilon:.3g}"
    return f"{epsilon:.4g}"


def norm_name(norm: str) -> str:
    """As people write it."""
    return {"linf": "L-infinity", "l2": "L2"}[norm]


def accuracy_over_epsilon(evaluation: Evaluation) -> Figure | NotMeasured:
    """From the clean accuracy on: the worst case at each radius, or FGSM and one worst case."""
    if evaluation.in_turn:
        return _worst_case_over_epsilon(evaluation)
    fgsm = sorted((r for r in evaluation.attacks if r.kind == "fgsm"), key=lambda r: r.epsilon)
    if not fgsm:
        return NotMeasured(OVER_EPSILON, f"Suite {evaluation.suite!r} holds no FGSM row.")
    clean = evaluation.clean
    rows = ([clean] if clean else []) + fgsm
    worst = evaluation.worst_case

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        _line(axes, 0, [r.epsilon for r in rows], rows, "FGSM")
        if worst.epsilon is not None:
            _line(axes, 1, [worst.epsilon], [worst], "worst case of all attacks")
        _accuracy_axis(axes)
        axes.set_xlabel(f"epsilon ({_unit(evaluation)})")
        axes.legend(loc="best")

    shown = "; ".join(f"{r.epsilon:g}: {percent(r.score.accuracy)}" for r in rows)
    return _figure(
        "accuracy_over_epsilon",
        OVER_EPSILON,
        draw,
        alt=f"Line chart of accuracy under FGSM by epsilon: {shown}.",
        caption="One gradient step per image (FGSM); bars are 95 % intervals. The curve must fall "
        "as epsilon grows; the worst case is at most the lowest attack at its epsilon.",
        columns=["attack", "epsilon", *SCORE_COLUMNS],
        rows=[
            *([r.name, r.epsilon, *_score_cells(r)] for r in rows),
            ["worst case", worst.epsilon, *_score_cells(worst)],
        ],
    )


def _worst_case_over_epsilon(evaluation: Evaluation) -> Figure:
    clean = evaluation.clean
    points = [("clean", 0.0, clean.score)] if clean else []
    points += [("worst case", part.epsilon or 0.0, part.score) for part in evaluation.curve]
    x = [epsilon for _, epsilon, _ in points]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        y = [score.accuracy for _, _, score in points]
        low, high = zip(*(score.interval for _, _, score in points), strict=True)
        line = "-" if len(evaluation.curve) > 1 else ""  # between two points nothing is known
        if line:
            axes.fill_between(x, low, high, color=SERIES[0], alpha=0.18, linewidth=0)
        bars = [np.subtract(y, low).clip(0), np.subtract(high, y).clip(0)]
        axes.errorbar(
            x, y, yerr=None if line else bars, color=SERIES[0], marker=MARKERS[0], markersize=4.5,
            linewidth=1.6, linestyle=line, elinewidth=1, capsize=2.5,
        )  # fmt: skip
        _accuracy_axis(axes)
        axes.set_xlim(-0.03 * x[-1], 1.03 * x[-1])
        axes.set_xlabel(f"epsilon ({norm_name(evaluation.norm)}, {_unit(evaluation)})")

    shown = "; ".join(f"{epsilon:g}: {percent(score.accuracy)}" for _, epsilon, score in points)
    return _figure(
        "accuracy_over_epsilon",
        OVER_EPSILON,
        draw,
        alt=f"Line chart of worst-case accuracy by epsilon: {shown}.",
        caption="Share of images that stand under every attack within epsilon; at 0 without an "
        "attack. Band or bars: 95 % interval at the measured radii.",
        columns=["attack", "epsilon", *SCORE_COLUMNS],
        rows=[[name, epsilon, *_cells_of(score)] for name, epsilon, score in points],
    )


def accuracy_over_steps(evaluation: Evaluation) -> Figure | NotMeasured:
    """PGD accuracy against the number of steps, one line per epsilon, and the longer attacks."""
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
            label = f"PGD, epsilon {radius(epsilon, pixels=evaluation.of_255)}"
            _line(axes, i, [r.num_steps for r in line], line, label)
        for i, row in enumerate(longer, start=len(epsilons)):
            _line(axes, i, [row.num_steps], [row], row.name)
        _accuracy_axis(axes)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("steps")
        axes.set_xlim(left=0, right=1.08 * max(r.num_steps for r in rows))
        axes.legend(loc="best")

    shown = "; ".join(f"{r.name}: {percent(r.score.accuracy)}" for r in rows)
    return _figure(
        "accuracy_over_steps",
        OVER_STEPS,
        draw,
        alt=f"Line chart of accuracy under PGD by number of steps: {shown}.",
        caption=f"{CONVERGED} Bars are 95 % intervals.",
        columns=["attack", "kind", "epsilon", "num_steps", "num_restarts", *SCORE_COLUMNS],
        rows=[
            [r.name, r.kind, r.epsilon, r.num_steps, r.num_restarts, *_score_cells(r)] for r in rows
        ],
    )


def _accuracy_of_traces(traces: Traces, evaluation: Evaluation) -> Figure:
    steps = range(traces.num_steps + 1)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for r, row in enumerate(traces.accuracy):
            label = "first start" if r == 0 else f"and start {r + 1}"
            color = SERIES[r % len(SERIES)]
            axes.plot(steps, _array([row])[0], color=color, linewidth=1.6, label=label)
            mark = MARKERS[r % len(MARKERS)]
            axes.plot(steps[-1:], _array([row])[0][-1:], color=color, marker=mark, markersize=4.5)
        _accuracy_axis(axes)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("steps")
        axes.set_xlim(0, 1.03 * max(traces.num_steps, 1))
        axes.legend(loc="best")

    ends = ", ".join(percent(row[-1]) for row in traces.accuracy)
    return _figure(
        "accuracy_over_steps",
        "Robust accuracy against steps and restarts",
        draw,
        alt=f"Line chart of accuracy under PGD by number of steps, one line for each random start; "
        f"at the end {ends}.",
        caption=f"PGD on {traces.num_images} images, epsilon "
        f"{radius(traces.epsilon, pixels=evaluation.of_255)}, step size {traces.step_size:.4g}. "
        f"What stands at every step so far, of this start and of those before it. {CONVERGED}",
        columns=["restart", "step", "accuracy"],
        rows=[[r, step, row[step]] for r, row in enumerate(traces.accuracy) for step in steps],
    )


def loss_over_steps(evaluation: Evaluation) -> Figure | NotMeasured:
    """The cross-entropy as PGD goes: mean, and the band of most images."""
    title, traces = "Loss against steps", evaluation.traces
    if traces is None:
        return NotMeasured(title, _no_traces(evaluation))
    mean, low, high = (_array([traces.loss[key]])[0] for key in ("mean", "low", "high"))
    steps = range(traces.num_steps + 1)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.fill_between(
            steps, low, high, color=SERIES[0], alpha=0.18, linewidth=0, label="80 % of the images"
        )
        axes.plot(steps, mean, color=SERIES[0], linewidth=1.6, label="mean")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlim(0, max(traces.num_steps, 1))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("cross-entropy")
        axes.set_xlabel("steps")
        axes.legend(loc="best")

    first, last = (f"{v:.3g}" if math.isfinite(v) else "not finite" for v in (mean[0], mean[-1]))
    return _figure(
        "loss_over_steps",
        title,
        draw,
        alt=f"Line chart of the mean cross-entropy under PGD: {first} at the start, {last} after "
        f"{traces.num_steps} steps.",
        caption=f"Cross-entropy after each step of PGD, {traces.num_restarts} random starts of "
        f"{traces.num_images} images; band: 10 to 90 %. A loss that jumps about, or does not rise "
        "at all, is a sign of masked gradients.",
        columns=["step", "mean", "low", "high"],
        rows=[[k, *(traces.loss[key][k] for key in ("mean", "low", "high"))] for k in steps],
    )


def _no_traces(evaluation: Evaluation) -> str:
    if evaluation.in_turn:
        return "evaluation.diagnostic_images was 0, or the evaluation is older than traces."
    return f"Suite {evaluation.suite!r} does not follow PGD step by step."


def grad_cam(heatmaps: Heatmaps, class_name: Callable[[int], str] = str) -> Figure:
    """Where each expert looks: images down, experts across."""
    E, G, h, w = heatmaps.maps.shape

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(G, E + 1, squeeze=False)
        for g in range(G):
            label = class_name(heatmaps.labels[g])
            pictures_of = [picture(heatmaps.images[g])]
            pictures_of += [overlay(heatmaps, e, g) for e in range(E)]
            for e, (axes, image) in enumerate(zip(grid[g], pictures_of, strict=True)):
                axes.imshow(image, interpolation="nearest")
                axes.set_axis_off()
                axes.set_title(f"label {label}" if e == 0 else heatmaps.experts[e - 1], fontsize=7)

    return _figure(
        "grad_cam",
        "Where each expert looks",
        draw,
        width=WIDE,
        height=0.4 + 1.1 * G,
        svg=False,
        alt=f"Grad-CAM heatmaps of {E} experts on {G} images.",
        caption="",
        columns=["image", "label", "expert", "row", "column", "share"],
        rows=[
            [g, heatmaps.labels[g], heatmaps.experts[e], i, j, float(heatmaps.maps[e, g, i, j])]
            for g in range(G)
            for e in range(E)
            for i in range(h)
            for j in range(w)
        ],
    )


def overlay(heatmaps: Heatmaps, expert: int, g: int) -> Any:
    """A gray image with one expert's heatmap in color, uint8 [H, W, 3]."""
    image, heat = heatmaps.images[g], heatmaps.maps[expert, g]
    H, W = image.shape[1:]
    rows = np.arange(H) * heat.shape[0] // H
    columns = np.arange(W) * heat.shape[1] // W
    strength = heat[rows][:, columns] / max(float(heat.max()), 1e-12)
    gray = image.mean(axis=0, keepdims=True).repeat(3, axis=0)
    color = np.array([int(SERIES[1][i : i + 2], 16) / 255 for i in (1, 3, 5)])[:, None, None]
    share = OVERLAY * strength
    return picture((1 - share) * gray + share * color)


def gate_weights(gate: Gate, class_name: Callable[[int], str] = str) -> list[Figure]:
    """Mean gate weight, experts x classes, one figure per attack on one common scale."""
    tables = {a: np.array(gate.mean_weights[a], dtype=float).T for a in gate.attacks}  # [E, K]
    largest = max((float(np.nanmax(t, initial=0.0)) for t in tables.values()), default=0.0)
    return [
        _heatmap(
            f"gate_weights_{i}_{_slug(attack)}",
            f"Gate weights: {attack}",
            table,
            gate.experts,
            [class_name(k) for k in range(table.shape[1])],
            label=lambda value: f"{value:.2f}",
            row_name="expert",
            column_name="class",
            value_name="mean_weight",
            largest=largest,
            alt=f"Heatmap of the mean gate weight of {table.shape[0]} experts for "
            f"{table.shape[1]} classes under {attack}: {_strongest(table, gate.experts)}.",
            caption=f"Stronger color is more weight, on one scale from 0 to {largest:.2f} for all "
            "attacks; each column adds up to 1.",
        )
        for i, (attack, table) in enumerate(tables.items())
    ]


def gate_entropy(gate: Gate) -> Figure:
    """Mean entropy of the gate per attack, beside the entropy of a uniform gate."""
    uniform = math.log(max(len(gate.experts), 1))
    values = [gate.entropy[attack] for attack in gate.attacks]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.barh(gate.attacks, values, height=0.55, color=SERIES[0])
        axes.invert_yaxis()
        axes.axvline(uniform, color=COLORS["ink"], linestyle="--", linewidth=1)
        for i, value in enumerate(values):
            _note(axes, value + 0.02 * uniform, i, f"{value:.2f}", ha="left", va="center")
        axes.set_xlim(0, 1.15 * max([uniform, *values]) or 1.0)
        axes.set_xlabel("mean entropy of the gate weights (nats)")
        axes.grid(visible=False, axis="y")

    shown = "; ".join(f"{a}: {v:.2f}" for a, v in zip(gate.attacks, values, strict=True))
    return _figure(
        "gate_entropy",
        "Gate entropy",
        draw,
        height=1.1 + 0.32 * len(values),
        alt=f"Bar chart of the gate's mean entropy in nats: {shown}; uniform {uniform:.2f}.",
        caption=f"0: one expert decides alone. Dashed: all {len(gate.experts)} experts weigh the "
        f"same ({uniform:.2f}).",
        columns=["attack", "entropy"],
        rows=[[a, v] for a, v in zip(gate.attacks, values, strict=True)],
    )


def expert_accuracy(experts: Experts, attacks: Sequence[AttackRow]) -> Figure:
    """Accuracy of each expert, and of the whole mixture, on images crafted against the mixture."""
    whole = {row.name: row.score.accuracy for row in attacks}
    names = [*experts.names, "mixture"]
    columns = list(experts.accuracy)
    table = np.array([[*experts.accuracy[a], whole.get(a)] for a in columns], dtype=float).T
    return _heatmap(
        "expert_accuracy",
        "Accuracy of each expert",
        table,  # [E + 1, attacks]
        names,
        columns,
        label=lambda value: f"{100 * value:.1f}",
        row_name="expert",
        column_name="attack",
        value_name="accuracy",
        largest=1.0,
        alt=f"Heatmap of the accuracy in percent of {len(experts.names)} experts and the mixture "
        f"under {len(columns)} attacks.",
        caption="Percent correct when each expert answers alone; the last row is the mixture. "
        "These images were crafted against the mixture, so they say nothing about an attack on "
        "one expert.",
    )


def experts_under_attack(diagnostics: Diagnostics) -> list[Figure]:
    """Who stands, whose images transfer to whom, whom the gate trusts, who fails alike."""
    names = diagnostics.names
    experts, pairs = names[:-1], f"{len(names) - 1} experts"
    return [
        _heatmap(
            "experts_under_attack",
            "Each expert under attack",
            _array([diagnostics.accuracy[key] for key in ATTACKED_AS]).T,  # [E + 1, 3]
            names,
            list(ATTACKED_AS.values()),
            label=lambda value: f"{100 * value:.1f}",
            row_name="expert",
            column_name="attack",
            value_name="accuracy",
            largest=1.0,
            alt=f"Heatmap of the accuracy in percent of {pairs} and the mixture on clean images, "
            "under an attack through the mixture, and each under an attack on itself.",
            caption=f"Percent of {diagnostics.num_images} images. An expert attacked by itself has "
            "no gate and no other expert to help it.",
        ),
        _heatmap(
            "transfer",
            "Transfer between experts",
            _array(diagnostics.transfer),
            names,
            names,
            label=lambda value: f"{100 * value:.0f}",
            row_name="crafted on",
            column_name="judged by",
            value_name="accuracy",
            largest=1.0,
            alt=f"Heatmap of the accuracy in percent that {pairs} and the mixture keep on images "
            "crafted on each of them.",
            caption="Rows: what the images were crafted on. A column much paler off the diagonal "
            "than on it would mean a masked gradient.",
        ),
        _heatmap(
            "gate_load",
            "Load of the experts",
            _array(
                [
                    values
                    for load in (diagnostics.clean, diagnostics.attacked)
                    for values in (load.mean_weight, load.top_share)
                ]
            ).T,  # [E, 4]
            experts,
            ["weight, clean", "preferred, clean", "weight, attacked", "preferred, attacked"],
            label=lambda value: f"{100 * value:.1f}",
            row_name="expert",
            column_name="load",
            value_name="share",
            largest=1.0,
            alt=f"Heatmap of the gate's mean weight and of its preferences among {pairs}, before "
            "and after the attack through the mixture.",
            caption="Percent: mean gate weight, and share of the images for which the gate prefers "
            "the expert, before and after the attack through the mixture.",
        ),
        _heatmap(
            "gradient_cosine",
            "Do experts fail alike",
            _array(diagnostics.gradient_cosine),
            experts,
            experts,
            label=lambda value: f"{value:.2f}",
            row_name="expert",
            column_name="other expert",
            value_name="cosine",
            largest=1.0,
            alt=f"Heatmap of the mean cosine between the loss gradients of {pairs}.",
            caption="Mean cosine between two experts' loss gradients at the clean image: near 1 "
            "one perturbation breaks both, near 0 neither says anything about the other.",
        ),
    ]


def _array(values: Sequence[Sequence[float | None]]) -> Any:
    """A table of numbers; None is NaN."""
    return np.array(values, dtype=float)


Bar = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class Bars:
    """One line of a comparison: clean accuracy, if it was measured, and the worst case."""

    name: str
    clean: Bar | None
    worst: Bar


def clean_and_worst_case(groups: Sequence[Bars]) -> Figure:
    """Clean accuracy and worst case of several defenses, the most robust on top."""
    groups = sorted(groups, key=lambda bars: -bars.worst[0])
    series: list[tuple[str, list[Bar | None]]] = [
        ("clean", [bars.clean for bars in groups]),
        ("worst case", [bars.worst for bars in groups]),
    ]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, (label, points) in enumerate(series):
            known = [(y, *point) for y, point in enumerate(points) if point is not None]
            if not known:
                continue
            y, mean, low, high = (np.array(column) for column in zip(*known, strict=True))
            bars = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
            axes.errorbar(
                mean, y, xerr=bars, color=SERIES[i], marker=MARKERS[i], markersize=5,
                linestyle="none", elinewidth=1, capsize=2.5, label=label,
            )  # fmt: skip
        axes.set_yticks(range(len(groups)), [bars.name for bars in groups])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(0, 1.02)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0", "20", "40", "60", "80", "100 %"])
        axes.set_xlabel("accuracy")
        axes.grid(visible=True, axis="both")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)

    shown = "; ".join(
        f"{bars.name}: clean {percent(bars.clean and bars.clean[0])}, "
        f"worst case {percent(bars.worst[0])}"
        for bars in groups
    )
    return _figure(
        "clean_and_worst_case",
        "Clean accuracy and worst case",
        draw,
        width=WIDE,
        height=1.1 + 0.3 * len(groups),
        alt=f"Dot plot of clean accuracy and worst case by defense: {shown}.",
        caption="Worst case per image over all attacks within epsilon. Bars are the standard "
        "deviation over seeds, or of a single run the 95 % interval.",
        columns=["defense", "series", "mean", "low", "high"],
        rows=[
            [bars.name, label, *(point or (None, None, None))]
            for label, points in series
            for bars, point in zip(groups, points, strict=True)
        ],
    )


def training_curves(metrics: Sequence[MetricsRow]) -> Figure | NotMeasured:
    """Loss and accuracies over the global step; one line per phase, phases marked."""
    title = "Training curves"
    if not metrics:
        return NotMeasured(title, "The run folder holds no metrics.jsonl, or an empty one.")
    phases: dict[str, list[MetricsRow]] = {}
    for row in metrics:
        phases.setdefault(row.phase, []).append(row)
    panels = [
        ("training loss", [("loss", "train", "loss", 0)]),
        (
            "validation accuracy",
            [
                ("clean", "validation", "clean_accuracy", 0),
                ("robust", "validation", "robust_accuracy", 1),
            ],
        ),
    ]

    def draw(canvas: Canvas) -> None:
        loss, accuracy = canvas.subplots(2, 1, sharex=True)
        for axes, (name, lines) in zip((loss, accuracy), panels, strict=True):
            for label, kind, field, color in lines:
                for rows in phases.values():
                    _curve(axes, rows, kind, field, SERIES[color])
                # one legend entry for all phases
                axes.plot([], [], color=SERIES[color], label=label)
            axes.set_ylabel(name)
        losses = [row.loss for row in metrics if row.loss is not None]
        loss.set_ylim(0, 1.05 * max(losses, default=1.0))
        _accuracy_axis(accuracy, "validation accuracy")
        accuracy.set_xlabel("global step")
        # above the panel, where no curve can be
        accuracy.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)
        accuracy.set_xlim(0, 1.005 * max(row.global_step for row in metrics) or 1)
        _mark_phases(loss, accuracy, phases)

    last = [row for row in metrics if row.kind == "validation"][-1:]
    ends = "".join(
        f" At the last validation: clean {percent(row.clean_accuracy)}, "
        f"robust {percent(row.robust_accuracy)}."
        for row in last
    )
    names = [
        "kind",
        "phase",
        "epoch",
        "step",
        "global_step",
        "loss",
        "clean_accuracy",
        "robust_accuracy",
        "learning_rate",
    ]
    return _figure(
        "training_curves",
        title,
        draw,
        width=WIDE,
        height=5.4,
        alt=f"Line charts of training loss and validation accuracy over {len(phases)} phases: "
        f"{', '.join(phases)}.{ends}",
        caption="Each shaded or plain stretch is one phase of training. Validation images are held "
        f"out of the training set.{ends}",
        columns=names,
        rows=[[getattr(row, name) for name in names] for row in metrics],
    )


def example_grid(examples: Examples, class_name: Callable[[int], str] = str) -> Figure:
    """Clean image, adversarial image and their difference, as shown on the page."""
    count = min(len(examples.labels), MOST_EXAMPLES_IN_FIGURE)
    largest = np.abs(examples.adversarial - examples.clean).max(axis=(1, 2, 3))

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(3, count, squeeze=False)
        for g in range(count):
            label, before, after = (
                class_name(k)
                for k in (
                    examples.labels[g],
                    examples.predictions_clean[g],
                    examples.predictions_adversarial[g],
                )
            )
            titles = [f"label {label}\nsays {before}", f"says {after}", f"x{AMPLIFICATION}"]
            for axes, picture, text in zip(grid[:, g], pictures(examples, g), titles, strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set_axis_off()
                axes.set_title(text)

    return _figure(
        "examples",
        "Example images",
        draw,
        width=WIDE,
        height=3.6,
        svg=False,
        alt=f"{count} images before and after {examples.attack}, and their difference.",
        caption="",
        columns=[
            "example",
            "attack",
            "label",
            "prediction_clean",
            "prediction_adversarial",
            "largest_difference",
        ],
        rows=[
            [
                g,
                examples.attack,
                examples.labels[g],
                examples.predictions_clean[g],
                examples.predictions_adversarial[g],
                float(largest[g]),
            ]
            for g in range(len(examples.labels))
        ],
    )


def pictures(examples: Examples, g: int) -> tuple[Any, Any, Any]:
    """Clean, adversarial and amplified difference of one example, each uint8 [H, W, 3].

    In the difference gray means unchanged. Values outside the range of a screen are clipped.
    """
    clean, adversarial = examples.clean[g], examples.adversarial[g]
    difference = 0.5 + AMPLIFICATION * (adversarial - clean)
    return picture(clean), picture(adversarial), picture(difference)


def png_of_picture(picture: Any) -> bytes:
    """Encode uint8 [H, W, 3], one pixel for each."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, picture, format="png", metadata={"Software": "dwf"})
    return stream.getvalue()


def picture(image: Any) -> Any:
    """[C, H, W] to uint8 [H, W, 3]; anything but three channels is shown as gray."""
    if image.shape[0] != 3:
        image = image.mean(axis=0, keepdims=True).repeat(3, axis=0)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)


SCORE_COLUMNS = ["accuracy", "interval_low", "interval_high", "num_images"]


def _score_cells(row: AttackRow | WorstCase) -> list[Cell]:
    return _cells_of(row.score)


def _cells_of(score: Score) -> list[Cell]:
    return [score.accuracy, *score.interval, score.num_images]


def _unit(evaluation: Evaluation) -> str:
    return "pixels in [0, 1]" if evaluation.pixels else "normalized units"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def _strongest(table: Any, experts: Sequence[str]) -> str:
    """Which expert carries most weight, for readers who cannot see the heatmap."""
    # a class without images has no weights and does not count
    means = np.array(
        [row[np.isfinite(row)].mean() if np.isfinite(row).any() else 0 for row in table]
    )
    best = int(means.argmax())
    return f"{experts[best]} has the largest mean weight, {means[best]:.2f}"


def _figure(
    name: str,
    title: str,
    draw: Callable[[Canvas], None],
    *,
    alt: str,
    caption: str,
    columns: list[str],
    rows: list[list[Cell]],
    width: float = SMALL,
    height: float = 3.1,
    svg: bool = True,
) -> Figure:
    """Draw once, save twice: equal input gives equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        "axes.axisbelow": True,
        "axes.edgecolor": COLORS["grid"],
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": COLORS["muted"],
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "grid.color": COLORS["grid"],
        "grid.linewidth": 0.7,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "legend.labelcolor": COLORS["ink"],
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        # attack names are text, even if one holds a dollar sign
        "text.parse_math": False,
        "text.color": COLORS["ink"],
        "xtick.color": COLORS["muted"],
        "xtick.major.size": 3,
        "ytick.color": COLORS["muted"],
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(width, height))
        FigureCanvasAgg(canvas)
        draw(canvas)
        png = io.BytesIO()
        canvas.savefig(
            png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": "dwf"}
        )
        drawing = None
        if svg:
            # keep the layout just found: finding it takes longer than drawing
            canvas.set_layout_engine("none")
            text = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            canvas.savefig(text, format="svg", transparent=True, metadata=nothing)
            drawing = _inline_svg(text.getvalue())
    return Figure(
        name, title, alt, caption, png.getvalue(), drawing, columns, rows, wide=width == WIDE
    )


def _inline_svg(text: str) -> str:
    """Make matplotlib's SVG a part of a page: its prologue, ids and fixed colors go."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # the page names the drawing and sets its size
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1aria-hidden="true"', text, count=1)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text


def _line(
    axes: Axes,
    index: int,
    x: Sequence[float],
    rows: Sequence[AttackRow | WorstCase],
    label: str,
) -> None:
    """Accuracies with their intervals; a shape as well as a color for each line."""
    color, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    y = [row.score.accuracy for row in rows]
    bars = [
        [max(0.0, value - row.score.interval[0]) for value, row in zip(y, rows, strict=True)],
        [max(0.0, row.score.interval[1] - value) for value, row in zip(y, rows, strict=True)],
    ]
    axes.errorbar(
        x, y, yerr=bars, color=color, marker=marker, markersize=4.5, linewidth=1.6,
        elinewidth=1, capsize=2.5, label=label,
    )  # fmt: skip


def _accuracy_axis(axes: Axes, label: str = "accuracy") -> None:
    """From 0 to 100 %, so that no difference looks larger than it is."""
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0", "20", "40", "60", "80", "100 %"])
    axes.set_ylabel(label)


def _note(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    axes.text(x, y, text, fontsize=8, **{"color": COLORS["ink"], **options})


def _curve(axes: Axes, rows: Sequence[MetricsRow], kind: str, field: str, color: str) -> None:
    """One phase of one quantity; long phases as means over equal stretches."""
    points = [
        (row.global_step, getattr(row, field))
        for row in rows
        if row.kind == kind and getattr(row, field) is not None
    ]
    if not points:
        return
    stretches = np.array_split(np.array(points, dtype=float), min(len(points), MOST_POINTS))
    means = np.array([stretch.mean(axis=0) for stretch in stretches])
    marker = "o" if kind == "validation" or len(means) == 1 else "none"
    axes.plot(means[:, 0], means[:, 1], color=color, linewidth=1.4, marker=marker, markersize=3)


def _mark_phases(top: Axes, bottom: Axes, phases: dict[str, list[MetricsRow]]) -> None:
    """Shade every other phase; name above the panels each one that is wide enough."""
    start, limit = 0.0, max(1, max(rows[-1].global_step for rows in phases.values()))
    for i, (name, rows) in enumerate(phases.items()):
        end = float(rows[-1].global_step)
        for axes in (top, bottom):
            if i % 2 == 0:
                axes.axvspan(start, end, color=COLORS["band"], zorder=0, linewidth=0)
        share = (end - start) / limit
        if share > SMALLEST_NAMED_PHASE:
            top.annotate(
                name,
                ((start + end) / 2, 1.01),
                xycoords=("data", "axes fraction"),
                rotation=0 if share > CHARACTER_SHARE * len(name) else 90,
                ha="center",
                va="bottom",
                fontsize=8,
                color=COLORS["muted"],
            )
        start = end


def _heatmap(
    name: str,
    title: str,
    table: Any,  # [rows, columns], NaN where nothing was measured
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    label: Callable[[float], str],
    row_name: str,
    column_name: str,
    value_name: str,
    largest: float,
    alt: str,
    caption: str,
) -> Figure:
    num_rows, num_columns = table.shape
    every = math.ceil(num_columns / MOST_COLUMN_LABELS)
    # inches that a label needs, against those it has
    needed = 0.09 * max(len(text) for text in column_labels)
    turn = needed > every * 0.8 * SMALL / num_columns

    def draw(canvas: Canvas) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axes = canvas.subplots()
        # from transparent, so that an empty cell is the page itself, light or dark
        shades = LinearSegmentedColormap.from_list("shades", [SERIES[0] + "00", SERIES[0]])
        axes.pcolormesh(
            np.ma.masked_invalid(table), cmap=shades, vmin=0, vmax=largest or 1.0,
            edgecolors=COLORS["surface"], linewidth=1 if num_columns <= 20 else 0,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_yticks(np.arange(num_rows) + 0.5, row_labels)
        shown = np.arange(0, num_columns, every)
        texts = [column_labels[i] for i in shown]
        axes.set_xticks(shown + 0.5, texts)
        if turn:
            for text in axes.get_xticklabels():
                text.set(rotation=35, ha="right", rotation_mode="anchor")
        axes.set_xlabel(column_name)
        if SMALL / (num_columns + 2) >= SMALLEST_LABELED_CELL:
            for r, c, value in _cells(table):
                dark = value > LIGHT_TEXT_FROM * (largest or 1.0)
                color = COLORS["surface" if dark else "ink"]
                where = {"ha": "center", "va": "center", "color": color}
                _note(axes, c + 0.5, r + 0.5, label(value), **where)

    return _figure(
        name,
        title,
        draw,
        height=0.7 + 0.28 * num_rows + (min(0.6 * needed, 1.5) if turn else 0),
        alt=alt,
        caption=caption,
        columns=[row_name, column_name, value_name],
        rows=[
            [row_labels[r], column_labels[c], value if math.isfinite(value) else None]
            for (r, c), value in ((at, float(v)) for at, v in np.ndenumerate(table))
        ],
    )


def _cells(table: Any) -> Iterator[tuple[int, int, float]]:
    """The measured cells of a table."""
    return ((r, c, float(v)) for (r, c), v in np.ndenumerate(table) if math.isfinite(v))
