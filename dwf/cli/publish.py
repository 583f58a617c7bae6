"""``dwf publish``: pack a trained model with its numbers, for a hub or a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dwf.defenses import WEIGHTS
from dwf.published import publish


def add_publish(verbs: Any) -> None:
    """Add ``dwf publish`` to the parser's verbs."""
    verb = verbs.add_parser("publish", help="pack a model, its configuration, numbers and a card")
    verb.add_argument("folder", type=Path, metavar="RUN")
    verb.add_argument("--out", required=True, type=Path, metavar="FOLDER or FILE.zip")
    verb.add_argument("--weights", choices=WEIGHTS, help="those that the run reports by default")
    verb.set_defaults(run=_publish)


def _publish(options: argparse.Namespace, argv: list[str]) -> int:
    out = publish(options.folder, options.out, weights=options.weights)
    print(f'{out}: load it with dwf.load("{out}")')
    return 0
