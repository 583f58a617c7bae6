"""``dwf train`` and ``dwf presets``: train a configuration, evaluate it, write its report."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dwf import distributed, presets
from dwf.checks import CheckpointError, ConfigError
from dwf.cli.evaluate import EXIT_CODES, evaluate_and_print
from dwf.cli.subject import subject_of_run
from dwf.config import Config, apply_overrides, from_dict
from dwf.defenses import get
from dwf.files import read_json
from dwf.progress import LiveLine
from dwf.report import write_report
from dwf.training import train


def add_train(verbs: Any) -> None:
    """Add ``dwf train`` to the parser's verbs."""
    verb = verbs.add_parser(
        "train", help="train a preset, evaluate it, write its report; continues a stopped run"
    )
    verb.add_argument("preset", nargs="?", help="see `dwf presets`")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="joint.num_epochs=30 ...")
    verb.add_argument("--out", type=Path, help="run folder; runs/PRESET-seedN by default")
    verb.add_argument("--config", type=Path, help="a config.json instead of a preset")
    verb.add_argument("--print-config", action="store_true", help="print the JSON and stop")
    verb.add_argument("--deterministic", action="store_true", help="deterministic torch kernels")
    verb.add_argument("--no-eval", action="store_true", help="stop after training")
    verb.add_argument("--seed", type=int, help="as seed=N")
    verb.add_argument("--device", help="as device=cpu")
    verb.add_argument("--root", help="where data sets lie, as data.root=FOLDER")
    verb.add_argument("--quiet", action="store_true")
    verb.set_defaults(run=_train)


# Test images of the suite "quick" after training: a verdict in minutes; `dwf eval` takes them all.
QUICK_IMAGES = 100


def _train(options: argparse.Namespace, argv: list[str]) -> int:
    config = _config(options)
    if options.print_config:
        print(json.dumps(config.to_dict(), indent=1))
        return 0
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    folder = options.out or Path("runs") / f"{config.preset}-seed{config.seed}"
    live = LiveLine(quiet=options.quiet or distributed.rank() > 0)
    live.say(f"run folder: {folder}")
    model = train(config, folder, argv=argv, quiet=options.quiet)
    if options.no_eval:
        return 0
    subject = subject_of_run(folder, config, model)
    verdict = None
    # the grid cannot doubt itself, so the verdict is that of the quick suite where there is one
    if subject.protocol == "pixels":  # only the paper's grid attacks normalized images
        settings = subject.settings
        num_images = min(settings.num_images or QUICK_IMAGES, QUICK_IMAGES)
        first = replace(subject, settings=replace(settings, num_images=num_images))
        shared = distributed.world_size() > 1
        verdict = evaluate_and_print(first, "quick", argv, live, shared=shared)
    if distributed.rank() > 0:
        return 0  # the grid is rank 0's
    print()
    grid = evaluate_and_print(subject, "paper", argv, live)
    code = grid if verdict is None else verdict
    print(f"\nreport: {write_report(folder)}")
    # the run did what it was asked to: a doubtful table is the business of `dwf eval`
    return code if code == EXIT_CODES["INVALID"] else 0


def _config(options: argparse.Namespace) -> Config:
    overrides = list(options.overrides)
    if options.config is not None:
        if options.preset is not None:
            overrides.insert(0, options.preset)
        try:
            config = from_dict(read_json(options.config))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
    elif options.preset is None:
        raise ConfigError("name a preset (see `dwf presets`) or give --config FILE")
    else:
        config = presets.find(options.preset)
    # the flags of the other commands, as settings
    flags = {"seed": options.seed, "device": options.device, "data.root": options.root}
    overrides += [f"{key}={value}" for key, value in flags.items() if value is not None]
    return apply_overrides(config, overrides)


def add_presets(verbs: Any) -> None:
    """Add ``dwf presets`` to the parser's verbs."""
    verb = verbs.add_parser("presets", help="list the presets, by data and how long they take")
    verb.add_argument(
        "group", nargs="?", choices=tuple(presets.SIZES), metavar="DATA", help="only these"
    )
    verb.set_defaults(run=_presets)


def _presets(options: argparse.Namespace, argv: list[str]) -> int:
    groups = presets.groups()
    for group in [options.group] if options.group else groups:
        print(f"{group}: {presets.SIZES[group]}")
        for config in groups[group]:
            network = f"{config.model.network} width {config.model.width}"
            print(f"  {config.preset:<34} {get(config.defense).title}, {network}")
        print()
    print("`dwf train digits` is short for dwf_digits; key=value changes a setting")
    return 0
