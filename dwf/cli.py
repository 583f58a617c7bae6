"""The command line: ``dwf train | eval | report | compare | data | presets``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 our bug, 2
bad input or configuration, 3 an evaluation that is INVALID, 4 one that is SUSPECT, 75 stopped by a
signal after saving (the same command continues).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwf import data, distributed, presets
from dwf.checks import CheckpointError, ConfigError, DwfError
from dwf.config import Config, apply_overrides, from_dict
from dwf.defenses import WEIGHTS, get, load
from dwf.evaluation import evaluate, format_table
from dwf.files import read_json, run_lock
from dwf.models import ExpertModel
from dwf.progress import LiveLine, duration
from dwf.report import format_comparison, load_comparison, write_comparison, write_report
from dwf.training import Stopped, environment, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        return int(options.run(options, ["dwf", *arguments]) or 0)
    except Stopped as stopped:
        print(f"dwf: {stopped}", file=sys.stderr)
        return 75
    except DwfError as error:
        print(f"dwf: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            "dwf: interrupted; the same command continues from the last checkpoint", file=sys.stderr
        )
        return 130
    finally:
        distributed.shutdown()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on positionals once an option stood between them
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(late) < len(rest) or (late and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dwf", description="Adversarial training of mixture-of-experts image classifiers."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

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
    verb.add_argument("--quiet", action="store_true")
    verb.set_defaults(run=_train)

    verb = verbs.add_parser("eval", help="attack a trained model and print the table")
    verb.add_argument("folder", type=Path, metavar="RUN")
    verb.add_argument("--weights", choices=WEIGHTS, default="last")
    verb.add_argument("--expert", type=int, help="judge one expert alone")
    verb.add_argument("--images", type=int, help="only the first N test images")
    verb.add_argument("--protocol", choices=("pixels", "paper-compat"))
    verb.add_argument("--device", default="auto")
    verb.add_argument("--quiet", action="store_true")
    verb.set_defaults(run=_eval)

    verb = verbs.add_parser("report", help="write report.html from what the run folder holds")
    verb.add_argument("folder", type=Path, metavar="RUN")
    verb.add_argument("--suite", help="evaluation to show; the newest by default")
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("compare", help="one table of several evaluated runs, and its page")
    verb.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    verb.add_argument("--out", type=Path, default=Path("comparison"), help="folder; ./comparison")
    verb.add_argument("--suite", default="paper", help="evaluation to compare")
    verb.set_defaults(run=_compare)

    verb = verbs.add_parser("data", help="list, download or check data sets")
    verb.add_argument("action", choices=("list", "get", "check"))
    verb.add_argument("name", nargs="?", help="digits, cifar10, cifar100, svhn, a file, a folder")
    verb.add_argument("--root", help="where data sets lie; DWF_DATA_ROOT by default")
    verb.set_defaults(run=_data)

    verb = verbs.add_parser("presets", help="list the presets")
    verb.set_defaults(run=_presets)
    return parser


def _train(options: argparse.Namespace, argv: list[str]) -> int:
    config = _config(options)
    if options.print_config:
        print(json.dumps(config.to_dict(), indent=1))
        return 0
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    folder = options.out or Path("runs") / f"{config.preset}-seed{config.seed}"
    live = LiveLine(quiet=options.quiet)
    model = train(config, folder, argv=argv, quiet=options.quiet)
    if options.no_eval or distributed.rank() > 0:
        return 0
    code = _evaluate(folder, config, model, "last", config.attack.protocol, "paper", argv, live)
    path = write_report(folder)
    print(f"\nreport: {path}")
    # the run did what it was asked to: a doubtful table is the business of `dwf eval`
    return 3 if code == 3 else 0


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
    return apply_overrides(config, overrides)


def _eval(options: argparse.Namespace, argv: list[str]) -> int:
    model = load(options.folder, options.weights)
    config = from_dict(read_json(options.folder / "config.json"))
    if options.images is not None:
        config = replace(config, evaluation=replace(config.evaluation, num_images=options.images))
    parts = ["paper"]
    if options.weights != "last":
        parts.append(options.weights)
    if options.expert is not None:
        count = model.num_experts if isinstance(model, ExpertModel) else 0
        if not isinstance(model, ExpertModel) or not 0 <= options.expert < count:
            raise ConfigError(f"--expert {options.expert}: this model has {count} experts")
        model = model.expert(options.expert)
        parts.append(f"expert-{options.expert}")
    protocol = options.protocol or config.attack.protocol
    if protocol != config.attack.protocol:
        parts.append(protocol)
    model.to(distributed.init(options.device))
    if options.images is not None:  # beside the table of all images, not over it
        parts.append(f"{options.images}-images")
    live = LiveLine(quiet=options.quiet)
    return _evaluate(
        options.folder,
        config,
        model,
        options.weights,
        protocol,
        "-".join(parts),
        argv,
        live,
        expert=options.expert,
    )


def _evaluate(
    folder: Path,
    config: Config,
    model: nn.Module,
    weights: str,
    protocol: str,
    suite: str,
    argv: list[str],
    live: LiveLine,
    expert: int | None = None,
) -> int:
    """Evaluate on the test split, print the table, store it; the exit code of its findings."""
    test_set = data.load(config.data.name, root=config.data.root, split="test")
    result = evaluate(
        model,
        test_set,
        config.evaluation,
        protocol=protocol,
        clamp=config.attack.clamp,
        seed=config.seed,
        progress=live.show,
    )
    result.facts |= {
        "suite": suite,
        "run": folder.name,
        "weights": weights,
        "model": _describe(config, model, expert),
        "environment": environment(argv),
    }
    with run_lock(folder):
        result.write(folder / "evaluations" / f"{suite}.json")
    live.say(f"evaluated in {duration(result.facts['seconds'])}")
    print(format_table(result.to_dict()))
    severities = {finding["severity"] for finding in result.findings}
    return 3 if "invalid" in severities else 4 if "suspect" in severities else 0


def _describe(config: Config, model: nn.Module, expert: int | None) -> str:
    network = f"{config.model.network} width {config.model.width}"
    title = get(config.defense).title
    if isinstance(model, ExpertModel):
        return f"{title}, {model.num_experts} x {network}"
    return f"{title}{'' if expert is None else f', expert {expert} alone'}, {network}"


def _report(options: argparse.Namespace, argv: list[str]) -> int:
    print(write_report(options.folder, options.suite))
    return 0


def _compare(options: argparse.Namespace, argv: list[str]) -> int:
    comparison = load_comparison(options.folders, options.suite)
    path = write_comparison(comparison, options.out)
    print(format_comparison(comparison))
    print(f"page: {path}", file=sys.stderr)
    return 0


def _data(options: argparse.Namespace, argv: list[str]) -> int:
    if options.action == "list":
        lines: Any = data.listing(options.root)
    elif options.name is None:
        raise ConfigError(f"dwf data {options.action}: name a data set")
    elif options.action == "get":
        live = LiveLine()

        def progress(file: str, size: int, total: int | None) -> None:
            whole = "" if total is None else f" of {total / 1e6:,.1f}"
            live.show(f"{file}: {size / 1e6:,.1f}{whole} MB")

        lines = data.get(options.name, options.root, progress=progress)
    else:
        lines = data.check(options.name, options.root)
    print("\n".join(lines) if isinstance(lines, (list, tuple)) else lines)
    return 0


def _presets(options: argparse.Namespace, argv: list[str]) -> int:
    for name, make in presets.table().items():
        config = make()
        network = f"{config.model.network} width {config.model.width}"
        print(f"{name:<28} {config.data.name:<9} {get(config.defense).title}, {network}")
    return 0
