"""Print a comparison as Markdown, and write it as CSV, JSON and one HTML page."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dwf.checks import CheckpointError
from dwf.files import atomic_write_json, atomic_write_text, explain, safe_cell
from dwf.report import figures
from dwf.report.compare import CLEAN, WORST, Comparison, Entry, SeedGroup, Spread
from dwf.report.page import render, write_figures
from dwf.report.paired import paired
from dwf.report.words import bare_percent, duration, norm_name, radius, scaled

SCHEMA = 1


def format_comparison(comparison: Comparison, width: int | None = None) -> str:
    """The table as Markdown: groups, then, where a group has several seeds, its runs.

    A terminal of ``width`` characters gets as many columns as fit, the first ones first.
    """
    groups, columns = ranked(comparison), headline_first(comparison.columns)
    head = ["defense", *columns, "seeds"]
    head += ["network", "parameters", "FLOP/image", "training"]
    lines = [_description(comparison), ""]
    lines += _markdown(head, [_cells(comparison, group) for group in groups], width)
    if any(len(group.entries) > 1 for group in groups):
        lines += ["", "Every run, with 95 % intervals:", ""]
        lines += _markdown(
            ["run", *columns, "seed", "training"],
            [_run_cells(comparison, entry) for group in groups for entry in group.entries],
            width,
        )
    return "\n".join([*lines, *(f"\n{note}" for note in _notes(comparison))])


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
    groups = [
        {
            **_group_record(group, columns),
            "runs": [_run_record(entry, columns) for entry in group.entries],
        }
        for group in comparison.groups
    ]
    atomic_write_text(out / "comparison.csv", _csv(groups))
    atomic_write_text(out / "runs.csv", _csv([run for group in groups for run in group["runs"]]))
    table = {
        "schema": SCHEMA,
        "suite": comparison.suite,
        "facts": comparison.facts,
        "columns": columns,
        "groups": groups,
    }
    atomic_write_json(out / "comparison.json", table)
    page = out / "comparison.html"
    text = render(
        "compare.html.j2",
        comparison=comparison,
        description=_description(comparison),
        notes=list(_notes(comparison)),
        chart=chart,
        group_rows=[
            (_link(group.first, out), _cells(comparison, group)) for group in ranked(comparison)
        ],
        run_rows=[
            (_link(entry, out), _run_cells(comparison, entry))
            for group in ranked(comparison)
            for entry in group.entries
        ],
        columns=headline_first(columns),
    )
    atomic_write_text(page, text)
    return page


def ranked(comparison: Comparison) -> list[SeedGroup]:
    """The groups by their worst case, the most robust first; what is invalid comes last."""
    return sorted(comparison.groups, key=lambda g: (g.doubt == "invalid", -g.spread(WORST).mean))


def headline_first(columns: Sequence[str]) -> list[str]:
    """The columns of a table that people read: the worst case, which no screen may cut off."""
    return sorted(columns, key=lambda column: column != WORST)


def show(spread: Spread, num_images: int) -> str:
    """``76.5 +- 0.5``, or ``76.5 (72.6 to 80.0)``; percent."""
    mean = bare_percent(spread.mean, num_images)
    if spread.sd is not None:
        return f"{mean} +- {bare_percent(spread.sd, num_images)}"
    low, high = (bare_percent(bound, num_images) for bound in spread.bounds)
    return f"{mean} ({low} to {high})"


def _description(comparison: Comparison) -> str:
    """What all runs share, in a line."""
    facts = comparison.facts
    unit = "" if comparison.pixels else " in units of the normalized image"
    if facts["norm"] != "linf":
        unit += f" in {norm_name(facts['norm'])}"
    return (
        f"{facts['data.name']} {facts['data.split']}, n = {facts['data.num_images']}, "
        f"protocol {facts['protocol']}, "
        f"epsilon {radius(facts['epsilon'], of_255=comparison.of_255)}{unit}, "
        f"weights {facts['weights']}; percent correct"
    )


def _notes(comparison: Comparison) -> Iterator[str]:
    """Sentences that a reader of the numbers needs."""
    groups = comparison.groups
    if any(len(group.entries) > 1 for group in groups):
        yield "+- is the standard deviation over seeds."
    if any(len(group.entries) == 1 for group in groups):
        yield "95 % intervals are over images, not over seeds."
    for group in groups:
        if group.doubt:
            yield f"{group.doubt}: {group.name}; see the findings of its evaluation."
    yield from _paired_notes(ranked(comparison))
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


def _paired_notes(groups: Sequence[SeedGroup]) -> Iterator[str]:
    """The first run of the best group against that of each other, image by image."""
    best, *others = groups
    for group in others:
        mine, its = best.first.stands, group.first.stands
        if mine is None or its is None or len(mine) != len(its):
            continue
        test = paired(mine, its)
        yield (
            f"{best.name} against {group.name}, seeds {best.first.seed} and {group.first.seed}, "
            f"worst case: {test.first_only} images stand in the first alone, {test.second_only} in "
            f"the second alone; McNemar's exact p = {test.p_value:.2g}."
        )


def _markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None
) -> Iterator[str]:
    """Lines of a table with the columns that fit into so many characters, at least the first."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    ends = itertools.accumulate((w + 3 for w in widths), initial=1)
    shown = max(1, sum(end <= width for end in ends) - 1) if width else len(head)
    rows, widths = [row[:shown] for row in rows], widths[:shown]
    for r, row in enumerate(rows):
        yield "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        if r == 0:
            yield "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    if shown < len(head):
        yield ""
        yield f"not shown, for want of room: {', '.join(head[shown:])}; the page has them"


def _cells(comparison: Comparison, group: SeedGroup) -> list[str]:
    first = group.first
    return [
        group.name,
        *(
            show(group.spread(column), comparison.num_images)
            for column in headline_first(comparison.columns)
        ),
        str(len(group.entries)),
        first.network,
        scaled(first.num_parameters),
        scaled(first.flop_per_image),
        "" if group.train_seconds is None else duration(group.train_seconds),
    ]


def _run_cells(comparison: Comparison, entry: Entry) -> list[str]:
    scores = [entry.scores[column] for column in headline_first(comparison.columns)]
    return [
        str(entry.run),
        *(
            show(Spread(score.accuracy, None, score.interval), comparison.num_images)
            for score in scores
        ),
        str(entry.seed),
        "" if entry.train_seconds is None else duration(entry.train_seconds),
    ]


def _link(entry: Entry, out: Path) -> str:
    """The run's page as seen from the comparison's folder; empty if there is none."""
    page = entry.run / "report.html"
    return Path(os.path.relpath(page, out)).as_posix() if page.is_file() else ""


def _bars(comparison: Comparison, group: SeedGroup) -> figures.Bars:
    """Clean accuracy and worst case with their error bars."""
    clean = _bar(group.spread(CLEAN)) if CLEAN in comparison.columns else None
    return figures.Bars(group.name, clean=clean, worst=_bar(group.spread(WORST)))


def _bar(spread: Spread) -> figures.Bar:
    low, high = spread.bounds
    return figures.Bar(mean=spread.mean, low=low, high=high)


def _group_record(group: SeedGroup, columns: Sequence[str]) -> dict[str, Any]:
    """A group as JSON values."""
    first = group.first
    spreads = {column: group.spread(column) for column in columns}
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
            for column, x in spreads.items()
        },
    }


def _run_record(entry: Entry, columns: Sequence[str]) -> dict[str, Any]:
    """A run as JSON values."""
    scores = {column: entry.scores[column] for column in columns}
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
            for column, score in scores.items()
        },
    }


def _csv(records: Sequence[dict[str, Any]]) -> str:
    """A line for each record: lists joined, each number of an accuracy in its own column."""
    stream = io.StringIO()
    rows = [_flat(record) for record in records]
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: safe_cell(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in record.items():
        if key == "accuracy":
            for column, numbers in value.items():
                low, high = numbers["interval"] or (None, None)
                rest = {k: v for k, v in numbers.items() if k != "interval"}
                row |= {f"{column} {k}": v for k, v in {**rest, "low": low, "high": high}.items()}
        elif key != "runs":  # they have their own file
            row[key] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return row
