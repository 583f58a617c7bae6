"""Catastrophic overfitting: histories that have it, histories that look like it, and a real run."""

import csv

import numpy as np
import pytest
import torch
from small_models import Linear

import dwf
from dwf.config import Config, DataConfig, PhaseConfig, apply_overrides
from dwf.progress import read_metrics
from dwf.training import TrainingError, train
from dwf.training.monitors import catastrophic_overfitting


def history(*epochs, phase="train"):
    """Rows of epochs (accuracy under the attack of training, validation accuracy under PGD)."""
    found = []
    for epoch, (trained, robust) in enumerate(epochs):
        place = {"phase": phase, "epoch": epoch}
        found.append({"kind": "train", **place, "robust_accuracy": trained})
        if robust is not None:
            found.append({"kind": "validation", **place, "robust_accuracy": robust})
    return found


class TestHistories:
    def test_collapse(self):
        message = catastrophic_overfitting(history((0.4, 0.3), (0.5, 0.42), (0.93, 0.01)), "train")
        assert message == (
            "catastrophic overfitting since epoch 2: under PGD 42.0 % -> 1.0 %, under the attack "
            "of training 50.0 % -> 93.0 %"
        )

    def test_in_two_parts(self):
        """15 points and again 15: compared with the best, not with the one before."""
        rows = history((0.5, 0.4), (0.7, 0.25), (0.9, 0.1))
        assert catastrophic_overfitting(rows[:4], "train") is None
        assert catastrophic_overfitting(rows, "train")

    @pytest.mark.parametrize(
        "epochs",
        [
            [],
            [(0.5, None)],
            [(0.5, 0.4)],
            [(0.5, 0.1), (0.9, 0.4)],  # gets better
            [(0.5, 0.4), (0.9, 0.21)],  # 19 points
            [(0.5, 0.4), (0.4, 0.0)],  # falls under both attacks: another trouble
            [(0.5, 0.4), (0.5, 0.0)],
            [(None, 0.4), (None, 0.0)],  # trains on benign images
            [(0.5, 0.4), (0.9, None)],  # not validated yet
            [(0.5, 0.4), (0.9, 0.0), (0.9, 0.41)],  # has recovered
        ],
    )
    def test_none(self, epochs):
        assert catastrophic_overfitting(history(*epochs), "train") is None

    def test_once(self):
        rows = history((0.5, 0.4), (0.9, 0.0))
        assert catastrophic_overfitting(rows, "train")
        warning = {"kind": "warning", "phase": "train", "epoch": 1, "message": "..."}
        again = [*rows, warning, *history((0.95, 0.0))]
        assert catastrophic_overfitting(again, "train") is None

    def test_each_phase_for_itself(self):
        """Side by side, or one after another."""
        fallen = history((0.5, 0.4), (0.9, 0.0), phase="a")
        risen = history((0.9, 0.1), (0.95, 0.9), phase="b")
        mixed = [row for pair in zip(fallen, risen, strict=True) for row in pair]
        for rows in (mixed, fallen + risen, risen + fallen):
            assert catastrophic_overfitting(rows, "a")
            assert catastrophic_overfitting(rows, "b") is None


@pytest.fixture
def two_features(tmp_path):
    """One pixel that tells 9 of 10 labels and that no attack can turn; 63 that together tell all,
    by less than epsilon."""
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 2
    images = np.full((400, 8, 8, 1), 128.0)
    images += np.where(labels, 10, -10)[:, None, None, None]
    strong = np.where(generator.random(400) < 0.9, labels, 1 - labels)
    images[:, 0, 0, 0] = np.where(strong, 220, 36)
    path = tmp_path / "features.npz"
    np.savez(path, x_train=images.astype(np.uint8), y_train=labels)
    return path


def robust_model():
    """A linear model that looks at the strong pixel alone."""
    network = Linear((1, 8, 8), 2)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.zero_()
        network.weight[1, 0, 0, 0] = 1.0
    return dwf.as_pixel_model(network, mean=(0.5,), std=(0.1,))


def config(path, on_collapse):
    """Fast-AT with next to no step: it trains on noise, which the weak pixels outvote."""
    made = Config(
        "collapse",
        "fast-at",
        device="cpu",
        data=DataConfig(str(path), num_validation=100),
        pretrain=PhaseConfig(num_epochs=6, batch_size=20, learning_rate=0.002),
        log_every=15,
    )
    return apply_overrides(
        made,
        ["attack.epsilon=.1", "options.step_size=1e-6", f"on_collapse={on_collapse}"],
    )


@pytest.mark.usefixtures("one_thread")
class TestRun:
    def test_warns(self, two_features, tmp_path, capsys):
        folder = tmp_path / "run"
        train(config(two_features, "warn"), folder, model=robust_model())
        rows = read_metrics(folder)
        validated = [row["robust_accuracy"] for row in rows if row["kind"] == "validation"]
        assert len(validated) == 6
        assert max(validated) - validated[-1] > 0.2
        (warning,) = [row for row in rows if row["kind"] == "warning"]
        assert warning["message"].startswith("catastrophic overfitting since epoch")
        assert warning["global_step"] == 15 * (warning["epoch"] + 1)
        assert warning["message"] in capsys.readouterr().err
        with open(folder / "metrics.csv", newline="") as stream:
            table = [row for row in csv.DictReader(stream) if row["kind"] == "warning"]
        assert [row["message"] for row in table] == [warning["message"]]

    def test_stops_and_keeps_the_best(self, two_features, tmp_path):
        folder = tmp_path / "run"
        for _ in range(2):  # continuing comes to the same end
            with pytest.raises(TrainingError, match="catastrophic overfitting since epoch"):
                train(config(two_features, "stop"), folder, model=robust_model(), quiet=True)
            rows = read_metrics(folder)
            assert [row["kind"] for row in rows[-2:]] == ["validation", "warning"]
            assert sum(row["kind"] == "warning" for row in rows) == 1
        assert rows[-1]["epoch"] < 5
        assert (folder / "checkpoints" / "best.json").exists()
