"""``dwf export``: write a trained model as one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dwf.defenses import WEIGHTS
from dwf.export import SUFFIXES, export_run


def add_export(verbs: Any) -> None:
    """Add ``dwf export`` to the parser's verbs."""
    verb = verbs.add_parser("export", help="write a trained model as one file, and compare logits")
    verb.add_argument("folder", type=Path, metavar="RUN")
    verb.add_argument("--to", required=True, choices=tuple(SUFFIXES))
    verb.add_argument("--out", required=True, type=Path, metavar="FILE")
    verb.add_argument("--weights", choices=WEIGHTS, help="those that the run reports by default")
    verb.set_defaults(run=_export)


def _export(options: argparse.Namespace, argv: list[str]) -> int:
    print(export_run(options.folder, options.out, format=options.to, weights=options.weights))
    return 0
