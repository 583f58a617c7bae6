"""Train DWF and the networks it is compared with, judge all by the same table, over several seeds.

    python benchmarks/accuracy.py digits --seeds 0 1 2
    python benchmarks/accuracy.py cifar10-small --seeds 0 --baselines none data.name=FILE.npz

Every pre-trained expert is judged alone as well: the benign one is the plain network. Appends one
JSON line per model and seed to results/accuracy_<preset>.jsonl (or the folder DWF_BENCH_RESULTS)
and prints a summary at the end. Runs that are complete are not trained again, nor judged again.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import append, refuse_unbuilt

import dwf
from dwf.config import Config
from dwf.evaluation import evaluate_into
from dwf.files import read_json
from dwf.models import Mixture
from dwf.presets import find, single
from dwf.progress import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--baselines", choices=("all", "none"), default="all")
    options = parser.parse_intermixed_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unbuilt(device)
    name = f"accuracy_{options.preset.replace('-', '_')}"
    found = []
    for row in judge_seeds(options):
        path = append(row, device, name)
        found.append(row)
    summarize(found)
    print(f"\n{path}")


def judge_seeds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each model of each seed, as soon as it is judged."""
    for seed in options.seeds:
        overrides = [*options.overrides, f"seed={seed}"]
        config = dwf.apply_overrides(find(options.preset), overrides)
        yield from judge_dwf(config, options.runs)
        if options.baselines == "all":
            for defense in ("plain", "fgsm-at", "pgd-at"):
                yield judge_single(single(config, defense), options.runs)


def judge_dwf(config: Config, runs: Path) -> Iterator[dict[str, Any]]:
    """The mixture, and each expert as it was before end-to-end training."""
    folder = runs / f"{config.preset}-seed{config.seed}"
    model = dwf.train(config, folder, quiet=True)
    yield judge("DWF mixture", model, config, folder, "paper")
    pretrained = dwf.load(folder, "pretrained")
    assert isinstance(pretrained, Mixture)
    for e, name in enumerate(pretrained.expert_names):
        expert = pretrained.expert(e)
        suite = f"paper-pretrained-expert-{e}"
        yield judge(f"expert {name} alone", expert, config, folder, suite)


def judge_single(config: Config, runs: Path) -> dict[str, Any]:
    folder = runs / f"{config.preset}-seed{config.seed}"
    model = dwf.train(config, folder, quiet=True)
    return judge(config.defense, model, config, folder, "paper")


def judge(name: str, model: Any, config: Config, folder: Path, suite: str) -> dict[str, Any]:
    """The table of one model, from the run folder if `dwf eval` has put it there already."""
    path = folder / "evaluations" / f"{suite}.json"
    if not path.exists():
        test_set = dwf.data.load(config.data.name, root=config.data.root, split="test")
        evaluate_into(
            folder,
            model,
            test_set,
            config.evaluation,
            name=suite,
            suite="paper",
            title=name,
            weights="pretrained" if "pretrained" in suite else "last",
            seed=config.seed,
        )
    row = read_json(path)
    rows = read_metrics(folder)
    row |= {
        "model": name,
        "preset": config.preset,
        "trained_commit": read_json(folder / "environment.json")["commit"],
        "train_seconds": round(sum(metric["seconds"] for metric in rows), 1),
    }
    for key in ("run", "environment"):  # where it was made is nobody's business
        row.pop(key, None)
    print(
        f"{name:<26} seed {config.seed}: clean {100 * row['attacks'][0]['accuracy']:.1f} %, "
        f"worst case {100 * row['worst_case']['accuracy']:.1f} %",
        flush=True,
    )
    return row


def summarize(rows: list[dict[str, Any]]) -> None:
    """Mean and range over seeds; of the experts of a kind, the best one of each seed."""
    table: dict[str, dict[int, tuple[float, float, float]]] = defaultdict(dict)
    for row in rows:
        name = row["model"]
        if name.startswith("expert "):
            name = f"best {name.split()[2]} expert alone"
        pgd = [a["accuracy"] for a in row["attacks"] if a["kind"] == "pgd"][-1]
        values = (row["worst_case"]["accuracy"], row["attacks"][0]["accuracy"], pgd)
        table[name][row["seed"]] = max(values, table[name].get(row["seed"], (-1.0, 0.0, 0.0)))
    print(f"\n| {'model':<25} | clean | PGD (most steps) | worst case per image |")
    print("|---|---|---|---|")
    for name, by_seed in table.items():
        worst, clean, pgd = zip(*by_seed.values(), strict=True)
        print(f"| {name:<25} | {spread(clean)} | {spread(pgd)} | {spread(worst)} |")


def spread(values: tuple[float, ...]) -> str:
    """Mean in percent, with the standard deviation over seeds."""
    percent = [100 * v for v in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{statistics.mean(percent):.1f} +- {statistics.stdev(percent):.1f}"


if __name__ == "__main__":
    main()
