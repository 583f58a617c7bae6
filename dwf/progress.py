"""Report how a run goes: a live line, metrics as JSONL and CSV, TensorBoard if installed."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from dwf.checks import CheckpointError
from dwf.files import atomic_write_text, explain

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


class Metrics:
    """Appends rows to a run's metrics.jsonl and metrics.csv, and to TensorBoard's event files.

    Rows that are there already stay if ``keep(row)`` is true. A resumed run drops the others and
    writes them again.
    """

    def __init__(
        self, folder: Path, *, keep: Callable[[dict[str, Any]], bool], tensorboard: bool = True
    ) -> None:
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        kept = [row for row in read_metrics(folder) if keep(row)]
        atomic_write_text(self._jsonl, "".join(json.dumps(row) + "\n" for row in kept))
        header = io.StringIO()
        writer = csv.DictWriter(header, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        atomic_write_text(self._csv, header.getvalue())
        self._board = _tensorboard(folder / "tensorboard") if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; keys are those of COLUMNS, absent ones stay empty."""
        try:
            with open(self._jsonl, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row, allow_nan=False) + "\n")
            with open(self._csv, "a", encoding="utf-8", newline="") as stream:
                csv.DictWriter(stream, COLUMNS).writerow(row)
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
    """All rows of metrics.jsonl; a last line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tensorboard(folder: Path) -> Any:
    """An event writer if TensorBoard is installed (the extra "log"), else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


class LiveLine:
    """A line on a terminal that is written over and over; nothing where there is no terminal."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and not quiet
        self._quiet = quiet
        self._last = 0.0

    def show(self, text: str) -> None:
        """Replace the line, at most four times a second."""
        now = time.monotonic()
        if self._live and now - self._last > 0.25:
            self._last = now
            self._stream.write(f"\r\x1b[2K{text}")
            self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._stream.write(f"\r\x1b[2K{text}\n" if self._live else f"{text}\n")
            self._stream.flush()


def describe(
    phase: str,
    epoch: int,
    num_epochs: int,
    step: int,
    num_steps: int,
    row: dict[str, Any],
    eta_s: float,
) -> str:
    """``joint 3/30 | 210/391 | loss 1.42 | clean 61.2 % | robust 38.0 % | ... | ETA 0:41 | ...``"""
    parts = [f"{phase} {epoch + 1}/{num_epochs}", f"{step + 1}/{num_steps}"]
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.3f}")
    for name in ("clean", "robust"):
        if row.get(f"{name}_accuracy") is not None:
            parts.append(f"{name} {100 * row[f'{name}_accuracy']:.1f} %")
    if row.get("images_per_s"):
        parts.append(f"{row['images_per_s']:,.0f} images/s")
    parts.append(f"ETA {duration(eta_s)}")
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
