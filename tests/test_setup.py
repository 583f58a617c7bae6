"""Setup: an attack's problem, checked and made ready."""

import math

import pytest
import torch
from small_attacks import clamped
from small_models import Linear, Noisy, SmallNet, disordered, everything, make_images, make_labels

from dwf.attacks.losses import margin
from dwf.attacks.setup import Setup, packed
from dwf.attacks.target import AttackReport
from dwf.checks import ConfigError, ImageError, LabelError, PixelRangeError

IMAGES, LABELS = make_images(6), make_labels(6)


def opened(model, images, labels, **options):
    return Setup(model=model, images=images, labels=labels, **options).opened()


def test_the_batch_is_a_checked_copy():
    images = IMAGES.double().to(memory_format=torch.channels_last)
    with opened(Linear(), images, LABELS.int(), epsilon=0.1) as (batch, source):
        assert batch.images.dtype is torch.float32
        assert batch.images.is_contiguous()
        assert torch.equal(batch.images, IMAGES)
        assert batch.labels.dtype is torch.int64
        assert batch.sample_index.tolist() == list(range(6))
        assert batch.epsilon.tolist() == pytest.approx([0.1] * 6)
        assert (batch.low, batch.high, len(batch)) == (0.0, 1.0, 6)
        batch.images.zero_()
        assert source.passes == 0
    assert images.sum() > 0


def test_packed_takes_the_arguments_of_the_same_names():
    given = {"model": 1, "images": 2, "labels": 3, "epsilon": 4, "num_steps": 5, "seed": 6}
    assert packed(Setup, given) == Setup(model=1, images=2, labels=3, epsilon=4, seed=6)


def test_who_is_fooled():
    """Any wrong class or the target alone; logits that are not finite always."""
    logits = torch.tensor([[0.0, 1, 2], [3, 0, 1], [torch.nan, 9, 0], [0, 5, 1]])
    images, labels, targets = IMAGES[:4], torch.tensor([2, 2, 1, 2]), torch.tensor([1, 1, 0, 1])
    with opened(Linear(), images, labels, epsilon=0.1) as (batch, _):
        assert batch.fooled(logits).tolist() == [False, True, True, True]
        finite = torch.where(logits.isnan(), 0.0, logits)
        assert torch.equal(batch.margin(finite), margin(finite, labels))
    with opened(Linear(), images, labels, epsilon=0.1, targets=targets) as (batch, _):
        assert batch.fooled(logits).tolist() == [False, False, True, True]
        assert torch.equal(batch.margin(finite), -margin(finite, targets))
        assert batch.subset(torch.tensor([3, 0])).targets.tolist() == [1, 1]


@pytest.mark.parametrize("keep", [torch.tensor([4, 1]), torch.arange(6) % 2 == 0])
def test_subset(keep):
    epsilon = torch.arange(6) / 10
    with opened(Linear(), IMAGES, LABELS, epsilon=epsilon) as (batch, _):
        part = batch.subset(keep)
    assert torch.equal(part.images, IMAGES[keep])
    assert torch.equal(part.labels, LABELS[keep])
    torch.testing.assert_close(part.epsilon, epsilon[keep], rtol=0, atol=1e-7)
    assert torch.equal(part.sample_index, torch.arange(6)[keep])


def test_what_is_done_inside_is_undone_and_reported():
    model = disordered(Noisy(SmallNet()))
    before = everything(model)
    report = AttackReport()
    with opened(model, IMAGES, LABELS, epsilon=0.1, seed=3, report=report) as (batch, source):
        assert not model.training
        source.gradient_and_logits(batch.images, batch.labels)
        source.fooled(batch.images[:2], batch.labels[:2])
    assert everything(model) == before
    assert (report.passes, report.num_forwards, report.num_backwards) == (6, 8, 6)
    assert report.num_images == 6


def test_an_empty_batch():
    with opened(Linear(), IMAGES[:0], LABELS[:0], epsilon=0.1) as (batch, _):
        assert len(batch) == 0


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ConfigError, "norm: .L2. is unknown, expected one of", {"norm": "L2"}),
        (ConfigError, "epsilon: 8 is larger than the whole pixel range", {"epsilon": 8}),
        (ConfigError, r"epsilon: 128 is .* 13.86 .* 0.502", {"epsilon": 128, "norm": "l2"}),
        (ConfigError, "epsilon: nan", {"epsilon": math.nan, "norm": "l2"}),
        (ConfigError, "clamp: 'all'", {"model": clamped(Linear(), "all")}),
        (ConfigError, "seed: .*, expected an integer", {"seed": (1, 2)}),
        (LabelError, "targets: expected integers", {"targets": torch.rand(6)}),
        (ConfigError, "eot_samples: 0", {"eot_samples": 0}),
        (ConfigError, "bn_mode", {"bn_mode": "no"}),
        (ImageError, "sample_index: expected integers", {"sample_index": torch.rand(6)}),
        (PixelRangeError, r"images: 1\.3.* expected \[0, 1\]", {"images": IMAGES * 2}),
    ],
)
def test_bad_input(error, message, options):
    options = {"model": Linear(), "images": IMAGES, "epsilon": 0.1, **options}
    with pytest.raises(error, match=message), Setup(labels=LABELS, **options).opened():
        raise AssertionError("went in")


def test_an_l2_radius_may_exceed_one():
    with opened(Linear(), IMAGES, LABELS, epsilon=3.0, norm="l2") as (batch, _):
        assert batch.epsilon.tolist() == pytest.approx([3.0] * 6, rel=2e-6)


@pytest.mark.parametrize("size", [8, 10, 20, 32, 40])
def test_l2_diameter_is_a_radius_for_every_size(size):
    """Also where its square root in float32 is larger."""
    images = torch.rand(2, 3, size, size)
    diameter = math.sqrt(3 * size * size)
    batch = {"model": lambda x: x, "images": images, "labels": torch.tensor([0, 1]), "norm": "l2"}
    Setup(**batch, epsilon=diameter).checked()
    with pytest.raises(ConfigError, match="larger than the L2 diameter"):
        Setup(**batch, epsilon=1.01 * diameter).checked()
