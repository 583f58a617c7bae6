"""``dwf report`` and ``dwf compare``: HTML pages from run folders."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from dwf.report import format_comparison, load_comparison, write_comparison, write_report


def add_report(verbs: Any) -> None:
    """Add ``dwf report`` to the parser's verbs."""
    verb = verbs.add_parser("report", help="write report.html from what the run folder holds")
    verb.add_argument("folder", type=Path, metavar="RUN")
    verb.add_argument(
        "--suite", help="evaluation to show; by default the newest that is not the grid"
    )
    verb.set_defaults(run=_report)


def _report(options: argparse.Namespace, argv: list[str]) -> int:
    print(write_report(options.folder, options.suite))
    return 0


def add_compare(verbs: Any) -> None:
    """Add ``dwf compare`` to the parser's verbs."""
    verb = verbs.add_parser("compare", help="one table of several evaluated runs, and its page")
    verb.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    verb.add_argument("--out", type=Path, default=Path("comparison"), help="folder; ./comparison")
    verb.add_argument("--suite", default="paper", help="evaluation to compare; paper by default")
    verb.set_defaults(run=_compare)


def _compare(options: argparse.Namespace, argv: list[str]) -> int:
    comparison = load_comparison(options.folders, options.suite)
    path = write_comparison(comparison, options.out)
    # whole in a file, for a document; on a terminal a line that wraps could not be read
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(format_comparison(comparison, width))
    print(f"page: {path}", file=sys.stderr)
    return 0
