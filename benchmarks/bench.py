"""Work through one case of a benchmark: skip it, tell how far it is, time it, write its row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import rows
import torch

from moe_kernels.timing import Timing, compare, summarize

# A row that is slower than the last one of its case by more than this fails, on a GPU.
MAX_SLOWDOWN = 1.05
# Between two lines about rounds of the stopwatch.
QUIET_S = 10.0


class Bench:
    """What one case of a benchmark works with.

    An interrupt while the stopwatch runs does not lose the case: `time` returns what was measured
    so far, `record` writes it with "stopped": true, and then the interrupt goes on.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self.device = device
        self.say = say
        self._interrupt: KeyboardInterrupt | None = None

    def require(self, *, gpu: bool, minutes: bool = False) -> None:
        """Skip a case that is not for this machine, or takes minutes if those are not asked for."""
        if gpu != (self.device.type == "cuda"):
            pytest.skip("too slow for a CPU" if gpu else "a small case, for a CPU")
        if minutes and not os.environ.get("DWF_BENCH_FULL"):
            pytest.skip("takes minutes on a CPU, DWF_BENCH_FULL=1 runs it")

    def time(
        self,
        columns: Mapping[str, Callable[..., Any]],
        inputs: Sequence[Any],
        *,
        min_samples: int,
        min_s: float,
    ) -> dict[str, Timing]:
        """`moe_kernels.timing.compare`, telling now and then how far it is."""
        if os.environ.get("DWF_BENCH_QUICK"):  # does it run? no number to keep comes of it
            min_samples, min_s = 2, 0.0
        began = said = time.monotonic()
        so_far: Mapping[str, list[float]] = {}

        def after_round(samples: Mapping[str, list[float]]) -> None:
            nonlocal said, so_far
            so_far = samples
            if time.monotonic() - said > QUIET_S:
                said = time.monotonic()
                num_rounds = len(next(iter(samples.values())))
                self.say(f"round {num_rounds}, at least {min_samples} ({said - began:.0f} s)")

        self.say(f"timing {', '.join(columns)}")
        try:
            return compare(
                columns, inputs, min_samples=min_samples, min_s=min_s, after_round=after_round
            )
        except KeyboardInterrupt as interrupt:
            num_rounds = min(map(len, so_far.values()), default=0)
            if num_rounds < 2:
                raise
            self._interrupt = interrupt
            return summarize({name: times[:num_rounds] for name, times in so_far.items()})

    def record(self, row: dict[str, Any]) -> None:
        """Write a row and say its times; on a GPU, fail if ours became slower than in the last.

        The row needs "bench", "case", and "columns" with "median_ms" for each. `rows.append` adds
        the facts of the machine.
        """
        previous = rows.last(row["bench"], self.device, row["case"])
        stopped = {} if self._interrupt is None else {"stopped": True}
        path = rows.append({**row, **stopped}, self.device)
        times = (
            f"{k} {x['median_ms']:.4g} ms ({x['ratio']:.2f})" for k, x in row["columns"].items()
        )
        self.say(", ".join(times))
        self.say(f"row written to {path}")
        if self._interrupt is not None:
            raise self._interrupt
        # CPU clocks of shared machines wander by more than that.
        if previous is not None and self.device.type == "cuda":
            before, now = (x["columns"]["ours"]["median_ms"] for x in (previous, row))
            assert now <= MAX_SLOWDOWN * before, (
                f"{row['case']}: {now:.4g} ms, it was {before:.4g} ms at {previous['commit']}"
            )
