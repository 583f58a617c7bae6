"""Stages of benchmarks/gpu_suite.py: limits, logs, plan, summary. Nothing here needs a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, tmp_path: Path, *, limit_s: float = 30.0, **rest: Any) -> tuple[Any, str]:
    log = tmp_path / "log.txt"
    stage = gpu_suite.Stage("stage", [[sys.executable, "-c", code]], limit_s, **rest)
    outcome = gpu_suite.run_stage(stage, log, 60.0)
    return outcome, log.read_text()


def test_stage_that_works(tmp_path: Path) -> None:
    code = "import os; print('hello'); print(os.environ['KEY'])"
    outcome, log = run(code, tmp_path, environment={"KEY": "the last line"})
    assert (outcome.status, outcome.last) == ("ok", "the last line")
    assert "hello" in log


def test_stage_that_fails(tmp_path: Path) -> None:
    outcome, log = run("raise SystemExit('it broke')", tmp_path)
    assert (outcome.status, outcome.last) == ("failed", "it broke")
    assert "exit code 1" in log


def test_stage_that_hangs_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.2)
    # Both ignore the polite signal.
    sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = sleep + "print('child is up', flush=True); time.sleep(60)"
    code = (
        f"{sleep}import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    began = time.monotonic()
    outcome, _ = run(code, tmp_path, limit_s=2.0)
    assert outcome.status == "timed out"
    assert time.monotonic() - began < 10
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split(")")[-1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a stage that was ended still runs")


def test_stage_that_cannot_start_or_is_skipped(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    outcome = gpu_suite.run_stage(gpu_suite.Stage("none", [["/nowhere/program"]]), log, 5.0)
    assert outcome.status == "failed"
    assert "/nowhere/program" in outcome.last
    outcome = gpu_suite.run_stage(gpu_suite.Stage("no", skipped="no reason"), log, 5.0)
    assert (outcome.status, outcome.last) == ("skipped", "no reason")


def test_stage_stops_at_its_first_failure_and_reads_its_output(tmp_path: Path) -> None:
    heard: list[str] = []
    commands = [[sys.executable, "-c", f"print({n}); raise SystemExit({n - 1})"] for n in (1, 2, 3)]
    stage = gpu_suite.Stage("stage", commands, after=heard.append)
    outcome = gpu_suite.run_stage(stage, tmp_path / "log.txt", 30.0)
    assert outcome.status == "failed"
    assert "2\n" in heard[0]
    assert "3\n" not in heard[0]
    stage = gpu_suite.Stage("stage", commands[:1], after=lambda output: str(json.loads("{")))
    assert gpu_suite.run_stage(stage, tmp_path / "log.txt", 30.0).status == "failed"


def options(tmp_path: Path, **rest: Any) -> argparse.Namespace:
    defaults = {"out": tmp_path, "minutes": 9.0, "data": None, "dry_run": False}
    return argparse.Namespace(**{**defaults, **rest})


def test_plan_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    plan = gpu_suite.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)
    stages = {stage.name: stage for stage in plan}
    assert "Triton kernels only" in stages["build"].skipped
    assert "--data" in stages["training"].skipped


def test_plan_builds_for_this_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/bin/{name}")
    for capability, arch in [((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")]:
        gpu = {"capability": capability, "built": False}
        build = gpu_suite.build_stage(gpu, tmp_path, False, {}, 60.0)
        assert build.environment["MOE_KERNELS_CUDA_ARCHS"] == arch
        assert [x[1] for x in build.commands] == ["-S", "--build", "--install"]
    assert gpu_suite.build_stage({"built": True}, tmp_path, False, {}, 60.0).skipped


def test_without_a_gpu_it_says_what_it_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "probe", lambda: {"gpu": None, "torch": torch.__version__})
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out)]) == 2
    text = capsys.readouterr().out
    assert "-m gpu" in text
    assert text.rstrip().endswith("nothing was run; see --dry-run")
    assert not out.exists()


def test_time_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A greedy stage leaves some time for those behind it, and all together keep to the limit."""
    limits = []

    def fake(stage: Any, log: Path, seconds: float) -> Any:
        limits.append(min(seconds, stage.limit_s))
        status = "failed" if stage.name == "b" else "ok"
        return gpu_suite.Outcome(stage.name, status, 0.0, "")

    stages = [gpu_suite.Stage(name, [["true"]], 1000.0) for name in "abc"]
    monkeypatch.setattr(gpu_suite, "probe", lambda: {"gpu": "a GPU", "torch": "2"})
    monkeypatch.setattr(gpu_suite, "plan", lambda *_: stages)
    monkeypatch.setattr(gpu_suite, "run_stage", fake)
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "2"]) == 1
    assert limits == pytest.approx([80, 95, 110], abs=1)
    limits.clear()
    chosen = ["--out", str(tmp_path), "--minutes", "2", "--stages", "c"]
    assert gpu_suite.main(chosen) == 0
    assert limits == pytest.approx([110], abs=1)
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("c ")


def test_summary_survives_rows_that_were_cut_off(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir()
    out.mkdir()
    column = {"median_ms": 2.0}
    columns = {"eager": {"median_ms": 8.0}, "ours": column}
    row = {"bench": "step", "case": "pgd-step", "columns": columns}
    (rows / "step_gpu_2026-01-01.jsonl").write_text(json.dumps(row) + '\n{"case": "pg')
    gpu_suite.collect_rows(rows, out)
    assert (out / "rows.jsonl").read_text() == json.dumps(row) + "\n"
    (out / "measurements.jsonl").write_text('{"measurement": "x", "skipped": "why"}\n')
    outcomes = [gpu_suite.Outcome("tests", "ok", 1.0, "12 passed")]
    text = gpu_suite.summarize_all(out, outcomes, {"gpu": "a GPU", "torch": "2"})
    assert "x: skipped, why" in text
    assert "pgd-step: eager 8, ours 2 ms; 4.00x eager" in text
    assert text.splitlines()[-1].startswith("tests")
    (rows / "ops_gpu_2026-01-01.jsonl").write_text('{"bench": "ops", "case": "no columns"}\n')
    gpu_suite.collect_rows(rows, out)
    text = gpu_suite.summarize_all(out, outcomes, {"gpu": "a GPU", "torch": "2"})
    assert "bench_lines: KeyError" in text
    assert "x: skipped, why" in text


def test_summary_adds_up_the_convolutions_of_a_step(tmp_path: Path) -> None:
    def row(count: int, **ms: float) -> dict[str, Any]:
        columns = {name: {"median_ms": value} for name, value in ms.items()}
        facts = {"bench": "conv", "backward": False, "batch_size": 128, "gflop": 1.0}
        return {**facts, "count": count, "columns": columns}

    rows = [row(1, eager=1.0, ours=0.25, native=0.25), row(4, eager=2.0, ours=0.5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert gpu_suite.conv_lines(tmp_path) == [
        "5 convolutions forward, N=128: eager 9 ms (0.556 TFLOP/s), ours 2.25 ms (2.22 TFLOP/s)"
    ]


def test_summary_compares_attacks(tmp_path: Path) -> None:
    column = {"robust_accuracy": 0.5, "sign_agreement": 0.98, "ratio": 0.25}
    row = {"bench": "attack_quality", "case": "smoke", "columns": {"slab bfloat16": column}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert gpu_suite.attack_lines(tmp_path) == [
        "smoke, slab bfloat16: robust accuracy 50.00 %, signs 98.00 %, time 0.250"
    ]


def test_log_of_a_talkative_stage_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "MAX_LOG_BYTES", 1000)
    log = tmp_path / "log.txt"
    log.write_text("what was there before\n")
    outcome, text = run("print('first'); print('x' * 5000); print('last')", tmp_path)
    assert outcome.last == "last"
    assert len(text) < 1200
    assert text.startswith("what was there before\n")
    assert "first" in text
    assert "... cut ..." in text
    assert text.rstrip().endswith("last")


@pytest.mark.slow
def test_tests_that_take_too_long_say_what_failed_so_far(tmp_path: Path) -> None:
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time\ndef test_a():\n    assert 1 == 2\ndef test_b():\n    time.sleep(60)\n"
    )
    stages = gpu_suite.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)
    stage = next(x for x in stages if x.name == "tests")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    stage = dataclasses.replace(stage, commands=[command])
    outcome = gpu_suite.run_stage(stage, tmp_path / "log.txt", 6.0)
    assert outcome.status == "timed out"
    assert "assert 1 == 2" in (tmp_path / "log.txt").read_text()
    assert "1 failed" in outcome.last


@pytest.mark.slow
def test_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--dry-run"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    summary = (tmp_path / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    table = [line.split()[0] for line in summary.strip().splitlines()[-12:]]
    assert table == [
        *("tools", "build", "self-test", "tests", "bench", "tests", "bench", "attack"),
        *("hardware", "bench", "bench", "training"),
    ]
    assert "joint: validation clean" in summary
    assert "linf_step_-128x3x32x32-float32: eager" in summary
    assert "convolutions backward, N=16: eager" in summary
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.txt", "measurements.jsonl", "rows.jsonl", "summary.txt", "training.jsonl")
    }
