"""Read what the stages of a suite wrote, also if it was cut off, and make a page of text of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.runner import Outcome


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def collect_rows(folder: Path, out: Path) -> None:
    """All rows that benchmarks wrote into a folder, in one file."""
    lines = [json.dumps(row) for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    if lines:
        (out / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bench_lines(out: Path) -> list[str]:
    """Every row of steps and ops: milliseconds by column, and eager's time over ours."""
    lines = []
    for row in read_rows(out / "rows.jsonl"):
        if row["bench"] in ("step", "end_to_end", "ops"):
            columns = row["columns"]
            times = ", ".join(f"{k} {v['median_ms']:.3g}" for k, v in columns.items())
            gain = columns["eager"]["median_ms"] / columns["ours"]["median_ms"]
            lines.append(f"{row['case']}: {times} ms; {gain:.2f}x eager")
    return lines


def conv_lines(out: Path) -> list[str]:
    """Of each direction and batch, milliseconds of all convolutions of a step by column.

    A column that has no number for each of them is left out.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in read_rows(out / "rows.jsonl"):
        if row["bench"] == "conv":
            direction = "backward" if row["backward"] else "forward"
            groups.setdefault((direction, row["batch_size"]), []).append(row)
    lines = []
    for (direction, batch_size), rows in groups.items():
        common = [k for k in rows[0]["columns"] if all(k in row["columns"] for row in rows)]
        ms = {k: sum(x["count"] * x["columns"][k]["median_ms"] for x in rows) for k in common}
        gflop = sum(row["count"] * row["gflop"] for row in rows)
        times = ", ".join(f"{k} {v:.3g} ms ({gflop / v:.3g} TFLOP/s)" for k, v in ms.items())
        launches = sum(row["count"] for row in rows)
        lines.append(f"{launches} convolutions {direction}, N={batch_size}: {times}")
    return lines


def attack_lines(out: Path) -> list[str]:
    """How each back end's attack compares with the reference's."""
    return [
        f"{row['case']}, {name}: robust accuracy {100 * x['robust_accuracy']:.2f} %, "
        f"signs {100 * x['sign_agreement']:.2f} %, time {x['ratio']:.3f}"
        for row in read_rows(out / "rows.jsonl")
        if row["bench"] == "attack_quality"
        for name, x in row["columns"].items()
    ]


def training_lines(out: Path) -> list[str]:
    rows = read_rows(out / "training.jsonl")
    lines = [
        f"{x['phase']}: validation clean {100 * x['clean_accuracy']:.1f} %, "
        f"attacked {100 * x['robust_accuracy']:.1f} %, {x['num_images']} images"
        for x in rows
        if x["kind"] == "validation"
    ]
    speeds = {x["phase"]: x["images_per_s"] for x in rows if x["kind"] == "train"}
    return lines[-2:] + [f"{phase}: {speed:.0f} images/s" for phase, speed in speeds.items()]


def hardware_lines(out: Path) -> list[str]:
    """The summary that measure_hardware.py made of its rows, made again from what it wrote."""
    rows = [
        x
        for x in read_rows(out / "measurements.jsonl")
        if x["measurement"] not in ("environment", "info")
    ]
    if not rows:
        return []
    # Not at the top: it imports torch.
    from measure_hardware import summarize

    return summarize(rows)


def summarize_all(out: Path, outcomes: Sequence[Outcome], gpu: dict[str, Any]) -> str:
    blocks = [[f"{gpu['gpu'] or 'no GPU, a dry run'}, torch {gpu['torch']}"]]
    for make in (hardware_lines, conv_lines, bench_lines, attack_lines, training_lines):
        try:
            blocks.append(make(out))
        except Exception as error:
            # A table must not cost the others.
            blocks.append([f"{make.__name__}: {error!r}"])
    blocks.append([str(outcome) for outcome in outcomes])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)
