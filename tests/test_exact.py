"""Integer programming decides what bounds leave open, and agrees with asking every image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwf.config import EvaluationConfig
from dwf.evaluation import Budget, certificates, evaluate, exact
from dwf.evaluation.bounds import certified
from dwf.evaluation.exact import settled

pytestmark = pytest.mark.usefixtures("one_thread")


def by_bounds(model, images, labels, epsilon):
    found = certified(model, [(images, labels)], epsilon=epsilon)
    return torch.zeros_like(labels, dtype=torch.bool) if found is None else found


class Twice(nn.Module):
    """Logit 0 is ReLU(x - .5) - ReLU(x - .5) + .1 by two units, logit 1 is zero."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(1, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.hidden.weight.fill_(1.0)
            self.hidden.bias.fill_(-0.5)
            self.last.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
            self.last.bias.copy_(torch.tensor([0.1, 0.0]))

    def forward(self, images):
        return self.last(torch.relu(self.hidden(images.flatten(1))))


def test_units_that_relaxation_takes_for_independent():
    model, labels = Twice().eval(), torch.tensor([0])
    images = torch.full((1, 1, 1, 1), 0.5)
    assert not by_bounds(model, images, labels, 0.4).any()
    assert settled(model, images, labels, epsilon=0.4).tolist() == [True]
    assert settled(model, images, 1 - labels, epsilon=0.4).tolist() == [False]


def smallest_margin(model, image, label, epsilon, count=60):
    """Over a grid of the ball around an image of two pixels."""
    low, high = (image - epsilon).clamp(min=0).flatten(), (image + epsilon).clamp(max=1).flatten()
    grids = [torch.linspace(float(a), float(b), count) for a, b in zip(low, high, strict=True)]
    asked = torch.cartesian_prod(*grids).view(-1, 1, 1, 2)
    logits = model(asked)
    others = logits.clone()
    others[:, label] = -torch.inf
    return float((logits[:, label] - others.amax(dim=1)).min())


def test_agrees_with_asking_the_whole_ball():
    torch.manual_seed(0)
    layers = [nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3)]
    model = nn.Sequential(nn.Flatten(), *layers).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.0)
    images = torch.rand(40, 1, 1, 2)
    labels = model(images).argmax(dim=1)
    truth = torch.tensor(
        [
            smallest_margin(model, image, int(label), 0.2) > 0
            for image, label in zip(images, labels, strict=True)
        ]
    )
    found = settled(model, images, labels, epsilon=0.2)
    assert torch.equal(found, truth)
    assert by_bounds(model, images, labels, 0.2).sum() < found.sum() < len(found)


def test_stays_open_where_it_would_take_long(monkeypatch):
    model, labels = Twice().eval(), torch.tensor([0])
    images = torch.full((1, 1, 1, 1), 0.5)
    for limit, value in (("MAX_UNDECIDED", 1), ("MAX_UNITS", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(exact, limit, value)
            assert not settled(model, images, labels, epsilon=0.4).any()


def test_an_evaluation_certifies_more_with_it(monkeypatch):
    torch.manual_seed(4)
    layers = [nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)]
    model = nn.Sequential(nn.Flatten(), *layers).eval()
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = model(images).argmax(dim=1)
    settings = EvaluationConfig(epsilon=0.06, step_size=0.005, diagnostic_images=0)

    def certified_share():
        budget = Budget(num_steps=10, num_queries=20)
        found = evaluate(model, (images, labels), settings, suite="quick", budget=budget)
        (own,) = found.certified
        assert own.accuracy <= found.worst_case.accuracy
        assert "sandwich" not in [finding.name for finding in found.findings]
        return own.accuracy

    with_it = certified_share()
    monkeypatch.setattr(certificates, "NUM_SETTLED", 0)
    assert certified_share() < with_it
