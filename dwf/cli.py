"""The command line: ``dwf train | eval | report | compare | data | doctor | export | presets``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 our bug, 2
bad input or configuration, 3 an evaluation that is INVALID, 4 one that is SUSPECT, 75 stopped by a
signal after saving (the same command continues).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwf import data, distributed, doctor, presets
from dwf.attacks.norms import NORMS
from dwf.checks import CheckpointError, ConfigError, DwfError
from dwf.config import Config, DataConfig, EvaluationConfig, apply_overrides, from_dict
from dwf.defenses import WEIGHTS, get, load
from dwf.evaluation import SUITES, evaluate
from dwf.export import SUFFIXES, export_run
from dwf.files import atomic_write_json, read_json, run_lock
from dwf.foreign import load_foreign
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

    verb = verbs.add_parser(
        "eval", help="attack a model and print the table; continues where it was stopped"
    )
    verb.add_argument("folder", type=Path, nargs="?", metavar="RUN")
    verb.add_argument("--suite", choices=SUITES, default="paper", help="which attacks")
    verb.add_argument("--epsilon", type=_radii, help="8/255, or several with commas")
    verb.add_argument("--norm", choices=NORMS, default="linf")
    verb.add_argument("--weights", choices=WEIGHTS, help="of RUN; last by default")
    verb.add_argument("--expert", type=int, help="judge one expert alone")
    verb.add_argument("--images", type=int, help="only the first N test images")
    verb.add_argument("--protocol", choices=("pixels", "paper-compat"))
    verb.add_argument(
        "--model", help="in place of RUN: module:name, file.py:name, a .pt or a .pt2 file"
    )
    verb.add_argument("--data", help="with --model: digits, cifar10, ..., a file, a folder")
    verb.add_argument("--root", help="where data sets lie; DWF_DATA_ROOT by default")
    verb.add_argument("--out", type=Path, help="with --model: folder for results and report")
    verb.add_argument("--eot-samples", type=int, help="passes a gradient, for a random model")
    verb.add_argument("--batch-size", type=int)
    verb.add_argument("--seed", type=int)
    verb.add_argument("--accept-suspect", action="store_true", help="exit with 0 if SUSPECT")
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

    verb = verbs.add_parser(
        "doctor", help="say what this installation can do, and prove that it is right"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--selftest", action="store_true", help="every kernel against plain torch")
    verb.add_argument(
        "--canaries", action="store_true", help="break models on purpose: is each one caught?"
    )
    verb.set_defaults(run=_doctor)

    verb = verbs.add_parser("export", help="write a trained model as one file, and compare logits")
    verb.add_argument("folder", type=Path, metavar="RUN")
    verb.add_argument("--to", required=True, choices=tuple(SUFFIXES))
    verb.add_argument("--out", required=True, type=Path, metavar="FILE")
    verb.add_argument("--weights", choices=WEIGHTS, default="last")
    verb.set_defaults(run=_export)

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
    code = _evaluate(_of_run(folder, config, model, "last"), "paper", argv, live)
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


def _radii(text: str) -> list[float]:
    """8/255,0.05 as numbers."""
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 2/255,8/255") from (
            error
        )


def _eval(options: argparse.Namespace, argv: list[str]) -> int:
    judged = _foreign(options) if options.model is not None else _trained(options)
    changes = {
        "num_images": options.images,
        "eot_samples": options.eot_samples,
        "batch_size": options.batch_size,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    parts = [options.suite, *judged.parts]
    if options.norm != "linf":
        parts.append(options.norm)
    if options.epsilon is not None:
        parts.append("-".join(f"{radius:.4g}" for radius in options.epsilon))
    if options.images is not None:  # beside the table of all images, not over it
        parts.append(f"{options.images}-images")
    judged.model.to(distributed.init(options.device))
    code = _evaluate(
        replace(
            judged,
            settings=replace(judged.settings, **changes),
            seed=judged.seed if options.seed is None else options.seed,
        ),
        "-".join(parts),
        argv,
        LiveLine(quiet=options.quiet),
        suite=options.suite,
        norm=options.norm,
        epsilon=options.epsilon,
    )
    return 0 if code == 4 and options.accept_suspect else code


@dataclass(frozen=True)
class _Judged:
    """A model to be evaluated, and where the results go."""

    model: nn.Module
    title: str
    folder: Path
    data: DataConfig
    settings: EvaluationConfig
    seed: int
    weights: str = "last"
    protocol: str = "pixels"
    clamp: str = "unit"
    parts: tuple[str, ...] = ()  # of the name of the results, beside the suite's


def _trained(options: argparse.Namespace) -> _Judged:
    """A model of a run folder, or one expert of it."""
    for name in ("data", "root", "out"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} goes with --model; a run knows its own")
    if options.folder is None:
        raise ConfigError("dwf eval: name a run folder, or a model with --model")
    weights = options.weights or "last"
    model = load(options.folder, weights)
    config = from_dict(read_json(options.folder / "config.json"))
    judged = _of_run(options.folder, config, model, weights)
    parts = [] if weights == "last" else [weights]
    if options.expert is not None:
        count = model.num_experts if isinstance(model, ExpertModel) else 0
        if not isinstance(model, ExpertModel) or not 0 <= options.expert < count:
            raise ConfigError(f"--expert {options.expert}: this model has {count} experts")
        model = model.expert(options.expert)
        parts.append(f"expert-{options.expert}")
    protocol = options.protocol or config.attack.protocol
    if protocol != config.attack.protocol:
        parts.append(protocol)
    return replace(
        judged,
        model=model,
        title=_describe(config, model, options.expert),
        protocol=protocol,
        parts=tuple(parts),
    )


def _of_run(folder: Path, config: Config, model: nn.Module, weights: str) -> _Judged:
    return _Judged(
        model,
        _describe(config, model, None),
        folder,
        config.data,
        config.evaluation,
        config.seed,
        weights,
        config.attack.protocol,
        config.attack.clamp,
    )


def _foreign(options: argparse.Namespace) -> _Judged:
    """A model that was trained elsewhere."""
    for name in ("folder", "expert", "protocol", "weights"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{'RUN' if name == 'folder' else '--' + name} does not go with --model"
            )
    if options.data is None:
        raise ConfigError("--model needs --data: digits, cifar10, cifar100, svhn, a file, a folder")
    model = load_foreign(options.model)
    folder = options.out or Path("runs") / f"eval-{_slug(options.model)}"
    return _Judged(
        model,
        options.model,
        folder,
        DataConfig(options.data, options.root),
        EvaluationConfig(),
        0,
        weights="as given",
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _evaluate(
    judged: _Judged,
    name: str,
    argv: list[str],
    live: LiveLine,
    *,
    suite: str = "paper",
    norm: str = "linf",
    epsilon: Sequence[float] | None = None,
) -> int:
    """Evaluate on the test split, print the table, store it; the exit code of its verdict."""
    test_set = data.load(judged.data.name, root=judged.data.root, split="test")
    evaluations = judged.folder / "evaluations"
    partial = evaluations / f".{name}.partial.npz"
    about = environment(argv)
    result = evaluate(
        judged.model,
        test_set,
        judged.settings,
        suite=suite,
        norm=norm,
        epsilon=epsilon,
        protocol=judged.protocol,
        clamp=judged.clamp,
        seed=judged.seed,
        partial=None if suite == "paper" else partial,
        progress=live.show,
    )
    result = replace(
        result,
        suite=name,
        run=judged.folder.name,
        weights=judged.weights,
        model=judged.title,
        environment=about,
    )
    with run_lock(judged.folder):
        result.write(evaluations / f"{name}.json")
        partial.unlink(missing_ok=True)
        if not (judged.folder / "config.json").exists():  # trained elsewhere
            facts = {"model": judged.title, "data": asdict(judged.data)}
            atomic_write_json(judged.folder / "config.json", facts)
            atomic_write_json(judged.folder / "environment.json", about)
    live.say(f"evaluated in {duration(result.seconds)}")
    print(result)
    return {"VALID": 0, "SUSPECT": 4, "INVALID": 3}[result.verdict]


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


def _doctor(options: argparse.Namespace, argv: list[str]) -> int:
    live = LiveLine()
    facts = doctor.examination(
        selftest=options.selftest, canaries=options.canaries, progress=live.show
    )
    print(json.dumps(facts, indent=1) if options.json else doctor.render(facts))
    return doctor.exit_code(facts)


def _export(options: argparse.Namespace, argv: list[str]) -> int:
    print(export_run(options.folder, options.out, format=options.to, weights=options.weights))
    return 0


def _presets(options: argparse.Namespace, argv: list[str]) -> int:
    for name, make in presets.table().items():
        config = make()
        network = f"{config.model.network} width {config.model.width}"
        print(f"{name:<28} {config.data.name:<9} {get(config.defense).title}, {network}")
    return 0
