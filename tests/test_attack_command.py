"""``dwf attack``: one attack from the command line, on a run or on a foreign model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwf
from dwf import cli
from dwf.attacks import load_images
from dwf.cli.attack import ATTACKS, craft, read_settings
from dwf.data import evaluation_batches

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def attack(tmp_path, monkeypatch, capsys):
    """Run the command on a linear model of digits; return its exit code, output and error."""
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)

    def command(*argv):
        model = ["--model", "net.py:net", "--data", "digits", "--images", "40", "--quiet"]
        code = cli.main(["attack", *model, *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def few(num_images=40):
    return dwf.data.load("digits", split="test").subset(torch.arange(num_images))


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def test_says_what_the_function_does(attack, tmp_path):
    code, out, err = attack("--out", "made.safetensors", "num_steps=4", "step_size=1/50")
    assert (code, err) == (0, "")
    model, dataset = linear(), few()
    images, labels, index = next(evaluation_batches(dataset, 40))
    settings = {"epsilon": 8 / 255, "step_size": 1 / 50, "num_steps": 4, "random_start": True}
    expected = dwf.pgd(model, images, labels, sample_index=index, **settings)
    found, saved_labels = load_images(tmp_path / "made.safetensors")
    assert torch.equal(found, expected)
    assert torch.equal(saved_labels, labels)
    accuracy = float((model(expected).argmax(dim=1) == labels).double().mean())
    assert f"under this attack    {100 * accuracy:6.2f} %" in out
    assert "PGD(Sequential, epsilon=0.03137, step_size=0.02, num_steps=4)" in out


def test_toward_a_class():
    """Images of the class are left out; the others go there, far enough given."""
    dataset = few()
    others = dataset.subset((dataset.labels != 3).nonzero()[:, 0])
    attack = dwf.PGD(linear(), epsilon=0.5, step_size=0.1, num_steps=10)
    made = craft(attack, others, target=3, batch_size=16)
    assert len(made.images) == len(others) < 40
    assert (made.answers == 3).all()
    assert (made.distances <= 0.5 + 1e-6).all()
    assert "answers class 3      100.00 %" in made.lines("linf")[2]


def test_target_from_the_command_line(attack):
    code, out, _ = attack("--target", "3", "--epsilon", "0.5", "step_size=0.1")
    assert code == 0
    assert f"n = {int((few().labels != 3).sum())}" in out
    assert "answers class 3      100.00 %" in out


def test_a_distance_is_minimized_without_epsilon(attack):
    code, out, _ = attack("--attack", "carlini_wagner", "num_steps=3", "num_searches=1")
    assert code == 0
    assert "l2 distance: mean" in out


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_settings_from_text(name):
    kind = ATTACKS[name]
    text = ["norm=linf", "bn_mode=train", "allow_probabilities=true"]
    expected = {"norm": "linf", "bn_mode": "train", "allow_probabilities": True}
    assert read_settings(kind, text) == expected
    assert kind(linear(), **expected).norm == "linf"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["num_step=4"], "expected KEY=VALUE with a KEY of ['step_size', 'num_steps'"),
        (["num_steps=four"], "num_steps: 'four' is not a int"),
        (["norm=l2"], "--epsilon: name one for norm l2"),
        (["--target", "10"], "--target: 10 is no class of 0 to 9"),
        (["--attack", "autoattack", "--target", "1"], "targets: AutoAttack takes none"),
        (["--epsilon", "8"], "did you mean 8/255"),
        (["--out", "nowhere/made.safetensors"], "nowhere: not writable"),
    ],
)
def test_mistakes(attack, argv, message):
    code, _, err = attack(*argv)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
