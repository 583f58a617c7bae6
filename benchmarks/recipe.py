"""Train a published recipe to its end, judge it, and add its row to the page of recipes.

    python benchmarks/recipe.py n_fgsm_cifar10 data.name=cifar10.npz
    python benchmarks/recipe.py n_fgsm_cifar10 --images 300 model.width=16 pretrain.num_epochs=15

What is changed with key=value stands in the row and on the page, but for where the data lie. A run
that was stopped goes on. Appends one JSON line to results/recipes.jsonl (or the folder
DWF_BENCH_RESULTS); `python docs/make_recipes.py` makes the page.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rows import append, refuse_unbuilt, verdict_of

import dwf
from dwf.presets import find
from dwf.presets.recipes import PUBLISHED
from dwf.progress import read_metrics

NAME = "recipes"
HIDDEN = ("data.name=", "data.root=", "device=")  # where it was made is nobody's business


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=[published.preset for published in PUBLISHED])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--images", type=int, default=1000, help="the first so many of the test")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    options = parser.parse_intermixed_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unbuilt(device)
    config = dwf.apply_overrides(find(options.preset), options.overrides)
    run = options.runs / options.preset
    try:
        dwf.train(config, run)
    except dwf.training.Stopped as stopped:
        raise SystemExit(str(stopped)) from None
    test_set = dwf.data.load(config.data.name, root=config.data.root, split="test")
    settings = replace(config.evaluation, num_images=options.images)
    model = dwf.load(run).to(device)
    result = dwf.evaluate(model, test_set, settings, suite=options.suite)
    seconds = sum(metric["seconds"] for metric in read_metrics(run))
    row = {
        "bench": NAME,
        "preset": options.preset,
        "changed": [text for text in options.overrides if not text.startswith(HIDDEN)],
        "weights": config.weights,
        "seed": config.seed,
        "hours": round(seconds / 3600, 2),
        "suite": options.suite,
        "epsilon": settings.epsilon,
        "num_images": result.worst_case.num_images,
        **verdict_of(result),
        "notes": list(test_set.notes),
    }
    print(append(row, device, NAME))
    print(
        f"{options.preset}: clean {100 * row['clean']:.1f} %, worst case "
        f"{100 * row['worst_case']:.1f} %, {row['verdict']}"
    )


if __name__ == "__main__":
    main()
