"""A run that was stopped, crashed or killed ends with the bits of the run that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import (
    NUM_STEPS,
    Crash,
    assert_same_run,
    before_steps,
    crash,
    small_config,
    stop,
)

from dwf import checkpoint
from dwf.training import Stopped, train

STRIDE = 6
NUM_KILLS = 50


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda folder: None)
        train(small_config(), folder, quiet=True)
    return folder


@pytest.mark.parametrize(
    "interrupt", [stop, pytest.param(crash, marks=pytest.mark.slow)], ids=["stopped", "crashed"]
)
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, STRIDE))]
)
def test_every_step(interrupt, first, uninterrupted, tmp_path, monkeypatch):
    """Interrupted at steps first, first + 6, ...; all six together cover each of the 60."""
    monkeypatch.setattr(checkpoint, "prune", lambda folder: None)
    starts = 0
    with before_steps(interrupt, *range(first, NUM_STEPS, STRIDE)):
        while True:
            starts += 1
            try:
                train(small_config(), tmp_path / "run", quiet=True)
                break
            except (Stopped, Crash):
                continue
    assert starts == NUM_STEPS // STRIDE + 1  # also after a stop in the last step
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_complete_run_stays_as_it_is(uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*")}
    model = train(small_config(), uninterrupted, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*")} == before
    path = checkpoint.resolve(uninterrupted / "checkpoints", "last")
    weights = checkpoint.load(path)[0]["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_kill_at_any_time(tmp_path):
    """50 times kill -9, most of them in the middle of something."""
    command = [sys.executable, __file__, str(tmp_path), str(NUM_KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{NUM_KILLS} kills" in done.stdout


def kill_many(folder: Path, num_kills: int) -> None:
    """Fork one run after another, kill each after a random time, and start it again."""
    torch.set_num_threads(1)
    config = small_config("pretrain.num_epochs=2", "joint.num_epochs=2")
    expected = folder / "expected"
    train(config, expected, quiet=True)  # forked runs inherit what is warm now
    started = time.monotonic()
    train(config, folder / "timed", quiet=True)
    seconds = time.monotonic() - started
    rng = random.Random(0)
    kills = completed = 0
    while kills < num_kills or completed == 0:
        run = folder / f"run{completed}"
        child = os.fork()
        if child == 0:
            train(config, run, quiet=True)
            os._exit(0)
        if kills < num_kills:
            time.sleep(rng.uniform(0, seconds / 2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            if (run / "checkpoints" / "last.json").exists():
                checkpoint.load(checkpoint.resolve(run / "checkpoints", "last"))
        else:
            assert os.waitstatus_to_exitcode(status) == 0
            assert_same_run(run, expected)
            completed += 1
    print(f"{kills} kills, {completed} complete runs")


if __name__ == "__main__":
    kill_many(Path(sys.argv[1]), int(sys.argv[2]))
