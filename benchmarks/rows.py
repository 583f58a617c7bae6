"""Append measurements to files of JSON lines, one row as soon as it is there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_kernels import lang, native
from moe_kernels.timing import device_slug, environment

if TYPE_CHECKING:
    from dwf.evaluation import Evaluation

RESULTS = Path(__file__).parent / "results"


def folder() -> Path:
    """results/, or the folder that DWF_BENCH_RESULTS names."""
    return Path(os.environ.get("DWF_BENCH_RESULTS") or RESULTS)


def stem(bench: str, device: torch.device) -> str:
    """Start of the names of a benchmark's files on this device; a date follows."""
    return f"{bench}_{device_slug(device)}"


def append(row: dict[str, Any], device: torch.device, name: str | None = None) -> Path:
    """Append a row and the facts of its machine; `name` is that of a file without a date.

    The default file is <bench>_<device>_<date>.jsonl, after the row's "bench".
    """
    path = folder() / f"{name or stem(row['bench'], device) + time.strftime('_%Y-%m-%d')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **environment(device)}) + "\n")
    return path


def verdict_of(result: Evaluation) -> dict[str, Any]:
    """What a row says of an evaluation."""
    return {
        "clean": result.clean_accuracy,
        "worst_case": result.worst_case.accuracy,
        "interval": result.worst_case.interval,
        "verdict": result.verdict,
        "findings": [finding.name for finding in result.findings],
        "parameters": result.num_parameters,
    }


def last(bench: str, device: torch.device, case: str) -> dict[str, Any] | None:
    """The newest row of a case on this device, if there is one."""
    # The files' dates sort as text, and the rows of a file are in order.
    for path in sorted(folder().glob(f"{stem(bench, device)}_*.jsonl"), reverse=True):
        for line in reversed(path.read_text(encoding="utf-8").splitlines()):
            row: dict[str, Any] = json.loads(line)
            if row["case"] == case:
                return row
    return None


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be measured here: our kernels are not compiled for the device."""
    compiled = native.has_cpu if device.type == "cpu" else native.has_cuda or not lang.missing
    if compiled:
        return None
    reason = native.missing or "built without CUDA"
    return f"no row is measured without compiled kernels ({reason}): pip install -e ."


def refuse_unbuilt(device: torch.device) -> None:
    """End the program with one line if our kernels are not compiled for the device."""
    if reason := obstacle(device):
        raise SystemExit(reason)
