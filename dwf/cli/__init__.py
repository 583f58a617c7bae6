"""The command line: ``dwf train | eval | attack | report | compare | data | doctor | bench | ...``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 our bug, 2
bad input or configuration, 3 an evaluation that is INVALID, 4 one that is SUSPECT, 75 stopped by a
signal after saving (the same command continues).

A command is one file here, or two short ones share a file. Each adds its arguments to the parser
and names the function that runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dwf import distributed
from dwf.checks import DwfError
from dwf.cli import (
    attack,
    bench,
    evaluate,
    export,
    machine,
    publish,
    report,
    train,
    transfer,
)
from dwf.progress import LiveLine
from dwf.training import Stopped, environment
from dwf.version import DISTRIBUTION, __version__
from moe_kernels import native


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        return int(options.run(options, ["dwf", *arguments]) or 0)
    except Stopped as stopped:
        LiveLine().say(f"dwf: {stopped}")  # over the live line that stopped
        return 75
    except DwfError as error:
        LiveLine().say(f"dwf: {type(error).__name__}: {error}")
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        LiveLine().say("dwf: interrupted; the same command continues from the last checkpoint")
        return 130
    finally:
        distributed.shutdown()


class _Version(argparse.Action):
    """Print which dwf this is: there are other packages of that name."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """Version, distribution, folder, commit and kernels of this dwf."""
    facts = environment([])
    installed = facts["versions"][DISTRIBUTION]
    how = f"installed as {DISTRIBUTION} {installed}" if installed else "not installed"
    commit = (facts["commit"] or "unknown")[:12] + (", changed" if facts["dirty"] else "")
    story = native.build_story()
    kernels = native.missing or (story["line"] if story else "compiled")
    return (
        f"dwf {__version__} ({how}; from {Path(__file__).resolve().parents[2]}; commit {commit}; "
        f"kernels: {kernels})"
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run`` to its function, ``parser`` to its parser."""
    parser = argparse.ArgumentParser(
        prog="dwf", description="Adversarial training of mixture-of-experts image classifiers."
    )
    parser.add_argument("--version", action=_Version, help="say which dwf this is, and stop")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    train.add_train(verbs)
    evaluate.add_eval(verbs)
    attack.add_attack(verbs)
    transfer.add_transfer(verbs)
    report.add_report(verbs)
    report.add_compare(verbs)
    machine.add_data(verbs)
    machine.add_doctor(verbs)
    bench.add_bench(verbs)
    export.add_export(verbs)
    publish.add_publish(verbs)
    train.add_presets(verbs)
    for verb in verbs.choices.values():  # so that a mistake is answered by its verb's usage
        verb.set_defaults(parser=verb)
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on positionals once an option stood between them
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(late) < len(rest) or (late and "overrides" not in options):
        settings = "; settings are key=value, as seed=1" if "overrides" in options else ""
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}{settings}")
    if late:
        options.overrides += late
    return options
