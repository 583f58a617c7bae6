"""Evaluate into a folder: what `dwf eval` leaves there, for library users too.

FOLDER/evaluations/NAME.json     the record
FOLDER/evaluations/NAME.npz      the outcome of each image, example images
FOLDER/evaluations/.NAME.partial.safetensors   outcomes so far, while attacks in turn run
FOLDER/config.json, environment.json           written for a model that was trained elsewhere
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwf import distributed
from dwf.attacks.losses import Model
from dwf.checks import CheckpointError, ConfigError, plain
from dwf.config import EvaluationConfig
from dwf.evaluation.evaluate import evaluate
from dwf.evaluation.result import Evaluation
from dwf.files import atomic_write_json, make_folder, remove_leftovers, require_writable, run_lock

NAME = re.compile(r"\w[\w.+-]*")
# What results may take, with examples and heatmaps of large images.
ROOM = 64 << 20


def evaluate_into(
    folder: Path,
    model: Model,
    dataset: Any,
    settings: EvaluationConfig | None = None,
    *,
    name: str | None = None,
    suite: str = "standard",
    title: str = "model",
    weights: str = "as given",
    data: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a model, and store the result where reports look for it.

    A run that was stopped continues from its partial file when it is called again with the same
    arguments. Results of the same name are replaced. The folder is locked and tried before the
    model is: against training, not against other evaluations. If it cannot take the results in the
    end, they go to the folder for temporary files.

    Args:
        folder: a run folder, or any folder for a model trained elsewhere; made if it is not there.
        name: of the results; :func:`results_name` of the suite, norm and radii by default.
        title: the model, in words.
        weights: which weights of a run these are: "last", "best", "ema", or "as given".
        data: what config.json says of the data set; its name by default.
        environment: versions, hardware and command line, as JSON values.
        options: the other keyword arguments of :func:`dwf.evaluation.evaluate`; with ``shared``
            rank 0 alone writes.
    Raises:
        CheckpointError: before any attack if a process trains into the folder, it is not writable
            or its disk is full; a `NotStored` with the results if that happens meanwhile.
        ModelOutputError, LabelError, ...: as ``evaluate``.
    """
    epsilon, norm = plain(options.get("epsilon")), options.get("norm", "linf")
    name = name or results_name(suite, norm=norm, epsilon=epsilon)
    if not NAME.fullmatch(name):
        raise ConfigError(f"name: {name!r:.80} is not possible, expected a word, as {suite!r}")
    folder = Path(folder)
    evaluations = folder / "evaluations"
    partial = evaluations / f".{name}.partial.safetensors"
    shared = bool(options.get("shared"))
    writes = not shared or distributed.rank() == 0
    with contextlib.ExitStack() as stack:
        if shared:
            stack.enter_context(distributed.naming_lost())
        obstacle = _obstacle(folder, stack) if writes else None
        if shared and distributed.any_process(obstacle is not None) and obstacle is None:
            obstacle = CheckpointError(f"{folder}: rank 0 cannot write there, and says why")
        if obstacle is not None:
            raise obstacle
        result = replace(
            evaluate(
                model,
                dataset,
                settings,
                suite=suite,
                partial=None if suite == "paper" else partial,
                **options,
            ),
            suite=name,
            run=folder.name,
            weights=weights,
            model=title,
            environment=dict(environment or {}),
        )
        if writes:
            _write(result, folder, name, dict(data or {"name": result.data.name}))
            with contextlib.suppress(OSError):  # the results are there; it is replaced next time
                partial.unlink(missing_ok=True)
    return result


def _obstacle(folder: Path, stack: contextlib.ExitStack) -> CheckpointError | None:
    """Lock a folder and try it; what is in the way, if something is."""
    try:
        stack.enter_context(run_lock(folder, shared=True))
        make_folder(folder / "evaluations")
        require_writable(folder / "evaluations", ROOM)
        remove_leftovers(folder / "evaluations")
    except CheckpointError as error:
        return error
    return None


def _write(result: Evaluation, folder: Path, name: str, data: dict[str, Any]) -> None:
    try:
        result.write(folder / "evaluations" / f"{name}.json")
    except CheckpointError as error:
        raise NotStored(result, name, error) from error
    if not (folder / "config.json").exists():  # trained elsewhere
        atomic_write_json(folder / "config.json", {"model": result.model, "data": data})
        atomic_write_json(folder / "environment.json", result.environment)


class NotStored(CheckpointError):
    """The folder could not take the results of an evaluation.

    Attributes:
        result: the results.
        path: where they are instead; None if no other place could take them either.
    """

    def __init__(self, result: Evaluation, name: str, error: CheckpointError) -> None:
        self.result = result
        self.path: Path | None = None
        where = "nor in the folder for temporary files; they are in this error's `result`"
        with contextlib.suppress(OSError):
            place = Path(tempfile.mkdtemp(prefix="dwf-evaluation-")) / f"{name}.json"
            result.write(place)
            self.path = place
            where = (
                f"so they are in {place.parent}; move both files to the folder once it takes them"
            )
        super().__init__(f"{error}; the results could not be stored there, {where}")


def results_name(
    suite: str,
    *,
    parts: Sequence[str] = (),
    norm: str = "linf",
    epsilon: float | Sequence[float] | None = None,
    num_images: int | None = None,
) -> str:
    """A name that tells results from others of the same model: ``standard-l2-0.5-100-images``.

    ``parts`` are words of the caller, such as the weights. ``epsilon`` and ``num_images`` count
    where they differ from the settings of the run.
    """
    words = [suite, *parts]
    if norm != "linf":
        words.append(norm)
    if epsilon is not None:
        radii = [epsilon] if isinstance(epsilon, int | float) else epsilon
        words.append("-".join(f"{radius:.4g}" for radius in radii))
    if num_images is not None:
        words.append(f"{num_images}-images")
    return "-".join(words)
