"""Compare with torchattacks, foolbox and ART: their attacks and ours find the same images.

Their attacks run on our mixtures, ours on their wrapped models. A library that is not installed
skips its tests.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from small_models import NUM_CLASSES, SHAPE, Linear, SmallNet, make_images, make_labels
from torch import nn

import dwf
import moe_kernels
from dwf.attacks import apgd, bim, carlini_wagner, fab, fgsm, mim, minimum_norm, pgd
from dwf.attacks.apgd import STREAMS
from dwf.evaluation import Budget, evaluate
from dwf.models import Mixture, MlpGate, build_network

IMAGES, LABELS = make_images(6), make_labels(6)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
THEIR_NORM = {"linf": "Linf", "l2": "L2"}


def library(name: str) -> Any:
    """A library, whatever its import warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"not installed: {error.name}")


@pytest.fixture(scope="session")
def torchattacks():
    return library("torchattacks")


@pytest.fixture(scope="session")
def foolbox():
    return library("foolbox")


@pytest.fixture(scope="session")
def wrap_for_foolbox(foolbox):
    def wrap(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")

    return wrap


@pytest.fixture(scope="session")
def wrap_for_art():
    estimators = library("art.estimators.classification")

    def wrap(model):
        return estimators.PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=SHAPE,
            nb_classes=NUM_CLASSES,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )

    return wrap


class Curved(nn.Module):
    """Two layers with many boundaries nearby; equal bits in every batch, as Linear."""

    def __init__(self):
        super().__init__()
        self.hidden = Linear(num_classes=24, seed=1)
        generator = torch.Generator().manual_seed(2)
        self.register_buffer("weight", torch.randn(NUM_CLASSES, 24, generator=generator))

    def forward(self, images):
        return (torch.sin(self.hidden(images)).unsqueeze(1) * self.weight).sum(dim=2)


def make_model(name):
    if name == "linear":
        return Linear().eval()
    if name == "smooth":
        return SmallNet().eval()
    network = build_network("resnet6", num_classes=NUM_CLASSES, width=4, in_channels=3, seed=0)
    return network.eval()


MODELS = pytest.mark.parametrize("model", ["linear", "smooth", "resnet6"])


def classes_of(model, images):
    """Labels that the model gets right."""
    with torch.no_grad():
        return model(images).argmax(dim=1)


def size(difference, norm):
    flat = difference.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


# The same numbers -------------------------------------------------------------------------------


class TestFgsmAndPgd:
    """Same model, same start, float32.

    In 256ths every image, radius and step is a sum of powers of two, so each library's arithmetic
    is exact and the results are equal bits. In 255ths they round differently, by less than 1e-6.
    """

    BUDGETS = pytest.mark.parametrize(
        ("unit", "tolerance"), [(256, 0.0), (255, 1e-6)], ids=["exact", "usual"]
    )

    @staticmethod
    def case(name, unit):
        images = (make_images(8) * 255).round() / unit
        return make_model(name), images.clamp(max=1), make_labels(8), 8 / unit, 2 / unit

    @MODELS
    @BUDGETS
    def test_torchattacks(self, torchattacks, model, unit, tolerance):
        model, images, labels, epsilon, step = self.case(model, unit)
        close = {"rtol": 0, "atol": tolerance}
        theirs = torchattacks.FGSM(model, eps=epsilon)(images, labels)
        torch.testing.assert_close(fgsm(model, images, labels, epsilon=epsilon), theirs, **close)
        options = {"epsilon": epsilon, "step_size": step, "random_start": False}
        for steps in (1, 10, 20):
            attack = torchattacks.PGD(
                model, eps=epsilon, alpha=step, steps=steps, random_start=False
            )
            ours = pgd(model, images, labels, **options, num_steps=steps)
            torch.testing.assert_close(ours, attack(images, labels), **close)

    @MODELS
    @BUDGETS
    def test_foolbox(self, foolbox, wrap_for_foolbox, model, unit, tolerance):
        model, images, labels, epsilon, step = self.case(model, unit)
        close = {"rtol": 0, "atol": tolerance}
        theirs = wrap_for_foolbox(model)
        attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        expected = attack.run(theirs, images, labels, epsilon=epsilon)
        torch.testing.assert_close(fgsm(model, images, labels, epsilon=epsilon), expected, **close)
        options = {"epsilon": epsilon, "step_size": step, "random_start": False}
        for steps in (1, 10, 20):
            attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False)
            ours = pgd(model, images, labels, **options, num_steps=steps)
            expected = attack.run(theirs, images, labels, epsilon=epsilon)
            torch.testing.assert_close(ours, expected, **close)

    def test_foolbox_from_our_random_start(self, foolbox, wrap_for_foolbox):
        model, images, labels, epsilon, step = self.case("smooth", 255)
        noise = moe_kernels.uniform_noise(3, torch.arange(8), SHAPE)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=10, random_start=True)
        attack.get_random_start = lambda x0, epsilon: x0 + (2 * noise - 1) * epsilon
        expected = attack.run(wrap_for_foolbox(model), images, labels, epsilon=epsilon)
        options = {"epsilon": epsilon, "step_size": step, "num_steps": 10}
        ours = pgd(model, images, labels, **options, random_start=True, seed=3)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("model", ["linear", "smooth"])  # theirs needs contiguous gradients
    def test_torchattacks_in_l2(self, torchattacks, model):
        model = make_model(model)
        attack = torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=8, random_start=False)
        options = {"epsilon": 0.5, "step_size": 0.2, "num_steps": 8, "random_start": False}
        found = pgd(model, IMAGES, LABELS, norm="l2", **options)
        torch.testing.assert_close(found, attack(IMAGES, LABELS), rtol=0, atol=1e-5)

    @MODELS
    def test_torchattacks_bim_and_mim(self, torchattacks, model):
        model = make_model(model)
        theirs = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10}
        ours = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10}
        expected = torchattacks.BIM(model, **theirs)(IMAGES, LABELS)
        found = bim(model, IMAGES, LABELS, **ours)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        expected = torchattacks.MIFGSM(model, decay=1.0, **theirs)(IMAGES, LABELS)
        found = mim(model, IMAGES, LABELS, **ours)
        assert ((found - expected).abs() > 1e-6).float().mean() < 2e-3


def apgd_start(norm, loss, num_images):
    """Our first start of APGD, in units of its radius: uniform noise, or normal noise in l2."""
    noise = moe_kernels.uniform_noise(0, torch.arange(num_images), SHAPE, restart=STREAMS[loss])
    if norm == "linf":
        start = 2 * noise - 1
        return start / start.abs().amax(dim=(1, 2, 3), keepdim=True)
    start = math.sqrt(2) * torch.erfinv((2 * noise - 1).clamp(-1 + 2e-7, 1 - 2e-7))
    return start / start.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


@NORMS
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_torchattacks_apgd_from_the_same_start(torchattacks, loss, norm, monkeypatch):
    """Rounding turns few iterates away: 58 of 60 verdicts agree, and neither breaks all or none."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(192, 24, generator=generator) / 8
    second = torch.randn(24, NUM_CLASSES, generator=generator)

    def network(images):
        return ((2 * images - 1).flatten(1) @ first).tanh() @ second

    model = Function(network).eval()
    images, radius = make_images(60), {"linf": 0.02, "l2": 0.25}[norm]
    labels = classes_of(model, images)
    start = apgd_start(norm, loss, len(images))
    draw = {
        "linf": ("rand", lambda *_, **__: (start + 1) / 2),
        "l2": ("randn", lambda *_, **__: start),
    }
    attack = torchattacks.APGD(model, norm=THEIR_NORM[norm], eps=radius, steps=30, loss=loss)
    with monkeypatch.context() as patch:
        patch.setattr(torch, *draw[norm])
        theirs = classes_of(model, attack(images, labels)) != labels
    found = apgd(model, images, labels, epsilon=radius, norm=norm, loss=loss, num_steps=30)
    ours = classes_of(model, found) != labels
    assert (ours == theirs).sum() >= 58
    assert 10 < ours.sum() < 60


class Function(nn.Module):
    """A function as a module; torchattacks asks a model for the device of its parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.function(images)


@NORMS
def test_torchattacks_fab_finds_the_same_distances(torchattacks, norm):
    model = Curved()
    labels = classes_of(model, IMAGES)
    attack = torchattacks.FAB(
        model, norm=THEIR_NORM[norm], eps=1e9, steps=25, n_classes=NUM_CLASSES
    )
    theirs = size(attack(IMAGES, labels) - IMAGES, norm)
    ours = minimum_norm(fab, model, IMAGES, labels, norm=norm, num_steps=25).distance.double()
    assert theirs.min() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_foolbox_carlini_wagner_finds_the_same_distances(foolbox, wrap_for_foolbox):
    model, gray = Curved().eval(), 0.3 + 0.4 * IMAGES
    labels = classes_of(model, gray)
    settings = {"binary_search_steps": 6, "steps": 100, "stepsize": 0.02, "initial_const": 0.1}
    attack = foolbox.attacks.L2CarliniWagnerAttack(**settings, abort_early=False)
    criterion = foolbox.criteria.Misclassification(labels)
    expected = size(attack.run(wrap_for_foolbox(model), gray, criterion) - gray, "l2")
    settings = {"num_searches": 6, "num_steps": 100, "learning_rate": 0.02, "initial_c": 0.1}
    ratio = size(carlini_wagner(model, gray, labels, **settings) - gray, "l2") / expected
    # they go on to the last step
    assert ratio.max() <= 1.1
    assert ratio.min() >= 0.95


# Mixtures there, their models here --------------------------------------------------------------

EPSILON = 0.06
PLAIN_PGD = {"epsilon": EPSILON, "step_size": 0.02, "num_steps": 10, "random_start": False}


@pytest.fixture(scope="module")
def mixture():
    experts = [
        dwf.as_pixel_model(SmallNet(seed=e), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)) for e in range(3)
    ]
    return Mixture(experts, MlpGate(SHAPE, 3, hidden=8)).eval()


@pytest.fixture(scope="module")
def batch(mixture):
    images = make_images(12)
    return images, classes_of(mixture, images)


def check(model, images, labels, adversarial):
    assert adversarial.shape == images.shape
    assert (adversarial - images).abs().max() <= EPSILON + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert (classes_of(model, adversarial) != labels).any()


class TestOurModelsThere:
    """``mixture(images)`` is logits and nothing else, so anything can attack it."""

    def test_torchattacks(self, torchattacks, mixture, batch):
        attack = torchattacks.PGD(mixture, eps=EPSILON, alpha=0.02, steps=10, random_start=False)
        found = attack(*batch)
        check(mixture, *batch, found)
        torch.testing.assert_close(found, pgd(mixture, *batch, **PLAIN_PGD), rtol=0, atol=1e-6)

    def test_foolbox(self, foolbox, wrap_for_foolbox, mixture, batch):
        attack = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=10, random_start=False)
        _, found, fooled = attack(wrap_for_foolbox(mixture), *batch, epsilons=EPSILON)
        check(mixture, *batch, found)
        assert torch.equal(fooled, classes_of(mixture, found) != batch[1])
        torch.testing.assert_close(found, pgd(mixture, *batch, **PLAIN_PGD), rtol=0, atol=1e-6)

    def test_art(self, wrap_for_art, mixture, batch):
        theirs = wrap_for_art(mixture)
        attack = library("art.attacks.evasion").ProjectedGradientDescentPyTorch(
            theirs, eps=EPSILON, eps_step=0.02, max_iter=10, verbose=False
        )
        images, labels = batch
        found = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
        check(mixture, images, labels, found)
        assert np.allclose(theirs.predict(images.numpy()), mixture(images).detach(), atol=1e-5)


class TestTheirModelsHere:
    """A wrapped model is a callable like any other; gradients flow through the wrapper."""

    def test_foolbox(self, wrap_for_foolbox, mixture, batch):
        found = pgd(wrap_for_foolbox(mixture), *batch, **PLAIN_PGD)
        torch.testing.assert_close(found, pgd(mixture, *batch, **PLAIN_PGD), rtol=0, atol=1e-6)

    def test_art(self, wrap_for_art, batch):
        found = pgd(wrap_for_art(Linear()).model, *batch, **PLAIN_PGD)
        assert (found - batch[0]).abs().max() <= EPSILON + 1e-6

    def test_evaluation_of_a_wrapped_model(self, wrap_for_foolbox):
        digits = dwf.data.load("digits", split="test").subset(torch.arange(10))
        network = SmallNet((1, 8, 8), 10).eval()
        short = {"suite": "quick", "budget": Budget(num_steps=5, num_queries=20), "epsilon": 0.05}
        result = evaluate(wrap_for_foolbox(network), digits, **short)
        expected = evaluate(network, digits, **short)
        assert result.worst_case == expected.worst_case
