"""Balls in two norms: steps, projections and random points, against numbers worked by hand."""

import math

import pytest
import torch
from small_models import SHAPE, make_images

from dwf.attacks import norms

IMAGES = make_images(6)
BOTH = pytest.mark.parametrize("norm", norms.NORMS)


def vector(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


class TestByHand:
    def test_length(self):
        assert norms.length(vector(3.0, -4.0), "l2").tolist() == [5.0]
        assert norms.length(vector(3.0, -4.0), "linf").tolist() == [4.0]
        assert norms.length(vector(1e-30, 0.0), "l2").item() == pytest.approx(1e-30)

    def test_ascent(self):
        gradient = vector(3.0, -4.0, 0.0)
        assert norms.ascent(gradient, "linf").flatten().tolist() == [1, -1, 0]
        torch.testing.assert_close(norms.ascent(gradient, "l2"), vector(0.6, -0.8, 0.0))
        tiny = norms.ascent(gradient * 1e-30, "l2")  # a vanishing gradient still points somewhere
        torch.testing.assert_close(tiny, vector(0.6, -0.8, 0.0))

    @BOTH
    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_no_direction_no_step(self, value, norm):
        assert torch.equal(
            norms.ascent(torch.full((2, *SHAPE), value), norm), torch.zeros(2, *SHAPE)
        )

    def test_project(self):
        images, epsilon = vector(0.5, 0.5), torch.tensor([0.1])
        found = norms.project(vector(0.8, 0.1), images, epsilon, "l2", 0.0, 1.0)
        torch.testing.assert_close(found, vector(0.56, 0.42))
        found = norms.project(vector(0.8, 0.45), images, epsilon, "linf", 0.0, 1.0)
        torch.testing.assert_close(found, vector(0.6, 0.45))
        found = norms.project(vector(0.54, 0.47), images, epsilon, "l2", 0.0, 1.0)
        torch.testing.assert_close(found, vector(0.54, 0.47))
        found = norms.project(vector(3.5, 0.5), images, torch.tensor([2.0]), "l2", 0.0, 1.0)
        torch.testing.assert_close(found, vector(1.0, 0.5))


@BOTH
def test_projection_is_idempotent_and_inside(norm):
    generator = torch.Generator().manual_seed(0)
    epsilon = torch.tensor([0.0, 1e-6, 0.01, 0.3, 1.0, 3.0])
    moved = IMAGES + torch.randn(IMAGES.shape, generator=generator)
    once = norms.project(moved, IMAGES, epsilon, norm, 0.0, 1.0)
    distance = torch.linalg.vector_norm(
        (once.double() - IMAGES).flatten(1), torch.inf if norm == "linf" else 2, dim=1
    )
    assert (distance <= epsilon + 1e-6).all()
    assert 0 <= once.min() <= once.max() <= 1
    twice = norms.project(once, IMAGES, epsilon, norm, 0.0, 1.0)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-7)


class TestRandomPoints:
    INDEX = torch.arange(2000)

    def test_uniform_in_the_l2_ball(self):
        """In d dimensions a share r^d lies within r, and no direction is favored."""
        d = 12
        points = norms.uniform_in_ball(3, self.INDEX, (3, 2, 2), "l2", stream=0)
        radius = norms.length(points, "l2").double()
        assert radius.max() <= 1 + 1e-6
        for r in (0.8, 0.9, 0.97):
            assert (radius <= r).double().mean().item() == pytest.approx(r**d, abs=0.035)
        # E x_i = 0 and E x_i^2 = 1 / (d + 2)
        flat = points.flatten(1).double()
        assert flat.mean(dim=0).abs().max() < 0.03
        torch.testing.assert_close(
            flat.square().mean(dim=0), torch.full((d,), 1 / (d + 2)).double(), rtol=0.15, atol=0
        )

    @BOTH
    def test_on_the_ball(self, norm):
        points = norms.uniform_on_ball(3, self.INDEX, SHAPE, norm, stream=0)
        torch.testing.assert_close(norms.length(points, norm), torch.ones(2000))
        assert points.mean().abs() < 0.01

    @BOTH
    @pytest.mark.parametrize("draw", [norms.uniform_in_ball, norms.uniform_on_ball])
    def test_depend_on_seed_index_and_stream_alone(self, draw, norm):
        first = draw(1, self.INDEX[:6], SHAPE, norm, stream=2)
        order = torch.tensor([4, 1])
        assert torch.equal(draw(1, order, SHAPE, norm, stream=2), first[order])
        for seed, stream in ((2, 2), (1, 3)):
            assert not torch.equal(draw(seed, self.INDEX[:6], SHAPE, norm, stream=stream), first)
