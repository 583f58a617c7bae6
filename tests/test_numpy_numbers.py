"""Settings out of np.arange, np.linspace or a data frame: they are numbers, as Python's are."""

import dataclasses

import numpy as np
import pytest
import torch
from small_models import SmallNet, make_dataset, make_images, make_labels

from dwf import checks, evaluate
from dwf.attacks import PGD, apgd, carlini_wagner, fab, fgsm, pgd, random_noise, square
from dwf.checks import ConfigError
from dwf.compat import AutoAttack
from dwf.config import Config, EvaluationConfig, PhaseConfig
from dwf.evaluation import Budget
from dwf.models import build_network

IMAGES, LABELS = make_images(4), make_labels(4)
EPSILON, STEP = np.float32(0.1), np.float64(0.03)
KINDS = [np.int64(5), np.int32(5), np.uint8(5), np.array(5), torch.tensor(5)]


@pytest.mark.parametrize("five", KINDS, ids=lambda five: type(five).__name__)
def test_counts(five):
    assert type(checks.check_count(five, "num_steps")) is int
    assert checks.check_seed(five) == 5


@pytest.mark.parametrize("value", [np.float64(5.0), np.True_, torch.tensor(True), np.int64(0)])
def test_what_is_no_count(value):
    with pytest.raises(ConfigError, match=r"num_steps: .* expected an integer >= 1"):
        checks.check_count(value, "num_steps")


CALLS = {
    "fgsm": lambda n: fgsm(SmallNet(), IMAGES, LABELS, epsilon=np.float64(0.1), seed=n(3)),
    "fgsm at zero": lambda n: fgsm(SmallNet(), IMAGES, LABELS, epsilon=n(0)),
    "pgd": lambda n: pgd(
        SmallNet(),
        IMAGES,
        LABELS,
        epsilon=EPSILON,
        step_size=STEP,
        num_steps=n(3),
        num_restarts=n(2),
        random_start=np.True_,
        seed=n(4),
        eot_samples=n(1),
    ),
    "apgd": lambda n: apgd(SmallNet(), IMAGES, LABELS, epsilon=EPSILON, num_steps=n(5), seed=n(1)),
    "fab": lambda n: fab(
        SmallNet(), IMAGES, LABELS, epsilon=EPSILON, num_steps=n(3), alpha_max=np.float32(0.1)
    ),
    "square": lambda n: square(
        SmallNet(), IMAGES, LABELS, epsilon=EPSILON, num_queries=n(20), p_init=np.float32(0.8)
    ),
    "random_noise": lambda n: random_noise(
        SmallNet(), IMAGES, LABELS, epsilon=EPSILON, num_draws=n(3)
    ),
    "carlini_wagner": lambda n: carlini_wagner(
        SmallNet(),
        IMAGES,
        LABELS,
        num_steps=n(4),
        num_searches=n(2),
        learning_rate=np.float64(0.01),
        initial_c=np.float32(1e-3),
    ),
    "PGD": lambda n: PGD(SmallNet(), num_steps=n(3), seed=n(2))(IMAGES, LABELS),
    "AutoAttack": lambda n: AutoAttack(
        SmallNet(),
        eps=np.float64(0.05),
        seed=n(2),
        device="cpu",
        verbose=False,
        version="custom",
        attacks_to_run=["apgd-ce"],
    ).run_standard_evaluation(IMAGES, LABELS, bs=n(2)),
}


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
@pytest.mark.parametrize("name", CALLS)
def test_attacks(name, kind):
    found, expected = CALLS[name](kind), CALLS[name](int)
    assert torch.equal(found, expected)


def test_a_state_of_autoattack(tmp_path):
    adversary = AutoAttack(
        SmallNet(),
        eps=np.float32(0.05),
        seed=np.int64(2),
        device="cpu",
        verbose=False,
        version="custom",
        attacks_to_run=["apgd-ce"],
    )
    adversary.apgd.n_iter = np.int64(3)
    state = tmp_path / "state"
    first = adversary.run_standard_evaluation(IMAGES, LABELS, state_path=state)
    assert torch.equal(adversary.run_standard_evaluation(IMAGES, LABELS, state_path=state), first)


@pytest.mark.parametrize(
    "epsilon", [np.array([0.02, 0.05]), np.float32(0.05), torch.tensor(0.05), np.array(0.05)]
)
def test_evaluate(epsilon, tmp_path):
    settings = EvaluationConfig(
        batch_size=np.int64(4),
        num_images=np.int32(4),
        num_steps=(np.int64(2),),
        diagnostic_images=np.int64(0),
    )
    found = evaluate(
        SmallNet(),
        make_dataset(6),
        settings,
        suite="quick",
        budget=Budget(num_steps=np.int64(5), num_queries=20),
        epsilon=epsilon,
        seed=np.int64(1),
    )
    assert found.epsilon == pytest.approx(0.05)
    assert type(found.epsilon) is float
    assert type(found.seed) is int
    found.write(tmp_path / "evaluation")  # JSON knows no number of numpy


def test_settings_are_stored_as_numbers_of_python():
    phase = PhaseConfig(num_epochs=np.int64(3), learning_rate=np.float32(0.5), nesterov=np.True_)
    assert [type(getattr(phase, n)) for n in ("num_epochs", "learning_rate", "nesterov")] == [
        int,
        float,
        bool,
    ]
    config = Config("own", "plain", seed=np.int64(3), pretrain=phase)
    values = [config, config.pretrain, config.data, config.evaluation]
    for part in values:
        for field in dataclasses.fields(part):
            assert not isinstance(getattr(part, field.name), np.generic)


def test_networks():
    counts = {"num_classes": np.int64(10), "width": np.int64(4), "in_channels": np.int32(1)}
    model = build_network("resnet6", **counts, seed=np.int64(0))
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
