"""``dwf transfer``: a table between models from the command line."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import dwf
from dwf import cli
from dwf.attacks import save_images

CODE = """
import torch
from torch import nn

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def other():
    return net(1)
"""
DATA = dwf.data.load("digits", split="test").subset(torch.arange(40))
IMAGES, LABELS = DATA.images.float() / 255, DATA.labels
MODELS = ("net.py:net", "net.py:other")


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = cli.main(["transfer", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_prints_what_the_function_returns(command, tmp_path):
    """Models and saved images, with settings of the attack between them."""
    save_images(tmp_path / "saved.safetensors", IMAGES, LABELS)
    code, out, err = command(
        *MODELS, "num_steps=3", "saved.safetensors", "--images", "40", "--data", "digits",
        "--attack", "pgd", "--epsilon", "0.1", "--seed", "5",
    )  # fmt: skip
    assert (code, err) == (0, "")
    models = {name: linear(seed) for seed, name in enumerate(MODELS)}
    expected = dwf.transfer(
        {**models, "saved.safetensors": IMAGES}, IMAGES, LABELS, judges=models,
        attack=dwf.PGD, epsilon=0.1, num_steps=3, seed=5,
    )  # fmt: skip
    # the order of the settings in the title is the command's
    assert out.splitlines()[1:] == str(expected).splitlines()[1:]
    assert out.startswith("PGD(epsilon=0.1, ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["net.py:net"], "--model needs --data"),
        (["saved.safetensors", "--data", "digits"], "somebody has to answer"),
        (["net.py:nett", "--data", "digits"], "did you mean"),
        (["net.py:net", "--data", "digits", "steps=3"], "expected KEY=VALUE"),
        (["net.py:net", "missing.safetensors", "--data", "digits"], "missing.safetensors"),
    ],
)
def test_mistakes(command, argv, message):
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_runs_of_one_data_set(command, tmp_path):
    settings = ["pretrain.num_epochs=1", "data.num_train=64", "model.width=2", "validate_every=0"]
    argv = ["train", "plain_digits", *settings, "--out", str(tmp_path / "a"), "--no-eval"]
    assert cli.main(argv) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    code, out, _ = command("a", "b", "--images", "20", "--attack", "fgsm")
    assert code == 0
    assert out.startswith("FGSM(epsilon=0.15")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["clean", "a", "b", "worst"]
