"""Attacks through another model: what it follows, who judges, 8 bits, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from small_models import Linear, Mapped, SmallNet, disordered, everything, make_images

from dwf.attacks import AttackReport, pgd, through_surrogate
from dwf.attacks.setup import AttackBatch
from dwf.attacks.surrogate import on_eight_bits
from dwf.checks import ConfigError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the model's output does not depend"),
]
IMAGES = make_images(10)
SETTINGS = {"epsilon": 0.05, "num_steps": 20}


def labels_of(model):
    with torch.no_grad():
        return model.eval()(IMAGES).argmax(dim=1)


def stands(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).sum().item()


def test_on_itself_it_is_an_attack():
    model = Linear()
    labels = labels_of(model)
    found = through_surrogate(model, IMAGES, labels, surrogate=model, **SETTINGS)
    other = pgd(
        model, IMAGES, labels, epsilon=0.05, step_size=0.01, num_steps=20, random_start=False
    )
    assert stands(model, found, labels) <= stands(model, other, labels)
    assert (found - IMAGES).abs().max() <= 0.05


def test_a_flat_model_falls_through_what_is_inside():
    inside = SmallNet()
    flat = Mapped(inside, lambda z: torch.nn.functional.one_hot(z.argmax(1), 5).float())
    labels = labels_of(flat)
    settings = {**SETTINGS, "epsilon": 0.2, "allow_probabilities": True}
    by_itself = through_surrogate(flat, IMAGES, labels, surrogate=flat.eval(), **settings)
    through = through_surrogate(flat, IMAGES, labels, surrogate=inside.eval(), **settings)
    assert stands(flat, by_itself, labels) == len(IMAGES)
    assert stands(flat, through, labels) < len(IMAGES)


def test_a_row_aligned_surrogate_gets_all_rows():
    """Of a mixture's views some belong to the images that they were made for, row by row."""
    model = SmallNet()
    labels = labels_of(model)
    number, seen = torch.arange(len(IMAGES)), []

    def aligned(images):
        seen.append(len(images))
        return model(images) + 0 * number[:, None]  # raises at another number of rows

    settings = {**SETTINGS, "epsilon": 0.1, "num_restarts": 2}
    freely = through_surrogate(model, IMAGES, labels, surrogate=model, **settings)
    found = through_surrogate(
        model, IMAGES, labels, surrogate=aligned, row_aligned=True, **settings
    )
    assert set(seen) <= {len(IMAGES), 1}
    assert 0 < stands(model, found, labels) < len(IMAGES)  # some fell on the way
    assert torch.equal(found, freely)


def test_the_model_judges_and_a_fooled_surrogate_is_no_end():
    """A surrogate that errs everywhere must not stop the search."""
    model = Linear()
    labels = labels_of(model)
    wrong = Mapped(model, lambda z: z.roll(1, dims=1) * 1e-3 + z)
    found = through_surrogate(model, IMAGES, labels, surrogate=wrong, **SETTINGS)
    assert stands(model, found, labels) < len(IMAGES)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eight_bits(norm):
    model = Linear()
    labels = labels_of(model)
    epsilon = 0.05 if norm == "linf" else 0.5
    settings = {"epsilon": epsilon, "norm": norm, "num_steps": 10}
    found = through_surrogate(model, IMAGES, labels, surrogate=model, eight_bits=True, **settings)
    assert ((found * 255) - (found * 255).round()).abs().max() < 1e-3
    delta = (found - IMAGES).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= epsilon + 1e-6).all()


def test_rounding_goes_to_the_nearest_in_the_ball():
    clean = torch.full((1, 1, 1, 3), 100 / 255)
    radius = torch.tensor([2.6 / 255])
    batch = AttackBatch(clean, torch.zeros(1), torch.zeros(1), radius, 0.0, 1.0)
    moved = torch.tensor([102.6, 98.4, 100.2]).view(1, 1, 1, 3) / 255
    found = on_eight_bits(moved, batch, "linf") * 255
    assert found.flatten().tolist() == pytest.approx([102, 98, 100])


def test_batch_changes_nothing_and_passes_are_counted():
    model, other = SmallNet(), SmallNet(seed=3)
    labels = labels_of(model)
    report = AttackReport()
    settings = {**SETTINGS, "surrogate": other.eval(), "num_restarts": 2}
    whole = through_surrogate(model, IMAGES, labels, report=report, **settings)
    rows = torch.tensor([7, 2])
    part = through_surrogate(model, IMAGES[rows], labels[rows], sample_index=rows, **settings)
    torch.testing.assert_close(part, whole[rows])
    assert 0 < report.num_backwards <= 2 * 20 * len(IMAGES)
    assert report.num_forwards > report.num_backwards


def test_leaves_no_trace():
    model, other = disordered(SmallNet()), disordered(SmallNet(seed=2))
    before = everything(model), everything(other)
    labels = torch.zeros(10, dtype=torch.int64)
    through_surrogate(model, IMAGES, labels, surrogate=other, epsilon=0.1, num_steps=2)
    assert (everything(model), everything(other)) == before


def test_bad_settings():
    with pytest.raises(ConfigError, match="loss"):
        through_surrogate(
            Linear(), IMAGES, labels_of(Linear()), surrogate=Linear(), epsilon=0.1, loss="dlr"
        )
