"""Compare our standard suite with the original AutoAttack: numbers, images, seconds.

    git clone https://github.com/fra31/auto-attack
    python benchmarks/compare_autoattack.py RUN ... --autoattack auto-attack --images 200

The original is not part of this project and not installed with it. For each run: robust accuracy by
both, the share of images on which they agree, the images that only one of them broke, and the time.
Each model is attacked by both in turn, with the same batch size and threads; which goes first
changes from model to model. Appends a row per model to results/autoattack_<hardware>_<date>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows import append, refuse_unbuilt
from torch import Tensor, nn

import dwf
from dwf import compat
from dwf.config import from_dict
from dwf.data.batches import to_unit_range
from dwf.files import read_json

MOST_ABOVE, LEAST_AGREEMENT = 0.002, 0.995


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--autoattack", type=Path, required=True, help="a clone of its repository")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--expert", type=int, help="attack this expert of a mixture alone")
    parser.add_argument("--weights", default="last")
    options = parser.parse_args()
    sys.path.insert(0, str(options.autoattack))
    from autoattack import AutoAttack

    device = torch.device("cpu")
    refuse_unbuilt(device)
    within_bounds = True
    for number, run in enumerate(options.runs):
        model = dwf.load(run, options.weights)
        if options.expert is not None:
            model = model.expert(options.expert)  # type: ignore[operator]
        config = from_dict(read_json(run / "config.json"))
        test_set = dwf.data.load(config.data.name, root=config.data.root, split="test")
        images = to_unit_range(test_set.images[: options.images])
        labels = test_set.labels[: options.images]
        model, epsilon, size = model.eval(), config.evaluation.epsilon, options.batch_size
        contenders = {"autoattack": AutoAttack, "ours": compat.AutoAttack}
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        found = {
            name: judge(contenders[name], model, images, labels, epsilon, size) for name in order
        }
        row = compare(run.name, model, found, config, options, order)
        append(row, device)
        print(json.dumps(row, indent=1), flush=True)
        within_bounds &= row["within_bounds"]
    return 0 if within_bounds else 1


def judge(
    make: Any, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, batch_size: int
) -> tuple[Tensor, float]:
    """(whether each image stands in float32, seconds)."""
    adversary = make(model, norm="Linf", eps=epsilon, seed=0, device="cpu", verbose=False)
    started = time.perf_counter()
    adversarial = adversary.run_standard_evaluation(images, labels, bs=batch_size)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(dim=1) for part in adversarial.split(batch_size)])
    return answers == labels, seconds


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """What a row says of the images [N] that stand after ours and after the original's attacks."""
    robust = {"autoattack": float(theirs.double().mean()), "ours": float(ours.double().mean())}
    agree = float((ours == theirs).double().mean())
    above = robust["ours"] - robust["autoattack"]
    return {
        "num_images": len(ours),
        "robust_accuracy": robust,
        "only_ours_broke": int((theirs & ~ours).sum()),
        "only_autoattack_broke": int((ours & ~theirs).sum()),
        "agreement": agree,
        "within_bounds": above <= MOST_ABOVE and agree >= LEAST_AGREEMENT,
    }


def compare(
    name: str,
    model: nn.Module,
    found: dict[str, tuple[Tensor, float]],
    config: Any,
    options: argparse.Namespace,
    order: list[str],
) -> dict[str, Any]:
    (theirs, their_seconds), (ours, our_seconds) = found["autoattack"], found["ours"]
    return {
        "bench": "autoattack",
        "model": name,
        "expert": options.expert,
        "network": f"{config.model.network} width {config.model.width}",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "epsilon": config.evaluation.epsilon,
        **agreement(ours, theirs),
        "seconds": {"autoattack": round(their_seconds, 1), "ours": round(our_seconds, 1)},
        "ratio": round(our_seconds / their_seconds, 3),
        "first": order[0],
    }


if __name__ == "__main__":
    sys.exit(main())
