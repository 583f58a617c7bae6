"""Models with nothing to hide: none is condemned, whatever its size or training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwf
from dwf import data
from dwf.data import ImageDataset
from dwf.data.batches import to_unit_range
from dwf.evaluation.canaries import judge
from dwf.evaluation.honest import build_small_network, honest_mixture, train_quickly

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
NUM_IMAGES = 128
PATTERNS = {"image_shape": (3, 16, 16), "num_classes": 5}


def patterns(num_images: int, split: str) -> ImageDataset:
    """Five smooth colour patterns under noise."""
    generator = torch.Generator().manual_seed(7)
    shapes = torch.rand(5, 3, 16, 16, generator=generator)
    shapes = nn.functional.avg_pool2d(shapes, 3, 1, 1)
    shapes = (shapes - shapes.mean()) * 2 + 0.5
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.randint(0, 5, (num_images,), generator=generator)
    noise = torch.randn(num_images, 3, 16, 16, generator=generator)
    pixels = ((shapes[labels] + 0.15 * noise).clamp(0, 1) * 255).round().to(torch.uint8)
    names = tuple("abcde")
    return ImageDataset("patterns", pixels, labels, 5, names, (0.5,) * 3, (0.2,) * 3, "none", split)


def small(seed, epsilon, **settings):
    return train_quickly(build_small_network(seed, **settings), seed=seed, epsilon=epsilon)


def of_patterns(seed, epsilon):
    network = build_small_network(seed, width=8, **PATTERNS)
    dataset = patterns(1000, "train")
    return train_quickly(network, dataset, seed=seed, epsilon=epsilon, num_epochs=3)


def mlp(epsilon):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    return train_quickly(nn.Sequential(nn.Flatten(), *layers), epsilon=epsilon)


def resnet(seed, epsilon):
    network = dwf.models.build_network("resnet6", num_classes=10, width=8, in_channels=1, seed=seed)
    return train_quickly(network, epsilon=epsilon, num_epochs=4)


def learned_gate(seed, epsilon):
    experts = [build_small_network(seed + e, width=6) for e in range(3)]
    return train_quickly(
        dwf.Mixture(experts, dwf.MlpGate((1, 8, 8), 3, hidden=16)), epsilon=epsilon
    )


# how each is made, and the radius that it is judged at
HONEST = {
    "plain": (lambda: small(0, 0), 0.1),
    "plain, narrow": (lambda: small(9, 0, width=4), 0.1),
    "plain, wide": (lambda: small(9, 0, width=32), 0.1),
    "adversarial": (lambda: small(1, 0.2), 0.2),
    "adversarial, narrow": (lambda: small(5, 0.15, width=6), 0.15),
    "adversarial, wide": (lambda: small(5, 0.15, width=24), 0.15),
    "adversarial at half the radius": (lambda: small(8, 0.1), 0.2),
    "perceptron": (lambda: mlp(0.1), 0.1),
    "plain ResNet": (lambda: resnet(0, 0), 0.1),
    "adversarial ResNet": (lambda: resnet(1, 0.2), 0.2),
    "plain mixture": (lambda: honest_mixture(3, epsilon=0), 0.1),
    "adversarial mixture": (lambda: honest_mixture(4), 0.2),
    "plain mixture, learned gate": (lambda: learned_gate(2, 0), 0.1),
    "adversarial mixture, learned gate": (lambda: learned_gate(6, 0.2), 0.2),
    "plain, patterns": (lambda: of_patterns(0, 0), 0.1),
    "adversarial, patterns": (lambda: of_patterns(1, 0.1), 0.1),
}


@pytest.mark.parametrize("name", HONEST)
def test_is_not_invalid(name):
    make, epsilon = HONEST[name]
    dataset = patterns(200, "test") if "patterns" in name else data.load("digits", split="test")
    dataset = dataset.subset(torch.arange(NUM_IMAGES))
    model = make()
    with torch.no_grad():
        predicted = model(to_unit_range(dataset.images)).argmax(dim=1)
    assert (predicted == dataset.labels).double().mean() > 0.8
    trial = judge(model, dataset, epsilon=epsilon)
    assert trial.verdict != "INVALID", [str(finding) for finding in trial.findings]
