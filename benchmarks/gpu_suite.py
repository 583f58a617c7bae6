"""Prove, test and measure this code on a GPU in one call, also from a checkout.

    python benchmarks/gpu_suite.py --out DIR [--minutes 9] [--data FILE.npz] [--stages tests ...]

Compiles the kernels into the checkout if they are missing, proves and tests them, runs every
benchmark, measures the hardware, attacks a small trained model on every back end, and with --data
trains for a moment. Each stage is a process of its own with a time limit: one that fails or hangs
is logged, and the rest goes on. DIR gets log.txt, measurements.jsonl, rows.jsonl (of all
benchmarks), training.jsonl and summary.txt; the summary is printed last. Nothing is downloaded or
installed, and nothing of the GPU is set.

Exit code 0: every stage did what it should; 1: some did not; 2: no GPU, nothing was run, and what
would have been is printed. --dry-run runs all stages' plumbing on any machine, measuring nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
# Left for ending the last stage and writing the summary, and for each stage that is still to come.
RESERVE_S = 10.0
RESERVE_PER_STAGE_S = 15.0
# Between asking a process to stop and killing it: training saves a checkpoint when asked.
GRACE_S = 15.0
# A stage that says more than this is cut in the middle.
MAX_LOG_BYTES = 2**20

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

# What runs whole networks; all other tests are of single ops.
FAST_PATH_TESTS = [f"tests/test_{name}.py" for name in ("plan_gpu", "graphs", "conv_sm90a")]

Command = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that run one after the other until one fails, within `limit_s` altogether.

    `skipped` is the reason not to run; `stop` asks it to end when the time is up.
    """

    name: str
    commands: Sequence[Command] = ()
    limit_s: float = 60.0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: str | None = None
    stop: signal.Signals = signal.SIGTERM
    # Takes the stage's output and keeps what matters; what it returns replaces the last line.
    after: Callable[[str], str | None] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a stage: "ok", "failed", "timed out" or "skipped"; `last` is its last line."""

    name: str
    status: str
    seconds: float
    last: str

    def __str__(self) -> str:
        return f"{self.name:<18} {self.status:<10} {self.seconds:6.1f} s  {self.last[:110]}"


def run_stage(stage: Stage, log: Path, seconds: float) -> Outcome:
    """Run a stage within `seconds`, its output appended to the log; never raises for its faults."""
    if stage.skipped:
        _append(log, f"\n=== {stage.name}: skipped, {stage.skipped}\n")
        return Outcome(stage.name, "skipped", 0.0, stage.skipped)
    began = time.monotonic()
    limit_s = min(stage.limit_s, seconds)
    _append(log, f"\n=== {stage.name}, at most {limit_s:.0f} s\n")
    offset = log.stat().st_size
    status = "ok"
    for command in stage.commands:
        _append(log, f"$ {' '.join(command)}\n")
        left = limit_s - (time.monotonic() - began)
        code = _run(command, stage, log, left) if left > 0 else None
        if code != 0:
            status = "timed out" if code is None else "failed"
            _append(log, f"=== {stage.name} {status}" + (f", exit code {code}\n" if code else "\n"))
            break
    output = _text(log, offset)
    _shorten(log, offset)
    last = None
    if stage.after is not None:
        try:
            last = stage.after(output)
        except Exception as error:
            # Also what a stage printed is beyond this program's control.
            status = "failed" if status == "ok" else status
            _append(log, f"=== {stage.name}: its output is no use: {error!r}\n")
    if last is None:
        told = [x.strip() for x in output.splitlines() if not x.startswith(("=== ", "$ "))]
        last = next((x.strip("= ") for x in reversed(told) if x), "")
    return Outcome(stage.name, status, time.monotonic() - began, last)


def _run(command: Command, stage: Stage, log: Path, limit_s: float) -> int | None:
    """Exit code, or None if the time was up; leaves no process behind."""
    with log.open("ab") as stream:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **stage.environment},
                start_new_session=True,  # a group of its own, to end with all its children
                preexec_fn=_listen_to_interrupts,
            )
        except OSError as error:
            stream.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, stage.stop)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def _listen_to_interrupts() -> None:
    """A shell's background job ignores them, and so would whatever it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)


def _shorten(log: Path, offset: int) -> None:
    """Leave of what follows the offset the beginning and the end."""
    with log.open("r+b") as stream:
        stream.seek(offset)
        text = stream.read()
        if len(text) > MAX_LOG_BYTES:
            half = MAX_LOG_BYTES // 2
            stream.seek(offset)
            stream.write(text[:half] + b"\n... cut ...\n" + text[-half:])
            stream.truncate()


def _text(log: Path, offset: int) -> str:
    with log.open("rb") as stream:
        stream.seek(offset)
        return stream.read().decode(errors="replace")


# What runs --------------------------------------------------------------------------------------


def plan(options: argparse.Namespace, gpu: dict[str, Any], scratch: Path) -> list[Stage]:
    """The stages, what is worth most first. Limits are for nine minutes and grow with them."""
    out, dry = options.out, options.dry_run
    python = [sys.executable, "-u"]
    common = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DWF_BENCH_RESULTS": str(scratch / "rows"),
    }
    scale = options.minutes / 9

    def stage(name: str, commands: Sequence[Command], limit_s: float, **rest: Any) -> Stage:
        return Stage(name, commands, limit_s * scale, common, **rest)

    def pytest_stage(name: str, arguments: Sequence[str], limit_s: float) -> Stage:
        if importlib.util.find_spec("pytest") is None:
            return Stage(name, skipped="pytest is not installed")
        command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
        command += ["--tb=short", "--maxfail=50"]
        # Interrupted it tells what failed so far; ended it would not.
        return stage(name, [[*command, *arguments]], limit_s, stop=signal.SIGINT)

    def bench_stage(name: str, limit_s: float, small: Sequence[str]) -> Stage:
        """All cases of a benchmark; in a dry run a few."""
        file = BENCHMARKS / f"bench_{name.replace(' ', '_')}.py"
        return pytest_stage(f"bench {name}", [str(file), *(small if dry else [])], limit_s)

    def keep_info(output: str) -> str:
        facts = json.loads(output[output.index("{") : output.rindex("}") + 1])
        _append(out / "measurements.jsonl", json.dumps({"measurement": "info", **facts}) + "\n")
        wrong = sum(x["fault"] is not None for x in facts["selftest"])
        story = facts["build"]["line"] if facts["build"] else "nothing was compiled"
        return f"{len(facts['selftest']) - wrong} right, {wrong} wrong; {story}"

    tools = [["nvidia-smi"], ["nvcc", "--version"], ["cmake", "--version"]]
    found = [x for x in tools if shutil.which(x[0])]
    report = [*python, "-m", "moe_kernels.info", "--json", "--selftest"]
    hardware = [*python, str(BENCHMARKS / "measure_hardware.py")]
    hardware += ["--out", str(out / "measurements.jsonl"), "--minutes", f"{1.4 * scale:.2f}"]
    # Wide and long enough that bfloat16 costs as little as in networks that one would use.
    attacked = str(scratch / "attacked")
    train = [*python, "-m", "dwf", "train", "smoke", "model.width=16", "data.num_train=1024"]
    train += ["--out", attacked, "--no-eval"]
    quality = [*python, str(BENCHMARKS / "attack_quality.py")]
    attack = [train, [*quality, attacked, "--num-images", "1797"]]
    ignored = [f"--ignore={file}" for file in FAST_PATH_TESTS]
    return [
        stage("tools", [*found, [*python, "--version"]], 15),
        build_stage(gpu, scratch, dry, common, 120 * scale),
        stage("self-test", [report], 60, after=keep_info),
        pytest_stage("tests fast path", ["-m", "gpu", *FAST_PATH_TESTS], 90),
        bench_stage("step", 180, ["--collect-only"]),
        pytest_stage(
            "tests", ["-m", "gpu", *(["tests/test_timing.py"] if dry else ["tests", *ignored])], 90
        ),
        bench_stage("conv", 100, ["-k", "small"]),
        stage("attack quality", [[*quality, "--help"]] if dry else attack, 75),
        stage("hardware", [[*hardware, *(["--small"] * dry)]], 95),
        bench_stage("ops", 45, ["-k", "linf_step_-128x3x32x32-float32"]),
        bench_stage("end to end", 60, ["--collect-only"]),
        training_stage(options, scratch, python, common),
    ]


def build_stage(
    gpu: dict[str, Any], scratch: Path, dry: bool, environment: dict[str, str], limit_s: float
) -> Stage:
    """CMake straight into moe_kernels/, for this GPU alone; a dry run only configures."""
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
    if dry:
        skip_cuda = {"MOE_KERNELS_SKIP_CUDA": "1"}
        return Stage("build", [configure], limit_s, {**environment, **skip_cuda})
    major, minor = gpu["capability"]
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    commands = [
        configure,
        ["cmake", "--build", folder, "--parallel"],
        ["cmake", "--install", folder, "--prefix", str(ROOT)],
    ]
    return Stage("build", commands, limit_s, {**environment, "MOE_KERNELS_CUDA_ARCHS": arch})


def training_stage(
    options: argparse.Namespace, scratch: Path, python: list[str], environment: dict[str, str]
) -> Stage:
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

    def keep_metrics(output: str) -> None:
        # Also of a training that was stopped by its limit.
        shutil.copyfile(run / "metrics.jsonl", options.out / "training.jsonl")

    command = [*python, "-m", "dwf", "train", *name, "--out", str(run), "--no-eval"]
    # Whatever time is left.
    return Stage("training", [command], 60 * options.minutes, environment, after=keep_metrics)


# The summary ------------------------------------------------------------------------------------


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
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(BENCHMARKS))
    from measure_hardware import summarize

    return summarize(rows)


def summarize_all(out: Path, outcomes: list[Outcome], gpu: dict[str, Any]) -> str:
    blocks = [[f"{gpu['gpu'] or 'no GPU, a dry run'}, torch {gpu['torch']}"]]
    for make in (hardware_lines, conv_lines, bench_lines, attack_lines, training_lines):
        try:
            blocks.append(make(out))
        except Exception as error:
            # A table must not cost the others.
            blocks.append([f"{make.__name__}: {error!r}"])
    blocks.append([str(outcome) for outcome in outcomes])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def probe() -> dict[str, Any]:
    """GPU, torch, and whether kernels for the GPU are built; in a process of its own, because
    this one shall survive whatever torch does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz, to train on for a moment")
    parser.add_argument("--stages", nargs="+", help="only these: names or their first words")
    parser.add_argument("--dry-run", action="store_true", help="try all stages, measure nothing")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes - RESERVE_S
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
        stages = plan(options, gpu, Path(scratch))
        if options.stages:
            stages = [x for x in stages if {x.name, x.name.split()[0]} & set(options.stages)]
        outcomes: list[Outcome] = []
        for i, stage in enumerate(stages):
            left = deadline - time.monotonic()
            if left < 1 and not stage.skipped:
                stage = dataclasses.replace(stage, skipped="the time was up")
            to_come = sum(not x.skipped for x in stages[i + 1 :])
            fair = max(left - RESERVE_PER_STAGE_S * to_come, min(left, RESERVE_PER_STAGE_S))
            outcomes.append(run_stage(stage, options.out / "log.txt", fair))
            print(outcomes[-1], flush=True)
            collect_rows(Path(scratch) / "rows", options.out)
            # After every stage: whoever ends this program early has what there was.
            text = summarize_all(options.out, outcomes, gpu)
            (options.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}")
    return int(any(x.status in ("failed", "timed out") for x in outcomes))


if __name__ == "__main__":
    # Stages have sessions of their own: who ends this program wants to end them, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
