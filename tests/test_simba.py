"""SimBA: the paper's loop, one image at a time; margins rise, the ball holds, nothing changes."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    NUM_CLASSES,
    Linear,
    Mapped,
    SmallNet,
    disordered,
    everything,
    make_images,
)

import moe_kernels
from dwf.attacks import AttackReport, simba
from dwf.attacks.losses import margin
from dwf.attacks.setup import AttackBatch
from dwf.attacks.target import AttackTarget
from dwf.checks import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

B = 6
IMAGES = make_images(B)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
# Radii at which some of these images fall to the linear model, and some do not.
EPSILON = {"linf": 0.03, "l2": 0.5}


def right(model, images=IMAGES):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def slow(model, image, label, *, epsilon, norm, num_queries, step_size, seed, index):
    """The paper's loop in Python, without an end for images that fool the model."""
    noise = moe_kernels.uniform_noise(seed, torch.tensor([index]), (image.numel(),))[0]
    order = noise.argsort(stable=True).tolist()

    def score(x):
        with torch.no_grad():
            return float(margin(model(x[None]), label[None]))

    best, best_score, used, place = image.clone(), score(image), 1, 0
    while used < num_queries:
        for sign in (-1, 1):
            if used == num_queries:
                break
            delta = (best - image).double()
            delta.view(-1)[order[place % len(order)]] += sign * step_size
            if norm == "linf":
                delta = delta.clamp(-epsilon, epsilon)
            elif delta.norm() > epsilon:
                delta *= epsilon / delta.norm()
            tried = (image + delta).clamp(0, 1).float()
            used += 1
            if score(tried) > best_score:
                best, best_score = tried, score(tried)
                break
        place += 1
    return best


@NORMS
def test_is_the_papers_loop(norm):
    """500 queries are more than twice the 192 values, so the order begins again."""
    model = Linear()
    labels, index = right(model), torch.arange(B) + 2
    # too small to fool anything, which would end it early
    settings = {"epsilon": 0.002, "norm": norm, "num_queries": 500, "step_size": 0.001, "seed": 3}
    report = AttackReport()
    found = simba(model, IMAGES, labels, sample_index=index, report=report, **settings)
    standing = right(model, found) == labels
    assert int(standing.sum()) >= 4
    for b in torch.nonzero(standing)[:, 0].tolist():
        expected = slow(model, IMAGES[b], labels[b], index=b + 2, **settings)
        torch.testing.assert_close(found[b], expected, atol=1e-6, rtol=0)
    assert report.num_forwards <= B * 501 + B * 8
    assert report.num_backwards == 0


@NORMS
def test_the_margin_rises_inside_the_ball(norm):
    model, epsilon = Linear(), EPSILON[norm]
    labels = right(model)
    before, margins = margin(model(IMAGES), labels), []
    for num_queries in (20, 100, 400):
        found = simba(model, IMAGES, labels, epsilon=epsilon, norm=norm, num_queries=num_queries)
        # in float32, as a user measures it
        order = torch.inf if norm == "linf" else 2
        assert bool(((found - IMAGES).flatten(1).norm(order, dim=1) <= epsilon).all())
        assert found.min() >= 0
        assert found.max() <= 1
        margins.append(margin(model(found), labels))
    standing = margins[2] < 0
    assert bool((margins[0] > before).all())
    assert bool((margins[2] > margins[0])[standing].all())
    assert 0 < int(standing.sum()) < B


def test_a_full_pass_reaches_the_corner():
    """In L-inf each value of a linear model ends where the gradient's sign points."""
    model = Linear(num_classes=2)
    labels = right(model)
    weight = model.weight[1 - labels] - model.weight[labels]
    corner = (IMAGES + 0.01 * weight.sign()).clamp(0, 1)
    found = simba(model, IMAGES, labels, epsilon=0.01, num_queries=385, step_size=0.01)
    standing = right(model, found) == labels
    assert bool(standing.any())
    torch.testing.assert_close(found[standing], corner[standing], atol=1e-6, rtol=0)


def test_targets():
    model = Linear()
    labels = right(model)
    targets = (labels + 1) % NUM_CLASSES
    found = simba(model, IMAGES, labels, epsilon=0.3, targets=targets, num_queries=800)
    assert torch.equal(right(model, found), targets)


def test_a_callable_without_gradient():
    weight = Linear().weight.detach().flatten(1).numpy()

    def scores(images):
        return torch.from_numpy(images.flatten(1).numpy() @ weight.T)

    labels = right(scores)
    found = simba(scores, IMAGES, labels, epsilon=0.3, num_queries=600)
    assert bool((right(scores, found) != labels).all())


@NORMS
def test_an_image_does_not_depend_on_its_batch(norm):
    model = Linear()
    labels, index = right(model), torch.arange(B) + 3
    settings = {"epsilon": EPSILON[norm], "norm": norm, "num_queries": 300}
    whole = simba(model, IMAGES, labels, sample_index=index, **settings)
    for rows in (torch.tensor([4, 0, 5]), torch.tensor([1])):
        part = simba(model, IMAGES[rows], labels[rows], sample_index=index[rows], **settings)
        assert torch.equal(whole[rows], part)
    assert not torch.equal(whole, simba(model, IMAGES, labels, **settings))


def test_the_model_itself_judges():
    """A plan that is always fooled ends nothing, and its overflow is no margin."""

    class Wrong:
        deterministic, back_end, graphs = True, "wrong", None

        def __call__(self, images):
            return torch.full((len(images), NUM_CLASSES), torch.nan)

        def gflop_per_image(self, shape):
            return None

    model = Linear()
    labels, report = right(model), AttackReport()
    target = AttackTarget(model, plan=Wrong())
    found = simba(target, IMAGES, labels, epsilon=0.3, num_queries=150, report=report)
    assert torch.equal(right(model, found), labels)
    assert report.num_forwards >= 150 * B


def test_what_is_wrong_already_comes_back():
    model = Linear()
    labels = (right(model) + 1) % NUM_CLASSES
    assert torch.equal(simba(model, IMAGES, labels, epsilon=0.3), IMAGES)
    assert simba(model, IMAGES[:0], labels[:0], epsilon=0.3).shape == (0, 3, 8, 8)


def test_nothing_changes():
    model = disordered(SmallNet())
    before, images, labels = everything(model), IMAGES.clone(), right(SmallNet().eval())
    simba(model, images, labels, epsilon=0.1, num_queries=100)
    assert everything(model) == before
    assert torch.equal(images, IMAGES)


def test_a_step_that_lowers_the_margin_is_caught(monkeypatch):
    """Planted: the opposite score. Every image keeps a margin below that of its clean one."""
    model = Linear()
    labels = right(model)
    before, right_score = margin(model(IMAGES), labels), AttackBatch.searched_margin
    monkeypatch.setattr(AttackBatch, "searched_margin", lambda *given: -right_score(*given))
    found = simba(model, IMAGES, labels, epsilon=0.01, num_queries=100)
    assert bool((margin(model(found), labels) < before).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 0}, "num_queries: 0"),
        ({"step_size": 0.0}, "step_size"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ConfigError, match=message):
        simba(Linear(), IMAGES, right(Linear()), **{"epsilon": 0.1, **settings})


def test_probabilities_are_refused():
    model = Mapped(Linear(), lambda z: z.softmax(dim=1))
    with pytest.raises(ValueError, match="probabilities"):
        simba(model, IMAGES, right(model), epsilon=0.1)
