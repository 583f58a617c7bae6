"""No attack leaves its ball, not even by the rounding of float32: a strict user checks it so."""

import pytest
import torch
from small_models import SmallNet, make_labels

from dwf.attacks import (
    apgd,
    autoattack,
    bim,
    fab,
    fgsm,
    hop_skip_jump,
    mim,
    pgd,
    random_noise,
    simba,
    square,
)

STEPS = {"step_size": 0.02, "num_steps": 5}
ATTACKS = {
    "fgsm": (fgsm, {}),
    "pgd": (pgd, {**STEPS, "random_start": True}),
    "bim": (bim, STEPS),
    "mim": (mim, STEPS),
    "apgd": (apgd, {"num_steps": 8}),
    "fab": (fab, {"num_steps": 8}),
    "square": (square, {"num_queries": 40}),
    "simba": (simba, {"num_queries": 40}),
    "hop_skip_jump": (hop_skip_jump, {"num_queries": 200}),
    "random_noise": (random_noise, {"num_draws": 4}),
    "autoattack": (autoattack, {"version": "rand"}),
}
IMAGES = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = make_labels(32)
RADII = [1 / 255, 8 / 255, 0.1, 0.3]
# The ensemble takes seconds, and ends as its attacks do.
NAMES = [pytest.param(x, marks=[pytest.mark.slow] if x == "autoattack" else []) for x in ATTACKS]


def given(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels that an attack gets; the longest one gets few, all right."""
    if name != "autoattack":
        return IMAGES, LABELS
    return IMAGES[:3], SmallNet().eval()(IMAGES[:3]).argmax(dim=1)


@pytest.mark.parametrize("epsilon", RADII)
@pytest.mark.parametrize("name", NAMES)
def test_linf(name, epsilon):
    attack, settings = ATTACKS[name]
    images, labels = given(name)
    found = attack(SmallNet(), images, labels, epsilon=epsilon, **settings)
    assert (found - images).abs().max() <= epsilon


@pytest.mark.parametrize("name", NAMES)
def test_linf_of_each_image(name):
    attack, settings = ATTACKS[name]
    images, labels = given(name)
    each = torch.tensor(RADII).repeat(8)[: len(images)]
    found = attack(SmallNet(), images, labels, epsilon=each, **settings)
    assert bool(((found - images).abs() <= each.view(-1, 1, 1, 1)).all())


@pytest.mark.parametrize("epsilon", [0.5, 1.5])
@pytest.mark.parametrize("name", NAMES)
def test_l2(name, epsilon):
    attack, settings = ATTACKS[name]
    images, labels = given(name)
    found = attack(SmallNet(), images, labels, epsilon=epsilon, norm="l2", **settings)
    assert (found - images).flatten(1).norm(dim=1).max() <= epsilon


def test_the_ball_is_still_used_to_its_end():
    found = fgsm(SmallNet(), IMAGES, LABELS, epsilon=8 / 255)
    size = (found - IMAGES).abs().flatten(1).max(dim=1).values
    assert bool((size > 8 / 255 - 2e-7).all())
