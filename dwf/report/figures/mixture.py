"""Draw what the gate and the experts of a mixture do, on clean images and under attack."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dwf.evaluation.mixture_record import Diagnostics, Experts, Gate
from dwf.evaluation.record import AttackRow
from dwf.report.figures.canvas import COLORS, SERIES, SMALL, Figure, array, draw_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# a heatmap cell narrower than this many inches has no room for its number
SMALLEST_LABELED_CELL = 0.3
MOST_COLUMN_LABELS = 12
# share of the scale above which a cell is dark enough for light text
LIGHT_TEXT_FROM = 0.7


@dataclass(frozen=True)
class Heatmap:
    """A table of numbers to be shown as colors, from 0 to ``largest``.

    ``values`` is [rows, columns], NaN where nothing was measured. ``row_name``, ``column_name`` and
    ``value_name`` head the columns of the CSV file. Cells show ``decimals`` decimals, in percent
    where ``in_percent`` is true.
    """

    name: str
    title: str
    values: NDArray[np.float64]
    rows: Sequence[str]
    columns: Sequence[str]
    column_name: str
    value_name: str
    alt: str
    caption: str
    row_name: str = "expert"
    largest: float = 1.0
    decimals: int = 1
    in_percent: bool = True

    def draw(self) -> Figure:
        """Draw it small, as high as its rows need."""
        num_rows, num_columns = self.values.shape
        every = math.ceil(num_columns / MOST_COLUMN_LABELS)
        # inches that a label needs, against those it has
        needed = 0.09 * max(len(text) for text in self.columns)
        turned = needed > every * 0.8 * SMALL / num_columns
        return draw_figure(
            self.name,
            self.title,
            lambda canvas: self._fill(canvas, every, turned),
            height=0.7 + 0.28 * num_rows + (min(0.6 * needed, 1.5) if turned else 0),
            alt=self.alt,
            caption=self.caption,
            columns=[self.row_name, self.column_name, self.value_name],
            rows=[
                [self.rows[r], self.columns[c], float(value) if math.isfinite(value) else None]
                for (r, c), value in np.ndenumerate(self.values)
            ],
        )

    def _fill(self, canvas: Canvas, every: int, turned: bool) -> None:
        """Color the cells; label every row and each ``every``-th column, ``turned`` or level."""
        from matplotlib.colors import LinearSegmentedColormap

        num_rows, num_columns = self.values.shape
        largest = self.largest or 1.0
        axes = canvas.subplots()
        # from transparent, so that an empty cell is the page itself, light or dark
        shades = LinearSegmentedColormap.from_list("shades", [SERIES[0] + "00", SERIES[0]])
        axes.pcolormesh(
            np.ma.masked_invalid(self.values),
            cmap=shades,
            vmin=0,
            vmax=largest,
            edgecolors=COLORS["surface"],
            linewidth=1 if num_columns <= 20 else 0,
        )
        axes.invert_yaxis()
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_yticks(np.arange(num_rows) + 0.5, self.rows)
        shown = range(0, num_columns, every)
        axes.set_xticks([c + 0.5 for c in shown], [self.columns[c] for c in shown])
        if turned:
            for text in axes.get_xticklabels():
                text.set(rotation=35, ha="right", rotation_mode="anchor")
        axes.set_xlabel(self.column_name)
        if SMALL / (num_columns + 2) < SMALLEST_LABELED_CELL:
            return
        scale = 100 if self.in_percent else 1
        for (r, c), value in np.ndenumerate(self.values):
            if math.isfinite(value):
                axes.text(
                    c + 0.5,
                    r + 0.5,
                    f"{scale * value:.{self.decimals}f}",
                    fontsize=8,
                    ha="center",
                    va="center",
                    color=COLORS["surface" if value > LIGHT_TEXT_FROM * largest else "ink"],
                )


def gate_weights(gate: Gate, class_name: Callable[[int], str] = str) -> list[Figure]:
    """Mean gate weight, experts by classes: one heatmap per attack, all on one scale."""
    tables = {attack: array(gate.mean_weights[attack]).T for attack in gate.attacks}  # [E, K]
    largest = max((float(np.nanmax(t, initial=0.0)) for t in tables.values()), default=0.0)
    return [
        Heatmap(
            name=f"gate_weights_{i}_{_slug(attack)}",
            title=f"Gate weights: {attack}",
            values=table,
            rows=gate.experts,
            columns=[class_name(k) for k in range(table.shape[1])],
            column_name="class",
            value_name="mean_weight",
            largest=largest,
            decimals=2,
            in_percent=False,
            alt=f"Heatmap of the mean gate weight of {table.shape[0]} experts for "
            f"{table.shape[1]} classes under {attack}: {_strongest(table, gate.experts)}.",
            caption=f"Stronger color is more weight, on one scale from 0 to {largest:.2f} for all "
            "attacks; each column adds up to 1.",
        ).draw()
        for i, (attack, table) in enumerate(tables.items())
    ]


def gate_entropy(gate: Gate) -> Figure:
    """Mean entropy of the gate under each attack, against the entropy of a uniform gate."""
    uniform = math.log(max(len(gate.experts), 1))
    values = [gate.entropy[attack] for attack in gate.attacks]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.barh(gate.attacks, values, height=0.55, color=SERIES[0])
        axes.invert_yaxis()
        axes.axvline(uniform, color=COLORS["ink"], linestyle="--", linewidth=1)
        for i, value in enumerate(values):
            axes.text(
                value + 0.02 * uniform,
                i,
                f"{value:.2f}",
                fontsize=8,
                ha="left",
                va="center",
                color=COLORS["ink"],
            )
        axes.set_xlim(0, 1.15 * max([uniform, *values]) or 1.0)
        axes.set_xlabel("mean entropy of the gate weights (nats)")
        axes.grid(visible=False, axis="y")

    shown = "; ".join(f"{a}: {v:.2f}" for a, v in zip(gate.attacks, values, strict=True))
    return draw_figure(
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
    """Accuracy of each expert, and of the mixture, on images crafted against the mixture."""
    whole = {row.name: row.accuracy for row in attacks}
    columns = list(experts.accuracy)
    return Heatmap(
        name="expert_accuracy",
        title="Accuracy of each expert",
        values=array([[*experts.accuracy[a], whole.get(a)] for a in columns]).T,  # [E + 1, attacks]
        rows=[*experts.names, "mixture"],
        columns=columns,
        column_name="attack",
        value_name="accuracy",
        alt=f"Heatmap of the accuracy in percent of {len(experts.names)} experts and the mixture "
        f"under {len(columns)} attacks.",
        caption="Percent correct when each expert answers alone; the last row is the mixture. "
        "These images were crafted against the mixture, so they say nothing about an attack on "
        "one expert.",
    ).draw()


def experts_under_attack(diagnostics: Diagnostics) -> list[Figure]:
    """Accuracy, transfer between experts, load of the gate, and likeness of gradients."""
    names = diagnostics.names
    experts, counted = names[:-1], f"{len(names) - 1} experts"
    clean, attacked = diagnostics.gate.clean, diagnostics.gate.attacked
    accuracy = diagnostics.accuracy
    alone = Heatmap(
        name="experts_under_attack",
        title="Each expert under attack",
        values=array(
            [accuracy.clean, accuracy.mixture_attacked, accuracy.self_attacked]
        ).T,  # [E + 1, 3]
        rows=names,
        columns=["clean", "via mixture", "via itself"],
        column_name="attack",
        value_name="accuracy",
        alt=f"Heatmap of the accuracy in percent of {counted} and the mixture on clean images, "
        "under an attack through the mixture, and each under an attack on itself.",
        caption=f"Percent of {diagnostics.num_images} images. An expert attacked by itself has "
        "no gate and no other expert to help it.",
    )
    transfer = Heatmap(
        name="transfer",
        title="Transfer between experts",
        values=array(diagnostics.transfer),
        rows=names,
        columns=names,
        row_name="crafted on",
        column_name="judged by",
        value_name="accuracy",
        decimals=0,
        alt=f"Heatmap of the accuracy in percent that {counted} and the mixture keep on images "
        "crafted on each of them.",
        caption="Rows: what the images were crafted on. A column much paler off the diagonal "
        "than on it would mean a masked gradient.",
    )
    load = Heatmap(
        name="gate_load",
        title="Load of the experts",
        values=array(
            [clean.mean_weight, clean.top_share, attacked.mean_weight, attacked.top_share]
        ).T,  # [E, 4]
        rows=experts,
        columns=["weight, clean", "preferred, clean", "weight, attacked", "preferred, attacked"],
        column_name="load",
        value_name="share",
        alt=f"Heatmap of the gate's mean weight and of its preferences among {counted}, before "
        "and after the attack through the mixture.",
        caption="Percent: mean gate weight, and share of the images for which the gate prefers "
        "the expert, before and after the attack through the mixture.",
    )
    cosine = Heatmap(
        name="gradient_cosine",
        title="Do experts fail alike",
        values=array(diagnostics.gradient_cosine),
        rows=experts,
        columns=experts,
        column_name="other expert",
        value_name="cosine",
        decimals=2,
        in_percent=False,
        alt=f"Heatmap of the mean cosine between the loss gradients of {counted}.",
        caption="Mean cosine between two experts' loss gradients at the clean image: near 1 "
        "one perturbation breaks both, near 0 neither says anything about the other.",
    )
    return [heatmap.draw() for heatmap in (alone, transfer, load, cosine)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def _strongest(table: NDArray[np.float64], experts: Sequence[str]) -> str:
    """Which expert carries most weight, for readers who cannot see the heatmap."""
    # a class without images has no weights and does not count
    means = np.array(
        [row[np.isfinite(row)].mean() if np.isfinite(row).any() else 0 for row in table]
    )
    best = int(means.argmax())
    return f"{experts[best]} has the largest mean weight, {means[best]:.2f}"
