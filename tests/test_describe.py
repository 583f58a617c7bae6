"""Models, their outputs and data sets are shown in one line, without tensors."""

from __future__ import annotations

import pytest
from small_models import SHAPE, SmallNet, make_images
from torch import nn

from dwf import models
from dwf.data import load
from dwf.defenses import ModelFacts, get
from dwf.models import build_network
from dwf.models.describe import describe
from dwf.presets import find


def resnet(seed: int = 0) -> nn.Module:
    return build_network("resnet6", num_classes=5, width=4, in_channels=3, seed=seed)


MADE = {
    "Mixture(2 x resnet6 width 4, 1 x SmallNet, gate MlpGate, ": lambda: models.Mixture(
        [resnet(0), resnet(1), SmallNet()], models.MlpGate(SHAPE, 3)
    ),
    "RoutedMixture(2 x resnet6 width 4, ": lambda: models.RoutedMixture(
        [resnet(0), resnet(1)], models.LinearGate(SHAPE, 2)
    ),
    "PixelModel(resnet6 width 4, ": lambda: models.as_pixel_model(resnet(), (0.5,) * 3, (1,) * 3),
    "Accelerated(SmallNet, 1,405 parameters)": lambda: models.accelerate(SmallNet()),
    "Group(2 x SmallNet, 2,810 parameters)": lambda: models.Group([SmallNet(), SmallNet()]),
}


@pytest.mark.parametrize("start", MADE)
def test_one_line(start):
    shown = repr(MADE[start]())
    assert shown.startswith(start)
    assert shown.endswith(" parameters)")
    assert "\n" not in shown


@pytest.mark.parametrize(
    "preset", ["smoke", "advmoe_digits", "robust_experts_digits", "soe_digits", "jtdmoe_digits"]
)
def test_models_of_presets(preset):
    config = find(preset)
    model = get(config.defense).build(config, ModelFacts((1, 8, 8), 10, (0.5,), (0.25,)))
    for one in (model, model.expert(0)):
        assert "\n" not in repr(one)
        assert f"{sum(p.numel() for p in one.parameters()):,} parameters" in repr(one)


def test_outputs_are_shown_by_their_shapes():
    model = models.Mixture([SmallNet(), SmallNet()], models.MlpGate(SHAPE, 2)).eval()
    assert repr(model(make_images(4), return_aux=True)) == (
        "MixtureOutput(logits [4, 5], gate_logits [4, 2], gate_weights [4, 2], "
        "expert_logits [2, 4, 5])"
    )


def test_data_sets_are_shown_by_their_size():
    shown = "ImageDataset(digits test, 500 images [1, 8, 8], 10 classes)"
    assert repr(load("digits", split="test")) == shown


@pytest.mark.parametrize("name", models.NETWORKS)
def test_networks_are_known_by_name(name):
    network = build_network(name, num_classes=10, width=2, in_channels=1, seed=0)
    assert describe(network) == f"{name} width 2"
    assert "conv1" in nn.Module.__repr__(network)
