"""Networks whose robustness is known exactly, image by image: what the suites make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from dwf.attacks import apgd
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset
from dwf.evaluation import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SHAPE, NUM_HIDDEN, NUM_CLASSES = (1, 3, 3), 10, 4
SETTINGS = EvaluationConfig(batch_size=64, diagnostic_images=0)


def relu_network(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(9, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, NUM_CLASSES)
    )
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network.eval()


def smallest_margin(network: nn.Sequential, image: np.ndarray, label: int, epsilon: float) -> float:
    """min over the ball within [0, 1] of logit[label] - max of the others, by integer programming.

    Variables: the image x, the units h = max(z, 0) of z = A x + a, and for each unit a binary d
    that is 1 where z > 0. With bounds low <= z <= high from interval arithmetic,
    h >= z, h >= 0, h <= z - low (1 - d), h <= high d (Tjeng et al., arXiv:1711.07356).
    """
    A, a, C, c = (p.detach().double().numpy() for p in network.parameters())
    bottom, top = np.clip(image - epsilon, 0, 1), np.clip(image + epsilon, 0, 1)
    positive, negative = np.clip(A, 0, None), np.clip(A, None, 0)
    low, high = positive @ bottom + negative @ top + a, positive @ top + negative @ bottom + a
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    H, eye, none = NUM_HIDDEN, np.eye(NUM_HIDDEN), np.zeros((NUM_HIDDEN, NUM_HIDDEN))
    constraints = [
        LinearConstraint(np.hstack([-A, eye, none]), lb=a),
        LinearConstraint(np.hstack([-A, eye, -np.diag(low)]), ub=a - low),
        LinearConstraint(np.hstack([0 * A, eye, -np.diag(high)]), ub=0),
    ]
    bounds = Bounds(
        np.concatenate([bottom, np.zeros(2 * H)]), np.concatenate([top, high, np.ones(H)])
    )
    integrality = np.concatenate([np.zeros(len(image) + H), np.ones(H)])
    margins = []
    for other in set(range(NUM_CLASSES)) - {label}:
        cost = np.concatenate([np.zeros(len(image)), C[label] - C[other], np.zeros(H)])
        solved = milp(cost, constraints=constraints, bounds=bounds, integrality=integrality)
        assert solved.success, solved.message
        margins.append(solved.fun + c[label] - c[other])
    return min(margins)


@pytest.fixture(scope="module", params=[1, 2, 3])
def known(request, one_thread):
    """A network, images with labels of its own, and their margins at several radii."""
    network = relu_network(request.param)
    generator = torch.Generator().manual_seed(request.param)
    pixels = torch.randint(0, 256, (40, *SHAPE), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = network(pixels.float() / 255).argmax(dim=1)
    names = tuple("abcd")
    dataset = ImageDataset("known", pixels, labels, 4, names, (0.5,), (0.5,), "none", "test")
    margins = {
        epsilon: np.array(
            [
                smallest_margin(network, image, int(label), epsilon)
                for image, label in zip(pixels.flatten(1).numpy() / 255, labels, strict=True)
            ]
        )
        for epsilon in (0.02, 0.06, 0.15)
    }
    return network, dataset, margins


class TestTheTruthItself:
    def test_margin_is_reached_and_never_passed(self, known):
        """By thousands of random corners and points of the ball."""
        network, dataset, margins = known
        generator = torch.Generator().manual_seed(1)
        for i in range(5):
            image, label = dataset.images[i].float() / 255, int(dataset.labels[i])
            offset = 2 * torch.rand(20000, *SHAPE, generator=generator) - 1
            offset[::2] = offset[::2].sign()
            with torch.no_grad():
                logits = network((image + 0.06 * offset).clamp(0, 1))
            others = logits.clone()
            others[:, label] = -torch.inf
            found = float((logits[:, label] - others.amax(dim=1)).min())
            assert margins[0.06][i] <= found + 1e-5
            assert found <= margins[0.06][i] + 0.05 * abs(found) + 0.05


def standing(result, epsilon):
    within = [row.correct for row in result.attacks if row.epsilon <= epsilon]
    return torch.stack(within).all(dim=0).numpy()


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_relu_network_has_its_known_value(known, suite):
    network, dataset, margins = known
    result = evaluate(network, dataset, SETTINGS, suite=suite, epsilon=list(margins))
    for epsilon, margin in margins.items():
        sure = np.abs(margin) > 1e-4  # float32 could decide the others either way
        assert sure.sum() >= 39
        stands, truth = standing(result, epsilon)[sure], (margin > 0)[sure]
        assert (stands | ~truth).all(), "an image was broken that cannot be"
        if epsilon < max(margins):
            assert (stands == truth).all()
        else:  # in so large a ball an ascent may end at another optimum
            assert (stands != truth).sum() <= 2
    values = [(margin > 0).mean() for margin in margins.values()]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.5 > values[-1]


def test_more_restarts_break_more_and_never_what_cannot_be(known):
    network, dataset, margins = known
    images, labels = dataset.images.float() / 255, dataset.labels
    before = np.zeros(len(labels), dtype=bool)
    for num_restarts in (1, 2, 4):
        found = apgd(network, images, labels, epsilon=0.15, num_steps=20, num_restarts=num_restarts)
        with torch.no_grad():
            fooled = (network(found).argmax(dim=1) != labels).numpy()
        assert not (before & ~fooled).any()
        assert not (fooled & (margins[0.15] > 1e-4)).any()
        before = fooled
