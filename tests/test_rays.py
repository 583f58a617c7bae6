"""RayS: known distances, labels alone, budgets, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from small_models import Linear, Mapped, SmallNet, disordered, everything, make_images
from torch import nn

from dwf.attacks import AttackReport, minimum_norm, rays

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = make_images(3) * 0.5 + 0.25
TINY = make_images(3, (1, 4, 4)) * 0.5 + 0.25


class Sum(nn.Module):
    """Class 1 where the weighted sum of pixels is above a threshold; weights of both signs."""

    def __init__(self, threshold=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(1, 4, 4, generator=generator).sign()
        self.threshold = threshold

    def forward(self, images):
        total = (images * self.weight).sum(dim=(1, 2, 3)) - self.threshold
        return torch.stack([-total, total], dim=1)


def right(model, images=IMAGES):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def one_hot(logits):
    return nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).float()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_comes_close_to_a_known_distance(norm):
    """All signs right: the distance is that of the plane. It is never below it."""
    model = Sum(-1.0)
    labels = right(model, TINY)
    found = minimum_norm(rays, model, TINY, labels, norm=norm, num_queries=300)
    margin = model(TINY)[:, 1].abs()
    distance = margin / 16 if norm == "linf" else margin / 4
    assert (found.distance >= distance * (1 - 1e-4)).all()
    assert (found.distance <= 1.5 * distance + 0.02).all()
    few = minimum_norm(rays, model, TINY, labels, norm=norm, num_queries=60)
    assert (few.distance >= found.distance - 1e-6).all()


def test_labels_are_enough():
    model = SmallNet().eval()
    labels, settings = right(model), {"epsilon": 0.2, "num_queries": 60}
    expected = rays(model, IMAGES, labels, **settings)
    assert torch.equal(rays(Mapped(model, one_hot).eval(), IMAGES, labels, **settings), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_its_ball_and_fools_the_model(norm):
    model = Sum(-1.0)
    labels, epsilon = right(model, TINY), 0.2 if norm == "linf" else 0.8
    found = rays(model, TINY, labels, epsilon=epsilon, norm=norm, num_queries=300)
    delta = (found - TINY).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= epsilon + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    fooled = right(model, found) != labels
    assert fooled.any()
    assert torch.equal(found[~fooled], TINY[~fooled])


@pytest.mark.parametrize("num_queries", [1, 7, 50])
def test_never_more_queries_than_allowed(num_queries):
    report = AttackReport()
    rays(Linear(), IMAGES[:1], right(Linear())[:1], num_queries=num_queries, report=report)
    assert report.num_forwards <= num_queries + 1  # the first verdict


def test_batch_and_order_change_nothing():
    model = Sum(-1.0)
    labels, settings = right(model, TINY), {"epsilon": 0.1, "num_queries": 80}
    whole = rays(model, TINY, labels, **settings)
    order = torch.tensor([2, 0])
    part = rays(model, TINY[order], labels[order], sample_index=order, **settings)
    assert torch.equal(part, whole[order])


def test_leaves_no_trace_and_takes_nothing():
    model = disordered(SmallNet())
    before = everything(model)
    rays(model, IMAGES, torch.zeros(3, dtype=torch.int64), num_queries=20)
    assert everything(model) == before
    assert rays(Linear(), IMAGES[:0], torch.zeros(0).long()).shape == (0, 3, 8, 8)
