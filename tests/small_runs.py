"""Runs of 60 steps that take a second: their configuration, and what makes two of them equal."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import dwf
from dwf.config import Config, apply_overrides
from dwf.progress import read_metrics
from dwf.training import loop, train
from dwf.training.run import Run

# three experts of 4 epochs x 4 steps, then 3 joint epochs x 4 steps
SETTINGS = """
    device=cpu data.num_train=64 data.num_validation=20 model.width=2 model.gate_hidden=4
    attack.num_steps=1,2 pretrain.num_epochs=4 pretrain.batch_size=16 joint.num_epochs=3
    joint.batch_size=16 validate_every=2 validation_steps=2 checkpoint_every=7 log_every=3
"""
NUM_STEPS = 60
TIMES = ("seconds", "images_per_s")


def small_config(*overrides: str) -> Config:
    return apply_overrides(dwf.presets.smoke(), [*SETTINGS.split(), *overrides])


def rows(folder: Path) -> list[dict]:
    """Metrics without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]


def bits(checkpoint: Path) -> dict[str, str]:
    """A checkpoint's files by hash: weights, average, momentum, and where the run stood."""
    return json.loads((checkpoint / "manifest.json").read_text())["sha256"]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Equal pointers, equal bits of every checkpoint that ``expected`` kept, equal metrics."""
    for pointer in sorted((expected / "checkpoints").glob("*.json")):
        assert (folder / "checkpoints" / pointer.name).read_text() == pointer.read_text(), pointer
    for kept in sorted((expected / "checkpoints").glob("step-*")):
        assert bits(folder / "checkpoints" / kept.name) == bits(kept), kept.name
    assert rows(folder) == rows(expected)


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


def crash(run: Run) -> None:
    raise Crash


def stop(run: Run) -> None:
    """Ask the run to stop, by each of the two signals in turn."""
    os.kill(os.getpid(), signal.SIGTERM if run.at.global_step % 2 else signal.SIGUSR1)


@contextlib.contextmanager
def before_steps(action: Callable[[Run], None], *steps: int) -> Iterator[list[int]]:
    """Call ``action(run)`` when so many steps of a run are done, once for each of ``steps``.

    Yields the steps that have not come yet, the next one first.
    """
    due, train_step = list(steps), loop.train_step

    def step(run, *arguments):
        if due and run.at.global_step == due[0]:
            due.pop(0)
            action(run)
        return train_step(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        yield due


def train_interrupted(config: Config, folder: Path, *steps: int) -> nn.Module:
    """Train a run that crashes before each of these steps, and goes on; return the model."""
    with before_steps(crash, *steps) as due:
        for _ in steps:
            with pytest.raises(Crash):
                train(config, folder, quiet=True)
        assert not due
        return train(config, folder, quiet=True)


def dense_mixture(num_experts: int = 2, hidden: int = 16) -> dwf.Mixture:
    """A mixture for digits without BatchNorm, so that rows of a batch do not see each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        experts = [
            nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
            for _ in range(num_experts)
        ]
        gate = dwf.MlpGate((1, 8, 8), num_experts, hidden=4)
    return dwf.Mixture(experts, gate)
