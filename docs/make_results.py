"""Write docs/results.md from the committed rows: `python docs/make_results.py`.

Of several rows of one case the newest counts. tests/test_docs.py fails when the page is stale.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from texts_of_results import (
    ARCHITECTURES,
    ATTACK_BENCH,
    CHECKS,
    CIFAR,
    DIGITS,
    HARD_ROUTED,
    INTRODUCTION,
    LAYERS,
    MIXTURES,
    SCALING,
    SUITE_TIME,
    TRAINING,
    ZOO,
)

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = DOCS / "results.md"
Row = dict[str, Any]


def rows_of(pattern: str) -> list[Row]:
    """All rows of the files that match, oldest file first."""
    return [
        json.loads(line)
        for path in sorted(RESULTS.glob(pattern))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def newest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The newest row of each case, in the order in which the cases first appear."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        case = tuple(json.dumps(row.get(key)) for key in keys)
        if case not in found or row["date"] >= found[case]["date"]:
            found[case] = row
    return list(found.values())


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    texts = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in texts) + "\n"


def where(rows: Sequence[Row]) -> str:
    """Hardware, versions, commits and dates of these rows in one sentence."""
    devices = sorted({row["device"] for row in rows})
    versions = sorted({row["torch"] for row in rows})
    commits = sorted({row["commit"][:7] for row in rows})
    days = sorted({row["date"][:10] for row in rows})
    return (
        f"{', '.join(devices)}, {rows[0]['num_threads']} threads, torch {', '.join(versions)}, "
        f"commits {', '.join(commits)}, {', '.join(days)}.\n"
    )


def on_each_machine(pattern: str, *keys: str, draw: Callable[[list[Row]], str]) -> str:
    """What `draw` makes of the newest row of each case, machine by machine."""
    rows = newest(rows_of(pattern), "device", *keys)
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        parts.append(draw(own) + "\n" + where(own))
    return "\n".join(parts)


def percent(mean: str, deviation: str = "") -> str:
    """Fractions from a CSV file as percent."""
    spread = f" +- {100 * float(deviation):.1f}" if deviation else ""
    return f"{100 * float(mean):.1f}{spread}"


def comparison(folder: str) -> str:
    """A table written by `dwf compare`, most robust first."""
    with open(RESULTS / folder / "comparison.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: -float(row["worst case mean"]))
    columns = ("clean", "PGD-50", "worst case")
    lines = [
        [
            row["name"],
            row["network"],
            len(row["seeds"].split(";")),
            f"{int(row['num_parameters']) / 1e3:.0f} k",
            f"{int(row['flop_per_image']) / 1e6:.1f} M",
            f"{float(row['train_seconds']):.0f} s" if row["train_seconds"] else "",
            *(percent(row[f"{name} mean"], row[f"{name} sd"]) for name in columns),
        ]
        for row in rows
    ]
    head = ["defense", "network", "seeds", "parameters", "FLOP per image", "training", *columns]
    return table(head, lines)


def alone() -> str:
    """Divided We Fall and its experts on reduced CIFAR-10, by both attack paths."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows_of("accuracy_cifar10_small.jsonl"):
        path = row.get("attack_path", "autograd")
        found[row["model"], "autograd" if "autograd" in path else "plans"].append(row)
    lines = []
    for (model, path), rows in found.items():
        numbers = []
        for part in (lambda row: row["attacks"][0], lambda row: row["worst_case"]):
            values = [part(row)["accuracy"] for row in rows]
            deviation = str(statistics.stdev(values)) if len(values) > 1 else ""
            numbers.append(percent(str(statistics.mean(values)), deviation))
        lines.append([model, path, len({row["seed"] for row in rows}), *numbers])
    return table(["model", "attacked by", "seeds", "clean", "worst case"], lines)


def autoattack() -> str:
    rows = newest(rows_of("autoattack_*.jsonl"), "model", "num_images")
    lines = [
        [
            row["model"],
            row.get("network", "resnet6 width 16"),
            row["num_images"],
            *(f"{100 * row['robust_accuracy'][name]:.1f}" for name in ("autoattack", "ours")),
            f"{100 * row['agreement']:.1f} %",
            *(f"{row['seconds'][name]:.0f}" for name in ("autoattack", "ours")),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    head = ["model", "network", "images", "robust, original", "robust, ours", "images that agree"]
    return table([*head, "seconds, original", "seconds, ours", "ratio"], lines) + "\n" + where(rows)


def suite_time(rows: list[Row]) -> str:
    """A whole evaluation beside the original AutoAttack, in CPU seconds."""
    lines = [
        [
            row["case"],
            row["network"],
            row["num_images"],
            *(f"{100 * row['robust_accuracy'][name]:.1f}" for name in ("autoattack", "ours")),
            f"{row['only_autoattack_broke']}, {row['only_ours_broke']}",
            *(f"{row['cpu_seconds'][name]:.0f}" for name in ("autoattack", "ours")),
            f"**{row['ratio']:.2f}**",
            f"{row['questions_share']:.2f}",
            f"{row['stable_after_share']:.2f}",
        ]
        for row in rows
    ]
    head = ["model", "network", "images", "robust, original", "robust, ours"]
    head += ["broken by one alone: original, ours", "CPU s, original", "CPU s, ours", "ratio"]
    head += ["no attack", "headline stands after"]
    return table(head, lines)


def scaling(rows: list[Row]) -> str:
    """Milliseconds of a step, and ratios to eager, along experts, images and steps."""
    order = ["experts", "images", "steps"]
    rows.sort(key=lambda x: [order.index(x["curve"]), x["num_experts"], x["batch_size"]])
    lines = []
    for row in rows:
        times = row["columns"]
        stock = min(x["ratio"] for name, x in times.items() if "stock" in name)
        lines.append(
            [
                row["curve"],
                *(row[key] for key in ("num_experts", "batch_size", "num_steps")),
                f"{times['eager']['median_ms']:,.0f}",
                f"{stock:.2f}",
                f"{times['ours']['ratio']:.2f}",
                f"**{times['ours']['ratio'] / stock:.2f}**",
            ]
        )
    head = ["curve", "experts", "images", "steps", "eager, ms a step", "stock / eager"]
    return table([*head, "ours / eager", "ours / stock"], lines)


def benchmark(pattern: str, columns: Sequence[str]) -> str:
    """Times over eager's of the newest row of each case; the first column also in milliseconds."""

    def draw(rows: list[Row]) -> str:
        known = [name for name in columns if any(name in row["columns"] for row in rows)]
        lines = []
        for row in rows:
            times = row["columns"]
            ratios = [f"{times[name]['ratio']:.2f}" if name in times else "" for name in known]
            steps = f", {row['num_steps']} steps" if "num_steps" in row else ""
            lines.append([row["case"] + steps, f"{times[known[0]]['median_ms']:,.3g}", *ratios[1:]])
        return table(["case", f"{known[0]}, ms", *known[1:]], lines)

    return on_each_machine(pattern, "case", "num_steps", draw=draw)


def steps_of(*named: str) -> Callable[[list[Row]], str]:
    """A table of a step of PGD, a line named by these fields; "stock" is the fastest that ran."""

    def draw(rows: list[Row]) -> str:
        lines = []
        for row in rows:
            times = row["columns"]
            stock = min(
                (x for name, x in times.items() if "stock" in name), key=lambda x: x["ratio"]
            )
            ours = times["ours"]
            lines.append(
                [
                    *(row[name] for name in named),
                    f"{times['eager']['median_ms']:,.0f}",
                    f"{stock['ratio']:.2f}",
                    "yes" if "torch.compile" in stock["ran"] else "no",
                    f"{ours['ratio']:.2f}",
                    f"**{ours['ratio'] / stock['ratio']:.2f}**",
                    ours["ran"].removeprefix("dwf.pgd, "),
                ]
            )
        head = ["eager, ms", "stock / eager", "compiled", "ours / eager", "ours / stock", "ran on"]
        return table([*named, *head], lines)

    return draw


def layers() -> str:
    """Each kind of convolution of a step, and what share of its limit it reaches."""
    rows = newest(rows_of("layers_*.jsonl"), "case")
    parts = []
    for row in rows:
        lines = [
            [
                x["layer"],
                x["way"],
                x["count"],
                f"{x['ms']:.1f}",
                f"{x['limit_ms']:.1f}",
                f"{x['limit_ms'] / x['ms']:.2f}",
            ]
            for x in row["layers"]
        ]
        step, conv = (row["columns"][k]["median_ms"] for k in ("ours", "convolutions"))
        lines.append(["all", "", "", f"{conv:.1f}", f"{row['limit_ms']:.1f}"])
        lines[-1].append(f"**{row['limit_ms'] / conv:.2f}**")
        parts.append(
            table(["convolution", "way", "count", "ms", "limit, ms", "limit / ms"], lines)
            + f"\nA step on {row['batch_size']} images takes {step:.0f} ms, all but its "
            f"convolutions {step - conv:.0f} ms; a large bfloat16 product runs at "
            f"{1e3 * row['bf16_matmul_tflop_per_s']:.0f} GFLOP/s.\n"
        )
    return "\n".join(parts) + "\n" + where(rows)


def attack_quality() -> str:
    rows = newest(rows_of("attack_quality_*.jsonl"), "case")
    lines = [
        [
            row["case"],
            name,
            f"{100 * column['robust_accuracy']:.1f}",
            column["num_verdicts_differ"],
            f"{100 * column['sign_agreement']:.2f} %",
            f"{100 * column['weighted_sign_agreement']:.3f} %",
            f"{column['ratio']:.2f}",
        ]
        for row in rows
        for name, column in row["columns"].items()
    ]
    head = ["case", "path", "robust", "verdicts that differ", "equal signs", "by weight", "time"]
    return table(head, lines) + "\n" + where(rows)


def compiled() -> str:
    found: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in newest(rows_of("aot_*.jsonl"), "case", "kernel", "capability", "tile"):
        found[row["capability"], row["kernel"]].append(row)
    lines = [
        [
            f"sm_{capability}",
            kernel.strip("_"),
            len(rows),
            max(row["registers"] for row in rows),
            sum(row["spill_instructions"] > 0 for row in rows),
            f"{max(row['shared_bytes'] for row in rows) / 1024:.0f} KiB",
        ]
        for (capability, kernel), rows in sorted(found.items())
    ]
    head = ["for", "kernel", "variants", "most registers", "variants that spill", "shared memory"]
    return table(head, lines)


def hard_routed() -> str:
    """What stands behind hard routing, attack after attack."""
    rows = newest(rows_of("hard_routed_*.jsonl"), "case")
    stages = ("clean", "on_the_whole", "views", "square", "worst_case")
    lines = [
        [
            row["model"],
            *(f"{100 * row[stage] / row['num_images']:.1f}" for stage in stages),
            ", ".join(f"{view} {count}" for view, count in row["broken_by_views"].items()) or "-",
            row["verdict"],
            ", ".join(f"`{name}`" for name in row["findings"]) or "-",
        ]
        for row in rows
    ]
    head = ["model", "clean", "whole attacked", "views", "Square", "worst case"]
    head += ["images that only views broke", "verdict", "findings"]
    return HARD_ROUTED + "\n" + table(head, lines) + "\n" + where(rows)


def checks_share() -> str:
    """Seconds of each check as a percentage of the attacks'."""
    rows = newest(rows_of("checks_share_*.jsonl"), "case")
    names = sorted({name for row in rows for name in row["shares"]})
    lines = [
        [
            row["case"],
            f"{row['attack_seconds']:.0f}",
            *(f"{100 * row['shares'].get(name, 0.0):.1f}" for name in names),
            f"**{100 * row['share']:.1f}**",
        ]
        for row in rows
    ]
    return CHECKS + "\n" + table(["model", "attacks, s", *names, "all"], lines) + "\n" + where(rows)


def attack_bench() -> dict[str, str]:
    """How near each attack comes to the best of all, by model and norm; a section, if measured."""
    import torch

    from dwf.bench.optimality import optimality

    rows = newest(rows_of("attack_bench_*.jsonl"), "case")
    if not rows:
        return {}
    text = ATTACK_BENCH
    for model, norm in dict.fromkeys((row["model"], row["norm"]) for row in rows):
        its = [row for row in rows if (row["model"], row["norm"]) == (model, norm)]
        found = torch.tensor(
            [[torch.inf if d is None else d for d in row["distances"]] for row in its],
            dtype=torch.float64,
        )
        best = found.amin(dim=0)
        ranked = sorted(
            (
                (optimality(distance, best), row, distance)
                for row, distance in zip(its, found, strict=True)
            ),
            key=lambda entry: -entry[0],
        )
        lines = [
            [
                row["attack"],
                f"{100 * share:.1f}",
                f"{float(distance.median()):.4f}",
                str(int((distance <= 1.001 * best).sum())),
                str(int(distance.isfinite().sum())),
                f"{row['propagations']:,.0f}",
            ]
            for share, row, distance in ranked
        ]
        head = ["attack", "optimality", "median distance", "within 0.1 % of the best", "found"]
        text += f"\n{model}, {norm}, {len(best)} images, median of the best "
        text += f"{float(best.median()):.4f}:\n\n"
        text += table([*head, "propagations"], lines)
    return {"Attacks beside those of other libraries": text + "\n" + where(rows)}


def zoo() -> str:
    """The verdict on every model of the zoo that was judged."""
    rows = newest(rows_of("zoo_*.jsonl"), "case")
    outcomes = ("found", "flagged", "fooled", "right", "false alarm")
    counts = [f"{sum(row['outcome'] == name for row in rows)} {name}" for name in outcomes]
    lines = [f"{ZOO}\nOf {len(rows)} models: {', '.join(counts)}.\n"]
    lines += ["| model | what it does | verdict | robust % | truth % | outcome | findings |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = ["-" if x is None else f"{x:.0f}" for x in (row["robust"], row["truth"])]
        found = ", ".join(f"`{finding}`" for finding in row["findings"]) or "-"
        what = f"{row['description']} ({row['source']})" if row["source"] else row["description"]
        cells = [row["case"], what, row["verdict"], *numbers, row["outcome"], found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    steps = ("eager", "stock fp32", "stock", "torchattacks", "foolbox", "ours fp32", "ours")
    sections = {
        "Every defense on digits": DIGITS + comparison("comparison_digits"),
        "Hard-routed defenses by the standard suite": hard_routed(),
        "Five defenses on reduced CIFAR-10": CIFAR + comparison("comparison_cifar10_small"),
        "Divided We Fall and its experts on reduced CIFAR-10": alone(),
        "The standard suite's attacks beside the original AutoAttack": autoattack(),
        "A whole evaluation beside the original AutoAttack": SUITE_TIME
        + on_each_machine("suite_*.jsonl", "case", "num_images", draw=suite_time),
        "Is the verdict right? Broken and honest models": zoo(),
        "What the checks of an evaluation cost": checks_share(),
        **attack_bench(),
        "One step, as a share of eager PyTorch's time": benchmark("step_*.jsonl", steps),
        "PGD of ten steps on many architectures, a step": ARCHITECTURES
        + on_each_machine("architectures_*.jsonl", "case", draw=steps_of("network", "library")),
        "PGD of ten steps on mixtures and their views, a step": MIXTURES
        + on_each_machine("mixtures_*.jsonl", "case", draw=steps_of("mixture", "attacked")),
        "A step along experts, images and steps": SCALING
        + on_each_machine("scaling_*.jsonl", "case", draw=scaling),
        "Every convolution of ResNet-18 beside the limit of a CPU": LAYERS + layers(),
        "A training step of single networks, as a share of eager PyTorch's time": TRAINING
        + benchmark(
            "training_*.jsonl",
            ("eager", "stock, float32", "stock, not compiled", "stock", "ours, float32", "ours"),
        ),
        "A slice of training on digits, as a share of a plain script's time": benchmark(
            "end_to_end_*.jsonl", ("eager", "stock", "ours")
        ),
        "Ops, as a share of eager PyTorch's time": benchmark("ops_*.jsonl", ("eager", "ours")),
        "Does the fast path find what the slow one finds?": attack_quality(),
        "Triton kernels, compiled ahead of time": compiled(),
    }
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{INTRODUCTION}\n{body}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
