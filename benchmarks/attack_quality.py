"""Measure on trained models whether the fast path attacks as well as the reference.

    python benchmarks/attack_quality.py RUN [RUN ...] [--num-images 1000]

Each run folder's model is attacked by PGD-20 through autograd in float32 and through its plan in
every dtype and back end that runs here; all results are judged by the float32 model. A line of
results/attack_quality_<device>_<date>.jsonl (or in the folder DWF_BENCH_RESULTS) holds for each the
robust accuracy, in how many images the verdict differs, the agreement of the signs of the first
gradient, plain and weighted by the gradient's size, and the time. Exits with 1 if a plan misses a
bound: 0.3 points of robust accuracy, 97 % of signs, 99.9 % by weight.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before torch starts its threads: spinning ones cost a whole time slice each on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rows import append, refuse_unbuilt
from torch import Tensor, nn

import dwf
import moe_kernels
from dwf.attacks import AttackReport, attack_target, input_gradient
from dwf.config import from_dict
from dwf.data import evaluation_batches
from dwf.files import read_json
from moe_kernels.plan import choose

NUM_STEPS = 20
MAX_POINTS, MIN_SIGNS, MIN_WEIGHTED = 0.003, 0.97, 0.999
BACK_ENDS = ("avx512", "avx2", "aten", "slab")


class Found:
    """Results of one way of attacking, summed over batches."""

    def __init__(self) -> None:
        self.robust: list[Tensor] = []
        self.agreement = self.weighted = self.size = self.count = 0.0
        self.report = AttackReport()
        self.seconds = 0.0

    def add_signs(self, grad: Tensor, truth: Tensor) -> None:
        agree = grad.sign() == truth.sign()
        self.agreement += float(agree.sum())
        self.count += agree.numel()
        self.weighted += float(truth.abs()[agree].double().sum())
        self.size += float(truth.abs().double().sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unbuilt(device)
    missed = []
    for run in options.runs:
        row = measure(run, options.num_images, options.batch_size, device)
        append(row, device)
        missed += report(row)
    for line in missed:
        print(f"MISSED {line}")
    return 1 if missed else 0


def measure(run: Path, num_images: int, batch_size: int, device: torch.device) -> dict[str, Any]:
    """One row: the reference and every plan on the same images."""
    config = from_dict(read_json(run / "config.json"))
    model = dwf.load(run).to(device)
    budget = {"epsilon": config.attack.epsilon, "step_size": config.attack.step_size}
    ways: dict[str, tuple[str, torch.dtype] | None] = {"reference": None}
    for name in BACK_ENDS:
        for dtype in (torch.bfloat16, torch.float32):
            slow = name == "slab" and device.type == "cpu"  # nothing but its definition
            if not slow and choose.obstacle(name, device, dtype) is None:
                ways[f"{name} {str(dtype).removeprefix('torch.')}"] = (name, dtype)
    found = {name: Found() for name in ways}
    left = num_images
    for split in ("test", "train"):  # digits has fewer test images than are wanted
        dataset = dwf.data.load(config.data.name, root=config.data.root, split=split)
        dataset = dataset.subset(torch.arange(min(left, len(dataset))))
        left -= len(dataset)
        for images, labels, _ in evaluation_batches(dataset, batch_size, device):
            batch(model, images, labels, budget, ways, found)
    robust = {name: torch.cat(x.robust) for name, x in found.items()}
    columns = {}
    for name, one in found.items():
        columns[name] = {
            "robust_accuracy": float(robust[name].double().mean()),
            "num_verdicts_differ": int((robust[name] != robust["reference"]).sum()),
            "sign_agreement": one.agreement / one.count,
            "weighted_sign_agreement": one.weighted / one.size,
            "seconds": one.seconds,
            "ratio": one.seconds / found["reference"].seconds,
            "ran": str(one.report),
        }
    return {
        "bench": "attack_quality",
        "case": f"{config.preset}-seed{config.seed}-PGD-{NUM_STEPS}",
        "num_images": len(robust["reference"]),
        **budget,
        "num_steps": NUM_STEPS,
        "random_start": False,
        "bn_mode": "eval",
        "verdict": "float32",
        "columns": columns,
    }


def batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    budget: dict[str, float],
    ways: dict[str, tuple[str, torch.dtype] | None],
    found: dict[str, Found],
) -> None:
    """Attack one batch in every way, the reference first, and add up what each did."""
    truth: Tensor | None = None
    for name, way in ways.items():
        one = found[name]
        started = now(images.device)
        target = make_target(model, images, way)
        adversarial = dwf.pgd(
            target,
            images,
            labels,
            **budget,
            num_steps=NUM_STEPS,
            random_start=False,
            report=one.report,
        )
        one.seconds += now(images.device) - started
        grad = input_gradient(target, images, labels)
        truth = grad if truth is None else truth
        one.add_signs(grad, truth)
        with torch.no_grad():
            one.robust.append((model(adversarial).argmax(dim=1) == labels).cpu())


def now(device: torch.device) -> float:
    """Seconds on a clock, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_target(
    model: nn.Module, images: Tensor, way: tuple[str, torch.dtype] | None
) -> dwf.attacks.AttackTarget:
    """The model through autograd in float32, or through its plan on a back end in a dtype."""
    if way is None:
        with moe_kernels.implementation("reference"):
            return attack_target(model, images)
    back_end, dtype = way
    with choose.back_end(back_end):
        return dwf.attacks.AttackTarget(model, planned(model, back_end, dtype, images))


_plans: dict[Any, Any] = {}


def planned(model: Any, back_end: str, dtype: torch.dtype, images: Tensor) -> Any:
    """A plan on one back end, made once for each model."""
    key = (id(model), back_end, dtype)
    if key not in _plans:
        parts = model.plan_parts()
        _plans[key] = moe_kernels.plan.Plan(parts.networks, parts.gate, dtype=dtype)
    _plans[key].prepare(images)
    return _plans[key]


def report(row: dict[str, Any]) -> list[str]:
    """Print a table; the bounds that are missed."""
    print(f"\n{row['case']}, {row['num_images']} images, float32 verdicts")
    print("| way | robust accuracy | verdicts differ | signs | by weight | time |")
    print("|---|---|---|---|---|---|")
    missed = []
    expected = row["columns"]["reference"]["robust_accuracy"]
    for name, x in row["columns"].items():
        print(
            f"| {name} | {100 * x['robust_accuracy']:.2f} % | {x['num_verdicts_differ']} | "
            f"{100 * x['sign_agreement']:.2f} % | {100 * x['weighted_sign_agreement']:.3f} % | "
            f"{x['ratio']:.2f} |"
        )
        if not (
            round(abs(x["robust_accuracy"] - expected), 9) <= MAX_POINTS
            and x["sign_agreement"] >= MIN_SIGNS
            and x["weighted_sign_agreement"] >= MIN_WEIGHTED
        ):
            missed.append(f"{row['case']}: {name}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
