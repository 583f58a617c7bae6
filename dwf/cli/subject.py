"""Find the model that a command is about: of a run folder, or trained elsewhere."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dwf import distributed
from dwf.checks import ConfigError
from dwf.config import Config, DataConfig, EvaluationConfig, from_dict
from dwf.defenses import WEIGHTS, get, load
from dwf.evaluation import wilson_interval
from dwf.files import read_json
from dwf.foreign import load_foreign
from dwf.models import ExpertModel
from dwf.progress import read_metrics


@dataclass(frozen=True)
class Subject:
    """A model, its data and settings, and the folder of its results.

    ``expected_clean`` is the lower end of the 95 % interval of what validation measured.
    ``parts`` become parts of the name of a result, beside the suite's: ("ema", "expert-1").
    """

    model: nn.Module
    title: str
    folder: Path
    data: DataConfig
    settings: EvaluationConfig
    seed: int
    weights: str = "last"
    protocol: str = "pixels"
    clamp: str = "unit"
    expected_clean: float | None = None
    parts: tuple[str, ...] = ()


def add_subject(verb: argparse.ArgumentParser) -> None:
    """Add the options that name a model, its data and the part of them to use."""
    verb.add_argument("folder", type=Path, nargs="?", metavar="RUN")
    verb.add_argument("--weights", choices=WEIGHTS, help="of RUN; as configured by default")
    verb.add_argument("--expert", type=int, help="one expert alone, counted from 0")
    verb.add_argument(
        "--model", help="in place of RUN: module:name, file.py:name, a .pt or a .pt2 file"
    )
    verb.add_argument("--data", help="with --model: digits, cifar10, ..., a file, a folder")
    verb.add_argument("--root", help="where data sets lie; DWF_DATA_ROOT by default")
    verb.add_argument("--images", type=int, help="only the first N test images")
    verb.add_argument("--batch-size", type=int)
    verb.add_argument("--seed", type=int)
    verb.add_argument("--device", default="auto")
    verb.add_argument("--quiet", action="store_true")


def find_subject(options: argparse.Namespace) -> Subject:
    """Load the model that the options name, on the device that they name.

    Raises:
        ConfigError: options that contradict each other, or name nothing.
        CheckpointError, DataError: files that are missing or damaged.
    """
    subject = _foreign(options) if options.model is not None else _trained(options)
    changes = {"num_images": options.images, "batch_size": options.batch_size}
    changes = {key: value for key, value in changes.items() if value is not None}
    subject.model.to(distributed.init(options.device))
    return replace(
        subject,
        settings=replace(subject.settings, **changes),
        seed=subject.seed if options.seed is None else options.seed,
    )


def subject_named(name: str, options: argparse.Namespace) -> Subject:
    """The model of a run folder, or one trained elsewhere, as ``--model`` would name it.

    Args:
        options: ``data`` and ``root`` of a model trained elsewhere, and ``device``.
    Raises:
        As :func:`find_subject`.
    """
    folder = Path(name) if Path(name).is_dir() else None
    of_model = ("data", "root") if folder is None else ()
    parts = {key: getattr(options, key) if key in of_model else None for key in ("data", "root")}
    whole = argparse.Namespace(
        folder=folder, model=None if folder else name, weights=None, expert=None, **parts
    )
    subject = _foreign(whole) if folder is None else _trained(whole)
    subject.model.to(distributed.init(options.device))
    return subject


def find_sources(names: Sequence[str], device: str) -> dict[str, nn.Module]:
    """Models by name: of run folders, or as ``--model`` takes them, in eval mode on the device."""
    found: dict[str, nn.Module] = {}
    for name in names:
        folder = Path(name)
        trained = (folder / "config.json").exists()
        model = load(folder) if trained else load_foreign(name)
        found[folder.name if trained else name] = model.to(distributed.init(device)).eval()
    return found


def validated_clean(folder: Path) -> float | None:
    """The lower end of the 95 % interval of the clean accuracy that the last validation measured.

    None where a run was never validated.
    """
    rows = [row for row in read_metrics(folder) if row.get("kind") == "validation"]
    if not rows or not {"clean_accuracy", "num_images"} <= rows[-1].keys():
        return None
    num_images = int(rows[-1]["num_images"])
    return wilson_interval(round(float(rows[-1]["clean_accuracy"]) * num_images), num_images)[0]


def subject_of_run(folder: Path, config: Config, model: nn.Module) -> Subject:
    """A model with the data and settings of the run that trained it."""
    return Subject(
        model=model,
        title=_title(config, model),
        folder=folder,
        data=config.data,
        settings=config.evaluation,
        seed=config.seed,
        weights=config.weights,
        parts=() if config.weights == "last" else (config.weights,),
        protocol=config.attack.protocol,
        clamp=config.attack.clamp,
    )


def _trained(options: argparse.Namespace) -> Subject:
    for name in ("data", "root"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} goes with --model; a run knows its own")
    if options.folder is None:
        raise ConfigError("name a run folder, or a model with --model")
    model = load(options.folder, options.weights)
    config = from_dict(read_json(options.folder / "config.json"))
    weights = options.weights or config.weights
    subject = replace(subject_of_run(options.folder, config, model), weights=weights)
    if weights == "last" and options.expert is None:
        subject = replace(subject, expected_clean=validated_clean(options.folder))
    parts = [] if weights == "last" else [weights]
    if options.expert is not None:
        count = model.num_experts if isinstance(model, ExpertModel) else 0
        if not isinstance(model, ExpertModel) or not 0 <= options.expert < count:
            raise ConfigError(f"--expert {options.expert}: this model has {count} experts")
        model = model.expert(options.expert)
        parts.append(f"expert-{options.expert}")
    return replace(
        subject, model=model, title=_title(config, model, options.expert), parts=tuple(parts)
    )


def _foreign(options: argparse.Namespace) -> Subject:
    for name in ("folder", "expert", "weights"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{'RUN' if name == 'folder' else '--' + name} does not go with --model"
            )
    if options.data is None:
        raise ConfigError("--model needs --data: digits, cifar10, cifar100, svhn, a file, a folder")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", options.model).strip("-")
    return Subject(
        model=load_foreign(options.model),
        title=options.model,
        folder=Path("runs") / f"eval-{slug}",
        data=DataConfig(options.data, options.root),
        settings=EvaluationConfig(),
        seed=0,
        weights="as given",
    )


def _title(config: Config, model: nn.Module, expert: int | None = None) -> str:
    network = f"{config.model.network} width {config.model.width}"
    title = get(config.defense).title
    if isinstance(model, ExpertModel):
        return f"{title}, {model.num_experts} x {network}"
    return f"{title}{'' if expert is None else f', expert {expert} alone'}, {network}"
