"""Old scripts over our attacks: AutoAttack's class, RobustBench's functions."""

import enum
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from small_models import Linear, Mapped, Noisy, SmallNet, everything, make_dataset, make_images

from dwf import compat
from dwf.attacks import autoattack
from dwf.attacks.table import VERSIONS, AttackEntry
from dwf.checks import CheckpointError, ConfigError, LabelError, ModelOutputError, PixelRangeError
from dwf.compat import AutoAttack, benchmark, load_model, robustbench


@pytest.fixture(scope="module")
def case():
    model = SmallNet().eval()
    images = make_images(24)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 5
    return model, images, labels


def short(model, **settings):
    """AutoAttack with few steps."""
    adversary = AutoAttack(model, **{"eps": 0.08, "device": "cpu", "verbose": False, **settings})
    for attack in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
        attack.n_iter = 10
    adversary.square.n_queries = 40
    return adversary


class TestAutoAttack:
    def test_defaults_are_the_originals(self):
        adversary = AutoAttack(Linear(), device="cpu")
        assert (adversary.norm, adversary.epsilon, adversary.seed) == ("Linf", 0.3, None)
        assert adversary.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert (adversary.apgd.n_iter, adversary.apgd.n_restarts, adversary.apgd.eot_iter) == (
            100,
            1,
            1,
        )
        assert adversary.apgd_targeted.n_target_classes == adversary.fab.n_target_classes == 9
        assert adversary.square.n_queries == 5000
        adversary.set_version("plus")
        assert adversary.attacks_to_run == [
            "apgd-ce",
            "apgd-dlr",
            "fab",
            "square",
            "apgd-t",
            "fab-t",
        ]
        assert adversary.apgd.n_restarts == adversary.fab.n_restarts == 5
        adversary.set_version("rand")
        assert (adversary.apgd.eot_iter, adversary.apgd.n_restarts) == (20, 1)

    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    def test_returns_what_breaks_the_model_within_the_budget(self, case, norm):
        model, images, labels = case
        radius = 0.08 if norm == "Linf" else 0.5
        adversary = short(model, norm=norm, eps=radius)
        found, answers = adversary.run_standard_evaluation(images, labels, return_labels=True)
        with torch.no_grad():
            assert torch.equal(answers, model(found).argmax(dim=1))
        moved = (found - images).flatten(1)
        size = moved.abs().amax(dim=1) if norm == "Linf" else moved.norm(dim=1)
        assert size.max() <= radius + 1e-5
        assert 0 <= found.min() <= found.max() <= 1
        robust = answers == labels
        assert torch.equal(found[robust], images[robust])  # what stands is as it was
        assert torch.equal(found[:3], images[:3])  # what was wrong already, too
        assert 0 < robust.sum() < 21

    @pytest.mark.parametrize("state", [False, True])
    def test_never_more_images_at_once_than_bs(self, case, state, tmp_path):
        model, sizes = case[0], []

        def counted(images):
            sizes.append(len(images))
            return model(images)

        images, labels = make_images(110), torch.zeros(110, dtype=torch.int64)
        adversary = short(counted, version="custom", attacks_to_run=["apgd-ce", "apgd-t", "fab"])
        path = tmp_path / "state" if state else None
        adversary.run_standard_evaluation(images, labels, bs=4, state_path=path)
        adversary.clean_accuracy(images, labels, bs=4)
        assert max(sizes) == 4

    def test_attributes_of_the_attacks(self, case, tmp_path):
        """Old scripts read and set them, and use the logger."""
        model, images, labels = case
        adversary = short(model, log_path=tmp_path / "log")
        for attack in (adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square):
            assert (attack.eps, attack.norm, attack.seed, attack.verbose) == (
                0.08,
                "Linf",
                None,
                False,
            )
        assert (adversary.apgd.loss, adversary.apgd.rho, adversary.apgd.use_largereps) == (
            "ce",
            0.75,
            False,
        )
        adversary.logger.log("a line")
        assert (tmp_path / "log").read_text() == "a line\n"
        adversary.set_version("rand")
        for attack in (adversary.apgd, adversary.apgd_targeted):
            attack.eps = 0.01
        found = adversary.run_standard_evaluation(images, labels)
        assert (found - images).abs().max() <= 0.01

    def test_individual_attacks(self, case):
        model, images, labels = case
        adversary = short(model)
        together = adversary.run_standard_evaluation(images, labels)
        alone = adversary.run_standard_evaluation_individual(images, labels)
        assert list(alone) == adversary.attacks_to_run
        with torch.no_grad():
            fooled = {name: model(x).argmax(dim=1) != labels for name, x in alone.items()}
            union = torch.stack(list(fooled.values())).any(dim=0)
            assert not (union & (model(together).argmax(dim=1) == labels)).any()
        assert adversary.clean_accuracy(images, labels) == 21 / 24

    def test_batch_size_changes_nothing(self):
        model, images = Linear(), make_images(12)
        with torch.no_grad():
            labels = model(images).argmax(dim=1)
        expected = short(model).run_standard_evaluation(images, labels)
        assert torch.equal(short(model).run_standard_evaluation(images, labels, bs=5), expected)

    def test_custom(self, case):
        model, images, labels = case
        adversary = short(model, version="custom", attacks_to_run=["apgd-dlr", "fab"])
        adversary.apgd.n_restarts = 2
        assert adversary.run_standard_evaluation(images, labels).shape == images.shape

    def test_says_what_the_original_says(self, case, capsys, tmp_path):
        model, images, labels = case
        log = tmp_path / "log.txt"
        short(model, verbose=True, log_path=log).run_standard_evaluation(images, labels)
        said = capsys.readouterr().out
        assert "initial accuracy: 87.50%" in said
        assert "robust accuracy after APGD-CE: " in said
        assert "robust accuracy after SQUARE: " in said
        assert log.read_text() == said

    def test_nothing_of_the_callers_changes(self, case):
        _, images, labels = case
        model = SmallNet().train()
        before = everything(model), images.clone()
        short(model).run_standard_evaluation(images, labels)
        assert everything(model) == before[0]
        assert torch.equal(images, before[1])

    def test_nan_is_not_robust(self):
        images = make_images(6)
        broken = Mapped(Linear(), lambda logits: logits * torch.nan)
        adversary = short(broken)
        labels = torch.zeros(6, dtype=torch.int64)
        _, answers = adversary.run_standard_evaluation(images, labels, return_labels=True)
        assert (answers == -1).all()
        assert adversary.clean_accuracy(images, labels) == 0.0

    def test_random_model(self, case):
        _, images, labels = case
        adversary = short(Noisy(Linear()), version="rand")
        assert adversary.run_standard_evaluation(images[:6], labels[:6]).shape == (6, 3, 8, 8)


class TestState:
    def test_continues_after_a_kill(self, case, tmp_path, monkeypatch):
        model, images, labels = case
        expected = short(model).run_standard_evaluation(images, labels)
        path = tmp_path / "state.safetensors"
        interrupted = short(model)
        with monkeypatch.context() as patch:
            fails_on(patch, "fab-t")
            with pytest.raises(KeyboardInterrupt):
                interrupted.run_standard_evaluation(images, labels, state_path=path)
        fails_on(monkeypatch, "apgd-ce")  # not again
        found = short(model).run_standard_evaluation(images, labels, state_path=path)
        assert torch.equal(found, expected)

    def test_random_model_continues_to_the_same_images(self, case, tmp_path, monkeypatch):
        model, images, labels = Noisy(case[0], std=0.5), *case[1:]
        settings = {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-dlr", "square"]}
        expected = short(model, **settings).run_standard_evaluation(images, labels, bs=4)
        path = tmp_path / "state.safetensors"
        interrupted = short(model, **settings)
        with monkeypatch.context() as patch:
            fails_on(patch, "square")
            with pytest.raises(KeyboardInterrupt):
                interrupted.run_standard_evaluation(images, labels, bs=4, state_path=path)
        resumed = short(model, **settings)
        found = resumed.run_standard_evaluation(images, labels, bs=4, state_path=path)
        assert torch.equal(found, expected)

    def test_of_another_run(self, case, tmp_path):
        model, images, labels = case
        path = tmp_path / "state.safetensors"
        adversary = short(model, version="custom", attacks_to_run=["apgd-ce"])
        adversary.run_standard_evaluation(images, labels, state_path=path)
        with pytest.raises(CheckpointError, match="other images or other settings"):
            adversary.run_standard_evaluation(images[:5], labels[:5], state_path=path)
        another = short(SmallNet(seed=9), version="custom", attacks_to_run=["apgd-ce"])
        with pytest.raises(CheckpointError, match="another model"):
            another.run_standard_evaluation(images, labels, state_path=path)
        function = short(lambda x: -model(x), version="custom", attacks_to_run=["apgd-ce"])
        with pytest.raises(CheckpointError, match="another model"):
            function.run_standard_evaluation(images, labels, state_path=path)
        path.write_bytes(b"<html>")
        with pytest.raises(CheckpointError, match="not readable"):
            adversary.run_standard_evaluation(images, labels, state_path=path)


def fails_on(monkeypatch, key):
    """An attack of the table that is interrupted whenever it begins."""
    original = AttackEntry.__call__

    def call(self, *batch, **options):
        if self.key == key:
            raise KeyboardInterrupt
        return original(self, *batch, **options)

    monkeypatch.setattr(AttackEntry, "__call__", call)


class TestBadInput:
    @pytest.mark.parametrize(
        "settings",
        [
            {"norm": "L1"},
            {"norm": "linf"},
            {"version": "standrad"},
            {"is_tf_model": True},
            {"version": "standard", "attacks_to_run": ["apgd-ce"]},
        ],
    )
    def test_constructor(self, settings):
        with pytest.raises(ConfigError):
            AutoAttack(Linear(), **{"device": "cpu", **settings})

    @pytest.mark.parametrize(
        ("owner", "name", "value"),
        [("apgd", "rho", 0.5), ("apgd_targeted", "use_largereps", True), ("fab", "norm", "L1")],
    )
    def test_attributes_that_ours_cannot_obey(self, case, owner, name, value):
        adversary = short(case[0])
        setattr(getattr(adversary, owner), name, value)
        with pytest.raises(ConfigError, match=rf"{owner}.{name}: "):
            adversary.run_standard_evaluation(*case[1:])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_default_device_without_a_gpu(self):
        with pytest.raises(ConfigError, match="device='cpu'"):
            AutoAttack(Linear())

    def test_tensors(self, case):
        model, images, labels = case
        adversary = short(model)
        with pytest.raises(PixelRangeError):
            adversary.run_standard_evaluation(images * 255, labels)
        with pytest.raises(LabelError):
            adversary.run_standard_evaluation(images, labels + 5)
        softmax = Mapped(model, lambda logits: logits.softmax(dim=1))
        with pytest.raises(ModelOutputError, match="probabilities"):
            short(softmax).run_standard_evaluation(images, labels)
        nothing = short(model, version="custom")
        for run in (nothing.run_standard_evaluation, nothing.run_standard_evaluation_individual):
            with pytest.raises(ConfigError, match="empty"):
                run(images, labels)
        with pytest.raises(ConfigError, match="bs"):
            adversary.run_standard_evaluation(images, labels, bs=0)
        unknown = short(model, version="custom", attacks_to_run=["apgd-cee"])
        with pytest.raises(ConfigError, match="apgd-ce"):
            unknown.run_standard_evaluation(images, labels)


def test_restarts_of_fab_are_not_those_of_its_targeted_version(case):
    adversary = short(case[0], version="plus")
    assert adversary._settings("fab")["num_restarts"] == 5
    assert "num_restarts" not in adversary._settings("fab-t")


def test_no_images(case, capsys):
    model, images, labels = case
    found = short(model, verbose=True).run_standard_evaluation(images[:0], labels[:0])
    assert found.shape == images[:0].shape


def test_function_and_class_agree(case, monkeypatch):
    """`dwf.attacks.ensemble` is the same ensemble as one function."""
    model, images, labels = case
    monkeypatch.setattr(
        sys.modules["dwf.attacks.ensemble"],
        "VERSIONS",
        {
            "standard": tuple(
                attack.changed(**{attack.length: number})
                for attack, number in zip(VERSIONS["standard"], [10, 10, 10, 40], strict=True)
            )
        },
    )
    found = autoattack(model, images, labels, epsilon=0.08)
    assert torch.equal(found, short(model).run_standard_evaluation(images, labels))


def test_random_models_are_judged_by_the_mean(monkeypatch):
    """A pass that is unlucky, here the first of each ten, does not end the attack."""

    class Unlucky(Linear):
        passes = 0

        def forward(self, images):
            self.passes += 1
            logits = super().forward(images)
            return -logits if self.passes % 10 == 1 else logits

    images = make_images(12)
    with torch.no_grad():
        labels = Linear()(images).argmax(dim=1)
    few = VERSIONS["rand"][0].changed(num_steps=2)
    monkeypatch.setattr(sys.modules["dwf.attacks.ensemble"], "VERSIONS", {"rand": (few,)})
    found = autoattack(Unlucky(), images, labels, epsilon=0.3, version="rand")
    with torch.no_grad():
        assert (Linear()(found).argmax(dim=1) != labels).all()


class TestRobustBench:
    def test_benchmark(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(robustbench, "evaluate", quickly(robustbench.evaluate))
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        clean, robust = benchmark(
            model, 12, "digits", to_disk=True, model_name="mine", eps=0.1, batch_size=6
        )
        stored = json.loads((tmp_path / "model_info/digits/Linf/mine.json").read_text())
        assert stored["clean_acc"] == f"{100 * clean:.2f}"
        assert stored["autoattack_acc"] == f"{100 * robust:.2f}"
        assert (stored["eps"], stored["num_images"]) == (0.1, 12)
        assert stored["verdict"] in ("UNPROVEN", "SUSPECT", "INVALID")  # of 12 images
        with pytest.raises(ConfigError, match="model_name"):
            benchmark(model, 12, "digits", to_disk=True)

    def test_the_signature_is_the_originals(self):
        """Also by position, as of RobustBench 1.1."""
        assert list(inspect.signature(benchmark).parameters) == [
            "model",
            "n_examples",
            "dataset",
            "threat_model",
            "to_disk",
            "model_name",
            "data_dir",
            "corruptions_data_dir",
            "device",
            "batch_size",
            "eps",
            "log_path",
            "preprocessing",
            "aa_state_path",
        ]

    def test_what_came_with_newer_versions(self, monkeypatch, tmp_path):
        monkeypatch.setattr(robustbench, "evaluate", quickly(robustbench.evaluate))
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        state, lines = tmp_path / "state", tmp_path / "log"

        class Words(enum.Enum):
            data = "digits"
            norm = "Linf"

        def to_tensor(picture):
            return torch.from_numpy(np.array(picture)).float().unsqueeze(0) / 255

        options = {"dataset": Words.data, "threat_model": Words.norm, "eps": 0.1}
        expected = benchmark(model, 12, **options)
        found = benchmark(
            model,
            12,
            **options,
            device="cpu",
            log_path=lines,
            preprocessing=to_tensor,
            aa_state_path=state,
        )
        assert found == expected
        assert "verdict" in lines.read_text()
        assert state.exists()
        with pytest.raises(ConfigError, match="'Res256Crop224' is RobustBench's for ImageNet"):
            benchmark(model, 12, **options, preprocessing="Res256Crop224")
        with pytest.raises(ConfigError, match="corruptions"):
            benchmark(model, 12, dataset="digits", threat_model="corruptions")

    def test_load_images(self, monkeypatch):
        asked = []

        def load(name, root, split):
            asked.append((name, root, split))
            return make_dataset(9)

        monkeypatch.setattr(robustbench.data, "load", load)
        x, y = compat.load_cifar10(n_examples=4, data_dir="./data")
        assert torch.equal(x, make_dataset(9).images[:4].float() / 255)
        assert torch.equal(y, make_dataset(9).labels[:4])
        assert len(compat.load_cifar100()[0]) == 9
        assert asked == [("cifar10", "./data", "test"), ("cifar100", None, "test")]

    def test_clean_accuracy(self, case):
        model, images, labels = case
        assert compat.clean_accuracy(model, images, labels, batch_size=5) == 21 / 24
        assert compat.clean_accuracy(model, images, labels, device="cpu") == 21 / 24

    def test_load_model(self, tmp_path):
        with pytest.raises(CheckpointError):
            load_model("none", tmp_path)


def quickly(evaluate):
    def run(*args, **options):
        return evaluate(*args, **{**options, "suite": "quick"})

    return run
