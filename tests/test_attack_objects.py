"""Attack objects: built once, called on batches, nothing but the functions behind them."""

import dataclasses
import inspect

import pytest
import torch
from small_models import Linear, Noisy, SmallNet, make_images, make_labels

import dwf
from dwf.attacks import APGD, BIM, FGSM, MIM, PGD, apgd, bim, fgsm, mim, pgd

IMAGES, LABELS = make_images(4), make_labels(4)


def negative(logits, labels):
    return -logits[:, 0]


def names(setting):
    return "-".join(setting) or "defaults"


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"epsilon": 0.1},
        {"random_start": True},
        {"bn_mode": "train"},
        {"loss": negative},
        {"random_start": True, "seed": 3},
        {"norm": "l2", "epsilon": 1.0},
    ],
    ids=names,
)
def test_fgsm_is_its_function(setting):
    model = SmallNet()
    expected = fgsm(model, IMAGES, LABELS, **{"epsilon": 8 / 255, **setting})
    assert torch.equal(FGSM(model, **setting)(IMAGES, LABELS), expected)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"epsilon": 0.1, "step_size": 0.03},
        {"num_steps": 3, "random_start": False},
        {"num_restarts": 3},
        {"bn_mode": "train"},
        {"eot_samples": 3, "seed": 9},
        {"loss": negative},
    ],
    ids=names,
)
def test_pgd_is_its_function(setting):
    model = Noisy(SmallNet())
    usual = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10, "random_start": True}
    expected = pgd(model, IMAGES, LABELS, **{**usual, **setting})
    assert torch.equal(PGD(model, **setting)(IMAGES, LABELS), expected)


@pytest.mark.parametrize(
    "setting", [{}, {"norm": "l2", "epsilon": 0.5, "step_size": 0.1}, {"num_steps": 3}], ids=names
)
def test_bim_and_mim_are_their_functions(setting):
    model = SmallNet()
    usual = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10, **setting}
    assert torch.equal(BIM(model, **setting)(IMAGES, LABELS), bim(model, IMAGES, LABELS, **usual))
    expected = mim(model, IMAGES, LABELS, decay=0.7, **usual)
    assert torch.equal(MIM(model, decay=0.7, **setting)(IMAGES, LABELS), expected)


@pytest.mark.parametrize(
    "setting", [{}, {"norm": "l2", "loss": "dlr", "num_restarts": 2}], ids=names
)
def test_apgd_is_its_function(setting):
    model = SmallNet()
    attack = APGD(model, epsilon=0.02, num_steps=6, **setting)
    expected = apgd(model, IMAGES, LABELS, epsilon=0.02, num_steps=6, **setting)
    assert torch.equal(attack(IMAGES, LABELS), expected)
    assert attack.report().num_images == len(IMAGES)


def test_sample_index_reaches_the_noise():
    index = torch.tensor([7, 1, 4, 2])
    attack = PGD(Linear(), num_steps=1)
    options = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 1, "random_start": True}
    expected = pgd(Linear(), IMAGES, LABELS, sample_index=index, **options)
    assert torch.equal(attack(IMAGES, LABELS, index), expected)
    assert not torch.equal(attack(IMAGES, LABELS), expected)
    assert torch.equal(
        FGSM(Linear(), random_start=True)(IMAGES, LABELS, index),
        fgsm(Linear(), IMAGES, LABELS, epsilon=8 / 255, random_start=True, sample_index=index),
    )


@pytest.mark.parametrize(
    ("attack", "function"),
    [(FGSM, fgsm), (PGD, pgd), (BIM, bim), (MIM, mim), (APGD, apgd)],
)
def test_fields_are_the_functions_parameters(attack, function):
    """Same names and, where the function has a default, the same one."""
    parameters = inspect.signature(function).parameters
    for field in (x for x in dataclasses.fields(attack) if x.init):
        assert field.name in parameters
        default = parameters[field.name].default
        if default is not inspect.Parameter.empty:
            assert field.default == default


@pytest.mark.parametrize("attack", [dwf.FGSM, dwf.PGD, dwf.BIM, dwf.MIM, dwf.APGD])
def test_settings_are_named_and_fixed(attack):
    with pytest.raises(TypeError):
        attack(Linear(), 0.1)
    made = attack(Linear(), epsilon=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.epsilon = 0.2
    assert dataclasses.replace(made, epsilon=0.2).epsilon == 0.2


def test_follows_the_model_as_it_trains():
    model = SmallNet()
    attack = FGSM(model)
    before = attack(IMAGES, LABELS)
    with torch.no_grad():
        model.linear.weight.neg_()
    assert not torch.equal(attack(IMAGES, LABELS), before)
