"""The training loop: what a run leaves behind, and what it refuses to do."""

import contextlib
import csv
import errno
import itertools
import json
import math
import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from small_runs import (
    NUM_STEPS,
    assert_same_run,
    before_steps,
    dense_mixture,
    rows,
    small_config,
    stop,
)
from torch import nn

import dwf
from dwf import checkpoint
from dwf.checks import CheckpointError, ConfigError
from dwf.config import from_dict
from dwf.files import atomic_write_json, read_json, run_lock, sha256
from dwf.models import PixelModel
from dwf.presets import single
from dwf.progress import read_metrics
from dwf.training import Stopped, TrainingError, environment, loop, run_folder, train
from dwf.training import run as run_module
from dwf.training.run import Position

SLOW = pytest.mark.slow
PHASES = ["expert-0-benign", "expert-1-fgsm", "expert-2-pgd", "joint"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as everybody makes them; tests only read it."""
    folder = tmp_path_factory.mktemp("loop") / "run"
    train(small_config(), folder, argv=["dwf", "train", "smoke"], quiet=True)
    return folder


def joint_only(*overrides):
    """A configuration for the user's own mixture: four joint steps an epoch, and no experts."""
    return replace(small_config(*overrides), pretrain=None)


def weights(folder, which="last", stem="model"):
    tensors, _ = checkpoint.load(checkpoint.resolve(folder / "checkpoints", which))
    return tensors[stem]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


class TestRunFolder:
    def test_files(self, run):
        names = {p.name for p in run.iterdir()} - {"tensorboard", ".lock"}
        assert names == {
            "config.json",
            "environment.json",
            "metrics.jsonl",
            "metrics.csv",
            "checkpoints",
        }
        assert {p.name for p in (run / "checkpoints").iterdir()} >= {
            "last.json",
            "best.json",
            "pretrained.json",
            "step-00000048",
            "step-00000060",
        }

    def test_config_reads_back(self, run):
        assert from_dict(read_json(run / "config.json")) == small_config()

    def test_environment(self, run):
        found = read_json(run / "environment.json")
        assert found["argv"] == ["dwf", "train", "smoke"]
        assert found["torch"] == torch.__version__
        assert found["num_threads"] == 1
        assert environment([])["argv"]  # this process's own

    def test_rows(self, run):
        found = rows(run)
        trained = [row for row in found if row["kind"] == "train"]
        validated = [row for row in found if row["kind"] == "validation"]
        # every third step, and the last of each phase: 16, 32 and 48, of which 48 is a third too
        steps = sorted({*range(3, NUM_STEPS + 1, 3), 16, 32})
        assert [row["global_step"] for row in trained] == steps
        # after epochs 2 and 4 of each expert, and after 2 and the last of joint training
        assert [row["global_step"] for row in validated] == [8, 16, 24, 32, 40, 48, 56, 60]
        for row in found:
            index = min((row["global_step"] - 1) // 16, 3)
            assert (row["phase_index"], row["phase"]) == (index, PHASES[index])
            assert row["step"] == row["global_step"] - 16 * index
            assert row["epoch"] == (row["step"] - 1) // 4
        assert all(row["num_images"] == 20 for row in validated)

    def test_rows_count_what_they_say(self, run):
        """Benign rows are clean, attacked ones robust; joint steps have both."""
        sums = dict.fromkeys(PHASES, 0)
        for row in rows(run):
            if row["kind"] == "train":
                sums[row["phase"]] += row["num_images"]
                assert (row["clean_accuracy"] is None) == (row["phase_index"] in (1, 2))
                assert (row["robust_accuracy"] is None) == (row["phase_index"] == 0)
        assert sums == dict.fromkeys(PHASES[:3], 16 * 16) | {"joint": 12 * 16}

    def test_the_cosine_starts_again_in_each_phase(self, run):
        for row in rows(run):
            if row["kind"] == "train":
                # the rate of the step that has just been taken
                t, T = row["step"] - 1, 12 if row["phase"] == "joint" else 16
                expected = 0.1 * (1 + math.cos(math.pi * t / T)) / 2
                assert row["learning_rate"] == pytest.approx(expected, rel=1e-12)

    def test_csv_agrees_with_jsonl(self, run):
        with open(run / "metrics.csv", newline="") as stream:
            table = list(csv.DictReader(stream))
        for ours, theirs in zip(read_metrics(run), table, strict=True):
            for name, text in theirs.items():
                value = ours.get(name)
                assert text == ("" if value is None else str(value))


class TestWeights:
    def test_last(self, run):
        assert_equal(dict(dwf.load(run).state_dict()), weights(run))
        assert not dwf.load(run).training

    def test_pretrained_are_those_before_joint_training(self, run):
        path = checkpoint.resolve(run / "checkpoints", "pretrained")
        assert path.name == "step-00000048"
        gate = {
            k: v for k, v in weights(run, "pretrained").items() if k.startswith("gate.layers.3")
        }
        assert len(gate) == 2
        assert not any(value.any() for value in gate.values())  # as it was born

    def test_best_is_the_first_best_robust_validation_of_the_last_phase(self, run):
        seen = [r for r in rows(run) if (r["kind"], r["phase"]) == ("validation", "joint")]
        best = max(seen, key=lambda row: row["robust_accuracy"])
        path = checkpoint.resolve(run / "checkpoints", "best")
        assert path.name == f"step-{best['global_step']:08d}"
        assert checkpoint.load(path)[1]["progress"]["best"] == best["robust_accuracy"]

    @pytest.mark.slow
    def test_average_of_the_last_phase(self, tmp_path, monkeypatch):
        """a = d a + (1 - d) w with d = (1 + t) / (10 + t), from the pretrained weights on."""
        seen = []
        update = loop.WeightAverage.update

        def spy(self, model, *progress):
            seen.append({k: v.double().clone() for k, v in model.named_parameters()})
            update(self, model, *progress)

        monkeypatch.setattr(loop.WeightAverage, "update", spy)
        train(small_config(), tmp_path / "run", quiet=True)
        assert len(seen) == 12
        average = {k: v.double() for k, v in weights(tmp_path / "run", "pretrained").items()}
        for t, now in enumerate(seen, start=1):
            d = (1 + t) / (10 + t)
            average |= {k: d * average[k] + (1 - d) * v for k, v in now.items()}
        found = dwf.load(tmp_path / "run", "ema").state_dict()
        for name in seen[0]:
            torch.testing.assert_close(found[name].double(), average[name], rtol=1e-5, atol=1e-6)

    def test_baselines_have_no_pretrained(self, tmp_path):
        config = single(small_config("pretrain.num_epochs=1"), "plain")
        model = train(config, tmp_path / "run", quiet=True)
        assert isinstance(model, PixelModel)
        for which in ("last", "best", "ema"):
            dwf.load(tmp_path / "run", which)
        with pytest.raises(CheckpointError, match=r"pretrained\.json: not found.*best.*last"):
            dwf.load(tmp_path / "run", "pretrained")

    def test_no_average_before_the_last_phase(self, run):
        last = (run / "checkpoints" / "last.json").read_text()
        try:
            checkpoint.point(run / "checkpoints", "last", "step-00000048")
            with pytest.raises(CheckpointError, match="no average of the weights yet"):
                dwf.load(run, "ema")
        finally:
            (run / "checkpoints" / "last.json").write_text(last)

    def test_not_a_run(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config\.json not found"):
            dwf.load(tmp_path)

    def test_misspelled(self, run):
        with pytest.raises(ConfigError, match="did you mean 'best'"):
            dwf.load(run, "bets")


class TestUsersModel:
    def test_is_trained_in_place(self, tmp_path):
        mixture = dense_mixture()
        before = {name: value.clone() for name, value in mixture.state_dict().items()}
        returned = train(joint_only(), tmp_path / "run", model=mixture, quiet=True)
        assert returned is mixture
        assert not mixture.training
        for name, value in mixture.state_dict().items():
            assert not torch.equal(value, before[name]), name
        assert {row["phase"] for row in rows(tmp_path / "run")} == {"joint"}
        loaded = dwf.load(tmp_path / "run", model=dense_mixture())
        assert_equal(dict(loaded.state_dict()), dict(mixture.state_dict()))

    def test_trains_in_train_mode_whatever_mode_it_came_in(self, tmp_path):
        models = [dropout_mixture().train(), dropout_mixture().eval()]
        for i, model in enumerate(models):
            train(joint_only(), tmp_path / str(i), model=model, quiet=True)
        assert_equal(dict(models[0].state_dict()), dict(models[1].state_dict()))

    def test_continues(self, tmp_path):
        """The module given the second time is as good as the one given the first time."""
        whole = train(joint_only(), tmp_path / "whole", model=dense_mixture(), quiet=True)
        stop_at(9, joint_only(), tmp_path / "parts", model=dense_mixture())
        parts = train(joint_only(), tmp_path / "parts", model=dense_mixture(), quiet=True)
        assert_equal(dict(parts.state_dict()), dict(whole.state_dict()))

    def test_cannot_be_loaded_without_it(self, tmp_path):
        train(joint_only(), tmp_path / "run", model=dense_mixture(), quiet=True)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: another architecture"):
            dwf.load(tmp_path / "run")

    @pytest.mark.parametrize("defense", ["plain", "fgsm-at", "pgd-at"])
    def test_one_network(self, defense, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        config = single(small_config(), defense)
        assert train(config, tmp_path / "run", model=network, quiet=True) is network

    def test_that_does_not_suit_the_defense(self, tmp_path):
        with pytest.raises(ConfigError, match="trains Mixture"):
            train(small_config(), tmp_path / "run", model=nn.Flatten(), quiet=True)
        assert not (tmp_path / "run").exists()


def stop_at(step, config, folder, **options):
    """Train, get a signal during a step, and be stopped after it."""
    with before_steps(stop, step - 1):
        with pytest.raises(Stopped, match=f"stopped at step {step}, saved"):
            train(config, folder, quiet=True, **options)


class TestRefused:
    """Nothing is made, nothing is changed, and the message names what is wrong."""

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["joint.batch_size=65"], "batch_size: 65 is larger than the 64 images"),
            (["data.num_train=2000"], "num_train: 2000 is more than"),
            (["data.num_validation=5000"], "num_validation"),
            (["model.network=resnet19"], "resnet18"),
            (["device=cuda:99"], "device"),
        ],
    )
    def test_settings(self, overrides, message, tmp_path):
        with pytest.raises(ConfigError, match=message):
            train(small_config(*overrides), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    def test_defense(self, tmp_path):
        with pytest.raises(ConfigError, match="did you mean 'pgd-at'"):
            train(replace(small_config(), defense="pgd-a"), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    def test_another_configuration(self, run):
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(CheckpointError, match="seed was 0, is 1") as caught:
            train(small_config("seed=1", "data.num_train=32"), run, quiet=True)
        assert "data.num_train was 64, is 32" in str(caught.value)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    def test_somebody_elses_folder(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(CheckpointError, match="not empty and not a run folder"):
            train(small_config(), tmp_path, quiet=True)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_folder_in_use(self, run):
        with (
            run_lock(run),
            pytest.raises(CheckpointError, match=rf"pid {os.getpid()}\) is writing"),
        ):
            train(small_config(), run, quiet=True)

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="not writable"):
            train(small_config(), tmp_path / "file" / "run", quiet=True)

    def test_damaged_checkpoint(self, tmp_path):
        folder = tmp_path / "run"
        train(joint_only(), folder, model=dense_mixture(), quiet=True)
        for path in (folder / "checkpoints").glob("step-*"):
            path = path / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
            train(joint_only(), folder, model=dense_mixture(), quiet=True)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("progress", None),
            ("progress", {"phase_index": 0}),
            ("progress", {**vars(Position()), "step": "x"}),
            ("progress", {**vars(Position()), "phase_index": 99}),
            ("unwritten", {"joint": [[1, 2]]}),
            ("unwritten", [3]),
            ("ema_updates", -1),
            ("facts", {"image_shape": "x"}),
        ],
    )
    def test_state_of_something_else(self, key, value, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        folder = tmp_path / "run" / "checkpoints"
        for path in folder.glob("step-*"):
            state = read_json(path / "state.json")
            (path / "state.json").write_text(json.dumps({**state, key: value}))
            manifest = read_json(path / "manifest.json")
            manifest["sha256"]["state.json"] = sha256(path / "state.json")
            (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=rf"state\.json: {key}"):
            dwf.load(tmp_path / "run") if key == "facts" else train(
                small_config(), tmp_path / "run"
            )


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_one_flipped_bit_heals(file, tmp_path, caplog):
    """Training goes on from an older checkpoint, and makes the damaged one again."""
    train(joint_only(), tmp_path / "whole", model=dense_mixture(), quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    path = checkpoint.resolve(tmp_path / "run" / "checkpoints", "last") / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    train(joint_only(), tmp_path / "run", model=dense_mixture(), quiet=True)
    assert "going on from step-" in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    dwf.load(tmp_path / "run", model=dense_mixture())


class TestRefusedFolders:
    """As above: nothing is changed."""

    @pytest.mark.parametrize("left", [[], ["config.json"], [".config.json.tmp"]])
    def test_not_what_a_crash_at_the_start_left(self, left, run, tmp_path):
        """Killed while it made its folder: the same command goes on."""
        for name in left:
            (tmp_path / name).write_bytes((run / "config.json").read_bytes())
        config = small_config()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_train_stage", phase_done)
            train(config, tmp_path, quiet=True)
        assert read_json(tmp_path / "environment.json")["argv"]
        assert from_dict(read_json(tmp_path / "config.json")) == config


class TestOwner:
    """Which commands may open a run folder again, and what they leave as it is."""

    def test_it_is_asked_again_under_the_lock(self, tmp_path, monkeypatch):
        """Another process made the folder its own between the first look and the lock."""
        folder = tmp_path / "run"

        @contextlib.contextmanager
        def quicker(path):
            with run_lock(path):
                atomic_write_json(path / "config.json", small_config("seed=1").to_dict())
                yield

        monkeypatch.setattr(run_folder, "run_lock", quicker)
        with pytest.raises(CheckpointError, match="seed was 1, is 0"):
            with run_folder.opened(folder, small_config(), []):
                pass

    def test_environment_is_that_of_the_command_that_made_it(self, tmp_path):
        for argv in (["first"], ["second"]):
            with run_folder.opened(tmp_path / "run", small_config(), argv):
                pass
        assert read_json(tmp_path / "run" / "environment.json")["argv"] == ["first"]

    def test_settings_younger_than_the_run_had_their_defaults(self, tmp_path):
        with run_folder.opened(tmp_path, small_config(), []):
            pass
        stored = read_json(tmp_path / "config.json")
        del stored["pretrain_together"]
        atomic_write_json(tmp_path / "config.json", stored)
        with run_folder.opened(tmp_path, small_config(), []):
            pass
        with pytest.raises(CheckpointError, match="pretrain_together was 'auto', is 'always'"):
            with run_folder.opened(tmp_path, small_config("pretrain_together=always"), []):
                pass


def test_last_is_the_last_pointer_to_move(tmp_path, monkeypatch):
    """Killed between two of them, a run repeats the step and so moves the others again."""
    moved = []
    point = checkpoint.point

    def spy(folder, pointer, name):
        moved.append((pointer, name))
        point(folder, pointer, name)

    monkeypatch.setattr(checkpoint, "point", spy)
    train(joint_only(), tmp_path, model=dense_mixture(), quiet=True)
    best = [i for i, (pointer, _) in enumerate(moved) if pointer == "best"]
    assert best
    assert all(moved[i + 1] == ("last", moved[i][1]) for i in best)


def phase_done(run, *arguments):
    run.at.phase_index += 1


class TestFullDisk:
    @pytest.mark.slow
    @pytest.mark.parametrize("good_calls", [5, 20, 60])
    def test_the_run_continues_once_there_is_room(self, good_calls, run, tmp_path, monkeypatch):
        fsync, calls = os.fsync, itertools.count()

        def full(descriptor):
            if next(calls) >= good_calls:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(small_config(), tmp_path / "run", quiet=True)
        monkeypatch.setattr(os, "fsync", fsync)
        train(small_config(), tmp_path / "run", quiet=True)
        assert_same_run(tmp_path / "run", run)


class TestNotFinite:
    """A run that broke stops with a message, and the last checkpoint is a good one."""

    def broken(self, tmp_path, break_, at, *overrides):
        """Train a mixture that is broken by ``break_(mixture)`` during global step ``at``."""
        mixture = dense_mixture()
        config = joint_only("checkpoint_every=4", "log_every=3", *overrides)
        with before_steps(lambda run: break_(mixture), at - 1):
            with pytest.raises(TrainingError) as caught:
                train(config, tmp_path, model=mixture, quiet=True)
        assert "the last checkpoint stands" in str(caught.value)
        for pointer in (tmp_path / "checkpoints").glob("*.json"):
            for value in weights(tmp_path, pointer.stem).values():
                assert bool(value.isfinite().all())
        return str(caught.value)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_loss(self, value, tmp_path):
        def break_(mixture):
            forward = mixture.forward
            mixture.forward = lambda x: forward(x) * (value if mixture.training else 1)

        message = self.broken(tmp_path, break_, 6)
        assert "phase joint: the loss of step 6 is" in message
        assert weights(tmp_path).keys()
        assert rows(tmp_path)[-1]["global_step"] < 6

    @pytest.mark.parametrize(("at", "last"), [(4, None), (8, 4), (5, 4)])
    def test_weights(self, at, last, tmp_path):
        """The loss of the step was fine, its gradient was not: steps 4 and 8 are saved, and not."""

        def break_(mixture):
            weight = mixture.gate.layers[-1].bias
            weight.register_hook(lambda grad: grad * math.nan)

        message = self.broken(tmp_path, break_, at, "validate_every=0")
        if at == 5:  # seen in the loss of the step after
            assert "the loss of step 6 is nan" in message
        else:
            assert f"gate.layers.3.bias is not finite after step {at}" in message
        if last is None:
            assert not (tmp_path / "checkpoints" / "last.json").exists()
        else:
            assert checkpoint.resolve(tmp_path / "checkpoints", "last").name == f"step-{last:08d}"

    def test_a_broken_model_is_not_the_best(self, tmp_path):
        """Validation after an epoch saves between two due steps."""

        def break_(mixture):
            mixture.gate.layers[-1].bias.register_hook(lambda grad: grad * math.nan)

        self.broken(tmp_path, break_, 4, "checkpoint_every=100", "validate_every=1")
        assert not (tmp_path / "checkpoints" / "best.json").exists()

    def test_learning_rate_beyond_reason(self, tmp_path):
        config = joint_only("joint.learning_rate=1e30")
        with pytest.raises(TrainingError, match="lower the learning rate"):
            train(config, tmp_path, model=dense_mixture(), quiet=True)


class TestAccumulation:
    """Parts of a batch are the batch, as long as no BatchNorm looks at them."""

    @pytest.mark.parametrize(
        ("parts", "draw"), [(2, "batch"), pytest.param(16, "image", marks=SLOW)]
    )
    def test_mixture(self, parts, draw, tmp_path):
        config = joint_only(f"attack.draw={draw}", "log_every=1")
        split = replace(config, joint=replace(config.joint, accumulation=parts))
        whole = train(config, tmp_path / "whole", model=dense_mixture(), quiet=True)
        added = train(split, tmp_path / "parts", model=dense_mixture(), quiet=True)
        self.compare(whole, added, tmp_path)

    @pytest.mark.parametrize("defense", ["plain", "fgsm-at", "pgd-at"])
    def test_one_network(self, defense, tmp_path):
        config = single(small_config("log_every=1"), defense)
        split = replace(config, pretrain=replace(config.pretrain, accumulation=4))
        networks = [dense_mixture(1).expert(0) for _ in range(2)]
        whole = train(config, tmp_path / "whole", model=networks[0], quiet=True)
        added = train(split, tmp_path / "parts", model=networks[1], quiet=True)
        self.compare(whole, added, tmp_path)

    @staticmethod
    def compare(whole, added, folder):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(added.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(rows(folder / "parts"), rows(folder / "whole"), strict=True):
            loss = theirs.pop("loss", None)
            assert ours.pop("loss", None) == (loss and pytest.approx(loss, rel=1e-6))
            assert ours == theirs


@pytest.mark.parametrize("defense", ["dwf", "plain", "fgsm-at", "pgd-at"])
def test_training_lowers_the_loss(defense, tmp_path):
    config = small_config("model.width=8", "log_every=4", "validate_every=0", "ema_decay=0")
    if defense != "dwf":
        config = single(config, defense)
    train(config, tmp_path, quiet=True)
    trained = [row for row in rows(tmp_path) if row["kind"] == "train"]
    for phase, group in itertools.groupby(trained, key=lambda row: row["phase"]):
        losses = [row["loss"] for row in group]
        assert losses[-1] < losses[0] - 0.05, phase


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_where_the_processor_gains(fast, tmp_path, monkeypatch, caplog):
    """Stock convolutions in bfloat16 take twenty times as long on a CPU without AVX-512."""
    monkeypatch.setattr(run_module, "bfloat16_is_fast", lambda device: fast)
    caplog.set_level("INFO", logger="dwf")
    model, seen = dense_mixture(), set()

    def look(module, images):
        if module.training and torch.is_grad_enabled():
            seen.add(torch.is_autocast_enabled("cpu"))

    model.register_forward_pre_hook(look)
    config = joint_only("precision=bf16", "joint.num_epochs=1", "validate_every=0")
    train(config, tmp_path / "run", model=model, quiet=True)
    assert seen == {fast}
    told = [x for x in caplog.messages if "multiplies float32 faster than bfloat16" in x]
    assert len(told) == (0 if fast else 1)


def dropout_mixture():
    mixture = dense_mixture()
    for expert in mixture.experts:
        expert.insert(1, nn.Dropout(0.5))
    return mixture


class TestRandomness:
    @pytest.mark.slow
    def test_comes_from_the_runs_seed_alone(self, run, tmp_path):
        torch.manual_seed(987654321)
        train(small_config(), tmp_path / "again", quiet=True)
        assert_same_run(tmp_path / "again", run)

    @pytest.mark.slow
    def test_another_seed_is_another_run(self, run, tmp_path):
        train(small_config("seed=1"), tmp_path, quiet=True)
        ours, theirs = weights(tmp_path), weights(run)
        assert not any(torch.equal(ours[name], theirs[name]) for name in ours if "conv" in name)

    def test_models_that_draw_in_their_forward_pass(self, tmp_path):
        """Dropout draws anew at every step, and a stopped run draws what it would have drawn."""

        whole = train(joint_only(), tmp_path / "whole", model=dropout_mixture(), quiet=True)
        stop_at(5, joint_only(), tmp_path / "parts", model=dropout_mixture())
        parts = train(joint_only(), tmp_path / "parts", model=dropout_mixture(), quiet=True)
        assert_equal(dict(parts.state_dict()), dict(whole.state_dict()))


def test_the_test_split_is_never_read(tmp_path, monkeypatch):
    load, splits = loop.load, []

    def spy(name, root=None, split="train"):
        splits.append(split)
        return load(name, root=root, split=split)

    monkeypatch.setattr(loop, "load", spy)
    train(joint_only(), tmp_path, model=dense_mixture(), quiet=True)
    assert splits == ["train"]


class TestSignals:
    def test_handlers_are_put_back(self, run):
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
        train(small_config(), run, quiet=True)
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before

    @pytest.mark.parametrize("name", ["train_step", "_validate", "save"])
    def test_at_the_very_end(self, name, tmp_path, monkeypatch):
        """In the last step, its validation or its checkpoint: saved, and never swallowed."""
        original, calls = getattr(loop, name), []
        monkeypatch.setattr(loop, name, lambda *a: calls.append(a) or original(*a))
        config = joint_only("validate_every=1")
        train(config, tmp_path / "whole", model=dense_mixture(), quiet=True)
        num_calls = len(calls)

        def signalled(*arguments):
            calls.append(arguments)
            if len(calls) == 2 * num_calls:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        monkeypatch.setattr(loop, name, signalled)
        with pytest.raises(Stopped, match="stopped at step 12, saved"):
            train(config, tmp_path / "run", model=dense_mixture(), quiet=True)
        train(config, tmp_path / "run", model=dense_mixture(), quiet=True)
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        assert len(calls) == 2 * num_calls

    def test_a_thread_that_is_not_the_main_one_trains_without(self, tmp_path):
        done = []

        def work():
            done.append(train(joint_only(), tmp_path, model=dense_mixture(), quiet=True))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(done) == 1


class TestLiveLine:
    def test_says_what_happens(self, tmp_path, capsys, monkeypatch):
        said = []
        monkeypatch.setattr(loop.LiveLine, "say", lambda self, text: said.append(text))
        stop_at(9, joint_only(), tmp_path, model=dense_mixture())
        train(joint_only(), tmp_path, model=dense_mixture())
        assert said[0].startswith("joint epoch 2/3: validation clean ")
        assert "PGD-2" in said[0]
        assert said[1] == "resuming from step-00000009"
        assert json.loads((tmp_path / "checkpoints" / "last.json").read_text())
