"""Write docs/recipes.md from presets and committed rows: `python docs/make_recipes.py`.

tests/test_recipes.py fails when the page is stale.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwf.presets import find
from dwf.presets.recipes import PUBLISHED, Published

COLUMNS = ["recipe", "seeds", "rate", "clean", "gradients", "worst case", "interval", "verdict"]
COLUMNS += ["parameters", "MFLOP an image", "CPU s"]

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = DOCS / "recipes.md"
Row = dict[str, Any]

INTRODUCTION = """\
# Recipes

`python docs/make_recipes.py` wrote this page from the presets and the committed rows in
`benchmarks/results`. What no committed row shows says "not run".

## Recipes with a published number

CIFAR-10, 8/255 in L-inf, all 10,000 test images; published: percent clean and under AutoAttack, as
others report it. "With" a change of the recipe's settings, ours is another, cheaper recipe, and no
reproduction. Hours are those of training, on a machine that did other work beside it. `dwf train`
says after its first steps how long a phase takes on your machine.
"""

STUDY = """\
## Does a mixture earn its price?

scikit-learn's digits, epsilon 0.15. Single networks are ResNet-6 of 16 channels (1 x) and of 48
channels (9 x the parameters and the work); mixtures have nine experts of 16 channels, and SoE,
ADVMoE and Robust Experts the networks of their presets. Every row trains for 20 epochs with the
attacks of its preset, tries three learning rates with seed 0, and takes the one of highest robust
accuracy on 200 held-out training images. Mean over the seeds, and the lowest and highest seed where
there are several; "gradients": what APGD-CE and APGD-DLR leave; worst case: by suite `{suite}` with
a mixture's views; both on {num_images} test images. The interval is that of seed 0, 95 %; where
two overlap, one seed does not tell the rows apart. The experts of DWF modern learn nine times as
fast as its rate says. CPU seconds are those of one training run on a busy core; iGAT's
were taken on a CPU without AVX-512, which our kernels need, so they do not compare.
The rows of MixedNUTS are of `dwf.mix` before its fix (CHANGELOG), and have to be taken again.
`benchmarks/study.py` makes the rows.
"""

# rows of the study that are mixtures of several networks
MIXTURES = ("ensemble", "dwf", "dwf-modern", "mixednuts", "mixednuts-dwf", "igat", "soe")

IDEAS = """\
### Ideas for the mixture

One change of "DWF modern" each, seed 0, at its learning rate, judged by the gradient attacks above
alone: percent of {num_images} test images, so that differences of less than about 5 points are
within one interval. Ideas that are not listed were not run. The first rows are those of the table
above, for comparison.
"""

CURVES = """
### Learning curves

Robust accuracy in percent on held-out training images, at the radius of the training, after so many
seconds of training on a busy core; one seed each, the lowest that was watched.
"""

OPTIONS = """\
## Options of training, each alone

One ResNet-6 of 16 channels on digits, 20 epochs, seed 0 unless a row has more seeds. A method is a
preset, and tries three learning rates as above. An option is one change of a method, at its rate;
Adam and Muon try three rates of their own. APGD-CE and APGD-DLR alone judge all, on {num_images}
test images: in L-inf at {epsilon:g}, and in L2 at {l2_epsilon:g}, as `multi_norm_digits` has them.
"Difference" is that of the L-inf column to the method, in points, on the same seeds.

**Differences of less than about 5 points are within one interval of {num_images} images**, so one
seed tells few of these rows apart. Most options are made for photographs and long training; this
page shows what they do here, not what they are worth there. CPU seconds were taken on a core that
other work shared, and vary by a third. {base}`benchmarks/study_options.py` makes the rows.

### Methods

All are compared with TRADES. FGSM at twice the radius was chosen because it collapses, for an
epoch; few settings do so on digits.
"""

CHANGES = """
### One change of a method

TRADES, unless a row names another method. Options of `study_options.py` that are not listed were
not run.
"""

CIFAR10 = """\
## And on CIFAR-10?

10,000 training images of CIFAR-10, 8/255, networks ResNet-10: one robust network, and two narrower
ones that together cost as much: an accurate and a robust one, or two robust ones. N-FGSM for 20
epochs at the rate and label smoothing of its preset, averaged weights, one rate a row. Judged by
suite `{suite}` on {num_images} test images; otherwise as above. Training at a smaller radius trades
robust for clean accuracy, so a mixture has to lead a single network at each radius. Rows at 6/255
were trained on a CPU without AVX-512, where CPU seconds are others.
The rows of MixedNUTS are of `dwf.mix` before its fix (CHANGELOG), and have to be taken again.
`benchmarks/study.py --cifar10` makes the rows.
"""

MIXES = """\
## Two networks of CIFAR-10, mixed

MixedNUTS of an accurate and a robust network, both trained on 49,000 images of CIFAR-10. The other
1,000 set the mixture, without training: of those on which the robust network withstands an attack,
the share "keep" keeps its answer whatever the accurate network says. "Gradients": what APGD-CE and
APGD-DLR at 8/255 leave of {num_images} test images, the same for all rows; where no suite was run,
the worst case may be lower. A mixture works twice as much as either network.
The rows of MixedNUTS are of `dwf.mix` before its fix (CHANGELOG), and have to be taken again.
`benchmarks/mix.py` makes the rows.
"""

HALF = """\
### The same at half the width

An earlier study: networks of half as many channels, 12 epochs, attacks of 5 steps, two learning
rates, and 150 test images, so that the interval of one seed is about +-6 points at 80 %. Its rows
name the commit that made them. A mixture of experts that are each too small is well behind the wide
network here.
"""

TITLES = {
    "single-1x": "one network, TRADES",
    "single-9x": "one network of 9 x the parameters, TRADES",
    "ensemble": "nine networks, equal weights, each trained alone by TRADES",
    "dwf": "DWF as published",
    "dwf-modern": "DWF modern: TRADES over the mixture, experts at their own rate",
    "mixednuts": "MixedNUTS of a plain network and the 9 x one",
    "mixednuts-dwf": "MixedNUTS of a plain network and DWF modern",
    "robust-experts": "Robust Experts",
    "advmoe": "ADVMoE",
    "soe": "Synergy-of-Experts",
    "igat": "iGAT, eight networks",
    "plain": "one network, no attack",
}
ON_CIFAR10 = {
    "single-1x": "one network of 32 channels",
    "single-2x": "one network of 45 channels",
    "plain": "one network of 32 channels, no attack",
    "mixednuts": "MixedNUTS of the two networks of 32 channels",
    "mixednuts-6": "MixedNUTS of no attack and one trained at 6/255, keep 0.9",
    "single-2x-half": "one network of 45 channels, trained at half the radius",
    "single-1x-6": "one network of 32 channels, trained at 6/255",
    "single-2x-6": "one network of 45 channels, trained at 6/255",
    "ensemble-6": "two networks of 32 channels, equal weights, each trained alone at 6/255",
    "ensemble": "two networks of 32 channels, equal weights, each trained alone at 8/255",
}


def rows_of(name: str) -> list[Row]:
    """The rows of one file; none if it is not there."""
    path = RESULTS / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def recipe_rows() -> list[list[str]]:
    """A line for each published recipe."""
    ours = {row["preset"]: row for row in rows_of("recipes.jsonl")}
    return [recipe_row(published, ours.get(published.preset)) for published in PUBLISHED]


def recipe_row(published: Published, ours: Row | None) -> list[str]:
    """A recipe, what is published, and our row if there is one."""
    config = find(published.preset)
    network = published.network
    beside = f" ({network})"
    if network != config.model.network:
        beside = f" ({network}; ours is {config.model.network})"
    found, hardware, hours = ("not run",) * 3
    if ours is not None:
        low, high = (100 * bound for bound in ours["interval"])
        found = (
            f"{100 * ours['clean']:.1f} / {100 * ours['worst_case']:.1f} ({low:.1f} to {high:.1f}; "
            f"`{ours['suite']}`, n = {ours['num_images']}, {ours['verdict']})"
        )
        if ours["changed"]:
            found += f" with {', '.join(f'`{text}`' for text in ours['changed'])}"
        hardware, hours = ours["device"], f"{ours['hours']:.1f}"
    return [
        published.source + beside,
        f"{published.clean:.2f} / {published.robust:.2f}",
        found,
        hardware,
        hours,
        f"`dwf train {published.preset}`",
    ]


def study_rows(found: Sequence[Row], titles: Mapping[str, str] = TITLES) -> list[list[str]]:
    """A line for each recipe of the study; "not run" where no seed is there."""
    lines = []
    for key, title in titles.items():
        own = [row for row in found if row["row"] == key]
        if not own:
            lines.append([title, "not run", *[""] * (len(COLUMNS) - 2)])
            continue
        verdicts = sorted({row["verdict"] for row in own})
        lines.append(
            [
                title,
                str(len(own)),
                f"{own[0]['learning_rate']:g}",
                spread(own, "clean"),
                spread(own, "under_gradients"),
                spread(own, "worst_case"),
                interval(own),
                ", ".join(verdicts),
                f"{own[0]['parameters']:,}",
                f"{own[0]['flop_per_image'] / 1e6:.1f}",
                f"{statistics.mean(row['cpu_seconds'] for row in own):.0f}",
            ]
        )
    return lines


def answer(found: Sequence[Row]) -> str:
    """What the rows say so far: the best mixture against the single network of equal cost."""
    worst = {
        key: 100 * statistics.mean(row["worst_case"] for row in found if row["row"] == key)
        for key in {row["row"] for row in found if "worst_case" in row}
    }
    mixtures = [key for key in MIXTURES if key in worst]
    if "single-9x" not in worst or not mixtures:
        return ""
    best = max(mixtures, key=worst.__getitem__)
    ahead = worst[best] - worst["single-9x"]
    told = f"{abs(ahead):.1f} points {'behind' if ahead < 0 else 'ahead of'}"
    if abs(ahead) < 0.05:
        told = "level with"
    return (
        f'Of the mixtures that ran, the best in the worst case is "{TITLES[best]}": '
        f"{worst[best]:.1f}, {told} the single network of 9 x the parameters "
        f"({worst['single-9x']:.1f}).\n"
    )


def interval(own: Sequence[Row]) -> str:
    """The interval of the worst case of seed 0, in percent."""
    for row in own:
        if row["seed"] == 0 and "interval" in row:
            low, high = (100 * bound for bound in row["interval"])
            return f"{low:.1f} to {high:.1f}"
    return ""


def idea_rows(found: Sequence[Row]) -> list[list[str]]:
    """A line for each idea, best first, after those of the rows that ideas are compared with."""
    compared = [
        row
        for key in ("single-9x", "dwf-modern")
        for row in found
        if (row["row"], row["seed"]) == (key, 0)
    ]
    ideas = [row for row in found if row["row"].startswith("idea: ")]
    ideas.sort(key=lambda row: -row["under_gradients"])
    return [
        [
            TITLES.get(row["row"], row["title"]),
            f"{100 * row['clean']:.1f}",
            f"{100 * row['under_gradients']:.1f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        for row in [*compared, *ideas]
    ]


def option_rows(found: Sequence[Row], *, methods: bool) -> list[list[str]]:
    """A line for each method, best first, or for each option, by its method and settings."""
    lines = []
    seeds = {(row["row"], row["seed"]): row for row in found}
    wanted = [row for row in found if methods == (not row["settings"])]
    if methods:
        wanted.sort(key=lambda row: -row["under_gradients"])
    else:
        wanted.sort(key=lambda row: (row["base"] != "trades", row["base"], row["settings"]))
    for key in dict.fromkeys(row["row"] for row in wanted):
        own = [row for row in found if row["row"] == key]
        pairs = [(row, seeds[row["base"], row["seed"]]) for row in own]
        differences = [
            100 * (row["under_gradients"] - base["under_gradients"]) for row, base in pairs
        ]
        base = pairs[0][1]
        first, title = own[0], own[0]["title"]
        if not methods and first["base"] != "trades":
            title += f" ({base['title']})"
        lines.append(
            [
                title + remarks(own, base),
                " ".join(f"`{text}`" for text in first["settings"]),
                str(len(own)),
                f"{first['learning_rate']:.3g}",
                spread(own, "clean"),
                spread(own, "under_gradients"),
                "" if key == first["base"] else f"{statistics.mean(differences):+.1f}",
                spread(own, "under_gradients_l2"),
                f"{statistics.mean(row['cpu_seconds'] for row in own):.0f}",
            ]
        )
    return lines


def remarks(own: Sequence[Row], base: Row) -> str:
    """What else is to be said of a row's runs: an early end, and warnings of a collapse."""
    found = []
    for row in own:
        of_seed = f"seed {row['seed']}: " if len(own) > 1 else ""
        if row["settings"] and row["epochs"] < base["epochs"]:
            found.append(f"{of_seed}ended after epoch {row['epochs']}")
        found += [of_seed + text for text in row["warnings"] if text not in base["warnings"]]
    return "".join(f"; {text}" for text in found)


def options_section(found: Sequence[Row]) -> list[str]:
    """The tables of methods and of options, and what stands above them."""
    base = [row for row in found if row["row"] == "trades"]
    first = base[0]
    told = ""
    if len(base) > 1:
        told = (
            f"{len(base)} seeds of TRADES lie between "
            f"{spread(base, 'under_gradients').partition('(')[2].replace(' to ', ' and ')[:-1]}. "
        )
    header = ["seeds", "rate", "clean", "L-inf", "difference", "L2", "CPU s"]
    methods = [[title, *rest] for title, _, *rest in option_rows(found, methods=True)]
    return [
        OPTIONS.format(
            num_images=first["num_images"],
            epsilon=first["epsilon"],
            l2_epsilon=first["l2_epsilon"],
            base=told,
        ),
        table(["method", *header], methods),
        CHANGES,
        table(["option", "settings", *header], option_rows(found, methods=False)),
    ]


def curve_rows(found: Sequence[Row], titles: Mapping[str, str] = TITLES) -> list[list[str]]:
    """A line for each recipe of which a seed was watched."""
    watched = sorted((row for row in found if "curve" in row), key=lambda row: -row["seed"])
    newest = {row["row"]: row["curve"] for row in watched}
    return [
        [title, "; ".join(f"{seconds:.0f} s: {100 * x:.1f}" for seconds, x in newest[key])]
        for key, title in titles.items()
        if key in newest
    ]


def spread(own: Sequence[Row], field: str) -> str:
    """Mean in percent, and the lowest and highest seed."""
    values = [100 * row[field] for row in own if field in row]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def mix_rows(found: Sequence[Row]) -> list[list[str]]:
    """A line for each network and each mixture."""
    return [
        [
            row["title"],
            f"{100 * row['clean']:.1f}",
            f"{100 * row['under_gradients']:.1f}",
            f"{100 * row['worst_case']:.1f}" if "suite" in row else "not run",
            row.get("verdict", ""),
        ]
        for row in found
    ]


def page() -> str:
    """The whole page."""
    header = ["recipe", "published", "ours", "hardware", "hours", "command"]
    parts = [INTRODUCTION, table(header, recipe_rows())]
    study = rows_of("study_digits.jsonl")
    if study:
        suite = next(row["suite"] for row in study if "suite" in row)
        parts.append(STUDY.format(suite=suite, num_images=study[0]["num_images"]))
        parts += [table(COLUMNS, study_rows(study)), answer(study)]
        if curves := curve_rows(study):
            parts += [CURVES, table(["recipe", "robust on held-out images"], curves)]
        if any(row["row"].startswith("idea: ") for row in study):
            parts.append(IDEAS.format(num_images=study[0]["num_images"]))
            parts.append(table(["idea", "clean", "gradients", "CPU s"], idea_rows(study)))
    if options := rows_of("study_options_digits.jsonl"):
        parts += options_section(options)
    if cifar10 := rows_of("study_cifar10_small.jsonl"):
        suite, num_images = cifar10[0]["suite"], cifar10[0]["num_images"]
        parts.append(CIFAR10.format(suite=suite, num_images=num_images))
        parts.append(table(COLUMNS, study_rows(cifar10, ON_CIFAR10)))
        parts += [CURVES, table(["recipe", "robust"], curve_rows(cifar10, ON_CIFAR10))]
    if mixes := rows_of("mixes.jsonl"):
        parts.append(MIXES.format(num_images=mixes[0]["num_images"]))
        header = ["model", "clean", "gradients", "worst case", "verdict"]
        parts.append(table(header, mix_rows(mixes)))
    if half := rows_of("study_digits_half.jsonl"):
        parts += [HALF, table(COLUMNS, study_rows(half))]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
