"""Draw a training run: loss and validation accuracy over its phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dwf.report.figures.canvas import (
    COLORS,
    SERIES,
    WIDE,
    Figure,
    NotMeasured,
    accuracy_axis,
    draw_figure,
)
from dwf.report.results import MetricsRow
from dwf.report.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# a phase needs this share of the figure's width for its name, and each character this share
SMALLEST_NAMED_PHASE, CHARACTER_SHARE = 0.02, 0.009
# more points than a wide figure has pixels only make the page heavy
MOST_POINTS = 800
COLUMNS = [
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


def training_curves(metrics: Sequence[MetricsRow]) -> Figure | NotMeasured:
    """Loss and accuracies over the global step: one line for each phase, phases shaded in turn."""
    title = "Training curves"
    if not metrics:
        return NotMeasured(title, "The run folder holds no metrics.jsonl, or an empty one.")
    phases: dict[str, list[MetricsRow]] = {}
    for row in metrics:
        phases.setdefault(row.phase, []).append(row)

    def draw(canvas: Canvas) -> None:
        loss, accuracy = canvas.subplots(2, 1, sharex=True)
        _lines(loss, phases, kind="train", field="loss", label="loss", color=SERIES[0])
        loss.set_ylabel("training loss")
        losses = [row.loss for row in metrics if row.loss is not None]
        loss.set_ylim(0, 1.05 * max(losses, default=1.0))
        for label, color in (("clean", SERIES[0]), ("robust", SERIES[1])):
            field = f"{label}_accuracy"
            _lines(accuracy, phases, kind="validation", field=field, label=label, color=color)
        accuracy_axis(accuracy, "validation accuracy")
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
    return draw_figure(
        "training_curves",
        title,
        draw,
        width=WIDE,
        height=5.4,
        alt=f"Line charts of training loss and validation accuracy over {len(phases)} phases: "
        f"{', '.join(phases)}.{ends}",
        caption="Each shaded or plain stretch is one phase of training. Validation images are held "
        f"out of the training set.{ends}",
        columns=COLUMNS,
        rows=[[getattr(row, name) for name in COLUMNS] for row in metrics],
    )


def _lines(
    axes: Axes,
    phases: dict[str, list[MetricsRow]],
    *,
    kind: str,
    field: str,
    label: str,
    color: str,
) -> None:
    """Draw one quantity, a line for each phase; a long phase as means over equal stretches."""
    for rows in phases.values():
        points = [
            (row.global_step, getattr(row, field))
            for row in rows
            if row.kind == kind and getattr(row, field) is not None
        ]
        if not points:
            continue
        stretches = np.array_split(np.array(points, dtype=float), min(len(points), MOST_POINTS))
        means = np.array([stretch.mean(axis=0) for stretch in stretches])
        marker = "o" if kind == "validation" or len(means) == 1 else "none"
        axes.plot(means[:, 0], means[:, 1], color=color, linewidth=1.4, marker=marker, markersize=3)
    # one legend entry for all phases
    axes.plot([], [], color=color, label=label)


def _mark_phases(top: Axes, bottom: Axes, phases: dict[str, list[MetricsRow]]) -> None:
    """Shade every other phase; name above the panels each one that is wide enough."""
    start, limit = 0.0, max(1, max(rows[-1].global_step for rows in phases.values()))
    for i, (name, rows) in enumerate(phases.items()):
        end = float(rows[-1].global_step)
        if i % 2 == 0:
            for axes in (top, bottom):
                axes.axvspan(start, end, color=COLORS["band"], zorder=0, linewidth=0)
        share = (end - start) / limit
        if share > SMALLEST_NAMED_PHASE:
            top.annotate(
                name,
                xy=((start + end) / 2, 1.01),
                xycoords=("data", "axes fraction"),
                rotation=0 if share > CHARACTER_SHARE * len(name) else 90,
                ha="center",
                va="bottom",
                fontsize=8,
                color=COLORS["muted"],
            )
        start = end
