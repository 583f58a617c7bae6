"""Runs side by side: one table of what each defense costs and what it withstands.

Only runs that were judged alike stand in one table: the same images, protocol, radius and attacks.
Seeds of one configuration become one row, mean and standard deviation; each run stays available.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwf.checks import CheckpointError, ConfigError
from dwf.config import from_dict
from dwf.defenses import get
from dwf.files import atomic_write_json, atomic_write_text, explain
from dwf.report import figures
from dwf.report.figures import norm_name, percent, radius
from dwf.report.page import duration, render, write_figures
from dwf.report.results import AttackRow, Evaluation, Results, Score, load_results

SCHEMA = 1
CLEAN, WORST = "clean", "worst case"
# settings that change neither what a run computes nor what its table says
FREE = ("seed", "device", "pretrain_together", "checkpoint_every", "log_every", "evaluation")


@dataclass(frozen=True)
class Entry:
    """One run. ``train_seconds`` are of training steps alone, without validation and evaluation.

    ``eot_samples`` is that of the adaptive attack, 1 without one; ``doubt`` the gravest of the
    evaluation's findings, "invalid", "suspect" or "".
    """

    run: Path
    preset: str
    defense: str
    network: str
    seed: int
    num_parameters: int | None
    flop_per_image: int | None
    train_seconds: float | None
    train_device: str
    eot_samples: int
    doubt: str
    scores: dict[str, Score]
    settings: dict[str, Any]  # all that makes another seed of it the same configuration


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with their standard deviation; of a single run its 95 % interval."""

    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def bounds(self) -> tuple[float, float]:
        """What an error bar shows."""
        if self.interval is not None:
            return self.interval
        return self.mean - (self.sd or 0.0), self.mean + (self.sd or 0.0)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; ``name`` is unique in a comparison."""

    name: str
    entries: list[Entry]

    @property
    def first(self) -> Entry:
        return self.entries[0]

    @property
    def train_seconds(self) -> float | None:
        """Mean of the runs whose time is known."""
        known = [e.train_seconds for e in self.entries if e.train_seconds is not None]
        return statistics.fmean(known) if known else None

    @property
    def train_devices(self) -> list[str]:
        return list(dict.fromkeys(entry.train_device for entry in self.entries))

    @property
    def doubt(self) -> str:
        return next((x for x in ("invalid", "suspect") if x in {e.doubt for e in self.entries}), "")

    def spread(self, column: str) -> Spread:
        scores = [entry.scores[column] for entry in self.entries]
        values = [score.accuracy for score in scores]
        if len(scores) == 1:
            return Spread(values[0], None, scores[0].interval)
        return Spread(statistics.fmean(values), statistics.stdev(values), None)


@dataclass(frozen=True)
class Comparison:
    """Groups in the order in which their first runs were given.

    ``columns``: clean, one attack of each kind, worst case. ``facts``: what all runs share.
    """

    suite: str
    facts: dict[str, Any]
    columns: list[str]
    groups: list[Group]

    @property
    def num_images(self) -> int:
        return int(self.facts["data.num_images"])

    @property
    def pixels(self) -> bool:
        return bool(self.facts["protocol"] == "pixels")

    @property
    def of_255(self) -> bool:
        """Whether radii mean brightness, and so may be shown as k/255."""
        return self.pixels and bool(self.facts["norm"] == "linf")


def load_comparison(runs: Sequence[Path], suite: str = "paper") -> Comparison:
    """Read the evaluations of several run folders into one table.

    Raises:
        CheckpointError: a run is missing, damaged or has no such evaluation.
        ConfigError: two runs were judged differently, or are the same configuration and seed.
    """
    results = [load_results(Path(run), suite) for run in runs]
    facts = [_facts(result.evaluation) for result in results]
    for result, other in zip(results[1:], facts[1:], strict=True):
        _check_alike(results[0].run, facts[0], result.run, other)
    attacks = _columns(results[0].evaluation)
    entries = [_entry(result, attacks) for result in results]
    return Comparison(suite, facts[0], [*attacks, WORST], _groups(entries))


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    """What has to be equal, most telling first; the digest covers the images themselves."""
    attacks = [
        [
            row.name,
            row.epsilon,
            row.step_size,
            row.num_steps,
            row.num_restarts,
            "random start" if row.random_start else "clean start",
        ]
        # eot_samples may differ: what a random model needs, a deterministic one does not
        for row in evaluation.attacks
    ]
    return {
        "data.name": evaluation.data_name,
        "data.split": evaluation.data_split,
        "data.num_images": evaluation.num_images,
        "data.digest": evaluation.data_digest,
        "protocol": evaluation.protocol,
        "clamp": evaluation.clamp,
        "norm": evaluation.norm,
        "epsilon": evaluation.epsilon,
        "radii": [part.epsilon for part in evaluation.curve],
        "weights": evaluation.weights,
        "bn_mode": evaluation.bn_mode,
        "precision": evaluation.precision,
        "attacks": attacks,
    }


def _check_alike(
    first: Path, facts: dict[str, Any], second: Path, other_facts: dict[str, Any]
) -> None:
    differing = [key for key in facts if facts[key] != other_facts[key]]
    if not differing:
        return
    # a digest or an attack differs as a consequence of these
    causes = [key for key in differing if key not in ("data.digest", "attacks")] or differing
    parts = []
    for key in causes:
        one, other = facts[key], other_facts[key]
        if key == "attacks":
            one, other = _first_difference(one, other)
        parts.append(f"{key} is {one} in {first} and {other} in {second}")
    raise ConfigError(
        f"these runs cannot stand in one table: {'; '.join(parts)}; evaluate all of them alike"
    )


def _first_difference(one: list[Any], other: list[Any]) -> tuple[Any, Any]:
    length = max(len(one), len(other))
    pairs = zip(
        [*one, *["missing"] * (length - len(one))],
        [*other, *["missing"] * (length - len(other))],
        strict=True,
    )
    return next(pair for pair in pairs if pair[0] != pair[1])


def _columns(evaluation: Evaluation) -> list[str]:
    """Names of the clean row and of the strongest attack of each kind."""
    rows: list[AttackRow] = []
    if evaluation.clean is not None:
        rows.append(evaluation.clean)
    fgsm = [row for row in evaluation.attacks if row.kind == "fgsm"]
    within = [row for row in fgsm if row.epsilon <= evaluation.epsilon + 1e-12]
    if fgsm:
        # the grid of radii need not hold the primary one
        rows.append(
            max(within, key=lambda row: row.epsilon)
            if within
            else min(fgsm, key=lambda row: row.epsilon)
        )
    for kind in ("pgd", "multi_start", "adaptive"):
        same = [row for row in evaluation.attacks if row.kind == kind]
        if same:
            rows.append(max(same, key=lambda row: row.num_steps))
    return [row.name for row in rows]


def _entry(result: Results, names: Sequence[str]) -> Entry:
    evaluation, config = result.evaluation, from_dict(result.config)
    rows = {row.name: row for row in evaluation.attacks}
    title = get(config.defense).title
    settings = {k: v for k, v in config.to_dict().items() if k not in FREE}
    settings["data"] = {k: v for k, v in settings["data"].items() if k != "root"}
    seconds = [r.seconds for r in result.metrics if r.kind == "train" and r.seconds is not None]
    severities = {finding.severity for finding in evaluation.findings}
    device = str(result.environment.get("device") or "")
    if config.device == "cpu" and result.environment.get("cuda"):
        device = "CPU"  # the environment names the GPU that was there
    return Entry(
        run=result.run,
        preset=config.preset,
        defense=title,
        network=evaluation.model.removeprefix(title).removeprefix(", "),
        seed=config.seed,
        num_parameters=evaluation.num_parameters,
        flop_per_image=evaluation.flop_per_image,
        train_seconds=sum(seconds) if seconds else None,
        train_device=device,
        eot_samples=max(
            (row.eot_samples for row in evaluation.attacks if row.kind == "adaptive"), default=1
        ),
        doubt=next((x for x in ("invalid", "suspect") if x in severities), ""),
        scores={
            **{name: rows[name].score for name in names},
            WORST: evaluation.worst_case.score,
        },
        settings=settings,
    )


def _groups(entries: Sequence[Entry]) -> list[Group]:
    grouped: list[list[Entry]] = []
    for entry in entries:
        same = next((g for g in grouped if g[0].settings == entry.settings), None)
        if same is None:
            grouped.append([entry])
            continue
        for other in same:
            if other.seed == entry.seed:
                raise ConfigError(
                    f"{other.run} and {entry.run} are the same configuration and seed "
                    f"{entry.seed}; name one of them"
                )
        same.append(entry)
    names = [group[0].defense for group in grouped]
    for more in ([g[0].preset for g in grouped], [str(g[0].run) for g in grouped]):
        count = Counter(names)
        names = [
            f"{name} ({text})" if count[name] > 1 else name
            for name, text in zip(names, more, strict=True)
        ]
    return [Group(name, group) for name, group in zip(names, grouped, strict=True)]


def format_comparison(comparison: Comparison) -> str:
    """The table as Markdown: groups, then, where a group has several seeds, its runs."""
    groups = comparison.groups
    head = [
        "defense", "network", "parameters", "FLOP/image", "training", *comparison.columns, "seeds",
    ]  # fmt: skip
    lines = [describe(comparison), ""]
    lines += _markdown(head, [_cells(comparison, group) for group in groups])
    if any(len(group.entries) > 1 for group in groups):
        lines += ["", "Every run, with 95 % intervals:", ""]
        lines += _markdown(
            ["run", "seed", "training", *comparison.columns],
            [_run_cells(comparison, entry) for group in groups for entry in group.entries],
        )
    return "\n".join([*lines, *(f"\n{note}" for note in notes(comparison))])


def describe(comparison: Comparison) -> str:
    """What all runs share, in a line."""
    facts = comparison.facts
    unit = "" if comparison.pixels else " in units of the normalized image"
    if facts["norm"] != "linf":
        unit += f" in {norm_name(facts['norm'])}"
    return (
        f"{facts['data.name']} {facts['data.split']}, n = {facts['data.num_images']}, "
        f"protocol {facts['protocol']}, "
        f"epsilon {radius(facts['epsilon'], pixels=comparison.of_255)}{unit}, "
        f"weights {facts['weights']}; percent correct"
    )


def notes(comparison: Comparison) -> Iterator[str]:
    """What a reader of the numbers has to know."""
    groups = comparison.groups
    if any(len(group.entries) > 1 for group in groups):
        yield "+- is the standard deviation over seeds."
    if any(len(group.entries) == 1 for group in groups):
        yield "Intervals hold 95 %; they are of the images, not of the seeds."
    for group in groups:
        if group.doubt:
            yield f"{group.doubt}: {group.name}; see the findings of its evaluation."
    samples = {group.name: group.first.eot_samples for group in groups}
    if any(number > 1 for number in samples.values()):
        shown = ", ".join(f"{name} {number}" for name, number in samples.items())
        yield f"EoT samples of the adaptive attack: {shown}."
    devices = list(dict.fromkeys(d for group in groups for d in group.train_devices if d))
    if len(devices) == 1:
        yield f"Trained on {devices[0]}."
    elif devices:
        yield "Trained on different devices: training times do not compare."
        for group in groups:
            yield f"{group.name}: {', '.join(d or 'not recorded' for d in group.train_devices)}."
    if not comparison.pixels:
        yield "Attacks acted on normalized images: these numbers say nothing about pixels."


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    for r, row in enumerate(rows):
        yield "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        if r == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _cells(comparison: Comparison, group: Group) -> list[str]:
    first = group.first
    return [
        group.name,
        first.network,
        scaled(first.num_parameters),
        scaled(first.flop_per_image),
        "" if group.train_seconds is None else duration(group.train_seconds),
        *(show(group.spread(column), comparison.num_images) for column in comparison.columns),
        str(len(group.entries)),
    ]


def _run_cells(comparison: Comparison, entry: Entry) -> list[str]:
    return [
        str(entry.run),
        str(entry.seed),
        "" if entry.train_seconds is None else duration(entry.train_seconds),
        *(
            show(Spread(score.accuracy, None, score.interval), comparison.num_images)
            for score in (entry.scores[column] for column in comparison.columns)
        ),
    ]


def show(spread: Spread, num_images: int) -> str:
    """``76.5 +- 0.5``, or ``76.5 (72.6 to 80.0)``; percent."""

    def number(value: float) -> str:
        return percent(value, num_images).removesuffix(" %")

    if spread.interval is not None:
        low, high = spread.interval
        return f"{number(spread.mean)} ({number(low)} to {number(high)})"
    assert spread.sd is not None
    return f"{number(spread.mean)} +- {number(spread.sd)}"


def scaled(number: int | None) -> str:
    """Three digits and a unit: 9.61 M; empty for what is not known."""
    if number is None:
        return ""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write ``comparison.{csv,json,html}``, ``runs.csv`` and the figure; return the page's path.

    ``comparison.csv`` has a line for each group, ``runs.csv`` one for each run; accuracies are
    fractions with all their digits. What is not known is empty, or null in JSON.

    Raises:
        CheckpointError: the folder cannot be written, or holds something else than a comparison.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: could not be made, {explain(error, out)}") from error
    if (out / "config.json").exists():
        raise CheckpointError(f"{out}: holds a run; choose another folder for the comparison")
    chart = figures.clean_and_worst_case([_bars(comparison, g) for g in comparison.groups])
    write_figures(out, [chart])
    columns = comparison.columns
    groups = [_group_record(group, columns) for group in comparison.groups]
    runs = [_run_record(entry, columns) for group in comparison.groups for entry in group.entries]
    atomic_write_text(out / "comparison.csv", _csv(groups))
    atomic_write_text(out / "runs.csv", _csv(runs))
    by_run = {record["run"]: record for record in runs}
    atomic_write_json(
        out / "comparison.json",
        {
            "schema": SCHEMA,
            "suite": comparison.suite,
            "facts": comparison.facts,
            "columns": columns,
            "groups": [
                {**record, "runs": [by_run[str(entry.run)] for entry in group.entries]}
                for record, group in zip(groups, comparison.groups, strict=True)
            ],
        },
    )
    page = out / "comparison.html"
    atomic_write_text(
        page,
        render(
            "compare.html.j2",
            comparison=comparison,
            description=describe(comparison),
            notes=list(notes(comparison)),
            chart=chart,
            cells=lambda group: _cells(comparison, group),
            run_cells=lambda entry: _run_cells(comparison, entry),
        ),
    )
    return page


def _bars(comparison: Comparison, group: Group) -> figures.Bars:
    """Clean accuracy and worst case with their error bars."""
    clean = group.spread(CLEAN) if CLEAN in comparison.columns else None
    worst = group.spread(WORST)
    return figures.Bars(
        group.name,
        None if clean is None else (clean.mean, *clean.bounds),
        (worst.mean, *worst.bounds),
    )


def _group_record(group: Group, columns: Sequence[str]) -> dict[str, Any]:
    """A group as JSON values."""
    first = group.first
    return {
        "name": group.name,
        "defense": first.defense,
        "preset": first.preset,
        "network": first.network,
        "seeds": [entry.seed for entry in group.entries],
        "num_parameters": first.num_parameters,
        "flop_per_image": first.flop_per_image,
        "train_seconds": group.train_seconds,
        "train_devices": group.train_devices,
        "eot_samples": first.eot_samples,
        "doubt": group.doubt,
        "accuracy": {
            column: {"mean": x.mean, "sd": x.sd, "interval": x.interval}
            for column, x in ((column, group.spread(column)) for column in columns)
        },
    }


def _run_record(entry: Entry, columns: Sequence[str]) -> dict[str, Any]:
    """A run as JSON values."""
    return {
        "run": str(entry.run),
        "defense": entry.defense,
        "preset": entry.preset,
        "network": entry.network,
        "seed": entry.seed,
        "num_parameters": entry.num_parameters,
        "flop_per_image": entry.flop_per_image,
        "train_seconds": entry.train_seconds,
        "train_device": entry.train_device,
        "eot_samples": entry.eot_samples,
        "doubt": entry.doubt,
        "accuracy": {
            column: {
                "mean": score.accuracy,
                "interval": score.interval,
                "num_correct": score.num_correct,
                "num_images": score.num_images,
            }
            for column, score in ((column, entry.scores[column]) for column in columns)
        },
    }


def _csv(records: Sequence[dict[str, Any]]) -> str:
    """A line for each record: lists joined, accuracies as columns of their own."""
    stream = io.StringIO()
    rows = [_flat(record) for record in records]
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in record.items():
        if key == "accuracy":
            for column, numbers in value.items():
                low, high = numbers["interval"] or (None, None)
                rest = {k: v for k, v in numbers.items() if k != "interval"}
                row |= {f"{column} {k}": v for k, v in {**rest, "low": low, "high": high}.items()}
        else:
            row[key] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return row
