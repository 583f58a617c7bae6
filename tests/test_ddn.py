"""DDN: distances to known boundaries, and the published loop written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import NUM_CLASSES, Curved, Linear, make_images

from dwf.attacks import ddn, minimum_norm
from dwf.checks import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 0.3 + 0.4 * make_images(6)
B = len(IMAGES)


def classes_of(model, images):
    return model(images).argmax(dim=1)


def distances_to(model, labels, targets):
    """From each image to where class ``targets`` [B] equals the label's, without pixel limits."""
    w, z, rows = model.weight.flatten(1), model(IMAGES), torch.arange(B)
    gap = z[rows, labels] - z[rows, targets]
    return gap / (w[labels] - w[targets]).norm(dim=1)


def test_finds_the_nearest_boundary_of_a_linear_model():
    model = Linear()
    model.weight.data *= 10  # sure of itself, so the gradient is that of the best two classes
    labels = classes_of(model, IMAGES)
    each = [distances_to(model, labels, (labels + k) % NUM_CLASSES) for k in range(1, NUM_CLASSES)]
    nearest = torch.stack(each).amin(dim=0).detach()
    found = minimum_norm(ddn, model, IMAGES, labels, norm="l2", num_steps=300)
    ratio = found.distance / nearest
    assert ratio.min() >= 1 - 1e-5
    assert ratio.max() <= 1.02
    for factor, fooled in ((0.99, 0), (1.1, B)):
        bounded = ddn(model, IMAGES, labels, epsilon=factor * nearest, num_steps=300)
        assert (classes_of(model, bounded) != labels).sum() == fooled


def test_reaches_a_target():
    model = Linear()
    labels = classes_of(model, IMAGES)
    targets = (labels + 2) % NUM_CLASSES
    found = ddn(model, IMAGES, labels, targets=targets, num_steps=200)
    assert torch.equal(classes_of(model, found), targets)
    distance = (found - IMAGES).flatten(1).norm(dim=1)
    assert (distance >= distances_to(model, labels, targets) * (1 - 1e-5)).all()


def slow_ddn(model, x0, label, num_steps, radius, gamma):
    """One image: the closest that fools the model, by the loop of the paper."""
    x, nearest, best = x0, math.inf, x0
    for k in range(num_steps):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, label), leaf)
        fooled = logits.argmax(dim=1) != label
        if fooled and (distance := float((x - x0).norm())) < nearest:
            nearest, best = distance, x
        alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * k / num_steps)) / 2
        delta = x - x0 + alpha * grad / grad.norm()
        radius = radius * (1 - gamma if fooled else 1 + gamma)
        x = (x0 + radius * delta / delta.norm()).clamp(0, 1)
    return best


def test_is_the_published_loop():
    model = Curved()
    labels = classes_of(model, IMAGES)
    found = ddn(model, IMAGES, labels, num_steps=25, first_radius=0.5, gamma=0.1)
    expected = [
        slow_ddn(model, IMAGES[b : b + 1], labels[b : b + 1], 25, 0.5, 0.1) for b in range(B)
    ]
    assert not torch.equal(found, IMAGES)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"norm": "linf"}, "DDN"), ({"gamma": 1.0}, "gamma"), ({"first_radius": 0.0}, "first_radius")],
)
def test_refuses(settings, match):
    with pytest.raises(ConfigError, match=match):
        ddn(Linear(), IMAGES, torch.zeros(B, dtype=torch.int64), **settings)
