"""What CONTRIBUTING.md says of a new defense: one file's worth, and everything else works with it.

The example trains on images that went half of the way to their FGSM image.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from small_runs import assert_same_run, small_config, train_interrupted

import dwf
from dwf import defenses
from dwf.checks import ConfigError, check_positive
from dwf.config import OPTIONS, Options, apply_overrides, from_dict
from dwf.defenses import Defense, Phase
from dwf.defenses.adversarial_training import build
from dwf.defenses.steps import cross_entropy_step
from dwf.files import read_json
from dwf.progress import read_metrics
from dwf.training import train

# What a file in dwf/defenses/ would hold ---------------------------------------------------------


@dataclass(frozen=True)
class HalfwayOptions(Options, defense="halfway"):
    """``share`` of the way from an image to its FGSM image."""

    share: float = 0.5

    def __post_init__(self):
        check_positive(self.share, "options.share")


def phases(model, config):
    def step(model, forward, batch, crafter):
        attacked = crafter.fgsm(model, batch)
        images = batch.images + config.options.share * (attacked - batch.images)
        return cross_entropy_step(forward, images, batch.labels, 0)

    return [Phase("train", model, config.pretrain, step)]


# What its users do -------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("one_thread", "halfway")


@pytest.fixture
def halfway(monkeypatch):
    monkeypatch.setitem(defenses.DEFENSES, "halfway", Defense("Halfway", build, phases))


def config(*overrides):
    smoke = small_config("data.num_train=512", "pretrain.batch_size=32", "model.width=8")
    made = replace(smoke, preset="halfway_digits", defense="halfway", joint=None, options=None)
    return apply_overrides(made, overrides)


@pytest.mark.slow
def test_trains_and_is_judged(tmp_path):
    model = train(config(), tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    digits = dwf.data.load("digits", split="test").subset(torch.arange(40))
    settings = replace(config().evaluation, num_images=40)
    result = dwf.evaluate(dwf.load(tmp_path / "run"), digits, settings, suite="paper")
    assert result.clean_accuracy > 0.3
    with torch.no_grad():
        images = digits.images[:4].float() / 255
        torch.testing.assert_close(dwf.load(tmp_path / "run")(images), model(images))


@pytest.mark.slow
def test_continues_to_the_same_bits(tmp_path):
    train(config(), tmp_path / "whole", quiet=True)
    train_interrupted(config(), tmp_path / "parts", 11, 40)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_its_settings_are_settings(tmp_path):
    assert OPTIONS["halfway"] is HalfwayOptions
    changed = config("options.share=1/4")
    assert changed.options == HalfwayOptions(0.25)
    train(changed, tmp_path / "run", quiet=True)
    assert from_dict(read_json(tmp_path / "run" / "config.json")) == changed
    with pytest.raises(ConfigError, match=r"options.share"):
        config("options.share=-1")
    with pytest.raises(ConfigError, match=r"did you mean options.share"):
        config("options.shar=1")
