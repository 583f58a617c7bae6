"""Evaluate into a folder: what `dwf eval` leaves there, for library users too.

FOLDER/evaluations/NAME.json     the record
FOLDER/evaluations/NAME.npz      the outcome of each image, example images
FOLDER/evaluations/.NAME.partial.safetensors   outcomes so far, while attacks in turn run
FOLDER/config.json, environment.json           written for a model that was trained elsewhere
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwf.attacks.losses import Model
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset
from dwf.evaluation.evaluate import evaluate
from dwf.evaluation.result import Evaluation
from dwf.files import atomic_write_json, run_lock


def evaluate_into(
    folder: Path,
    model: Model,
    dataset: ImageDataset,
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
    arguments. Results of the same name are replaced.

    Args:
        folder: a run folder, or any folder for a model trained elsewhere; made if it is not there.
        name: of the results; :func:`results_name` of the suite, norm and radii by default.
        title: the model, in words.
        weights: which weights of a run these are: "last", "best", "ema", or "as given".
        data: what config.json says of the data set; its name by default.
        environment: versions, hardware and command line, as JSON values.
        options: the other keyword arguments of :func:`dwf.evaluation.evaluate`.
    Raises:
        CheckpointError: another process writes to the folder, or it is not writable.
        ModelOutputError, LabelError, ...: as ``evaluate``.
    """
    epsilon, norm = options.get("epsilon"), options.get("norm", "linf")
    name = name or results_name(suite, norm=norm, epsilon=epsilon)
    evaluations = Path(folder) / "evaluations"
    partial = evaluations / f".{name}.partial.safetensors"
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
        run=Path(folder).name,
        weights=weights,
        model=title,
        environment=dict(environment or {}),
    )
    with run_lock(Path(folder)):
        result.write(evaluations / f"{name}.json")
        partial.unlink(missing_ok=True)
        if not (Path(folder) / "config.json").exists():  # trained elsewhere
            facts = {"model": title, "data": dict(data or {"name": dataset.name})}
            atomic_write_json(Path(folder) / "config.json", facts)
            atomic_write_json(Path(folder) / "environment.json", result.environment)
    return result


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
        radii = epsilon if isinstance(epsilon, Sequence) else [epsilon]
        words.append("-".join(f"{radius:.4g}" for radius in radii))
    if num_images is not None:
        words.append(f"{num_images}-images")
    return "-".join(words)
