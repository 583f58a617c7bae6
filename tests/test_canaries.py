"""Models broken on purpose: each is caught, and honest ones are not condemned."""

from __future__ import annotations

import warnings

import pytest
import torch
from dwf.evaluation.verdict import Finding, seen
from small_models import everything

from dwf import data
from dwf.attacks import pgd
from dwf.attacks.space import NormalizedSpace
from dwf.data.batches import to_unit_range
from dwf.evaluation import verdict
from dwf.evaluation.canaries import (
    CANARIES,
    EPSILON,
    Honest,
    build_small_network,
    examine,
    examine_canary,
    honest_models,
    is_caught,
    pgd_suite,
    train_quickly,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def honest(one_thread) -> Honest:
    return honest_models()


@pytest.fixture(scope="module")
def digits():
    """The first 64 test images and their labels."""
    dataset = data.load("digits", split="test")
    return to_unit_range(dataset.images[:64]), dataset.labels[:64]


def accuracy(model, images, labels) -> float:
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).double().mean())


class TestHonest:
    def test_they_are_what_they_say(self, honest, digits):
        images, labels = digits
        for model in (honest.network, honest.mixture, honest.control):
            assert accuracy(model, images, labels) > 0.9
        stands = pgd_suite(honest.network, images, labels, EPSILON)
        assert 0.2 < float(stands.double().mean()) < 0.9
        assert not pgd_suite(honest.control, images, labels, EPSILON).double().mean() > 0.05

    @pytest.mark.parametrize("name", ["network", "mixture", "control"])
    def test_are_valid(self, honest, digits, name):
        other = honest.control if name != "control" else honest.network
        found = examine(getattr(honest, name), *digits, epsilon=EPSILON, sources={"another": other})
        assert verdict.verdict(found) == "VALID", [str(f) for f in found]

    def test_training_repeats_itself_and_leaves_the_generator(self):
        before = torch.get_rng_state()
        settings = {"num_epochs": 1, "num_steps": 1, "seed": 3}
        first, again = (train_quickly(build_small_network(3, width=4), **settings) for _ in "ab")
        assert torch.equal(torch.get_rng_state(), before)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class TestCanaries:
    def test_the_zoo(self):
        assert len(CANARIES) >= 16
        for name, canary in CANARIES.items():
            assert canary.caught_by, name
            assert canary.of in ("network", "mixture")

    @pytest.mark.parametrize("name", CANARIES)
    def test_is_caught(self, name, honest, digits):
        whole = honest.mixture if CANARIES[name].of == "mixture" else honest.network
        before = everything(whole)
        found = examine_canary(name, honest, *digits)
        assert verdict.verdict(found) != "VALID"
        assert is_caught(name, found), [str(f) for f in found]
        assert everything(whole) == before

    @pytest.mark.parametrize("name", ["gradient_killer", "jagged_input", "k_winners_take_all"])
    def test_looks_robust_to_the_naive(self, name, honest, digits):
        """A canary that PGD sees through would prove nothing."""
        broken = CANARIES[name].make(honest.network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stands = pgd_suite(broken, *digits, EPSILON, num_steps=10, num_restarts=1)
        honestly = pgd_suite(honest.network, *digits, EPSILON)
        assert float(stands.double().mean()) > float(honestly.double().mean()) + 0.2

    def test_an_attack_on_clamped_normalized_images_is_caught_by_the_control(self, honest, digits):
        """The protocol behind some published tables: the undefended network withstands it."""
        images, labels = digits
        space = NormalizedSpace(honest.control, [0.31], [0.37])
        found = pgd(
            space,
            space.from_pixels(images),
            labels,
            epsilon=EPSILON,
            step_size=EPSILON / 5,
            num_steps=20,
            random_start=False,
            clamp="none",
        )
        with torch.no_grad():
            stands = space(found).argmax(dim=1) == labels
        assert verdict.control_stands(seen(stands)) is not None
        right = pgd_suite(honest.control, images, labels, EPSILON)
        assert verdict.control_stands(seen(right)) is None


class TestIsCaught:
    def test_for_its_own_reason_only(self):
        def of(name, severity):
            return [Finding(name, severity, "")]

        assert is_caught("gradient_killer", of("zero_gradient", "invalid"))
        assert is_caught("gradient_killer", of("noise_wins", "suspect"))
        assert not is_caught("gradient_killer", of("zero_gradient", "note"))
        assert not is_caught("gradient_killer", of("random", "invalid"))
        assert not is_caught("gradient_killer", [])
