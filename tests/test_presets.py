"""Presets: all there, all valid, and the paper's recipe where they say so."""

import json
import re
from dataclasses import replace

import pytest

from dwf import presets
from dwf.checks import ConfigError
from dwf.config import AttackConfig, from_dict
from dwf.defenses import DEFENSES
from dwf.models import NETWORKS

NAMES = list(presets.table())


@pytest.mark.parametrize("name", NAMES)
def test_every_preset(name):
    config = presets.find(name)
    assert config.preset == name
    assert config.defense in DEFENSES
    assert config.model.network in NETWORKS
    assert from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    has_joint_phase = config.defense in ("adaptive-smoothing", "dwf", "dwf-modern", "igat", "more")
    assert (config.joint is not None) == has_joint_phase
    assert (config.pretrain is None) == (config.defense == "dwf-modern")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("digits", "dwf_digits"),
        ("smoke", "smoke"),
        ("cifar10", "dwf_cifar10"),
        ("cifar100", "dwf_cifar100"),
        ("svhn", "dwf_svhn"),
        ("cifar10-small", "dwf_cifar10_small"),
        ("dwf-cifar10", "dwf_cifar10"),
        ("pgd-at-digits", "pgd_at_digits"),
        ("cifar10-paper-compat", "dwf_cifar10_paper_compat"),
    ],
)
def test_short_names(alias, name):
    assert presets.find(alias).preset == name


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"'cifar11' is unknown; did you mean cifar10"):
        presets.find("cifar11")
    with pytest.raises(ConfigError, match="`dwf presets` lists all"):
        presets.find("qqqq")
    with pytest.raises(ConfigError, match=r"did you mean digits or ") as caught:
        presets.find("digit")
    words = re.split(r"[ ?]", str(caught.value))
    assert words.count("soe_digits") <= 1


@pytest.mark.parametrize("name", ["dwf_cifar10", "dwf_cifar100", "dwf_svhn"])
def test_the_papers_recipe(name):
    config = presets.find(name)
    model, attack, table = config.model, config.attack, config.evaluation
    assert (model.network, model.width, model.gate_hidden) == ("resnet18", 64, 128)
    assert (model.num_benign, model.num_fgsm, model.num_pgd) == (1, 4, 4)
    tenths = tuple(i / 100 for i in range(1, 10))
    assert attack.fgsm_epsilon == table.fgsm_epsilon == tenths
    assert attack.num_steps == table.num_steps == (10, 20, 30, 40, 50)
    assert (attack.epsilon, attack.step_size) == (8 / 255, 2 / 255)
    assert (table.epsilon, table.step_size) == (8 / 255, 2 / 255)
    assert not attack.random_start
    assert not attack.fgsm_random_start
    assert (attack.draw, attack.bn_mode, attack.protocol) == ("batch", "eval", "pixels")
    assert (table.multi_start_steps, table.num_restarts) == (100, 3)
    assert (table.adaptive_steps, table.eot_samples) == (100, 1)
    assert table.num_images is None
    assert config.pretrain.learning_rate == (0.01 if name == "dwf_svhn" else 0.1)
    assert config.joint.learning_rate == config.joint.gate_learning_rate == 0.01
    for phase in (config.pretrain, config.joint):
        assert (phase.num_epochs, phase.batch_size) == (100, 128)
        assert (phase.momentum, phase.weight_decay, phase.accumulation) == (0.9, 5e-4, 1)
    assert config.data.crop_padding == 4
    assert config.data.flip == (name != "dwf_svhn")


@pytest.mark.parametrize("name", ["dwf_cifar10", "dwf_svhn"])
def test_paper_compat_changes_the_protocol_alone(name):
    config, compat = presets.find(name), presets.find(f"{name}_paper_compat")
    assert compat.attack.protocol == "paper-compat"
    assert (compat.attack.epsilon, compat.attack.step_size) == (0.02, 0.005)
    assert (compat.evaluation.epsilon, compat.evaluation.step_size) == (0.02, 0.005)
    back = replace(compat, preset=config.preset, attack=config.attack, evaluation=config.evaluation)
    assert back == config
    assert compat.attack.fgsm_epsilon == AttackConfig().fgsm_epsilon


@pytest.mark.parametrize("defense", ["plain", "fgsm-at", "pgd-at"])
def test_baselines_share_data_network_and_table(defense):
    mixture = presets.dwf_cifar10()
    baseline = presets.find(f"{defense}_cifar10")
    assert baseline.defense == defense
    for part in ("data", "model", "pretrain", "evaluation", "precision"):
        assert getattr(baseline, part) == getattr(mixture, part)
    assert baseline.attack.num_steps == (10,)
    assert baseline.attack.fgsm_epsilon == (8 / 255,)


def test_pretrained_experts_leave_only_the_joint_phase():
    config = presets.dwf_cifar10("/data", pretrain=False)
    assert config.pretrain is None
    assert config.joint == presets.dwf_cifar10().joint
    assert config.data.root == "/data"
    assert presets.dwf_svhn(pretrain=False).pretrain is None
    assert presets.dwf_cifar100(pretrain=False).pretrain is None


def test_digits_attacks_reach_their_radius():
    attack = presets.dwf_digits().attack
    assert max(attack.num_steps) * attack.step_size >= attack.epsilon
