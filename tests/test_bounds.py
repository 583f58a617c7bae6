"""Bounds from below: exact for linear models, true for small ReLU networks, held to the attacks."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist

import pytest
import torch
from small_models import make_dataset
from torch import nn

import dwf
from dwf.attacks import apgd
from dwf.checks import ConfigError
from dwf.config import EvaluationConfig
from dwf.data import load
from dwf.evaluation import Budget, bounds, certificates
from dwf.evaluation.bounds import certified, looks
from dwf.evaluation.honest import build_small_network, train_quickly
from dwf.evaluation.smoothing import binomial_lower, smoothed
from dwf.models import Normalize, PixelModel, build_network

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = Budget(num_steps=10, num_queries=20)
SETTINGS = EvaluationConfig(epsilon=0.1, step_size=0.02, diagnostic_images=0)


def linear(num_classes=4):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).eval()


def perceptron(activation=nn.ReLU):
    torch.manual_seed(4)
    layers = [nn.Linear(64, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 4)]
    return nn.Sequential(nn.Flatten(), *layers).eval()


def labeled(model, count=60):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


def certified_at_once(model, images, labels, **radius):
    batches = ((images[places], labels[places]) for places in looks(torch.arange(len(images))))
    return certified(model, batches, **radius)


def stands(model, images, labels, epsilon, norm="linf"):
    """What a strong attack leaves."""
    left = torch.ones_like(labels, dtype=torch.bool)
    for loss in ("ce", "dlr"):
        found = apgd(model, images, labels, loss=loss, epsilon=epsilon, norm=norm, num_steps=100)
        with torch.no_grad():
            left &= model(found).argmax(dim=1) == labels
    return left


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("l2", 0.15)])
def test_of_a_linear_model_it_is_the_robust_accuracy(norm, epsilon):
    model = linear()
    images, labels = labeled(model)
    proven = certified_at_once(model, images, labels, epsilon=epsilon, norm=norm)
    assert 5 < proven.sum() < 55
    assert torch.equal(proven, stands(model, images, labels, epsilon, norm))


def test_the_box_is_used_where_the_ball_leaves_it():
    """Black and white images have half the room, and a linear model's bound knows it."""
    model = linear()
    images = (labeled(model)[0] > 0.5).float()
    labels = model(images).argmax(dim=1)
    for norm, epsilon in (("linf", 0.03), ("l2", 0.3)):
        proven = certified_at_once(model, images, labels, epsilon=epsilon, norm=norm)
        assert torch.equal(proven, stands(model, images, labels, epsilon, norm))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_margins_bound_every_point_of_the_ball(norm):
    """Random points and corners never go below, for affine layers and activations of all kinds."""
    torch.manual_seed(6)
    pooled = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()  # fmt: skip
    residual = PixelModel(
        Normalize((0.3,), (0.4,)),
        build_network("resnet6", num_classes=4, width=2, in_channels=1, seed=0),
    ).eval()
    epsilon = 0.05
    for model in (perceptron(), perceptron(nn.LeakyReLU), pooled, residual):
        images, labels = labeled(model, count=6)
        network = bounds.read_network(model, images[:1])
        lower = bounds.margins(network, images.double(), labels, epsilon, norm)
        assert lower.isfinite().any()
        lowest = torch.full_like(lower, torch.inf)
        own = labels.unsqueeze(1)
        for draw in range(100):
            move = torch.randn(images.shape, generator=torch.Generator().manual_seed(draw))
            if norm == "linf":
                move = epsilon * (move.sign() if draw % 2 else move.clamp(-1, 1))
            else:
                move = epsilon * move / move.flatten(1).norm(dim=1)[:, None, None, None]
            with torch.no_grad():
                logits = model((images + move).clamp(0, 1)).double()
            lowest = torch.minimum(lowest, logits.gather(1, own) - logits)
        others = torch.ones_like(lower).scatter(1, own, 0).bool()
        assert (lower <= lowest)[others].all()


def test_relaxation_proves_more_than_intervals(monkeypatch):
    model = perceptron()
    images, labels = labeled(model)
    both = certified_at_once(model, images, labels, epsilon=0.004)
    monkeypatch.setattr(
        bounds.Relaxed, "margins", lambda walk, labels: torch.full((len(labels), 4), -torch.inf)
    )
    alone = certified_at_once(model, images, labels, epsilon=0.004)
    assert 0 < alone.sum() < both.sum()
    assert not (alone & ~both).any()


def test_certified_robust_clean_of_a_trained_network():
    data = load("digits", split="test").subset(torch.arange(40))
    model = train_quickly(build_small_network(0, width=4), epsilon=0.05, num_epochs=3, num_steps=1)
    result = dwf.evaluate(model.eval(), data, SETTINGS, suite="quick", epsilon=0.01, budget=BUDGET)
    (bound,) = result.certified
    assert 0.2 < bound.accuracy <= result.robust_accuracy <= result.clean_accuracy
    assert result.finding("sandwich") is None
    text = str(result)
    assert text.index("worst case per image") < text.index("\ncertified  ")
    assert f"{100 * bound.accuracy:.2f} %" in text[text.index("\ncertified  ") :]
    assert "certified" in result._repr_html_()


BUGS = {
    # each proves what is not so
    "a smaller ball": lambda m: m.setattr(
        bounds.Ball,
        "interval",
        lambda ball: bounds.Interval(ball.images, torch.full_like(ball.images, 1e-6)),
    ),
    "a margin too generous": lambda m: m.setattr(bounds, "SURE", -5.0),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_a_finding(bug, monkeypatch):
    model = perceptron()
    images, labels = labeled(model)
    BUGS[bug](monkeypatch)
    result = dwf.evaluate(
        model, (images, labels), SETTINGS, suite="quick", epsilon=0.2, budget=BUDGET
    )
    finding = result.finding("sandwich")
    assert finding is not None
    assert (finding.severity, result.verdict) == ("invalid", "INVALID")
    assert finding.num_images >= len(finding.sample_indices) > 0


def test_other_networks_have_none():
    images, labels = make_dataset(20).images.float() / 255, torch.zeros(20, dtype=torch.long)
    torch.manual_seed(0)
    soft = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4), nn.Softmax(dim=1))
    assert certified_at_once(soft, images, labels, epsilon=0.01) is None
    assert certified_at_once(lambda x: x.flatten(1), images, labels, epsilon=0.01) is None

    lying = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4)).eval()
    labels = lying(images).argmax(dim=1)
    assert certified_at_once(lying, images, labels, epsilon=1e-4) is not None
    assert certified_at_once(copy.deepcopy(lying).half(), images, labels, epsilon=1e-4) is None
    handle = lying[1].register_forward_hook(lambda module, inputs, output: output.sin())
    assert certified_at_once(lying, images, labels, epsilon=1e-4) is None
    handle.remove()
    assert certified_at_once(lying, images, labels, epsilon=1e-4) is not None
    lying[1].forward = lambda x: x[:, :4].sin()
    assert certified_at_once(lying, images, labels, epsilon=1e-4) is None


def test_the_model_is_not_changed():
    model = perceptron().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    images, labels = labeled(model)
    certified_at_once(model, images, labels, epsilon=0.01)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.dtype is torch.float32 for x in model.parameters())


class TestSmoothing:
    def test_proportions(self):
        # that all of n succeed has probability alpha at alpha^(1/n)
        assert binomial_lower(100, 100, 0.001) == pytest.approx(0.001**0.01, abs=1e-9)
        assert binomial_lower(0, 10, 0.01) == 0.0
        # one of n: 1 - (1 - p)^n = alpha
        assert binomial_lower(1, 20, 0.05) == pytest.approx(1 - 0.95 ** (1 / 20), abs=1e-9)

    def test_of_a_half_space_the_radius_is_below_the_distance(self):
        """Smoothed, a linear model of two classes is itself; its margin is its distance."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        with torch.no_grad():
            weight = torch.randn(16, generator=torch.Generator().manual_seed(0))
            model[1].weight.copy_(torch.stack([weight, -weight]) / weight.norm() / 2)
            model[1].bias.zero_()
        images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = model(images)
        distance = (logits[:, 0] - logits[:, 1]).abs().double()
        found = smoothed(model, images, logits.argmax(dim=1), sigma=0.5, seed=1)
        assert found.correct.sum() >= 6
        assert (found.radius[found.correct] <= distance[found.correct]).all()
        most = 0.5 * NormalDist().inv_cdf(binomial_lower(1000, 1000, 0.001))
        assert found.radius.max() <= most
        near = distance < 0.8 * most
        assert (found.radius[near] > 0.5 * distance[near] - 0.1).all()
        again = smoothed(model, images, logits.argmax(dim=1), sigma=0.5, seed=1)
        assert torch.equal(again.radius, found.radius)

    def test_beside_the_table(self):
        model = linear()
        images, labels = labeled(model, count=8)
        result = dwf.evaluate(
            model,
            (images, labels),
            SETTINGS,
            suite="quick",
            epsilon=0.02,
            budget=BUDGET,
            certify=0.1,
        )
        bound, its = result.certified
        assert (bound.of, its.of) == ("model", "smoothed model")
        assert its.accuracy <= its.clean
        assert "sigma 0.1" in str(result)
        # the L-inf ball is inside an L2 ball of this radius
        far = smoothed(model, images, labels, sigma=0.1).radius >= 0.02 * math.sqrt(64)
        assert its.num_correct == int(far.sum())
        assert type(result).from_json(result.to_json(), certificates.__file__).certified == [
            bound,
            its,
        ]

    def test_bad_input(self):
        with pytest.raises(ConfigError, match="certify"):
            dwf.evaluate(linear(), make_dataset(4), SETTINGS, certify=-1.0)
