"""The averages of the weights, against the formulas written out."""

import math
from dataclasses import replace

import pytest
import torch
from small_runs import small_config
from torch import nn

import dwf
from dwf.checks import CheckpointError
from dwf.progress import read_metrics
from dwf.training import train
from dwf.training.average import WeightAverage

CONFIG = small_config("ema_decay=0.9")


class Small(nn.Module):
    """A weight, BatchNorm's statistics, and its counter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.norm = nn.BatchNorm1d(2)

    def become(self, value):
        with torch.no_grad():
            self.weight.fill_(value)
            self.norm.running_mean.fill_(10 * value)
            self.norm.num_batches_tracked.add_(1)


def averaged(config, values, steps_per_epoch=2, model=None):
    model = model or Small()
    average = WeightAverage(model, config)
    for step, value in enumerate(values, start=1):
        model.become(value)
        average.update(model, step, len(values), steps_per_epoch)
    return average


class TestEma:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
    def test_formula(self, decay):
        """a = d a + (1 - d) w, d = min(decay, (1 + t) / (10 + t)); of statistics, too."""
        values = [math.cos(t) for t in range(29)]
        found = averaged(replace(CONFIG, ema_decay=decay), values)
        weight, mean = [1.0, -2.0], 0.0
        for t, value in enumerate(values, start=1):
            d = min(decay, (1 + t) / (10 + t))
            weight = [d * w + (1 - d) * value for w in weight]
            mean = d * mean + (1 - d) * 10 * value
        assert found.num_updates == 29
        torch.testing.assert_close(found.model.weight, torch.tensor(weight))
        torch.testing.assert_close(found.model.norm.running_mean, torch.full((2,), mean))
        assert found.model.norm.num_batches_tracked == 29

    def test_begins_when_asked_to(self):
        """Until 2 of 4 steps the average is the model; then d = 2/11 and 3/12."""
        found = averaged(replace(CONFIG, average_from=0.5), [5.0, 1.0, 2.0, 3.0])
        expected = (3 / 12) * ((2 / 11) * 1 + (9 / 11) * 2) + (9 / 12) * 3
        torch.testing.assert_close(found.model.weight, torch.full((2,), expected))


class TestSwa:
    def test_mean_over_the_ends_of_epochs(self):
        """Epochs end with 2, 4, 6, 8; from a quarter on: the mean of 4, 6 and 8."""
        config = replace(CONFIG, average="swa", average_from=0.25)
        found = averaged(config, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        assert found.num_updates == 3
        torch.testing.assert_close(found.model.weight, torch.full((2,), 6.0))
        torch.testing.assert_close(found.model.norm.running_mean, torch.full((2,), 60.0))


class TestState:
    def test_is_a_model_of_its_own_that_nobody_trains(self):
        model = Small().train()
        average = WeightAverage(model, CONFIG)
        assert not average.model.training
        assert not any(p.requires_grad for p in average.model.parameters())
        assert all(p.requires_grad for p in model.parameters())
        model.become(0.0)
        assert average.model.weight.abs().sum() > 0

    def test_load_continues_to_the_same_bits(self):
        model = Small()
        whole, half = WeightAverage(model, CONFIG), None
        for step, value in enumerate([0.3, -1.0, 0.7, 2.0, 0.1, 0.9], start=1):
            if step == 4:
                half = WeightAverage(model, CONFIG)
                half.load({k: v.clone() for k, v in whole.state().items()}, 3, "ema.safetensors")
            model.become(value)
            for average in (whole, half) if half else (whole,):
                average.update(model, step, 6, 2)
        assert half.num_updates == whole.num_updates == 6
        assert torch.equal(half.model.weight, whole.model.weight)

    def test_weights_of_another_model(self):
        with pytest.raises(CheckpointError, match=r"ema\.safetensors: another architecture"):
            WeightAverage(Small(), CONFIG).load({}, 4, "ema.safetensors")


def joint_config(*overrides):
    """One network, six epochs of four steps, validated after each."""
    config = dwf.presets.single(small_config("validate_every=1"), "pgd-at")
    return dwf.apply_overrides(config, ["pretrain.num_epochs=6", *overrides])


def validations(folder, kind="validation"):
    return [row for row in read_metrics(folder) if row["kind"] == kind]


class TestReportedWeights:
    @pytest.mark.slow
    @pytest.mark.parametrize("weights", ["best", "ema", "best-ema"])
    def test_are_what_training_returns(self, weights, tmp_path):
        config = joint_config(f"weights={weights}")
        model = train(config, tmp_path, quiet=True)
        stored = dwf.load(tmp_path, weights).state_dict()
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
        again = train(config, tmp_path, quiet=True)  # nothing is left to do
        assert all(torch.equal(value, stored[name]) for name, value in again.state_dict().items())

    def test_the_average_is_chosen_by_its_own_validation(self, tmp_path):
        train(joint_config("weights=best-ema"), tmp_path, quiet=True)
        rows = validations(tmp_path, "validation-average")
        assert len(rows) == len(validations(tmp_path)) == 6
        best = max(rows, key=lambda row: row["robust_accuracy"])
        name = dwf.files.read_json(tmp_path / "checkpoints" / "best-ema.json")["checkpoint"]
        assert name == f"step-{best['global_step']:08d}"

    def test_patience(self, tmp_path, monkeypatch):
        """Robust accuracies .3 .5 .4 .5: after two without a better one, four of six epochs."""
        accuracies = iter([0.3, 0.5, 0.4, 0.5, 0.9])
        monkeypatch.setattr(
            "dwf.training.recorder.clean_and_robust_accuracy",
            lambda *args, **kwargs: (0.9, next(accuracies)),
        )
        config = joint_config("patience=2", "weights=best", "on_collapse=warn", "log_every=5")
        train(config, tmp_path, quiet=True)
        assert [row["epoch"] for row in validations(tmp_path)] == [0, 1, 2, 3]
        best = dwf.files.read_json(tmp_path / "checkpoints" / "best.json")
        assert best["checkpoint"] == "step-00000008"
        trained = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
        assert trained[-1]["step"] == 16
        assert sum(row["num_images"] for row in trained) == 16 * 16
