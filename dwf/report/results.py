"""Read the folder of a run: what was trained, how it was evaluated, what lies beside the tables.

A missing, mistyped or impossible value becomes a CheckpointError that names the file and the key.
What a run may leave out (example images, heatmaps, metrics) becomes None or empty, never an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwf.checks import CheckpointError
from dwf.evaluation.result import Arrays, Evaluation
from dwf.evaluation.suites import SUITES
from dwf.files import parse_json, read_bytes, read_json, require_run
from dwf.typed_json import Count, Fraction, NonNegative, Place, from_json, require_object

log = logging.getLogger("dwf")


@dataclass(frozen=True)
class Examples:
    """G images before and after one attack, with labels and predictions; images [G, C, H, W]."""

    attack: str
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    labels: list[int]
    predictions_clean: list[int]
    predictions_adversarial: list[int]


@dataclass(frozen=True)
class Heatmaps:
    """Grad-CAM of E experts on G images.

    ``maps`` is [E, G, h, w], each map with a sum of 1; ``images`` is [G, C, H, W].
    """

    experts: list[str]
    maps: NDArray[np.float32]
    images: NDArray[np.float32]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """One line of metrics.jsonl; a value that the line does not hold is None."""

    kind: str
    phase: str
    epoch: Count
    step: Count
    global_step: Count
    loss: float | None = None
    clean_accuracy: Fraction | None = None
    robust_accuracy: Fraction | None = None
    learning_rate: float | None = None
    seconds: NonNegative | None = None


@dataclass(frozen=True)
class Results:
    """Everything a report shows.

    ``stem`` names the evaluation's files, ``evaluations/<stem>.json`` and ``.npz``; ``others`` are
    the stems of the evaluations that are not shown.
    """

    run: Path
    stem: str
    others: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    evaluation: Evaluation
    examples: Examples | None
    heatmaps: Heatmaps | None
    metrics: list[MetricsRow]

    @property
    def trained_here(self) -> bool:
        """Whether the folder is that of a training run, not only of an evaluation."""
        return "model" not in self.config or "defense" in self.config


def load_results(run: Path, suite: str | None = None) -> Results:
    """Read and check a run folder.

    ``suite`` defaults to the evaluation that was written last.

    Raises:
        CheckpointError: with the file and key that are missing, damaged or contradict another.
    """
    require_run(run)
    config = _read_object(run / "config.json")
    environment = _read_object(run / "environment.json")
    file, others = _choose_suite(run, suite)
    evaluation = Evaluation.read(file)
    arrays = file.with_suffix(".npz")
    return Results(
        run=run,
        stem=file.stem,
        others=others,
        config=config,
        environment=environment,
        evaluation=evaluation,
        examples=_examples(arrays, evaluation.arrays),
        heatmaps=_heatmaps(arrays, evaluation),
        metrics=load_metrics(run / "metrics.jsonl"),
    )


def load_metrics(file: Path) -> list[MetricsRow]:
    """Read a run's metrics in order of step; none if the file is absent.

    A run that was killed may leave half a last line, and one that resumed repeats steps: the half
    line is dropped, and the last of repeated steps counts. Damaged lines are left out, and a
    warning says so.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    if not file.exists():
        return []
    try:
        *lines, half = read_bytes(file).split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{file}: not readable, {error}") from error
    rows: dict[tuple[int, str, str], MetricsRow] = {}
    faults = []
    for number, line in enumerate([*lines, half], start=1):
        if not line.strip():
            continue
        try:
            place = Place(file, f"line {number}")
            row = from_json(MetricsRow, parse_json(line, file), place)
            rows[row.global_step, row.phase, row.kind] = row
        except CheckpointError as error:
            faults += [f"line {number}: {error}"] * (number <= len(lines))
    if faults:
        log.warning(f"{file}: {len(faults)} damaged lines are left out, first {faults[0]}")
    return sorted(rows.values(), key=lambda row: row.global_step)


def _read_object(file: Path) -> dict[str, Any]:
    return require_object(read_json(file), Place(file))


def _choose_suite(run: Path, suite: str | None) -> tuple[Path, list[str]]:
    """The evaluation's file, and the stems of all others."""
    files = {path.stem: path for path in sorted((run / "evaluations").glob("*.json"))}
    if not files:
        raise CheckpointError(f"{run}: no evaluations/*.json; run `dwf eval {run}` first")
    if suite is None:
        # the newest; the paper's grid, which cannot doubt itself, where there is nothing else
        suite = max(
            files, key=lambda n: (not n.startswith("paper"), files[n].stat().st_mtime_ns, n)
        )
    if suite not in files:
        raise CheckpointError(
            f"{run / 'evaluations'}: no suite {suite!r}, expected one of {list(files)}"
            + (f"; run `dwf eval {run} --suite {suite}` to make it" if suite in SUITES else "")
        )
    return files[suite], [name for name in files if name != suite]


def _examples(file: Path, arrays: Arrays) -> Examples | None:
    """Example images among the arrays of an evaluation."""
    images = ["example_clean", "example_adversarial"]
    integers = ["example_labels", "example_predictions_clean", "example_predictions_adversarial"]
    names = ["example_attack", *images, *integers]
    if not any(name in arrays for name in names) or len(arrays.get(images[0], [0])) == 0:
        return None
    for name in names:
        _require(file, arrays, name)
    shape = arrays[images[0]].shape
    for name in images:
        _require_images(file, arrays, name, expected=str(list(shape)))
        if arrays[name].shape != shape:
            raise _error(file, arrays, name, f"finite images {list(shape)}")
    for name in integers:
        _require_integers(file, arrays, name, count=shape[0])
    return Examples(
        attack=str(arrays["example_attack"]),
        clean=arrays["example_clean"].astype(np.float32),
        adversarial=arrays["example_adversarial"].astype(np.float32),
        labels=arrays["example_labels"].tolist(),
        predictions_clean=arrays["example_predictions_clean"].tolist(),
        predictions_adversarial=arrays["example_predictions_adversarial"].tolist(),
    )


def _heatmaps(file: Path, evaluation: Evaluation) -> Heatmaps | None:
    """Heatmaps of the experts: their names are in the table, their maps beside it."""
    arrays = evaluation.arrays
    names = ["cam_maps", "cam_images", "cam_labels"]
    if not any(name in arrays for name in names):
        return None
    for name in names:
        _require(file, arrays, name)
    experts = evaluation.traces.experts if evaluation.traces else []
    maps, images, labels = (arrays[name] for name in names)
    count = [len(experts), len(images)]
    if maps.ndim != 4 or list(maps.shape[:2]) != count or not np.isfinite(maps).all():
        raise _error(file, arrays, "cam_maps", f"finite maps {[*count, 'h', 'w']}")
    _require_images(file, arrays, "cam_images", expected="[G, C, H, W]")
    _require_integers(file, arrays, "cam_labels", count=len(images))
    return Heatmaps(
        experts=experts,
        maps=maps.astype(np.float32),
        images=images.astype(np.float32),
        labels=labels.tolist(),
    )


def _require(file: Path, arrays: Arrays, name: str) -> None:
    if name not in arrays:
        raise CheckpointError(f"{file}: {name}: missing, expected an array")


def _require_images(file: Path, arrays: Arrays, name: str, expected: str) -> None:
    if arrays[name].ndim != 4 or not np.isfinite(arrays[name]).all():
        raise _error(file, arrays, name, f"finite images {expected}")


def _require_integers(file: Path, arrays: Arrays, name: str, count: int) -> None:
    if arrays[name].shape != (count,) or arrays[name].dtype.kind not in "iu":
        raise _error(file, arrays, name, f"{count} integers")


def _error(file: Path, arrays: Arrays, name: str, expected: str) -> CheckpointError:
    array = arrays[name]
    found = f"{array.dtype} {list(array.shape)}"
    return CheckpointError(f"{file}: {name}: expected {expected}, found {found}")
