"""What all benchmarks share: the device, and rows of JSON that are only ever appended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch starts its threads: spinning ones cost a whole time slice each on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from moe_kernels.timing import device_slug, environment

RESULTS = Path(__file__).parent / "results"
# A row that is slower than the last one of its case by more than this fails, on a GPU.
MAX_SLOWDOWN = 1.05

Record = Callable[[str, dict[str, Any]], None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def record(device: torch.device) -> Record:
    """Append a row to results/<bench>_<device>_<date>.jsonl, then compare it with the last one.

    `record("ops", row)` needs in the row "case", a name, and "columns", with "median_ms" in its
    "ours". It adds the facts of `environment`. DWF_BENCH_RESULTS names another folder.
    """
    facts = environment(device)

    def append(bench: str, row: dict[str, Any]) -> None:
        folder = Path(os.environ.get("DWF_BENCH_RESULTS") or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{bench}_{device_slug(device)}"
        previous = _last_row(folder, stem, row["case"])
        with (folder / f"{stem}_{time.strftime('%Y-%m-%d')}.jsonl").open("a") as file:
            file.write(json.dumps({"bench": bench, **row, **facts}) + "\n")
        # CPU clocks of shared machines wander by more than that.
        if previous is not None and device.type == "cuda":
            before, now = (x["columns"]["ours"]["median_ms"] for x in (previous, row))
            assert now <= MAX_SLOWDOWN * before, (
                f"{row['case']}: {now:.4g} ms, it was {before:.4g} ms at {previous['commit']}"
            )

    return append


def _last_row(folder: Path, stem: str, case: str) -> dict[str, Any] | None:
    # The files' dates sort as text, and the rows of a file are in order.
    for path in sorted(folder.glob(f"{stem}_*.jsonl"), reverse=True):
        for line in reversed(path.read_text().splitlines()):
            row: dict[str, Any] = json.loads(line)
            if row["case"] == case:
                return row
    return None
