"""Fair timing, and the facts that go with it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor

from moe_kernels import native, timing
from moe_kernels.timing import compare, environment


def test_compare_finds_the_slower_column() -> None:
    turns = []

    def fast(x: Tensor) -> None:
        turns.append("fast")

    def slow(x: Tensor) -> None:
        turns.append("slow")
        time.sleep(2e-3)

    times = compare({"fast": fast, "slow": slow}, [torch.ones(1)], min_samples=10, min_s=0)
    assert times["fast"].ratio == 1
    assert times["slow"].ratio > 5
    assert times["slow"].p20_ms <= times["slow"].median_ms <= times["slow"].p80_ms
    assert times["slow"].median_ms > 1.9
    assert times["fast"].num_samples == times["slow"].num_samples == 10
    # After the warm-up they take turns, and neither always goes first.
    rounds = [turns[i : i + 2] for i in range(6, len(turns), 2)]
    assert all(sorted(pair) == ["fast", "slow"] for pair in rounds)
    assert {pair[0] for pair in rounds} == {"fast", "slow"}


def test_compare_goes_on_for_the_time_asked_for() -> None:
    times = compare({"sleep": lambda: time.sleep(1e-3)}, [], min_samples=2, min_s=0.05)
    assert times["sleep"].num_samples > 10


def test_compare_on(device: torch.device) -> None:
    times = compare({"add": torch.add}, [torch.ones(8, device=device)] * 2, min_s=0)
    assert 0 < times["add"].median_ms < 1e3


def test_environment_is_json(device: torch.device) -> None:
    facts = environment(device)
    json.dumps(facts)
    assert facts["torch"] == torch.__version__
    assert facts["device"]
    assert ("driver" in facts) == (device.type == "cuda")


@pytest.mark.parametrize("found", ["a repository", "no repository"])
def test_environment_names_the_commit(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if found == "no repository":
        monkeypatch.setenv("GIT_DIR", "/nowhere")
        monkeypatch.setattr(native, "build_story", lambda: None)
        assert environment(torch.device("cpu"))["commit"] is None
    else:
        commit = environment(torch.device("cpu"))["commit"]
        assert commit is None or len(commit) == 40


def test_an_installed_copy_names_the_commit_it_was_built_from(monkeypatch):
    monkeypatch.setattr(timing, "_git", lambda *arguments: None)
    monkeypatch.setattr(native, "build_story", lambda: {"commit": "c" * 40, "dirty": True})
    facts = environment(torch.device("cpu"))
    assert (facts["commit"], facts["dirty"]) == ("c" * 40, True)
    monkeypatch.setattr(native, "build_story", lambda: None)
    assert environment(torch.device("cpu"))["commit"] is None
