"""Models broken on purpose: each is caught, and honest ones are not condemned."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from small_models import everything

from dwf import data
from dwf.attacks import pgd
from dwf.attacks.losses import cross_entropy, margin
from dwf.attacks.space import attack_space
from dwf.data.batches import to_unit_range
from dwf.evaluation import findings
from dwf.evaluation.canaries import CANARIES, Trial, is_caught, judge, judge_canary
from dwf.evaluation.honest import (
    EPSILON,
    Honest,
    build_small_network,
    honest_models,
    train_quickly,
)
from dwf.evaluation.measures import Seen, seen
from dwf.evaluation.record import Finding

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def honest(one_thread) -> Honest:
    return honest_models()


@pytest.fixture(scope="module")
def dataset():
    """The first 64 test images of digits."""
    return data.load("digits", split="test").subset(torch.arange(64))


@pytest.fixture(scope="module")
def digits(dataset):
    """Their pixels in [0, 1] and labels."""
    return to_unit_range(dataset.images), dataset.labels


@pytest.fixture(scope="module")
def trial_of(honest, dataset) -> Callable[[str], Trial]:
    """The verdict on an honest model, by its name."""
    return functools.cache(lambda name: judge(getattr(honest, name), dataset))


def accuracy(model, images, labels) -> float:
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).double().mean())


def after_pgd(model, images, labels, num_steps=25, num_restarts=2) -> float:
    """Accuracy that PGD by cross-entropy and by margin leave: a naive evaluation."""
    stands = torch.ones(len(labels), dtype=torch.bool)
    for loss in (cross_entropy, margin):
        adversarial = pgd(
            model,
            images,
            labels,
            epsilon=EPSILON,
            step_size=EPSILON / 5,
            num_steps=num_steps,
            random_start=True,
            num_restarts=num_restarts,
            loss=loss,
        )
        with torch.no_grad():
            stands &= model(adversarial).argmax(dim=1) == labels
    return float(stands.double().mean())


class TestHonest:
    @pytest.mark.slow
    def test_they_are_what_they_say(self, honest, digits):
        images, labels = digits
        for model in (honest.network, honest.mixture, honest.control):
            assert accuracy(model, images, labels) > 0.9
        assert 0.2 < after_pgd(honest.network, images, labels) < 0.9
        assert not after_pgd(honest.control, images, labels) > 0.05

    @pytest.mark.parametrize(
        "name",
        ["network", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mixture", "control"))],
    )
    def test_are_valid(self, trial_of, name):
        # 64 images are too few for more
        assert trial_of(name).verdict == "UNPROVEN", [str(f) for f in trial_of(name).findings]

    def test_training_repeats_itself_and_leaves_the_generator(self):
        before = torch.get_rng_state()
        settings = {"num_epochs": 1, "num_steps": 1, "seed": 3}
        first, again = (train_quickly(build_small_network(3, width=4), **settings) for _ in "ab")
        assert torch.equal(torch.get_rng_state(), before)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)


# One in the default tier, all by --slow.
SLOW = {name: [pytest.mark.slow] for name in CANARIES if name != "noisy_logits"}


class TestCanaries:
    def test_the_zoo(self):
        assert len(CANARIES) >= 16
        for name, canary in CANARIES.items():
            assert canary.caught_by, name
            assert canary.of in ("network", "mixture")

    @pytest.mark.parametrize("name", [pytest.param(x, marks=SLOW.get(x, [])) for x in CANARIES])
    def test_is_caught(self, name, honest, dataset, trial_of):
        whole = honest.mixture if CANARIES[name].of == "mixture" else honest.network
        before = everything(whole)
        trial = judge_canary(name, honest, dataset)
        if name == "hard_gate":  # a view undoes it, so the number itself is right
            assert trial.robust_accuracy <= trial_of("mixture").robust_accuracy
        else:
            assert trial.verdict in ("SUSPECT", "INVALID")
        honest_accuracy = trial_of(CANARIES[name].of).robust_accuracy
        assert is_caught(name, trial, honest_accuracy), [str(f) for f in trial.findings]
        assert everything(whole) == before

    @pytest.mark.parametrize("name", ["gradient_killer", "jagged_input", "k_winners_take_all"])
    def test_looks_robust_to_the_naive(self, name, honest, digits):
        """A canary that PGD sees through would prove nothing."""
        broken = CANARIES[name].make(honest.network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stands = after_pgd(broken, *digits, num_steps=10, num_restarts=1)
        assert stands > after_pgd(honest.network, *digits) + 0.2

    def test_an_attack_on_clamped_normalized_images_is_caught_by_the_control(self, honest, digits):
        """The protocol behind some published tables: the undefended network withstands it."""
        images, labels = digits
        space = attack_space(honest.control, "paper-compat", "none", [0.31], [0.37])
        found = pgd(
            space,
            space.enter(images),
            labels,
            epsilon=EPSILON,
            step_size=EPSILON / 5,
            num_steps=20,
            random_start=False,
        )
        with torch.no_grad():
            stands = space(found).argmax(dim=1) == labels
        assert findings.control_stands(seen(stands)) is not None

    @pytest.mark.slow
    def test_the_control_falls_to_attacks_on_pixels(self, trial_of, dataset):
        standing = round(trial_of("control").robust_accuracy * len(dataset))
        assert findings.control_stands(Seen(standing, len(dataset))) is None


class TestIsCaught:
    def test_for_its_own_reason_only(self):
        def of(name, severity):
            return Trial([Finding(name, severity, "")], robust_accuracy=0.1)

        assert is_caught("gradient_killer", of("zero_gradient", "invalid"), 0.5)
        assert is_caught("gradient_killer", of("noise_wins", "suspect"), 0.5)
        assert not is_caught("gradient_killer", of("zero_gradient", "note"), 0.5)
        assert not is_caught("gradient_killer", of("random", "invalid"), 0.5)
        assert not is_caught("gradient_killer", Trial([], 0.1), 0.5)

    def test_by_a_number_that_is_right_where_the_suite_sees_through(self):
        assert is_caught("hard_gate", Trial([], 0.5), 0.5)
        assert not is_caught("hard_gate", Trial([], 0.51), 0.5)
        assert not is_caught("detached_gate", Trial([], 0.1), 0.5)
        assert not is_caught("hard_gate", Trial([]), 0.5)
