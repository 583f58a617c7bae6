"""Report how a run goes: a live line, metrics as JSONL and CSV, TensorBoard if installed."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from dwf.checks import CheckpointError
from dwf.files import atomic_write_text, explain, parse_json, read_bytes, safe_cell

log = logging.getLogger("dwf")

COLUMNS = (
    "kind",
    "phase",
    "phase_index",
    "epoch",
    "step",
    "global_step",
    "loss",
    "clean_accuracy",
    "robust_accuracy",
    "learning_rate",
    "num_images",
    "images_per_s",
    "seconds",
    "message",
)

# Every row has these, and the words "kind" and "phase".
COUNTS = ("phase_index", "epoch", "step", "global_step")


class Metrics:
    """Appends rows to a run's metrics.jsonl and metrics.csv, and to TensorBoard's event files.

    Rows that are there already stay if ``keep(row)`` is true. A resumed run drops the others and
    writes them again. Damaged lines move to metrics.damaged, and a warning says so.
    """

    def __init__(
        self, folder: Path, *, keep: Callable[[dict[str, Any]], bool], tensorboard: bool = True
    ) -> None:
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        rows, damaged = _read(self._jsonl)
        if damaged:
            _keep_aside(folder / "metrics.damaged", damaged)
        kept = [row for row in rows if keep(row)]
        atomic_write_text(self._jsonl, "".join(json.dumps(row) + "\n" for row in kept))
        header = io.StringIO()
        writer = csv.DictWriter(header, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_cells, kept))
        atomic_write_text(self._csv, header.getvalue())
        self._board = _tensorboard(folder / "tensorboard") if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; keys are those of COLUMNS, absent ones stay empty."""
        try:
            with open(self._jsonl, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row, allow_nan=False) + "\n")
            with open(self._csv, "a", encoding="utf-8", newline="") as stream:
                csv.DictWriter(stream, COLUMNS).writerow(_cells(row))
        except OSError as error:
            raise CheckpointError(
                f"{self._jsonl}: could not be written, {explain(error, self._jsonl)}"
            ) from error
        if self._board is not None:
            for key in ("loss", "clean_accuracy", "robust_accuracy", "learning_rate"):
                if row.get(key) is not None:
                    self._board.add_scalar(f"{row['kind']}/{key}", row[key], row["global_step"])

    def close(self) -> None:
        """Close TensorBoard's event file."""
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl; damaged lines are left out, and a last one cut off by a crash.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    return _read(folder / "metrics.jsonl")[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The rows of a file, and the lines that are none; half a line at the end is neither."""
    try:
        *lines, half = read_bytes(path).split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise CheckpointError(f"{path}: not readable, {error}") from error
    rows, damaged = [], []
    for line in lines:
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line:
            damaged.append(line)
    last = _row(half)  # whole, if only its newline is missing
    return rows if last is None else [*rows, last], damaged


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, if each value is of its column's type."""
    try:
        row = parse_json(line, Path("metrics.jsonl"))
    except CheckpointError:
        return None
    if not isinstance(row, dict) or not row.keys() <= set(COLUMNS):
        return None
    right = all(isinstance(row.get(name), str) for name in ("kind", "phase"))
    right &= all(_is_count(row.get(name)) for name in COUNTS)
    numbers = row.keys() - {"kind", "phase", "message", *COUNTS}
    right &= all(row[name] is None or _is_number(row[name]) for name in numbers)
    return row if right and isinstance(row.get("message") or "", str) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300  # type: ignore[arg-type]


def _keep_aside(path: Path, lines: list[bytes]) -> None:
    """Append damaged lines to a file of their own, and say so."""
    log.warning(f"{path.with_suffix('.jsonl')}: {len(lines)} damaged lines, now in {path.name}")
    try:
        with open(path, "ab") as stream:
            stream.write(b"".join(line + b"\n" for line in lines))
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written, {explain(error, path)}") from error


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {name: safe_cell(value) for name, value in row.items()}


def _tensorboard(folder: Path) -> Any:
    """An event writer if TensorBoard is installed (the extra "log"), else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written, {explain(error, folder)}") from (
            error
        )


class LiveLine:
    """A line on a terminal that is written over and over; nothing where there is no terminal."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        # a dumb terminal, as an editor's, writes escape sequences as they are
        self._live = self._stream.isatty() and not quiet and os.environ.get("TERM") != "dumb"
        self._quiet = quiet
        self._last = 0.0

    def show(self, text: str) -> None:
        """Replace the line, at most four times a second."""
        now = time.monotonic()
        if self._live and now - self._last > 0.25:
            self._last = now
            # a line that wraps could not be taken back
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[2K{text[: max(width, 1)]}")
            self._stream.flush()

    def clear(self) -> None:
        """Take the line back, before something else is printed on the same terminal."""
        if self._live and self._last:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._stream.write(f"\r\x1b[2K{text}\n" if self._live else f"{text}\n")
            self._stream.flush()


def describe(
    phase: str,
    place: tuple[int, int],
    epoch: int,
    num_epochs: int,
    step: int,
    num_steps: int,
    row: dict[str, Any],
    eta_s: float,
) -> str:
    """``phase 2 of 10: joint 3/30 | ETA 0:41 | 210/391 | loss 1.42 | clean 61.2 % | ...``.

    What matters most comes first: a narrow terminal shows no more.

    Args:
        place: the number of the phase, counted from 0, and how many there are.
        eta_s: seconds until the last phase ends.
    """
    parts = [
        f"phase {place[0] + 1} of {place[1]}: {phase} {epoch + 1}/{num_epochs}",
        f"ETA {duration(eta_s)}",
        f"{step + 1}/{num_steps}",
    ]
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.3f}")
    for name in ("clean", "robust"):
        if row.get(f"{name}_accuracy") is not None:
            parts.append(f"{name} {100 * row[f'{name}_accuracy']:.1f} %")
    if row.get("images_per_s"):
        parts.append(f"{row['images_per_s']:,.0f} images/s")
    parts.append(f"{memory_gib():.1f} GiB")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def memory_gib() -> float:
    """Memory in use: the GPU's peak if there is one, else this process's peak."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
