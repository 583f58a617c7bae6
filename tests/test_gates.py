"""The gate: its layers, its equal start, its size."""

import pytest
import torch
from small_models import make_images

from dwf.checks import ConfigError
from dwf.models import MlpGate


def test_layers_by_hand():
    gate = MlpGate((3, 8, 8), 4, hidden=6)
    images = make_images(5)
    first, last = gate.layers[1], gate.layers[3]
    torch.nn.init.normal_(last.weight)
    hidden = (images.flatten(1) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(gate(images), hidden @ last.weight.T + last.bias)
    assert first.weight.shape == (6, 192)


def test_starts_from_equal_weights():
    gate_logits = MlpGate((3, 8, 8), 9)(make_images(5))
    assert torch.equal(gate_logits, torch.zeros(5, 9))


def test_the_papers_size():
    """3072 -> 128 -> 9, with biases."""
    gate = MlpGate((3, 32, 32), 9)
    assert sum(p.numel() for p in gate.parameters()) == 394_505


def test_layout_of_the_images_does_not_matter():
    gate = MlpGate((3, 8, 8), 4)
    torch.nn.init.normal_(gate.layers[3].weight)
    images = make_images(5)
    found = gate(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, gate(images))


def test_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = MlpGate((3, 8, 8), 4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, third = MlpGate((3, 8, 8), 4, seed=5), MlpGate((3, 8, 8), 4, seed=6)
    assert torch.equal(first.layers[1].weight, second.layers[1].weight)
    assert not torch.equal(first.layers[1].weight, third.layers[1].weight)


@pytest.mark.parametrize("sizes", [{"num_experts": 0}, {"num_experts": 3, "hidden": 0}])
def test_impossible(sizes):
    with pytest.raises(ConfigError):
        MlpGate((3, 8, 8), **sizes)
