"""Open the folder of a run, save checkpoints into it, and resume from the last one.

    config.json  environment.json  metrics.{jsonl,csv}  checkpoints/

Only one process at a time writes a folder, and only with the configuration that made it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from dwf import checkpoint, distributed
from dwf.checks import CheckpointError
from dwf.config import Config, from_dict
from dwf.files import atomic_write_json, make_folder, read_json, remove_leftovers, run_lock
from dwf.training.average import WeightAverage
from dwf.training.environment import environment
from dwf.training.run import Position, Run, TrainingError
from dwf.typed_json import Between, Count, Place, from_json

log = logging.getLogger("dwf")


@dataclass(frozen=True)
class SavedPosition:
    """A `Position` in a file: only what older versions did not have may be missing."""

    phase_index: Count
    step: Count
    global_step: Count
    best: float
    num_phases: Annotated[int, Between(1)]
    best_average: float = -1.0
    num_stale: Count = 0


@dataclass(frozen=True)
class SavedState:
    """What state.json holds for a resume; see `Run`."""

    progress: SavedPosition
    unwritten: dict[str, list[list[Any]]]
    ema_updates: Count

    def check(self, place: Place) -> None:
        """Raise unless each step has the six numbers that a row of metrics sums."""
        for name, steps in self.unwritten.items():
            for i, step in enumerate(steps):
                here = place.at("unwritten").at(name).at(i)
                here.require_length(step, 6)
                # integers stay integers: a checkpoint is written again to the same bits
                if not all(type(number) in (int, float) and abs(number) < 1e300 for number in step):
                    raise here.error("finite numbers", step)


@contextlib.contextmanager
def opened(folder: Path, config: Config, argv: list[str]) -> Iterator[None]:
    """Hold the lock of a run folder that is new, or belongs to this configuration.

    Raises:
        CheckpointError: the folder is in use, of another configuration, or no run folder.
    """
    _check_owner(folder, config)
    with run_lock(folder):
        _check_owner(folder, config)  # again, because another process may have been quicker
        if not (folder / "config.json").exists():
            atomic_write_json(folder / "config.json", config.to_dict())
        if not (folder / "environment.json").exists():
            atomic_write_json(folder / "environment.json", environment(argv))
        make_folder(folder / "checkpoints")
        remove_leftovers(folder)
        remove_leftovers(folder / "checkpoints")
        yield


def resume(run: Run) -> checkpoint.Tensors | None:
    """Bring a run to where its last checkpoint stands; return the optimizers' state.

    Without a checkpoint the run stays at its beginning, and None is returned. If the last one is
    damaged, an older one makes the same bits again, and a warning says so.

    Raises:
        CheckpointError: no checkpoint is undamaged, or the last one is of another model.
    """
    begun = (run.checkpoints / "last.json").exists() or checkpoint.checkpoints(run.checkpoints)
    if not begun:
        return None
    path, tensors, state, damage = checkpoint.load_newest(run.checkpoints)
    if damage:
        log.warning(f"{damage}; going on from {path.name}")
    where = Place(path / "state.json")
    saved = from_json(SavedState, state, where)
    if saved.progress.phase_index > len(run.phases):
        raise (
            where.at("progress")
            .at("phase_index")
            .error(f"at most {len(run.phases)}", saved.progress.phase_index)
        )
    checkpoint.load_weights(run.model, tensors["model"], path / "model.safetensors")
    run.at = Position(**vars(saved.progress))
    run.unwritten = saved.unwritten
    if "ema" in tensors:
        run.average = WeightAverage(run.model, run.config)
        run.average.load(tensors["ema"], saved.ema_updates, path / "ema.safetensors")
    run.live.say(f"resuming from {path.name}")
    return tensors.get("optimizer")


def save(run: Run, optimizer: checkpoint.Tensors | None, *pointers: str) -> None:
    """Write a checkpoint of this moment, and let ``last`` and other pointers name it.

    Args:
        optimizer: the optimizers' state; None at the end of a stage.
    Raises:
        TrainingError: a weight is not finite; nothing is written.
        CheckpointError: the folder cannot be written.
    """
    floats = {k: v for k, v in run.model.state_dict().items() if v.is_floating_point()}
    if floats and not bool(torch.stack([v.isfinite().all() for v in floats.values()]).all()):
        name = next(k for k, v in floats.items() if not bool(v.isfinite().all()))
        raise TrainingError(
            f"{name} is not finite after step {run.at.global_step}; lower the learning rate; "
            "the last checkpoint stands"
        )
    if distributed.rank() > 0:
        return
    tensors = {"model": dict(run.model.state_dict())}
    if optimizer is not None:
        tensors["optimizer"] = optimizer
    if run.average is not None:
        tensors["ema"] = run.average.state()
    state = {
        "progress": vars(run.at).copy(),
        # sorted, because a resumed run fills it in another order
        "unwritten": dict(sorted(run.unwritten.items())),
        "ema_updates": run.average.num_updates if run.average else 0,
        "facts": vars(run.facts),
    }
    name = checkpoint.save(run.checkpoints, run.at.global_step, tensors, state)
    for pointer in (*pointers, "last"):
        checkpoint.point(run.checkpoints, pointer, name)
    checkpoint.prune(run.checkpoints)


def report_weights(run: Run) -> None:
    """Put the weights that the configuration reports into the model of a finished run.

    Raises:
        CheckpointError: they cannot be read.
    """
    weights = run.config.weights
    if weights != "last":
        pointer, stem = checkpoint.place_of(weights)
        path = checkpoint.resolve(run.checkpoints, pointer)
        tensors, _ = checkpoint.load(path)
        checkpoint.load_weights(run.model, tensors[stem], path / f"{stem}.safetensors")


def _check_owner(folder: Path, config: Config) -> None:
    path = folder / "config.json"
    if path.exists():
        # settings that are younger than the run had their defaults
        differences = _differences(from_dict(read_json(path)).to_dict(), config.to_dict())
        if differences:
            raise CheckpointError(
                f"{folder}: holds a run of another configuration ({'; '.join(differences[:3])}); "
                "choose another folder, or repeat the command that made it"
            )
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise CheckpointError(f"{folder}: not empty and not a run folder; choose another")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]
