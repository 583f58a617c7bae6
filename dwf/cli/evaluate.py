"""``dwf eval``: attack a model with a suite of attacks, and print and store its table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from dwf import data
from dwf.attacks.norms import NORMS
from dwf.checks import ConfigError
from dwf.cli.subject import Subject, add_subject, find_subject
from dwf.evaluation import SUITES, evaluate, format_table
from dwf.files import atomic_write_json, run_lock
from dwf.progress import LiveLine, duration
from dwf.training import environment

EXIT_CODES = {"VALID": 0, "SUSPECT": 4, "INVALID": 3}


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
    parts = list(subject.parts)
    if options.protocol not in (None, subject.protocol):
        subject = replace(subject, protocol=options.protocol)
        parts.append(options.protocol)
    # attacks on normalized images are in the paper's grid alone
    suite = options.suite or ("standard" if subject.protocol == "pixels" else "paper")
    if options.norm != "linf":
        parts.append(options.norm)
    if options.epsilon is not None:
        parts.append("-".join(f"{radius:.4g}" for radius in options.epsilon))
    if options.images is not None:  # beside the table of all images, not over it
        parts.append(f"{options.images}-images")
    code = evaluate_and_store(
        subject,
        "-".join([suite, *parts]),
        argv,
        LiveLine(quiet=options.quiet),
        suite=suite,
        norm=options.norm,
        epsilon=options.epsilon,
    )
    return 0 if code == EXIT_CODES["SUSPECT"] and options.accept_suspect else code


def evaluate_and_store(
    subject: Subject,
    name: str,
    argv: list[str],
    live: LiveLine,
    *,
    suite: str,
    norm: str = "linf",
    epsilon: Sequence[float] | None = None,
) -> int:
    """Evaluate on the test split, print the table, store it; the exit code of its verdict."""
    test_set = data.load(subject.data.name, root=subject.data.root, split="test")
    evaluations = subject.folder / "evaluations"
    partial = evaluations / f".{name}.partial.npz"
    about = environment(argv)
    result = evaluate(
        subject.model,
        test_set,
        subject.settings,
        suite=suite,
        norm=norm,
        epsilon=epsilon,
        protocol=subject.protocol,
        clamp=subject.clamp,
        seed=subject.seed,
        partial=None if suite == "paper" else partial,
        progress=live.show,
    )
    result.facts |= {
        "suite": name,
        "run": subject.folder.name,
        "weights": subject.weights,
        "model": subject.title,
        "environment": about,
    }
    with run_lock(subject.folder):
        result.write(evaluations / f"{name}.json")
        partial.unlink(missing_ok=True)
        if not (subject.folder / "config.json").exists():  # trained elsewhere
            facts = {"model": subject.title, "data": asdict(subject.data)}
            atomic_write_json(subject.folder / "config.json", facts)
            atomic_write_json(subject.folder / "environment.json", about)
    live.say(f"evaluated in {duration(result.facts['seconds'])}")
    print(format_table(result.to_dict()))
    return EXIT_CODES[result.verdict]
