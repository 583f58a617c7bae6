"""A run that was stopped, crashed or killed ends with the bits of the run that was not."""

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


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda folder: None)
        train(small_config(), folder, quiet=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [stop, crash], ids=["stopped", "crashed"])
@pytest.mark.parametrize("first", range(STRIDE))
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


@pytest.mark.slow
def test_a_complete_run_stays_as_it_is(uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*")}
    model = train(small_config(), uninterrupted, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*")} == before
    path = checkpoint.resolve(uninterrupted / "checkpoints", "last")
    weights = checkpoint.load(path)[0]["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
