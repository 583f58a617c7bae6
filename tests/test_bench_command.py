"""`dwf bench`: three columns on a small network, side by side; and none that is not right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SmallNet
from torch import Tensor, nn

import dwf.bench.step as bench_step
from dwf.bench import Case, Comparison, compare_step
from dwf.checks import ConfigError
from dwf.cli import main
from dwf.models import build_network
from moe_kernels.timing import Timing

CPU = torch.device("cpu")


def case(network: nn.Module | None = None, **changes: Any) -> Case:
    values = {
        "network": network or SmallNet(),
        "image_shape": (3, 8, 8),
        "batch_size": 8,
        "epsilon": 8 / 255,
        "step_size": 2 / 255,
        "num_steps": 2,
    }
    return Case(**{**values, **changes})


def test_three_columns_side_by_side() -> None:
    network = SmallNet()
    before = [x.clone() for x in network.state_dict().values()]
    said: list[str] = []
    found = compare_step(case(network), CPU, seconds=3.0, say=said.append)
    assert list(found.times) == ["eager", "stock", "dwf"], found.skipped
    assert len({x.num_samples for x in found.times.values()}) == 1
    assert found.times["eager"].ratio == 1.0
    assert found.batch_size == 8
    assert said[-1] == "timing eager, stock, dwf"
    # The caller's network is not trained.
    assert all(
        torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True)
    )


def test_the_ratio_is_eager_over_ours() -> None:
    times = {
        name: Timing(median_ms=100 * ratio, p20_ms=0, p80_ms=0, num_samples=3, ratio=ratio)
        for name, ratio in (("eager", 1.0), ("stock", 0.5), ("dwf", 0.125))
    }
    found = Comparison("a CPU", 8, 2, times, dict.fromkeys(times, "how"), {})
    assert (found.gain("eager"), found.gain("stock")) == (8.0, 4.0)
    assert found.lines()[-1] == (
        "dwf's step is 8.00 times as fast as eager PyTorch, "
        "4.00 times as fast as the best stock PyTorch"
    )
    del times["dwf"]
    found = Comparison("a CPU", 8, 2, times, dict.fromkeys(times, "how"), {"dwf": "it broke"})
    assert "dwf    not timed: it broke" in found.lines()[-2]
    assert found.gain("eager") is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda model, images, labels, **rest: images, "its attack adds"),
        (lambda model, images, labels, **rest: (images + 0.1).clamp(0, 1), "leaves the ball"),
    ],
)
def test_a_wrong_attack_is_not_timed(
    wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "pgd", wrong)
    found = compare_step(case(), CPU, seconds=1.0)
    assert list(found.times) == ["eager", "stock"]
    assert reason in found.skipped["dwf"]


def test_a_batch_that_takes_too_long_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "_seconds_per_image", lambda *_: 1.0)
    found = compare_step(case(batch_size=64), CPU, seconds=300.0)
    assert found.batch_size == 8


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.BatchNorm1d(7))

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.net(nn.functional.dropout(images, 0.1, self.training))
        return x


def test_dwf_attacks_a_network_by_its_plan() -> None:
    network = build_network("resnet6", num_classes=7, width=16, in_channels=3, seed=0)
    found = compare_step(case(network), CPU, seconds=1.0)
    assert "no plan" not in found.ran["dwf"], found.ran


def test_a_network_that_has_no_plan_is_timed_as_well() -> None:
    found = compare_step(case(WithDropout()), CPU, seconds=1.0)
    assert "dwf" in found.times, found.skipped


def test_a_network_for_other_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not run on images"):
        compare_step(case(WithDropout(), image_shape=(3, 9, 9)), CPU)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(144, 5))\n"
    )
    command = ["bench", "--model", f"{file}:net", "--shape", "1,8,8", "--batch-size", "8"]
    command += ["--steps", "2", "--seconds", "1", "--device", "cpu", "--quiet"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1 <= found["batch_size"] <= 8  # halved where the machine is busy
    assert set(found["times"]) == {"eager", "stock", "dwf"}
    assert found["gain"]["eager"] == pytest.approx(1 / found["times"]["dwf"]["ratio"])


def test_command_on_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "smoke", "model.width=4", "model.num_fgsm=0", "model.num_pgd=2"]
    command += ["--batch-size", "4", "--steps", "1", "--seconds", "1", "--device", "cpu"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "Divided We Fall, resnet6 width 4" in told.out
    assert "times as fast as eager PyTorch" in told.out
    assert "building stock" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "--shape goes with --model"),
        (["--steps", "0"], "--steps: expected at least 1"),
        (["nothing_like_it"], "is unknown"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
