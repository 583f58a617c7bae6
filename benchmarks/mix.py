"""Mix two trained networks by MixedNUTS, and judge the mixtures beside both.

    python benchmarks/mix.py runs/plain runs/n_fgsm --keep 0.985 0.95 0.9

The first run's network is the accurate one, the second's the robust one. Both have to have the same
held-out training images, on which the mixtures are set. Gradient attacks judge all, and then the
suite, which asks much of a mixture's views: `--suite none` leaves it out. Appends one JSON line for
each network and each mixture to results/mixes.jsonl (or the folder DWF_BENCH_RESULTS);
`python docs/make_recipes.py` shows them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gradients import left_by_gradients
from rows import append, refuse_unbuilt, verdict_of
from torch import nn

import dwf
from dwf.config import Config, from_dict
from dwf.data import split_validation
from dwf.defenses.mixing import KEEP
from dwf.files import read_json

NAME = "mixes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("accurate", type=Path, help="a run folder")
    parser.add_argument("robust", type=Path, help="a run folder")
    parser.add_argument("--keep", type=float, nargs="+", default=[KEEP], help="see dwf.mix")
    parser.add_argument("--suite", default="standard", help="or none")
    parser.add_argument("--images", type=int, default=1000, help="the first so many of the test")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unbuilt(device)
    configs = [
        from_dict(read_json(run / "config.json")) for run in (options.accurate, options.robust)
    ]
    refuse_other_images(*configs)
    accurate, robust = (
        dwf.load(run).to(device).eval() for run in (options.accurate, options.robust)
    )
    config = configs[1]
    whole = dwf.data.load(config.data.name, root=config.data.root, split="train")
    held_out = split_validation(whole, config.data.num_validation, config.seed)[1]
    test_set = dwf.data.load(config.data.name, root=config.data.root, split="test")
    settings = replace(config.evaluation, num_images=options.images)
    titles = [f"{c.preset} ({c.model.network}, width {c.model.width})" for c in configs]
    models: dict[str, nn.Module] = dict(zip(titles, (accurate, robust), strict=True))
    for keep in options.keep:
        mixed = dwf.mix(accurate, robust, held_out, epsilon=config.attack.epsilon, keep=keep)
        print(f"keep {keep:g}: {mixed.stretch}, share {mixed.share:.5f} of the robust network")
        models[f"MixedNUTS of both, keep {keep:g}"] = mixed
    for title, model in models.items():
        clean, left = left_by_gradients(
            model, test_set, options.images, device, epsilon=settings.epsilon
        )
        row: dict[str, Any] = {
            "bench": NAME,
            "title": title,
            "epsilon": settings.epsilon,
            "num_images": options.images,
            "clean": clean,
            "under_gradients": left,
            "notes": list(test_set.notes),
        }
        if options.suite != "none":
            result = dwf.evaluate(model, test_set, settings, suite=options.suite)
            row |= {"suite": options.suite, **verdict_of(result)}
        print(append(row, device, NAME))
        print(f"{title}: clean {100 * clean:.1f} %, gradient attacks leave {100 * left:.1f} %")


def refuse_other_images(accurate: Config, robust: Config) -> None:
    """End the program if one network was trained on what the other left for validation."""
    facts = [(c.data.name, c.data.num_validation, c.seed) for c in (accurate, robust)]
    if facts[0] != facts[1]:
        raise SystemExit(
            f"the runs hold out other images: data, number and seed are {facts[0]} and {facts[1]}"
        )


if __name__ == "__main__":
    main()
