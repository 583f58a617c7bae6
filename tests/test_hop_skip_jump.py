"""HopSkipJump: known distances, models that only decide, budgets, batches, and nothing changed."""

from __future__ import annotations

import math

import pytest
import torch
from small_attacks import clamped
from small_models import (
    NUM_CLASSES,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    disordered,
    everything,
    make_images,
)
from torch import nn

from dwf.attacks import AttackReport, hop_skip_jump, minimum_norm
from dwf.attacks.norms import length
from dwf.checks import ConfigError, ImageError, LabelError, ModelError, ModelOutputError

pytestmark = pytest.mark.usefixtures("one_thread")

B = 6
# Far from black and white, so that the nearest image of the plane is an image.
GRAY = 0.3 + 0.4 * make_images(B)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def one_hot(logits):
    return nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).float()


class Counted(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return self.network(images)


def right(model, images=GRAY):
    with torch.no_grad():
        return model(images).argmax(dim=1)


@torch.no_grad()
def known_distance(model, images, labels, norm, targets=None):
    """To the nearest of the planes between the label and other classes, without a box."""
    weight, logits = model.weight.flatten(1).double(), model(images).double()
    order = 1 if norm == "linf" else 2
    found = []
    for b, label in enumerate(labels.tolist()):
        others = range(len(weight)) if targets is None else [int(targets[b])]
        found.append(
            min(
                float((logits[b, label] - logits[b, k]) / (weight[label] - weight[k]).norm(p=order))
                for k in others
                if k != label
            )
        )
    return torch.tensor(found)


class TestKnownDistance:
    @pytest.mark.parametrize(("norm", "most"), [("l2", 1.05), ("linf", 1.2)])
    def test_of_a_plane(self, norm, most):
        """Within 5 % in L2; in L-inf the normal counts by its signs, which are harder to guess."""
        model = Linear(num_classes=2)
        labels = right(model)
        known = known_distance(model, GRAY, labels, norm)
        found = minimum_norm(hop_skip_jump, model, GRAY, labels, norm=norm, num_queries=8000)
        assert bool((right(model, found.images) != labels).all())
        ratio = found.distance / known
        assert bool((ratio >= 0.999).all()), ratio
        assert bool((ratio <= most).all()), ratio

    def test_of_many_classes(self):
        """Within 5 % of the boundary that it has reached, which depends on the start."""
        model = Linear()
        labels = right(model)
        settings = {"norm": "l2", "num_queries": 8000}
        found = minimum_norm(hop_skip_jump, model, GRAY, labels, **settings)
        reached = right(model, found.images)
        assert bool((reached != labels).all())
        ratio = found.distance / known_distance(model, GRAY, labels, "l2", reached)
        assert bool((ratio <= 1.05).all()), ratio

    def test_more_queries_are_closer(self):
        model = Linear()
        labels = right(model)
        few, many = (
            minimum_norm(hop_skip_jump, model, GRAY, labels, norm="l2", num_queries=n).distance
            for n in (400, 3000)
        )
        assert bool((many < few).all())
        assert float((many / few).mean()) < 0.8

    def test_targets_from_a_start(self):
        """Toward the second best class, from an image of that class."""
        model = Linear()
        labels = right(model)
        targets = (labels + 1) % NUM_CLASSES
        gap = model.weight[targets] - model.weight[labels]
        start = (GRAY + gap.sign() * 0.5).clamp(0, 1)
        assert torch.equal(right(model, start), targets)
        found = hop_skip_jump(
            model, GRAY, labels, norm="l2", num_queries=8000, targets=targets, start=start
        )
        assert torch.equal(right(model, found), targets)
        known = known_distance(model, GRAY, labels, "l2", targets)
        distance = length(found - GRAY, "l2")
        # a third class may lie between, so the plane is a lower bound
        assert bool((distance >= known * 0.999).all())
        assert float((distance / known).median()) < 1.1

    def test_a_normal_with_the_wrong_sign_is_caught(self, monkeypatch):
        """Planted: jumps away from the boundary's other side find nothing closer."""
        from dwf.attacks.hop_skip_jump import _Walk

        model = Linear()
        labels, settings = right(model), {"norm": "l2", "num_queries": 3000}
        sound = minimum_norm(hop_skip_jump, model, GRAY, labels, **settings).distance
        normal = _Walk._normal
        monkeypatch.setattr(_Walk, "_normal", lambda *given: -normal(*given))
        broken = minimum_norm(hop_skip_jump, model, GRAY, labels, **settings).distance
        assert bool((broken > 1.05 * sound).all())
        assert bool((broken > 1.05 * known_distance(model, GRAY, labels, "l2")).all())


class TestOnlyDecisions:
    def test_one_hot_is_as_good_as_logits(self):
        """To the bit: nothing but the class is looked at."""
        model = Linear()
        labels, settings = right(model), {"norm": "l2", "num_queries": 500}
        expected = hop_skip_jump(model, GRAY, labels, **settings)
        assert not torch.equal(expected, GRAY)
        assert torch.equal(
            hop_skip_jump(Mapped(model, one_hot), GRAY, labels, **settings), expected
        )

    def test_a_callable_without_torch(self):
        """numpy inside, no gradient, no parameters, and no plan."""
        weight = Linear().weight.detach().flatten(1).numpy()

        def decide(images):
            assert not images.requires_grad
            logits = images.flatten(1).numpy() @ weight.T
            return torch.eye(NUM_CLASSES)[logits.argmax(axis=1)]

        labels = right(decide)
        report = AttackReport()
        found = hop_skip_jump(decide, GRAY, labels, norm="l2", num_queries=500, report=report)
        assert bool((right(decide, found) != labels).all())
        assert report.num_backwards == 0

    def test_probabilities_can_be_refused(self):
        model = Mapped(Linear(), one_hot)
        with pytest.raises(ModelOutputError, match="probabilities"):
            hop_skip_jump(model, GRAY, right(model), allow_probabilities=False)

    def test_a_random_model(self):
        model = Noisy(Linear(), std=0.1)
        labels = right(model.network)
        settings = {"norm": "l2", "num_queries": 300, "eot_samples": 3}
        found = hop_skip_jump(model, GRAY, labels, **settings)
        assert int((found != GRAY).flatten(1).any(dim=1).sum()) >= B - 1  # one may be wrong already
        assert torch.equal(found, hop_skip_jump(model, GRAY, labels, **settings))


class TestBudget:
    @NORMS
    def test_inside_the_ball_or_untouched(self, norm):
        model = Linear()
        labels = right(model)
        free = length(hop_skip_jump(model, GRAY, labels, norm=norm, num_queries=1500) - GRAY, norm)
        epsilon = float(free.median())  # some can be had, some cannot
        found = hop_skip_jump(model, GRAY, labels, norm=norm, num_queries=1500, epsilon=epsilon)
        distance = length(found - GRAY, norm)
        assert bool((distance <= epsilon * (1 + 1e-6)).all())
        assert found.min() >= 0
        assert found.max() <= 1
        fooled = right(model, found) != labels
        assert bool(fooled.any())
        assert not bool(fooled.all())
        assert torch.equal(fooled, distance > 0)

    def test_a_radius_for_each_image(self):
        model = Linear()
        labels = right(model)
        known = known_distance(model, GRAY, labels, "l2")
        epsilon = (known * torch.tensor([2.0, 0.5]).repeat(B // 2)).float()
        found = hop_skip_jump(model, GRAY, labels, norm="l2", num_queries=3000, epsilon=epsilon)
        moved = length(found - GRAY, "l2")
        assert (moved > 0).tolist() == [True, False] * (B // 2)
        assert bool((moved <= epsilon * (1 + 1e-6)).all())

    @pytest.mark.parametrize("num_queries", [1, 5, 60, 137, 900])
    def test_no_query_too_many(self, num_queries):
        """Of one image: after the first decision num_queries at most, and the most that fit."""
        model = Counted(Linear())
        labels = right(model)[:1]
        model.seen.clear()
        report = AttackReport()
        hop_skip_jump(model, GRAY[:1], labels, num_queries=num_queries, report=report)
        assert sum(model.seen) == report.num_forwards
        assert report.num_forwards <= num_queries + 1
        assert max(model.seen) <= 128
        if num_queries == 900:
            assert report.num_forwards > 600

    def test_an_end_comes_early_in_a_large_ball(self):
        report = AttackReport()
        model = Linear()
        hop_skip_jump(model, GRAY, right(model), epsilon=0.9, report=report)
        assert report.num_forwards < 60 * B

    def test_out_of_reach(self):
        """A class that nothing random is taken for: the images come back."""
        model = Mapped(Linear(), lambda z: z - 1e6 * torch.eye(NUM_CLASSES)[4])
        labels = right(model)
        targets = torch.full_like(labels, 4)
        found = hop_skip_jump(model, GRAY, labels, num_queries=300, targets=targets)
        assert torch.equal(found, GRAY)

    def test_what_is_wrong_already_comes_back(self):
        model = Linear()
        labels = right(model)
        labels[::2] = (labels[::2] + 1) % NUM_CLASSES
        found = hop_skip_jump(model, GRAY, labels, num_queries=400)
        unchanged = (found == GRAY).flatten(1).all(dim=1)
        assert unchanged.tolist() == [True, False] * (B // 2)


@NORMS
def test_an_image_does_not_depend_on_its_batch(norm):
    model = Linear()
    labels, index = right(model), torch.arange(B) + 3
    settings = {"norm": norm, "num_queries": 700, "seed": 5}
    whole = hop_skip_jump(model, GRAY, labels, sample_index=index, **settings)
    rows = torch.tensor([4, 0, 5])
    part = hop_skip_jump(model, GRAY[rows], labels[rows], sample_index=index[rows], **settings)
    assert torch.equal(whole[rows], part)
    for b in (1, 4):
        own = slice(b, b + 1)
        alone = hop_skip_jump(model, GRAY[own], labels[own], sample_index=index[own], **settings)
        assert torch.equal(whole[own], alone)
    other = hop_skip_jump(model, GRAY, labels, sample_index=index, **{**settings, "seed": 6})
    assert not torch.equal(whole, other)


def test_nothing_changes():
    model = disordered(SmallNet())
    before, images, labels = everything(model), GRAY.clone(), right(SmallNet().eval())
    hop_skip_jump(model, images, labels, num_queries=200)
    assert everything(model) == before
    assert torch.equal(images, GRAY)


def test_a_model_that_raises_is_named_and_left_as_it_was():
    class Late(Counted):
        def forward(self, images):
            if len(self.seen) > 3:
                raise RuntimeError("late")
            return super().forward(images)

    model = disordered(Late(SmallNet()))
    before = everything(model)
    with pytest.raises(ModelError, match=r"model Late fails.*late"):
        hop_skip_jump(model, GRAY, right(SmallNet().eval()), num_queries=200)
    assert everything(model) == before


def test_empty_and_one_pixel():
    assert hop_skip_jump(Linear(), GRAY[:0], torch.zeros(0).long()).shape == (0, 3, 8, 8)
    model = Linear((1, 1, 1))
    images = torch.full((1, 1, 1, 1), 0.5)
    found = hop_skip_jump(model, images, model(images).argmax(dim=1), num_queries=300)
    assert found.shape == images.shape


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_queries": 0}, ConfigError, "num_queries: 0"),
        ({"initial_points": 0}, ConfigError, "initial_points: 0"),
        ({"norm": "l1"}, ConfigError, "norm"),
        ({"start": GRAY[:2]}, ImageError, r"start: expected the images' \[6, 3, 8, 8\]"),
        ({"targets": torch.full((B,), NUM_CLASSES)}, LabelError, "targets"),
    ],
)
def test_bad_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        hop_skip_jump(Linear(), GRAY, right(Linear()), **settings)


def test_a_space_without_a_range():
    with pytest.raises(ConfigError, match="needs a range"):
        hop_skip_jump(clamped(Linear(), "none"), GRAY, right(Linear()))
    assert math.isfinite(
        float(
            hop_skip_jump(clamped(Linear(), "unit"), GRAY, right(Linear()), num_queries=200).sum()
        )
    )
