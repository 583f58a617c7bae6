"""Draw one figure as SVG for the page and PNG for slides, and keep its data beside it.

The SVG keeps text as text and takes its colors from the page's style sheet, so it is sharp at any
size and follows light, dark and print. It is drawn on a `matplotlib.figure.Figure`; pyplot, the
backend and the user's matplotlibrc have no part in it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dwf.files import safe_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


def _light_colors() -> dict[str, str]:
    """The colors of a light page by their CSS variable; the style sheet's first rule holds them."""
    file = resources.files("dwf.report").joinpath("templates").joinpath("style.css")
    css = file.read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css[: css.index("}")]))


# In the SVG each color becomes the CSS variable of that name, so a dark page can use its own.
COLORS = _light_colors()
SERIES = [COLORS[f"series-{i}"] for i in range(1, 5)]
MARKERS = ["o", "s", "^", "D"]
# inches at 72 points: on a phone the small one is shown at about its natural size
SMALL, WIDE = 4.2, 9.0
PNG_DPI = 160
PERCENT_TICKS = {0.0: "0", 0.2: "20", 0.4: "40", 0.6: "60", 0.8: "80", 1.0: "100 %"}

Cell = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """A drawing with its data. ``svg`` is None where the page shows the pictures themselves."""

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
        writer.writerow(map(safe_cell, self.columns))
        writer.writerows(map(safe_cell, row) for row in self.rows)
        return stream.getvalue()


@dataclass(frozen=True)
class NotMeasured:
    """A figure that cannot be drawn, and a sentence that says why."""

    title: str
    reason: str


def draw_figure(
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
    """Draw once, save twice: equal input gives equal bytes.

    Args:
        name: stem of the files ``figures/<name>.png`` and ``.csv``.
        draw: fills an empty matplotlib figure.
        alt: the content in words, for readers who cannot see it.
        columns, rows: the data, as the CSV file holds them.
        width, height: size in inches.
        svg: False for photographs, which the page shows as images.
    """
    matplotlib = _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(name))
        canvas = Canvas(figsize=(width, height))
        FigureCanvasAgg(canvas)
        draw(canvas)
        png = io.BytesIO()
        with _substituted(canvas):
            canvas.savefig(
                png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": "dwf"}
            )
        drawing = None
        if svg:
            # keep the layout just found: finding it takes longer than drawing
            canvas.set_layout_engine("none")
            text = io.StringIO()
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            with _silent_about_fonts():  # the reader's browser has them
                canvas.savefig(text, format="svg", transparent=True, metadata=no_metadata)
            drawing = _inline_svg(text.getvalue())
    return Figure(
        name=name,
        title=title,
        alt=alt,
        caption=caption,
        png=png.getvalue(),
        svg=drawing,
        columns=columns,
        rows=rows,
        wide=width == WIDE,
    )


def png_of_picture(picture: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] as PNG, one pixel for each."""
    _import_matplotlib()
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, picture, format="png", metadata={"Software": "dwf"})
    return stream.getvalue()


def array(values: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """A table of numbers; None becomes NaN."""
    return np.array(values, dtype=float)


def accuracy_axis(axes: Axes, label: str = "accuracy") -> None:
    """Set the y axis to 0 to 100 %, so that no difference looks larger than it is."""
    axes.set_ylim(0, 1.02)
    axes.set_yticks(list(PERCENT_TICKS), PERCENT_TICKS.values())
    axes.set_ylabel(label)


def step_axis(axes: Axes, last: float) -> None:
    """Set the x axis to the steps of an attack, from 0 to ``last``."""
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(0, last)
    axes.set_xlabel("steps")


@contextlib.contextmanager
def _silent_about_fonts() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        yield


@contextlib.contextmanager
def _substituted(canvas: Canvas) -> Iterator[None]:
    """Inside the block no text holds a character that its font lacks; "?" stands for each run."""
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    def readable(words: str, text: Any) -> str:
        if words.isascii():
            return words
        font = get_font(findfont(text.get_fontproperties()))
        known = (c.isspace() or font.get_char_index(ord(c)) != 0 for c in words)
        return re.sub(
            "\0+", "?", "".join(c if k else "\0" for c, k in zip(words, known, strict=True))
        )

    def shown(words_of: Callable[..., str], text: Any, *tick: Any) -> str:
        return readable(words_of(*tick), text)

    undo: list[Callable[[], object]] = []
    for text in canvas.findobj(Text):
        undo.append(functools.partial(text.set_text, text.get_text()))
        text.set_text(readable(text.get_text(), text))
    for axes in canvas.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FuncFormatter):  # it writes its texts anew at every draw
                undo.append(functools.partial(setattr, formatter, "func", formatter.func))
                formatter.func = functools.partial(shown, formatter.func, axis.label)
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _import_matplotlib() -> Any:
    """Import matplotlib whatever MPLBACKEND says.

    A notebook kernel names a backend that need not be installed here, and the import checks it.
    """
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):  # for the caller's own use of pyplot
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def _style(salt: str) -> dict[str, Any]:
    return {
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
        "svg.hashsalt": salt,
        # attack names are text, even if one holds a dollar sign
        "text.parse_math": False,
        "text.color": COLORS["ink"],
        "xtick.color": COLORS["muted"],
        "xtick.major.size": 3,
        "ytick.color": COLORS["muted"],
        "ytick.major.size": 0,
    }


def _inline_svg(text: str) -> str:
    """Make matplotlib's SVG a part of a page: remove its prologue, ids and fixed colors."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # the page names the drawing and sets its size
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1aria-hidden="true"', text, count=1)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text
