"""``dwf transfer``: attack each of several models, and show its images to all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dwf import data
from dwf.attacks import transfer
from dwf.checks import ConfigError
from dwf.cli.attack import ATTACKS, epsilon_of, read_settings
from dwf.cli.evaluate import radius
from dwf.cli.subject import subject_named
from dwf.data.batches import to_unit_range
from dwf.models import planned

# Test images unless --images says otherwise: every model is attacked, and asked about all images.
IMAGES = 200


def add_transfer(verbs: Any) -> None:
    """Add ``dwf transfer`` to the parser's verbs."""
    verb = verbs.add_parser(
        "transfer", help="attack each of several models, and show its images to all of them"
    )
    verb.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run folders, models as for --model of eval, files of saved images; settings of the "
        "attack as key=value",
    )
    verb.add_argument("--attack", choices=tuple(ATTACKS), default="apgd", help="apgd by default")
    verb.add_argument("--epsilon", type=radius, help="8/255; that of the first run by default")
    verb.add_argument("--data", help="digits, cifar10, ..., a file, a folder; a run knows its own")
    verb.add_argument("--root", help="where data sets lie; DWF_DATA_ROOT by default")
    verb.add_argument("--images", type=int, default=IMAGES, help=f"{IMAGES} by default")
    verb.add_argument("--batch-size", type=int, default=250)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", default="auto")
    verb.set_defaults(run=_transfer, overrides=[])


def _transfer(options: argparse.Namespace, argv: list[str]) -> int:
    kind = ATTACKS[options.attack]
    names = [text for text in options.sources if "=" not in text]
    overrides = [text for text in options.sources if "=" in text] + options.overrides
    settings = read_settings(kind, overrides)
    files = {name: Path(name) for name in names if name.endswith(".safetensors")}
    subjects = {name: subject_named(name, options) for name in names if name not in files}
    if not subjects:
        raise ConfigError("name a run folder or a model: somebody has to answer")
    known = {subject.data.name: subject for subject in subjects.values()}
    if len(known) > 1:
        raise ConfigError(f"the models are of different data sets, {' and '.join(sorted(known))}")
    first = next(iter(subjects.values()))
    dataset = data.load(first.data.name, root=first.data.root, split="test")
    dataset = dataset.subset(torch.arange(min(options.images, len(dataset))))
    models = {name: planned(subject.model) for name, subject in subjects.items()}
    print(
        transfer(
            {name: files.get(name) or models[name] for name in names},
            to_unit_range(dataset.images),
            dataset.labels,
            judges=models,
            attack=kind,
            batch_size=options.batch_size,
            seed=options.seed,
            **settings,
            **epsilon_of(kind, settings, options.epsilon, first),
        )
    )
    return 0
