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
from types import SimpleNamespace
from typing import Any

import gpu_suite
import pytest
import rehearsal
import torch
from suite import runner, stages, summary

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, tmp_path: Path, *, limit_s: float = 30.0, **rest: Any) -> tuple[Any, str]:
    log = tmp_path / "log.txt"
    stage = runner.Stage("stage", [[sys.executable, "-c", code]], limit_s, **rest)
    outcome = runner.run_stage(stage, log, 60.0)
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


@pytest.mark.slow
def test_stage_that_hangs_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.2)
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
    outcome = runner.run_stage(runner.Stage("none", [["/nowhere/program"]]), log, 5.0)
    assert outcome.status == "failed"
    assert "/nowhere/program" in outcome.last
    outcome = runner.run_stage(runner.Stage("no", skipped="no reason"), log, 5.0)
    assert (outcome.status, outcome.last) == ("skipped", "no reason")


def test_stage_stops_at_its_first_failure_and_reads_its_output(tmp_path: Path) -> None:
    heard: list[str] = []
    commands = [[sys.executable, "-c", f"print({n}); raise SystemExit({n - 1})"] for n in (1, 2, 3)]
    stage = runner.Stage("stage", commands, after=heard.append)
    outcome = runner.run_stage(stage, tmp_path / "log.txt", 30.0)
    assert outcome.status == "failed"
    assert "2\n" in heard[0]
    assert "3\n" not in heard[0]
    stage = runner.Stage("stage", commands[:1], after=lambda output: str(json.loads("{")))
    assert runner.run_stage(stage, tmp_path / "log.txt", 30.0).status == "failed"


def options(tmp_path: Path, **rest: Any) -> argparse.Namespace:
    defaults = {"out": tmp_path, "minutes": 9.7, "data": None, "dry_run": False}
    return argparse.Namespace(**{**defaults, **rest})


def test_plan_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    plan = stages.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)
    found = {stage.name: stage for stage in plan}
    assert "Triton kernels only" in str(found["build"].skipped)
    assert "--data" in str(found["training"].skipped)


def test_plan_builds_for_this_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/bin/{name}")
    for capability, arch in [((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")]:
        gpu = {"capability": capability, "built": False}
        build = stages.build_stage(gpu, tmp_path, dry=False)
        assert build.environment["MOE_KERNELS_CUDA_ARCHS"] == arch
        assert build.environment["MOE_KERNELS_STRICT"] == "1"
        assert [x[1] for x in build.commands] == ["-S", "--build", "--install"]
    assert stages.build_stage({"built": True}, tmp_path, dry=False).skipped


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


class Rehearsal:
    """Runs a plan on a clock of its own: each stage takes its estimate, or `slow` times that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **slow: float) -> None:
        self.now = 0.0
        self.slow = {name.replace("_", " "): factor for name, factor in slow.items()}
        self.limits: dict[str, float] = {}
        self.out = tmp_path / "out"
        data = tmp_path / "cifar10.npz"
        data.touch()
        monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(gpu_suite, "run_stage", self._take_time)
        monkeypatch.setattr(gpu_suite, "probe", self._probe)
        monkeypatch.setattr(stages.shutil, "which", lambda name: f"/bin/{name}")
        self.outcomes: dict[str, runner.Outcome] = {}
        self.code = gpu_suite.main(["--out", str(self.out), "--data", str(data)])

    def _probe(self) -> dict[str, Any]:
        self.now += 15  # to start Python, import torch and find the GPU
        return {"gpu": "a GPU", "torch": "2", "capability": (9, 0), "built": False}

    def _take_time(self, stage: runner.Stage, log: Path, seconds: float) -> runner.Outcome:
        if stage.skipped:
            return runner.Outcome(stage.name, "skipped", 0.0, stage.skipped)
        limit = min(stage.limit_s, seconds)
        wanted = limit if stage.estimate_s is None else stage.estimate_s
        wanted *= self.slow.get(stage.name, 1.0)
        status = "ok" if wanted <= limit else "timed out"
        # Who does not listen is killed after the grace period.
        took = wanted if wanted <= limit else limit + (runner.GRACE_S if stage.estimate_s else 1)
        self.now += took
        self.limits[stage.name] = limit
        self.outcomes[stage.name] = runner.Outcome(stage.name, status, took, "")
        return self.outcomes[stage.name]


def test_with_the_estimates_everything_fits_into_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pybind11")
    done = Rehearsal(monkeypatch, tmp_path)
    assert done.code == 0
    assert list(done.outcomes) == [
        *("tools", "build", "hopper kernel", "self-test", "graphs", "hardware", "bench step"),
        *("bench conv", "tests fast path", "attack quality", "training"),
    ]
    assert {x.status for x in done.outcomes.values()} == {"ok"}
    assert done.limits["training"] >= 50
    assert done.now <= 600
    names = [line.split("  ")[0] for line in (done.out / "summary.txt").read_text().splitlines()]
    assert names[-len(done.outcomes) :] == list(done.outcomes)


@pytest.mark.parametrize("late", ["build", "self-test", "bench step", "tests fast path"])
def test_a_stage_that_takes_too_long_costs_itself_and_some_of_the_training(
    late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pybind11")
    done = Rehearsal(monkeypatch, tmp_path, **{late.replace(" ", "_"): 100.0})
    others = {name: x.status for name, x in done.outcomes.items() if name != late}
    assert done.outcomes[late].status == "timed out"
    assert set(others.values()) == {"ok"}
    assert "training" in others
    assert done.now <= 600


def test_where_much_takes_longer_the_first_stages_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pybind11")
    slow = {"build": 1.8, "self-test": 1.6, "hopper kernel": 1.5, "bench step": 1.35}
    done = Rehearsal(monkeypatch, tmp_path, **slow)
    for name in ("build", "hopper kernel", "self-test", "graphs", "bench step"):
        assert done.outcomes[name].status == "ok"
    assert done.now <= 600


def test_a_greedy_stage_leaves_some_time_for_each_behind_it() -> None:
    three = [runner.Stage(name, [["true"]], 1000.0) for name in "abc"]
    assert gpu_suite.seconds_for(110, three[1:]) == 80
    assert gpu_suite.seconds_for(10, three[1:]) == 10
    skipped = dataclasses.replace(three[1], skipped="why")
    assert gpu_suite.seconds_for(110, [skipped, three[2]]) == 95


def test_chosen_stages(tmp_path: Path) -> None:
    all_of_them = stages.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)

    def names(*chosen: str) -> list[str]:
        return [x.name for x in gpu_suite.chosen(all_of_them, chosen or None)]

    assert "tests" not in names()
    assert names("tests") == ["tests fast path", "tests"]
    assert names("bench step") == ["bench step"]
    assert set(names("bench")) >= {"bench step", "bench ops", "bench end to end"}


def test_caches_are_kept_and_fed_to_a_second_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's, torch's and our choices, of every stage, under --out."""
    code = "import os, pathlib; p = pathlib.Path(os.environ[{!r}]); print(p.exists()); {}"
    variables = ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MOE_KERNELS_CACHE_DIR"]
    monkeypatch.setattr(gpu_suite, "probe", lambda: {"gpu": "a GPU", "torch": "2"})

    def fake(options: argparse.Namespace, gpu: Any, scratch: Path) -> list[runner.Stage]:
        fill = "p.mkdir(parents=True, exist_ok=True); (p / 'x').touch()"
        commands = [[sys.executable, "-c", code.format(name, fill)] for name in variables]
        environment = stages.environment(options.out)
        return [runner.Stage("stage", commands, environment=environment)]

    monkeypatch.setattr(gpu_suite, "plan", fake)
    first, second = tmp_path / "first", tmp_path / "second"
    assert gpu_suite.main(["--out", str(first)]) == 0
    assert (first / "log.txt").read_text().count("False\n") == 3
    assert gpu_suite.main(["--out", str(second), "--caches", str(first / "caches")]) == 0
    assert (second / "log.txt").read_text().count("True\n") == 3


def test_files_of_a_running_stage_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a training: who is killed as a whole leaves what there was."""
    monkeypatch.setattr(runner, "COPY_EVERY_S", 0.1)
    monkeypatch.setattr(runner, "GRACE_S", 0.2)
    source, target = tmp_path / "metrics.jsonl", tmp_path / "training.jsonl"
    seen: list[str] = []
    copy = runner.shutil.copyfile

    def watched(a: Path, b: Path) -> None:
        copy(a, b)
        seen.append(b.read_text())

    monkeypatch.setattr(runner.shutil, "copyfile", watched)
    write = f"import time; f = open({str(source)!r}, 'w'); f.write('a row'); f.close(); "
    outcome, _ = run(write + "time.sleep(60)", tmp_path, limit_s=2.0, keep={source: target})
    assert outcome.status == "timed out"
    assert len(seen) > 2
    assert target.read_text() == "a row"


def test_training_shows_its_rows_while_it_runs(tmp_path: Path) -> None:
    data = tmp_path / "cifar10.npz"
    stage = stages.training_stage(options(tmp_path, data=data), tmp_path)
    assert stage.keep == {tmp_path / "run" / "metrics.jsonl": tmp_path / "training.jsonl"}
    assert str(data) in " ".join(stage.commands[0])


def test_the_fast_path_shares_the_gpu_where_xdist_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((object(), ["-n", "8"]), (None, [])):
        found = {"xdist": there, "pytest": object()}
        monkeypatch.setattr(stages.importlib.util, "find_spec", found.get)
        command = list(stages._fast_path(dry=False).commands[0])
        assert command[command.index("tests/test_plan_gpu.py") + 1 :] == expected


def test_selftest_is_read_behind_its_lines(tmp_path: Path) -> None:
    facts = {"selftest": [{"fault": None}, {"fault": "{odd}"}], "build": None}
    output = f"self-test: a on cuda:0: 1 right {{}}\n{json.dumps(facts, indent=2)}\nwarning {{}}\n"
    after = stages._selftest(tmp_path).after
    assert after is not None
    assert after(output) == "1 right, 1 wrong; nothing was compiled"
    assert json.loads((tmp_path / "measurements.jsonl").read_text())["measurement"] == "info"


def test_summary_survives_rows_that_were_cut_off(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir()
    out.mkdir()
    column = {"median_ms": 2.0}
    columns = {"eager": {"median_ms": 8.0}, "ours": column}
    row = {"bench": "step", "case": "pgd-step", "columns": columns}
    (rows / "step_gpu_2026-01-01.jsonl").write_text(json.dumps(row) + '\n{"case": "pg')
    summary.collect_rows(rows, out)
    assert (out / "rows.jsonl").read_text() == json.dumps(row) + "\n"
    (out / "measurements.jsonl").write_text('{"measurement": "x", "skipped": "why"}\n')
    outcomes = [runner.Outcome("tests", "ok", 1.0, "12 passed")]
    text = summary.summarize_all(out, outcomes, {"gpu": "a GPU", "torch": "2"})
    assert "x: skipped, why" in text
    assert "pgd-step: eager 8, ours 2 ms; 4.00x eager" in text
    assert text.splitlines()[-1].startswith("tests")
    (rows / "ops_gpu_2026-01-01.jsonl").write_text('{"bench": "ops", "case": "no columns"}\n')
    summary.collect_rows(rows, out)
    text = summary.summarize_all(out, outcomes, {"gpu": "a GPU", "torch": "2"})
    assert "bench_lines: KeyError" in text
    assert "x: skipped, why" in text


def test_summary_adds_up_the_convolutions_of_a_step(tmp_path: Path) -> None:
    def row(count: int, **ms: float) -> dict[str, Any]:
        columns = {name: {"median_ms": value} for name, value in ms.items()}
        facts = {"bench": "conv", "backward": False, "batch_size": 128, "gflop": 1.0}
        return {**facts, "count": count, "columns": columns}

    rows = [row(1, eager=1.0, ours=0.25, native=0.25), row(4, eager=2.0, ours=0.5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert summary.conv_lines(tmp_path) == [
        "5 convolutions forward, N=128: eager 9 ms (0.556 TFLOP/s), ours 2.25 ms (2.22 TFLOP/s)"
    ]


def test_summary_compares_attacks(tmp_path: Path) -> None:
    column = {"robust_accuracy": 0.5, "sign_agreement": 0.98, "ratio": 0.25}
    row = {"bench": "attack_quality", "case": "smoke", "columns": {"slab bfloat16": column}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert summary.attack_lines(tmp_path) == [
        "smoke, slab bfloat16: robust accuracy 50.00 %, signs 98.00 %, time 0.250"
    ]


def test_log_of_a_talkative_stage_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_LOG_BYTES", 1000)
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
    plan = stages.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)
    stage = next(x for x in plan if x.name == "tests")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    stage = dataclasses.replace(stage, commands=[command])
    outcome = runner.run_stage(stage, tmp_path / "log.txt", 6.0)
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
    text = (tmp_path / "summary.txt").read_text()
    assert done.stdout.endswith(text)
    table = [line.split()[0] for line in text.strip().splitlines()[-11:]]
    assert table == [
        *("tools", "build", "hopper", "self-test", "graphs", "hardware", "bench", "bench"),
        *("tests", "attack", "training"),
    ]
    assert "joint: validation clean" in text
    assert "convolutions backward, N=16: eager" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.txt", "measurements.jsonl", "rows.jsonl", "summary.txt", "training.jsonl"),
        *("rows", "caches"),
    }


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not rehearsal.running, reason="a real GPU gets the suite by hand")
def test_stages_on_a_rehearsed_gpu(tmp_path: Path) -> None:
    """What a dry run cannot: a GPU is found, its kernels are tested, graphs are captured.

    The other stages measure, or run in a rehearsal without this program: tests, training.
    """
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import rehearsal\nrehearsal.start()\n")
    paths = os.pathsep.join(map(str, (site, ROOT / "tests")))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--minutes", "4"]
    done = subprocess.run(
        [
            *command,
            "--out",
            str(tmp_path / "out"),
            "--stages",
            "tools",
            "build",
            "self-test",
            "graphs",
        ],
        env={**os.environ, "PYTHONPATH": paths, "DWF_BENCH_RESULTS": str(tmp_path / "rows")},
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    lines = [json.loads(x) for x in (tmp_path / "out/measurements.jsonl").read_text().splitlines()]
    info = next(x for x in lines if x["measurement"] == "info")
    assert [x["device"] for x in info["gpus"]] == ["cuda:0"]
    checked = [x for x in info["selftest"] if x["device"].startswith("cuda")]
    assert {x["implementation"] for x in checked} >= {"native", "triton"}
    for found in checked:  # Triton has no driver here, and is the only one that may say so
        assert (found["fault"] is None) == (found["implementation"] != "triton"), found
    assert done.returncode == 1, done.stderr + log
    status = dict(line.split()[:2] for line in done.stdout.splitlines()[:4])
    graphs = status.pop("graphs")
    assert status == {"tools": "ok", "build": "skipped", "self-test": "failed"}, log
    # limits are those of a GPU; a busy CPU may take longer
    assert graphs == "timed" or (graphs == "ok" and " passed" in done.stdout), log
    assert " failed, " not in log.partition("=== graphs")[2], log
