"""PreActResNet and WideResNet: the layouts of published checkpoints, and their arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plan_networks import trained

from dwf.models import PreActResNet, WideResNet, build_network


def build(name, width=64):
    return build_network(name, num_classes=10, width=width, in_channels=3, seed=0)


# As their papers and public code count them.
PARAMETERS = {
    "preactresnet18": 11_172_170,
    "wrn16_4": 2_748_890,
    "wrn28_10": 36_479_194,
    "wrn34_10": 46_160_474,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    assert sum(x.numel() for x in build(name).parameters()) == PARAMETERS[name]


def test_keys_of_published_checkpoints():
    wide, pre = (set(build(name, width=16).state_dict()) for name in ("wrn28_10", "preactresnet18"))
    assert {
        "conv1.weight",
        "block1.layer.0.bn1.running_mean",
        "block1.layer.0.convShortcut.weight",
        "block3.layer.3.conv2.weight",
        "bn1.weight",
        "fc.bias",
    } <= wide
    assert "block1.layer.1.convShortcut.weight" not in wide
    assert {
        "conv1.weight",
        "layer1.0.bn1.weight",
        "layer2.0.shortcut.0.weight",
        "layer4.1.conv2.weight",
        "bn.running_var",
        "linear.bias",
    } <= pre
    assert "layer1.0.shortcut.0.weight" not in pre


def _normalized(state, x, at):
    statistics = state[f"{at}.running_mean"], state[f"{at}.running_var"]
    return F.relu(F.batch_norm(x, *statistics, state[f"{at}.weight"], state[f"{at}.bias"]))


def _block(state, x, at, stride, shortcut):
    """out = conv2(relu(bn2(conv1(relu(bn1(x)))))) + x, or + the shortcut of relu(bn1(x))."""
    first = _normalized(state, x, f"{at}.bn1")
    out = F.conv2d(first, state[f"{at}.conv1.weight"], stride=stride, padding=1)
    out = F.conv2d(_normalized(state, out, f"{at}.bn2"), state[f"{at}.conv2.weight"], padding=1)
    weight = state.get(f"{at}.{shortcut}.weight")
    return out + (x if weight is None else F.conv2d(first, weight, stride=stride))


@pytest.mark.parametrize("kind", ["preact", "wide"])
def test_arithmetic(kind):
    if kind == "wide":
        network = trained(WideResNet(2, width=6))
        places = [f"block{i}.layer.{j}" for i in (1, 2, 3) for j in (0, 1)]
        shortcut, norm, linear = "convShortcut", "bn1", "fc"
        strided = {"block2.layer.0", "block3.layer.0"}
    else:
        network = trained(PreActResNet((1, 2, 1, 1), width=6))
        places = ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
        shortcut, norm, linear = "shortcut.0", "bn", "linear"
        strided = {"layer2.0", "layer3.0", "layer4.0"}
    state = network.state_dict()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for at in places:
        x = _block(state, x, at, 2 if at in strided else 1, shortcut)
    x = _normalized(state, x, norm).mean(dim=(2, 3))
    expected = F.linear(x, state[f"{linear}.weight"], state[f"{linear}.bias"])
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["preactresnet34", "wrn34_10"])
@pytest.mark.parametrize(("width", "size"), [(1, (8, 8)), (6, (13, 9))])
def test_any_width_and_size(name, width, size):
    assert build(name, width).eval()(torch.rand(2, 3, *size)).shape == (2, 10)
