"""Time a whole evaluation beside the original AutoAttack: CPU seconds, and the images broken.

    git clone https://github.com/fra31/auto-attack
    python benchmarks/suite_time.py RUN ... --autoattack auto-attack --images 200

Ours is `dwf.evaluate` by suite `standard`: contracts, attacks, doubts, traces and bounds. The
original attacks one half of the images before it and the other half after it, so that clocks and
neighbors hurt both. A row says what share of ours are no attacks of the suite, and after how many
seconds of attacks the headline stayed what it is. Appends to results/suite_<hardware>_<date>.jsonl;
exit code 1 if ours leaves an image more than the original, beyond the bounds of
`compare_autoattack.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from compare_autoattack import agreement
from rows import append, refuse_unbuilt
from torch import Tensor, nn

import dwf
from dwf.attacks.table import ATTACKS
from dwf.config import EvaluationConfig, from_dict
from dwf.data.batches import to_unit_range
from dwf.files import read_json

BATCH_SIZE = 250
NOT_AN_ATTACK = ("noise", "rays")  # as rows of the suite these are doubts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--autoattack", type=Path, required=True, help="a clone of its repository")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--weights", default="last")
    parser.add_argument("--no-plan", action="store_true", help="inside a module that has no plan")
    options = parser.parse_args()
    sys.path.insert(0, str(options.autoattack))
    from autoattack import AutoAttack

    device = torch.device("cpu")
    refuse_unbuilt(device)
    within_bounds = True
    for run in options.runs:
        row = measure(run, AutoAttack, options)
        append(row, device)
        print(json.dumps(row, indent=1), flush=True)
        within_bounds &= row["within_bounds"]
    return 0 if within_bounds else 1


def measure(run: Path, make: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one run; ``make`` is the original's class."""
    model: nn.Module = dwf.load(run, options.weights).eval()
    if options.no_plan:
        model = Guarded(model).eval()
    config = from_dict(read_json(run / "config.json"))
    test_set = dwf.data.load(config.data.name, root=config.data.root, split="test")
    images = to_unit_range(test_set.images[: options.images])
    labels, epsilon = test_set.labels[: options.images], config.evaluation.epsilon

    def original(part: slice) -> Tensor:
        x, y = images[part], labels[part]
        adversary = make(model, norm="Linf", eps=epsilon, seed=0, device="cpu", verbose=False)
        found = adversary.run_standard_evaluation(x, y, bs=BATCH_SIZE)
        with torch.no_grad():
            return torch.cat([model(some).argmax(dim=1) for some in found.split(BATCH_SIZE)]) == y

    def ours() -> dwf.Evaluation:
        settings = EvaluationConfig(batch_size=BATCH_SIZE)
        return dwf.evaluate(model, (images, labels), settings, suite="standard", epsilon=epsilon)

    half = len(images) // 2
    first, before = timed(lambda: original(slice(half)))
    began = time.perf_counter()
    result, own = timed(ours)
    whole = time.perf_counter() - began
    second, after = timed(lambda: original(slice(half, None)))
    return {
        "bench": "suite",
        "case": f"{run.name}{' without plan' if options.no_plan else ''}",
        "network": f"{config.model.network} width {config.model.width}",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "epsilon": epsilon,
        "cpu_seconds": {"autoattack": round(before + after, 1), "ours": round(own, 1)},
        "ratio": round(own / (before + after), 3),
        **describe(result, torch.cat([first, second]), whole),
    }


class Guarded(nn.Module):
    """A network behind a check of its images; no plan can read it, tracing ends at the ``if``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        if bool(images.isnan().any()):
            raise ValueError("images hold NaN")
        logits: Tensor = self.network(images)
        return logits


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the CPU seconds of all its threads."""
    started = time.process_time()
    found = function()
    return found, time.process_time() - started


def describe(result: dwf.Evaluation, theirs: Tensor, whole: float) -> dict[str, Any]:
    """What both left, and where our ``whole`` seconds went."""
    ours = torch.from_numpy(result.arrays["correct"]).all(dim=0)
    seconds, stable = 0.0, 0.0
    suite = [x for x in result.attacks if x.kind in ATTACKS and x.kind not in NOT_AN_ATTACK]
    for row_before, row in pairwise([result.attacks[0], *suite]):
        seconds += row.seconds
        if row.accuracy < row_before.accuracy:
            stable = seconds
    return {
        **agreement(ours, theirs),
        "attack_path": result.attack_path,
        "verdict": result.verdict,
        "seconds": {"ours": round(whole, 1), "attacks": round(seconds, 1)},
        "questions_share": round(1 - seconds / whole, 3),
        "stable_after_share": round(stable / whole, 3),
        "attacks": {
            x.name: {
                "seconds": round(x.seconds, 1),
                "num_forwards": x.num_forwards,
                "num_backwards": x.num_backwards,
                "num_attacked": x.num_attacked,
            }
            for x in suite
        },
    }


if __name__ == "__main__":
    sys.exit(main())
