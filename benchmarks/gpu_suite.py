"""Prove, test and measure this code on a GPU in one call of ten minutes, also from a checkout.

    python benchmarks/gpu_suite.py --out DIR [--minutes 9.7] [--data FILE.npz] [--caches DIR/caches]

Each stage is a process of its own with a time limit: one that fails or hangs is logged, and the
rest goes on. Results are written as they come, so that whoever ends this program loses what it was
doing and nothing before. DIR gets log.txt, measurements.jsonl, rows/ and rows.jsonl (of all
benchmarks), training.jsonl, caches/ and summary.txt; the summary is printed last. Nothing is
downloaded or installed, and nothing of the GPU is set. In this order, a first call answers:

    tools             which driver, nvcc and CMake are there?
    build             do the kernels compile here? Strict: a build without Python.h fails
    hopper kernel     is the Hopper convolution right on a device?
    self-test         is every kernel right, in every dtype? A line for each op as it goes
    graphs            do captured steps replay what eager ones compute?
    hardware          memory, L2 cache, launches, matrix products: the ceilings
    bench step        a PGD step of nine ResNet-18 on 128 images: eager, the best stock torch, ours
    bench conv        every convolution of that step
    tests fast path   whole networks on every back end, on 8 workers if pytest-xdist is there
    attack quality    does the fast attack find what the slow one finds?
    training          with --data: the recipe, shortened, on real images, for all the time left

Named in --stages, more run: "tests" (single ops), "bench step, all cases", "bench ops", "bench end
to end". `--stages bench tests` takes all whose name starts so. A second call with --caches, the
folder caches/ of a first one, finds compiled kernels and choices there.

A machine without CMake, pybind11 and pytest gets them from `pip install --target FOLDER`: put
FOLDER on PYTHONPATH and FOLDER/bin on PATH. CIFAR-10 in less than 50 MiB, so many images as go with
a checkout into 64 MiB:

    python - <<END
    import numpy, dwf.data
    train, test = (dwf.data.load("cifar10", split=name) for name in ("train", "test"))
    numpy.savez_compressed(
        "cifar10.npz", x_train=train.images[:16000], y_train=train.labels[:16000],
        x_test=test.images[:1000], y_test=test.labels[:1000],
    )
    END

Exit code 0: every stage did what it should; 1: some did not; 2: no GPU, nothing was run, and what
would have been is printed. --dry-run runs all stages' plumbing on any machine, measuring nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.runner import ROOT, Outcome, Stage, run_stage
from suite.stages import plan
from suite.summary import collect_rows, summarize_all

# Left for ending the last stage and writing the summary, and at least for each stage to come.
RESERVE_S = 20.0
RESERVE_PER_STAGE_S = 15.0

PROBE = """
import json, torch
found = {"torch": torch.__version__, "gpu": None}
if torch.cuda.is_available():
    from moe_kernels import native
    capability = torch.cuda.get_device_capability()
    found |= {
        "gpu": torch.cuda.get_device_name(),
        "capability": capability,
        "built": native.supports_device(capability),
    }
print(json.dumps(found))
"""


def probe() -> dict[str, Any]:
    """GPU, torch, and whether kernels for the GPU are built; in a process of its own, because
    this one shall survive whatever torch does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    if done.returncode:
        raise SystemExit(f"torch does not work here:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _python_path() -> list[str]:
    return [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]


def chosen(stages: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    """The stages that are named, by their names or first words; by default all but extra ones."""
    if names is None:
        return [x for x in stages if not x.extra]
    return [x for x in stages if {x.name, x.name.split()[0]} & set(names)]


def seconds_for(left: float, to_come: Sequence[Stage]) -> float:
    """What a stage may take of the time left: each that is to come keeps some of it.

    Not all that it would like to have: the first stages are worth more than the last, and the one
    that takes whatever is left has no claim.
    """
    kept = sum(min(x.estimate_s or 0.0, RESERVE_PER_STAGE_S) for x in to_come if not x.skipped)
    return max(left - kept, min(left, RESERVE_PER_STAGE_S))


def run_all(
    stages: Sequence[Stage], options: argparse.Namespace, gpu: dict[str, Any], deadline: float
) -> tuple[list[Outcome], str]:
    """Run the stages until the deadline on the monotonic clock; outcomes and the summary."""
    outcomes: list[Outcome] = []
    text = ""
    for i, stage in enumerate(stages):
        left = deadline - time.monotonic()
        if left < 1 and not stage.skipped:
            stage = dataclasses.replace(stage, skipped="the time was up")
        seconds = seconds_for(left, stages[i + 1 :])
        outcomes.append(run_stage(stage, options.out / "log.txt", seconds))
        print(outcomes[-1], flush=True)
        collect_rows(options.out / "rows", options.out)
        # After every stage: whoever ends this program early has what there was.
        text = summarize_all(options.out, outcomes, gpu)
        (options.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return outcomes, text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    # What starts Python is part of the call's time.
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--minutes", type=float, default=9.7, help="for everything together")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz, to train on for a moment")
    parser.add_argument("--caches", type=Path, help="the folder caches/ of an earlier call")
    parser.add_argument("--stages", nargs="+", help="only these: names or their first words")
    parser.add_argument("--dry-run", action="store_true", help="try all stages, measure nothing")
    options = parser.parse_args(argv)
    deadline = began + 60 * options.minutes - RESERVE_S
    options.out = options.out.resolve()
    gpu = probe()
    with tempfile.TemporaryDirectory(prefix="gpu_suite-") as scratch:
        if gpu["gpu"] is None and not options.dry_run:
            print("Would run, with output to log.txt:")
            for stage in plan(options, {"capability": (9, 0)}, Path(scratch)):
                print(f"  {stage.name}: {stage.skipped or ''}")
                for command in stage.commands:
                    print(f"    {' '.join(command)}")
            print("gpu_suite: torch finds no GPU on this machine, nothing was run; see --dry-run")
            return 2
        options.out.mkdir(parents=True, exist_ok=True)
        if options.caches is not None:
            shutil.copytree(options.caches, options.out / "caches", dirs_exist_ok=True)
        stages = chosen(plan(options, gpu, Path(scratch)), options.stages)
        outcomes, text = run_all(stages, options, gpu, deadline)
        print(f"\n{text}")
    return int(any(x.status in ("failed", "timed out") for x in outcomes))


if __name__ == "__main__":
    # Stages have sessions of their own: who ends this program wants to end them, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
