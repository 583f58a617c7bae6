"""``dwf data`` and ``dwf doctor``: data sets on this machine, and what it can compute."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from dwf import data, doctor
from dwf.checks import ConfigError
from dwf.progress import LiveLine


def add_data(verbs: Any) -> None:
    """Add ``dwf data`` to the parser's verbs."""
    verb = verbs.add_parser("data", help="list, download or check data sets")
    verb.add_argument("action", choices=("list", "get", "check"))
    verb.add_argument("name", nargs="?", help="digits, cifar10, cifar100, svhn, a file, a folder")
    verb.add_argument("--root", help="where data sets lie; DWF_DATA_ROOT by default")
    verb.set_defaults(run=_data)


def _data(options: argparse.Namespace, argv: list[str]) -> int:
    live = LiveLine()
    if options.action == "list":
        lines = data.listing(options.root)
    elif options.name is None:
        raise ConfigError(f"dwf data {options.action}: name a data set")
    elif options.action == "get":
        lines = data.get(options.name, options.root, progress=partial(_show_download, live))
    else:
        lines = data.check(options.name, options.root)
    live.clear()
    print("\n".join(lines))
    return 0


def _show_download(live: LiveLine, file: str, size: int, total: int | None) -> None:
    whole = "" if total is None else f" of {total / 1e6:,.1f}"
    live.show(f"{file}: {size / 1e6:,.1f}{whole} MB")


def add_doctor(verbs: Any) -> None:
    """Add ``dwf doctor`` to the parser's verbs."""
    verb = verbs.add_parser(
        "doctor", help="say what this installation can do, and prove that it is right"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--selftest", action="store_true", help="every kernel against plain torch")
    verb.add_argument(
        "--canaries", action="store_true", help="break models on purpose: is each one caught?"
    )
    verb.add_argument(
        "--zoo",
        nargs="*",
        metavar="NAME",
        help="judge broken models of published mechanisms, and honest ones: an hour for all",
    )
    verb.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, argv: list[str]) -> int:
    live = LiveLine()
    facts = doctor.examination(
        selftest=options.selftest,
        canaries=options.canaries,
        zoo=options.zoo,
        progress=live.show,
    )
    live.clear()
    print(json.dumps(facts, indent=1) if options.json else doctor.render(facts))
    return doctor.exit_code(facts)
