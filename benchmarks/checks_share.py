"""What the checks of an evaluation cost beside its attacks: `python benchmarks/checks_share.py`.

Judges small models by suite `standard` and appends a row for each: seconds of the attacks, and of
every check as a share of them, in CPU time: other processes do not count. The aim is 15 % in all.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import rows
import torch

import dwf
from dwf.config import EvaluationConfig
from dwf.data import load
from dwf.evaluation import questions, sequence
from dwf.evaluation.zoo import EPSILON, HONEST_ZOO

evaluate = import_module("dwf.evaluation.evaluate")  # the package's name is the function
NUM_IMAGES = 100
MODELS = ("adversarial 1", "adversarial, depthwise", "soft mixture", "routed mixture")
ATTACKS = "attacks"
TIMED: tuple[tuple[Any, str, str], ...] = (
    (sequence, "attack_in_turn", ATTACKS),
    (sequence, "contracts", "contracts"),
    (questions, "doubts", "doubts"),
    (questions, "behaviour", "behaviour"),
    (questions, "fall_again", "views again"),
    (questions, "attack_harder", "harder attacks"),
    (evaluate, "trusted", "plan against autograd"),
    (evaluate, "certificates", "bounds"),
    (evaluate, "diagnose", "diagnostics"),
    (evaluate, "trace", "traces"),
)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each of `TIMED` inside the block."""
    spent: dict[str, float] = defaultdict(float)

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - started

        return call

    patches = [
        mock.patch.object(module, name, watched(getattr(module, name), title))
        for module, name, title in TIMED
    ]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    """Append a row for each model."""
    digits = load("digits", split="test").subset(torch.arange(NUM_IMAGES))
    settings = EvaluationConfig(epsilon=EPSILON, step_size=EPSILON / 5)
    for name in MODELS:
        model = HONEST_ZOO[name].make()
        with timed() as spent:
            result = dwf.evaluate(model, digits, settings, suite="standard")
        shares = {key: seconds / spent[ATTACKS] for key, seconds in spent.items() if key != ATTACKS}
        row = {
            "bench": "checks_share",
            "case": name,
            "num_images": NUM_IMAGES,
            "suite": "standard",
            "attack_seconds": round(spent[ATTACKS], 2),
            "shares": {key: round(share, 4) for key, share in shares.items()},
            "share": round(sum(shares.values()), 4),
            "robust": result.robust_accuracy,
            "verdict": result.verdict,
        }
        rows.append(row, torch.device("cpu"))
        print(row, flush=True)


if __name__ == "__main__":
    main()
