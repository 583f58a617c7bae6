"""Show images: examples before and after an attack, and heatmaps of where each expert looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dwf.report.figures.canvas import SERIES, WIDE, Figure, draw_figure
from dwf.report.results import Examples, Heatmaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# perturbations are shown this many times larger than they are
# Differences are amplified by one of these: the largest that clips none of an evaluation's.
AMPLIFICATIONS = (50, 20, 10, 5, 2, 1)
MOST_EXAMPLES_IN_FIGURE = 8
# share of color where a heatmap is strongest
OVERLAY = 0.8

Picture = NDArray[np.uint8]  # [H, W, 3]


def example_grid(examples: Examples, class_name: Callable[[int], str] = str) -> Figure:
    """Draw clean image, adversarial image and their difference, one column for each example."""
    count = min(len(examples.labels), MOST_EXAMPLES_IN_FIGURE)
    largest = np.abs(examples.adversarial - examples.clean).max(axis=(1, 2, 3))
    times = amplification(examples)

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(3, count, squeeze=False)
        for g in range(count):
            label = class_name(examples.labels[g])
            before = class_name(examples.predictions_clean[g])
            after = class_name(examples.predictions_adversarial[g])
            titles = [f"label {label}\nsays {before}", f"says {after}", f"x{times}"]
            for axes, image, text in zip(grid[:, g], pictures(examples, g), titles, strict=True):
                axes.imshow(image, interpolation="nearest")
                axes.set_axis_off()
                axes.set_title(text)

    return draw_figure(
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


def grad_cam(heatmaps: Heatmaps, class_name: Callable[[int], str] = str) -> Figure:
    """Draw where each expert looks: images down, experts across."""
    E, G, h, w = heatmaps.maps.shape

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(G, E + 1, squeeze=False)
        for g in range(G):
            label = class_name(heatmaps.labels[g])
            titles = [f"label {label}", *heatmaps.experts]
            images = [picture(heatmaps.images[g]), *(overlay(heatmaps, e, g) for e in range(E))]
            for axes, image, text in zip(grid[g], images, titles, strict=True):
                axes.imshow(image, interpolation="nearest")
                axes.set_axis_off()
                axes.set_title(text, fontsize=7)

    return draw_figure(
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


def amplification(examples: Examples) -> int:
    """By how much differences are amplified: all alike, and none beyond black or white."""
    largest = float(np.abs(examples.adversarial - examples.clean).max(initial=0.0))
    return next((x for x in AMPLIFICATIONS if x * largest <= 0.5), AMPLIFICATIONS[-1])


def pictures(examples: Examples, g: int) -> tuple[Picture, Picture, Picture]:
    """Example ``g`` clean, adversarial, and as their amplified difference.

    In the difference gray means unchanged.
    """
    clean, adversarial = examples.clean[g], examples.adversarial[g]
    difference = 0.5 + amplification(examples) * (adversarial - clean)
    return picture(clean), picture(adversarial), picture(difference)


def overlay(heatmaps: Heatmaps, expert: int, g: int) -> Picture:
    """Image ``g`` in gray with the heatmap of one expert in color."""
    image, heat = heatmaps.images[g], heatmaps.maps[expert, g]
    H, W = image.shape[1:]
    rows = np.arange(H) * heat.shape[0] // H
    columns = np.arange(W) * heat.shape[1] // W
    strength = heat[rows][:, columns] / max(float(heat.max()), 1e-12)
    gray = image.mean(axis=0, keepdims=True).repeat(3, axis=0)
    color = np.array([int(SERIES[1][i : i + 2], 16) / 255 for i in (1, 3, 5)])[:, None, None]
    share = OVERLAY * strength
    return picture((1 - share) * gray + share * color)


def picture(image: NDArray[np.floating]) -> Picture:
    """[C, H, W] as uint8 [H, W, 3]; any number of channels but three is shown as gray."""
    if image.shape[0] != 3:
        image = image.mean(axis=0, keepdims=True).repeat(3, axis=0)
    shown: Picture = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    return shown
