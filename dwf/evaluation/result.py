"""The result of an evaluation: the stored record, and the outcome of each image."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwf.checks import CheckpointError
from dwf.evaluation.record import AttackRow, EvaluationRecord, GivenUp, WorstCase, score
from dwf.evaluation.suites import AttackSpec
from dwf.evaluation.table import format_table, html_table
from dwf.files import (
    atomic_write_bytes,
    atomic_write_json,
    make_folder,
    read_bytes,
    read_json,
    sha256,
)
from dwf.typed_json import NOT_IN_JSON, Place, require_object

log = logging.getLogger("dwf")

Arrays = dict[str, NDArray[Any]]
# Outcomes and examples take megabytes; a small archive that holds more is none of ours.
MAX_ARRAYS = 1 << 32


@dataclass
class Row:
    """One attack's outcome while it is being measured; :meth:`record` is what is kept of it.

    ``correct`` is [N] bool: what the attack left, in turn what stands after it. The counts are
    those of :class:`dwf.evaluation.record.AttackRow`. ``num_over_budget`` counts attacked pixels
    outside the ball, ``num_disagree`` images whose search and verdict differ.
    """

    spec: AttackSpec
    correct: Tensor
    num_non_finite: int = 0
    seconds: float = 0.0
    num_forwards: int = 0
    num_backwards: int = 0
    same_as: str | None = None
    num_attacked: int | None = None
    num_over_budget: int = 0
    num_disagree: int = 0
    broken_by: dict[str, int] = field(default_factory=dict)
    given_up: GivenUp | None = None

    def record(self) -> AttackRow:
        """The line of the table."""
        return AttackRow(
            name=self.spec.name,
            kind=self.spec.kind,
            epsilon=self.spec.epsilon,
            step_size=self.spec.step_size,
            num_steps=self.spec.num_steps,
            num_restarts=self.spec.num_restarts,
            random_start=self.spec.random_start,
            eot_samples=self.spec.eot_samples,
            norm=self.spec.norm,
            stream=self.spec.stream,
            num_non_finite=self.num_non_finite,
            seconds=round(self.seconds, 3),
            num_forwards=self.num_forwards,
            num_backwards=self.num_backwards,
            same_as=self.same_as,
            num_attacked=self.num_attacked,
            broken_by=self.broken_by,
            given_up=self.given_up,
            correct=self.correct,
            **score(self.correct),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation(EvaluationRecord):
    """A table of results. ``print(evaluation)`` shows it, ``write`` stores it, ``read`` reads it.

    ``arrays`` is what lies beside the JSON: ``correct`` [A, N] bool, the outcome of each image
    under each attack; ``sample_index`` [N], their places in the data set; example images, and
    what diagnostics and traces were computed from.
    """

    arrays: Arrays = field(default_factory=dict, compare=False, metadata=NOT_IN_JSON)

    @property
    def clean_accuracy(self) -> float:
        """Accuracy without an attack."""
        return self.attacks[0].accuracy

    @property
    def robust_accuracy(self) -> float:
        """Worst case per image over all attacks within epsilon; the headline."""
        return self.worst_case.accuracy

    def write(self, path: Path) -> None:
        """Write the table as JSON and the arrays beside it as .npz, with a hash of both.

        Raises:
            CheckpointError: the folder is not writable.
        """
        make_folder(path.parent)
        stream = io.BytesIO()
        np.savez_compressed(stream, **self.arrays)  # type: ignore[arg-type]
        data, table = stream.getvalue(), self.to_json()
        hashes = {"table": _hash_of(table), "arrays": hashlib.sha256(data).hexdigest()}
        atomic_write_bytes(path.with_suffix(".npz"), data)
        atomic_write_json(path, {**table, "sha256": hashes})

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read what :meth:`write` wrote; without the .npz there are no arrays.

        Raises:
            CheckpointError: with the file and key that are missing, damaged, contradict another, or
                were changed since the evaluation; files of dwf 0.1 have no hashes to see that by.
        """
        value = require_object(read_json(path), Place(path))
        found = cls.from_json(value, path)
        arrays = read_arrays(path.with_suffix(".npz"))
        _check_hashes(value, path)
        if "correct" not in arrays:
            return replace(found, arrays=arrays)
        _check_outcomes(found, arrays["correct"], path)
        attacks = [
            replace(row, correct=torch.from_numpy(outcomes))
            for row, outcomes in zip(found.attacks, arrays["correct"], strict=True)
        ]
        return replace(found, attacks=attacks, arrays=arrays)

    def __str__(self) -> str:
        return format_table(self)

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.suite!r}, {self.model} on {self.data.name}, n = {self.num_images}, "
            f"clean {100 * self.clean_accuracy:.2f} %, robust {100 * self.robust_accuracy:.2f} % "
            f"at {self.norm} {self.epsilon:.4g}, {self.verdict})"
        )

    def _repr_html_(self) -> str:
        return html_table(self)


def _hash_of(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _check_hashes(value: dict[str, Any], path: Path) -> None:
    """Require that table and arrays are those that were written, where their hashes are known."""
    if "sha256" not in value:
        log.warning(f"{path}: holds no sha256, so whether it was changed cannot be seen")
        return
    hashes, file = value["sha256"], path.with_suffix(".npz")
    table = {name: part for name, part in value.items() if name != "sha256"}
    found = {"table": _hash_of(table)}
    if file.exists():
        found["arrays"] = sha256(file)
    for name, part in found.items():
        if not isinstance(hashes, dict) or hashes.get(name) != part:
            changed = path if name == "table" else file
            raise CheckpointError(
                f"{changed}: changed since it was written, its sha256 is not the one in "
                f"{path.name}; evaluate again"
            )


def worst_case(rows: Sequence[Row], epsilon: float) -> WorstCase:
    """The images that every one of ``rows`` left correct; ``epsilon`` is their largest radius."""
    correct = torch.stack([row.correct for row in rows]).all(dim=0)
    return WorstCase(epsilon=epsilon, attacks=[row.spec.name for row in rows], **score(correct))


def read_arrays(file: Path) -> Arrays:
    """The arrays of an .npz file; none if the file is absent.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not file.exists():
        return {}
    try:
        data = read_bytes(file)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_ARRAYS:
                raise ValueError(f"more than {MAX_ARRAYS:,} bytes")
        # from memory, because np.load leaves a damaged file open
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # which ones parsers raise on random bytes has no list
        reason = error or type(error).__name__
        raise CheckpointError(f"{file}: not a readable .npz file, {reason}") from error


def _check_outcomes(evaluation: EvaluationRecord, correct: NDArray[Any], path: Path) -> None:
    """Require that the outcomes of the images add up to the counts of the table."""
    file = path.with_suffix(".npz")
    expected = (len(evaluation.attacks), evaluation.num_images)
    if correct.dtype != np.bool_ or correct.shape != expected:
        found = f"{correct.dtype} {list(correct.shape)}"
        raise CheckpointError(f"{file}: correct: expected bool {list(expected)}, found {found}")
    for row, outcomes in zip(evaluation.attacks, correct, strict=True):
        if int(outcomes.sum()) != row.num_correct:
            raise CheckpointError(
                f"{file}: correct: {int(outcomes.sum())} images for {row.name!r}, "
                f"but {path.name} says num_correct {row.num_correct}"
            )
