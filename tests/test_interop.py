"""Our models in other libraries' hands, and theirs in ours."""

import numpy as np
import pytest
import torch
from small_models import NUM_CLASSES, SHAPE, Linear, SmallNet, make_images

import dwf
from dwf.evaluation import evaluate
from dwf.models import Mixture, MlpGate

foolbox = pytest.importorskip("foolbox")
EPSILON = 0.06


@pytest.fixture(scope="module")
def mixture():
    gate = MlpGate(SHAPE, 3, hidden=8)
    experts = [
        dwf.as_pixel_model(SmallNet(seed=e), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)) for e in range(3)
    ]
    return Mixture(experts, gate).eval()


@pytest.fixture(scope="module")
def batch(mixture):
    images = make_images(12)
    with torch.no_grad():
        return images, mixture(images).argmax(dim=1)


def check(model, images, labels, adversarial):
    assert adversarial.shape == images.shape
    assert (adversarial - images).abs().max() <= EPSILON + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    with torch.no_grad():
        assert (model(adversarial).argmax(dim=1) != labels).any()


class TestOurModelsThere:
    def test_torchattacks(self, mixture, batch):
        torchattacks = pytest.importorskip("torchattacks")
        attack = torchattacks.PGD(mixture, eps=EPSILON, alpha=0.02, steps=10, random_start=False)
        found = attack(*batch)
        check(mixture, *batch, found)
        settings = {"epsilon": EPSILON, "step_size": 0.02, "num_steps": 10, "random_start": False}
        torch.testing.assert_close(found, dwf.pgd(mixture, *batch, **settings), rtol=0, atol=1e-6)

    def test_foolbox(self, mixture, batch):
        theirs = foolbox.PyTorchModel(mixture, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=10, random_start=False)
        _, found, fooled = attack(theirs, *batch, epsilons=EPSILON)
        check(mixture, *batch, found)
        with torch.no_grad():
            assert torch.equal(fooled, mixture(found).argmax(dim=1) != batch[1])

    def test_art(self, mixture, batch):
        estimators = pytest.importorskip("art.estimators.classification")
        evasion = pytest.importorskip("art.attacks.evasion")
        theirs = estimators.PyTorchClassifier(
            mixture,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=SHAPE,
            nb_classes=NUM_CLASSES,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attack = evasion.ProjectedGradientDescentPyTorch(
            theirs, eps=EPSILON, eps_step=0.02, max_iter=10, verbose=False
        )
        images, labels = batch
        found = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
        check(mixture, images, labels, found)
        assert np.allclose(theirs.predict(images.numpy()), mixture(images).detach(), atol=1e-5)


class TestTheirModelsHere:
    """A wrapped model is a callable like any other; gradients flow through the wrapper."""

    def test_foolbox(self, mixture, batch):
        theirs = foolbox.PyTorchModel(mixture, bounds=(0, 1), device="cpu")
        settings = {"epsilon": EPSILON, "step_size": 0.02, "num_steps": 10, "random_start": False}
        found = dwf.pgd(theirs, *batch, **settings)
        torch.testing.assert_close(found, dwf.pgd(mixture, *batch, **settings), rtol=0, atol=1e-6)

    def test_art(self, batch):
        estimators = pytest.importorskip("art.estimators.classification")
        network = Linear()
        theirs = estimators.PyTorchClassifier(
            network,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=SHAPE,
            nb_classes=NUM_CLASSES,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        found = dwf.pgd(
            theirs.model,
            *batch,
            epsilon=EPSILON,
            step_size=0.02,
            num_steps=5,
            random_start=False,
        )
        assert (found - batch[0]).abs().max() <= EPSILON + 1e-6

    def test_evaluation_of_a_wrapped_model(self, mixture):
        digits = dwf.data.load("digits", split="test").subset(torch.arange(10))
        network = SmallNet((1, 8, 8), 10).eval()
        theirs = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        result = evaluate(theirs, digits, suite="quick", epsilon=0.05)
        expected = evaluate(network, digits, suite="quick", epsilon=0.05)
        assert result.worst_case == expected.worst_case
