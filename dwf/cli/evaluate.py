"""``dwf eval``: attack a model with a suite of attacks, and print and store its table."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from dwf import data, distributed
from dwf.attacks.norms import NORMS
from dwf.checks import ConfigError, DwfError
from dwf.cli.subject import Subject, add_subject, find_sources, find_subject
from dwf.data import ImageDataset
from dwf.evaluation import SUITES, Evaluation, NotStored, evaluate_into, results_name
from dwf.evaluation.for_ci import write_for_ci
from dwf.progress import LiveLine, duration
from dwf.training import environment

# 0: no sign of an overestimate was seen, however little was tried
EXIT_CODES = {"VALID": 0, "UNPROVEN": 0, "SUSPECT": 4, "INVALID": 3}


def add_eval(verbs: Any) -> None:
    """Add ``dwf eval`` to the parser's verbs."""
    verb = verbs.add_parser(
        "eval", help="attack a model and print the table; continues where it was stopped"
    )
    add_subject(verb)
    verb.add_argument(
        "--suite", choices=SUITES, help="which attacks; standard by default, paper for the grid"
    )
    verb.add_argument("--epsilon", type=radii, help="8/255, or several with commas")
    verb.add_argument("--norm", choices=NORMS, default="linf")
    verb.add_argument("--protocol", choices=("pixels", "paper-compat"))
    verb.add_argument("--eot-samples", type=int, help="passes a gradient, for a random model")
    verb.add_argument("--out", type=Path, help="with --model: folder for results and report")
    verb.add_argument(
        "--expected-clean",
        type=float,
        help="clean accuracy that is known, as 0.94; less is a finding",
    )
    verb.add_argument(
        "--sources",
        nargs="+",
        metavar="RUN",
        help="run folders, or models as --model takes them: images made on each are tried",
    )
    verb.add_argument(
        "--certify",
        type=float,
        metavar="SIGMA",
        help="certify the model smoothed by noise of this deviation, a thousand passes an image",
    )
    verb.add_argument("--sarif", type=Path, metavar="FILE", help="findings for code scanning")
    verb.add_argument("--junit", type=Path, metavar="FILE", help="findings as tests, for CI")
    verb.add_argument("--accept-suspect", action="store_true", help="exit with 0 if SUSPECT")
    verb.set_defaults(run=_eval)


def radii(text: str) -> list[float]:
    """Numbers from text: ``8/255,0.05``."""
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 2/255,8/255") from (
            error
        )


def radius(text: str) -> float:
    """One number from text: ``8/255``."""
    found = radii(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one number like 8/255")
    return found[0]


def _eval(options: argparse.Namespace, argv: list[str]) -> int:
    if options.model is None and options.out is not None:
        raise ConfigError("--out goes with --model; the results of a run go into its folder")
    if options.model is not None and options.protocol is not None:
        raise ConfigError("--protocol does not go with --model")
    subject = find_subject(options)
    if options.out is not None:
        subject = replace(subject, folder=options.out)
    if options.eot_samples is not None:
        settings = replace(subject.settings, eot_samples=options.eot_samples)
        subject = replace(subject, settings=settings)
    if options.protocol not in (None, subject.protocol):
        subject = replace(
            subject, protocol=options.protocol, parts=(*subject.parts, options.protocol)
        )
    # only the paper's grid attacks normalized images
    suite = options.suite or ("standard" if subject.protocol == "pixels" else "paper")
    sources = find_sources(options.sources or (), options.device)
    rank = distributed.rank()
    if suite == "paper" and rank > 0:
        return 0  # the grid is rank 0's
    code = evaluate_and_print(
        subject,
        suite,
        argv,
        LiveLine(quiet=options.quiet or rank > 0),
        # the table of a few images beside that of all, not over it
        name=results_name(
            suite,
            parts=subject.parts,
            norm=options.norm,
            epsilon=options.epsilon,
            num_images=options.images,
        ),
        norm=options.norm,
        epsilon=options.epsilon,
        shared=suite != "paper" and distributed.world_size() > 1,
        expected_clean=options.expected_clean,
        sources=sources,
        certify=options.certify,
        files={"sarif": options.sarif, "junit": options.junit},
    )
    return 0 if code == EXIT_CODES["SUSPECT"] and options.accept_suspect else code


def evaluate_and_print(
    subject: Subject,
    suite: str,
    argv: list[str],
    live: LiveLine,
    *,
    name: str | None = None,
    norm: str = "linf",
    epsilon: Sequence[float] | None = None,
    shared: bool = False,
    expected_clean: float | None = None,
    sources: Mapping[str, nn.Module] | None = None,
    certify: float | None = None,
    files: Mapping[str, Path | None] | None = None,
) -> int:
    """Evaluate on the test split, store and print the table; the exit code of its verdict.

    With ``shared`` all processes of a torchrun come here, and rank 0 stores and prints. ``files``
    are written for other tools: "sarif" and "junit". By default the clean accuracy that is expected
    is the validation's of the run.
    """
    if expected_clean is None:
        expected_clean = subject.expected_clean
    try:
        options: dict[str, Any] = {"norm": norm, "epsilon": epsilon, "shared": shared}
        options |= {"expected_clean": expected_clean, "sources": sources}
        options["certify"] = certify
        options["training_data"] = _training_data(subject)
        result = _evaluated(subject, suite, argv, live, name, options)
    except NotStored as error:
        live.clear()
        print(error.result)  # hours of attacks
        raise
    if shared and distributed.rank() > 0:
        return 0
    live.say(f"evaluated in {duration(result.seconds)}")
    print(result)
    for kind, path in (files or {}).items():
        if path is not None:
            write_for_ci(result, kind, path)
    return EXIT_CODES[result.verdict]


def _evaluated(
    subject: Subject,
    suite: str,
    argv: list[str],
    live: LiveLine,
    name: str | None,
    options: dict[str, Any],
) -> Evaluation:
    return evaluate_into(
        subject.folder,
        subject.model,
        data.load(subject.data.name, root=subject.data.root, split="test"),
        subject.settings,
        name=name,
        suite=suite,
        title=subject.title,
        weights=subject.weights,
        data=asdict(subject.data),
        environment=environment(argv),
        protocol=subject.protocol,
        clamp=subject.clamp,
        seed=subject.seed,
        progress=_first_line_stays(live),
        **options,
    )


def _training_data(subject: Subject) -> ImageDataset | None:
    """The training split of the subject's data, if it is there and not a folder to be decoded."""
    if Path(subject.data.name).expanduser().is_dir():
        return None
    try:
        return data.load(subject.data.name, root=subject.data.root, split="train")
    except DwfError:
        return None


def _first_line_stays(live: LiveLine) -> Callable[[str], None]:
    """Progress whose first line stays, because it says how long the suite takes."""
    lines = itertools.count()
    return lambda line: live.show(line) if next(lines) else live.say(line)
