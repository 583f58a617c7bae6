"""The stages of gpu_suite.py, what is worth most first, with what each is believed to take.

Estimates are for one H200 with 16 cores, made of what the same work takes elsewhere; no stage has
run on one yet. Limits are generous: the last stage takes whatever is left, and gives when others
take longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.runner import ROOT, Command, Stage, append

BENCHMARKS = ROOT / "benchmarks"
PYTHON = [sys.executable, "-u"]
# Processes that share the GPU in the fast-path tests.
NUM_WORKERS = 8


def plan(options: argparse.Namespace, gpu: dict[str, Any], scratch: Path) -> list[Stage]:
    """All stages; those that are `extra` run only when they are named."""
    out, dry = options.out, options.dry_run
    common = environment(out)

    def bench(name: str, cases: Sequence[str], estimate_s: float, *, extra: bool = False) -> Stage:
        file = str(BENCHMARKS / f"bench_{name.split(',')[0].replace(' ', '_')}.py")
        return _pytest(f"bench {name}", [file, *cases], estimate_s, extra=extra)

    stages = [
        Stage("tools", _tools(), 15, 5),
        build_stage(gpu, scratch, dry=dry),
        _pytest("hopper kernel", ["-m", "gpu", "tests/test_conv_sm90a.py"], 30),
        _selftest(out),
        _pytest("graphs", ["-m", "gpu", "tests/test_graphs.py"], 15),
        _hardware(out, dry=dry),
        bench("step", ["--collect-only"] if dry else ["-k", "pgd_step and B128"], 100),
        bench("conv", ["-k", "small"] if dry else [], 60),
        _fast_path(dry=dry),
        _attack_quality(scratch, dry=dry),
        training_stage(options, scratch),
        _tests(dry=dry),
        bench("step, all cases", ["--collect-only"] if dry else [], 240, extra=True),
        bench("ops", ["-k", "linf_step_-128x3x32x32-float32"] if dry else [], 45, extra=True),
        bench("end to end", ["--collect-only"] if dry else [], 60, extra=True),
    ]
    return [dataclasses.replace(x, environment={**common, **x.environment}) for x in stages]


def environment(out: Path) -> dict[str, str]:
    """For all stages: this checkout, rows and caches under `out`, written as they come."""
    caches = out / "caches"
    paths = [str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DWF_BENCH_RESULTS": str(out / "rows"),
        "MOE_KERNELS_CACHE_DIR": str(caches / "choices"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TRITON_STORE_BINARY_ONLY": "1",  # the cache of a second call, not material to read
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }


def _tools() -> list[Command]:
    tools = [["nvidia-smi"], ["nvcc", "--version"], ["cmake", "--version"]]
    return [*(x for x in tools if shutil.which(x[0])), [*PYTHON, "--version"]]


def build_stage(gpu: dict[str, Any], scratch: Path, *, dry: bool) -> Stage:
    """CMake straight into moe_kernels/, for this GPU alone; a dry run only configures.

    Strict: a build that had to leave something out, for want of Python.h say, fails and says so.
    """
    if gpu.get("built"):
        return Stage("build", skipped="kernels for this GPU are there already")
    missing = [x for x in ("cmake",) if not shutil.which(x)]
    missing += [x for x in ("pybind11",) if importlib.util.find_spec(x) is None]
    if missing:
        return Stage("build", skipped=f"no {' and '.join(missing)}: Triton kernels only")
    cmake_folder = Path(str(importlib.util.find_spec("pybind11").origin)).parent / "share/cmake"  # type: ignore[union-attr]
    folder = str(scratch / "build")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
        f"-Dpybind11_DIR={cmake_folder / 'pybind11'}",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]
    # Of the build alone: where it fails, the other stages run on Triton.
    strict = {"MOE_KERNELS_STRICT": "1"}
    if dry:
        skip_cuda = {"MOE_KERNELS_SKIP_CUDA": "1"}
        return Stage("build", [configure], 110, 60, {**strict, **skip_cuda})
    major, minor = gpu["capability"]
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    commands = [
        configure,
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)],
        ["cmake", "--install", folder, "--prefix", str(ROOT)],
    ]
    return Stage("build", commands, 110, 60, {**strict, "MOE_KERNELS_CUDA_ARCHS": arch})


def _pytest(
    name: str, arguments: Sequence[str], estimate_s: float, *, extra: bool = False
) -> Stage:
    if importlib.util.find_spec("pytest") is None:
        return Stage(name, skipped="pytest is not installed", extra=extra)
    command = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    command += ["--tb=short", "--maxfail=50", *arguments]
    # Interrupted it tells what failed so far; ended it would not.
    return Stage(
        name,
        [command],
        min(1.5 * estimate_s, estimate_s + 40),
        estimate_s,
        stop=signal.SIGINT,
        extra=extra,
    )


def _selftest(out: Path) -> Stage:
    def keep_info(output: str) -> str:
        # A line for each op came first; the object starts and ends with a line of its own.
        lines = output.splitlines()
        first = lines.index("{")
        facts = json.loads("\n".join(lines[first : lines.index("}", first) + 1]))
        append(out / "measurements.jsonl", json.dumps({"measurement": "info", **facts}) + "\n")
        wrong = sum(x["fault"] is not None for x in facts["selftest"])
        story = facts["build"]["line"] if facts["build"] else "nothing was compiled"
        return f"{len(facts['selftest']) - wrong} right, {wrong} wrong; {story}"

    command = [*PYTHON, "-m", "moe_kernels.info", "--json", "--selftest"]
    return Stage("self-test", [command], 100, 60, after=keep_info)


def _hardware(out: Path, *, dry: bool) -> Stage:
    command = [*PYTHON, str(BENCHMARKS / "measure_hardware.py")]
    command += ["--out", str(out / "measurements.jsonl"), "--minutes", "0.7"]
    return Stage("hardware", [[*command, *(["--small"] * dry)]], 60, 45)


def _fast_path(*, dry: bool) -> Stage:
    """Whole networks; the kernels compile once for all workers, in the cache that they share."""
    shared = ["-n", str(NUM_WORKERS)] if importlib.util.find_spec("xdist") and not dry else []
    return _pytest("tests fast path", ["-m", "gpu", "tests/test_plan_gpu.py", *shared], 60)


def _tests(*, dry: bool) -> Stage:
    """The GPU tests of single ops."""
    files = ["conv_sm90a", "graphs", "plan_gpu"]
    ignored = [f"--ignore=tests/test_{name}.py" for name in files]
    which = ["tests/test_timing.py"] if dry else ["tests", *ignored]
    return _pytest("tests", ["-m", "gpu", *which], 120, extra=True)


def _attack_quality(scratch: Path, *, dry: bool) -> Stage:
    # Wide and long enough that bfloat16 costs as little as in networks that one would use.
    attacked = str(scratch / "attacked")
    train = [*PYTHON, "-m", "dwf", "train", "smoke", "model.width=16", "data.num_train=1024"]
    train += ["--out", attacked, "--no-eval"]
    quality = [*PYTHON, str(BENCHMARKS / "attack_quality.py")]
    commands = [train, [*quality, attacked, "--num-images", "1797"]]
    return Stage("attack quality", [[*quality, "--help"]] if dry else commands, 75, 45)


def training_stage(options: argparse.Namespace, scratch: Path) -> Stage:
    """The whole recipe, shortened; what it reached when the time is up counts."""
    run = scratch / "run"
    if options.dry_run:
        # Two small experts, an epoch of two steps each.
        name = ["smoke", "data.num_train=64", "model.num_fgsm=0"]
        name += ["pretrain.num_epochs=1", "joint.num_epochs=1"]
    elif options.data is not None:
        file = options.data.resolve()
        name = ["cifar10-small", f"data.name={file}", "pretrain.num_epochs=1", "joint.num_epochs=2"]
    else:
        return Stage("training", skipped="no --data FILE.npz")
    command = [*PYTHON, "-m", "dwf", "train", *name, "--out", str(run), "--no-eval"]
    keep = {run / "metrics.jsonl": options.out / "training.jsonl"}
    return Stage("training", [command], 60 * options.minutes, None, keep=keep)
