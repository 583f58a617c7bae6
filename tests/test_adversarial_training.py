"""Baselines on one network against the formulas written out."""

import copy
from dataclasses import replace

import pytest
import slow_reference
import torch
import torch.nn.functional as F
from small_defenses import (
    CRAFTER,
    EPSILON,
    FACTS,
    STEP_SIZE,
    assert_same_gradients,
    assert_same_statistics,
    lived_in,
    make_batch,
)
from small_runs import small_config

from dwf.checks import ConfigError
from dwf.config import PhaseConfig
from dwf.defenses import adversarial_training, get
from dwf.presets import dwf_cifar10, single

B = 8
DEFENSES = ("plain", "fgsm-at", "pgd-at")


pytestmark = pytest.mark.usefixtures("reference")


def small_baseline(defense):
    return single(small_config(), defense)


@pytest.fixture
def model():
    """Statistics are not those of birth, so that it matters which mode an attack uses."""
    return lived_in(adversarial_training.build(small_baseline("plain"), FACTS))


@pytest.fixture
def batch():
    return make_batch(B)


def step_of(defense, model):
    (phase,) = get(defense).phases(model, small_baseline(defense))
    assert phase.module is model
    assert phase.gate_prefix is None
    return phase.step


@pytest.mark.parametrize("defense", DEFENSES)
def test_step(defense, model, batch):
    """Loss, gradients and statistics: every second image attacked, one mean over all rows."""
    expected = copy.deepcopy(model).eval()
    x, y, *_ = batch
    attacked = x.clone()
    for b in range(1, B, 2):
        one = slice(b, b + 1)
        if defense == "fgsm-at":
            attacked[one] = slow_reference.fgsm(expected, x[one], y[one], EPSILON)
        elif defense == "pgd-at":
            attacked[one] = slow_reference.pgd(expected, x[one], y[one], EPSILON, STEP_SIZE, 3)
    expected.train().zero_grad()
    loss = F.cross_entropy(expected(attacked), y)
    loss.backward()

    model.train()
    result = step_of(defense, model)(model, model, batch, CRAFTER)
    result.loss.backward()
    assert result.num_clean == (B if defense == "plain" else B // 2)
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0)
    assert_same_gradients(model, expected)
    assert_same_statistics(model, expected)


@pytest.mark.parametrize("defense", ["fgsm-at", "pgd-at"])
def test_attacked_rows_do_not_depend_on_the_division(defense, model, batch):
    """Two processes, or two parts of a batch, attack the images that one would attack."""
    step, seen = step_of(defense, model), []

    def forward(images):
        seen.append(images)
        return images.flatten(1)

    for part in (batch, *batch.split(2)):
        step(model, forward, part, CRAFTER)
    whole, first, second = seen
    parts = torch.cat([first[: B // 4], second[: B // 4], first[B // 4 :], second[B // 4 :]])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("odd", [1, 5])
def test_odd_batches(odd, model, batch):
    few = batch.rows(lambda part: part[:odd])
    result = step_of("pgd-at", model.train())(model, model, few, CRAFTER)
    assert (result.num_clean, len(result.labels)) == ((odd + 1) // 2, odd)


class TestPresets:
    @pytest.mark.parametrize("defense", DEFENSES)
    def test_strength_of_the_paper(self, defense):
        config = single(dwf_cifar10(), defense)
        assert config.attack.fgsm_epsilon == (8 / 255,)
        assert (config.attack.epsilon, config.attack.step_size) == (8 / 255, 2 / 255)
        assert config.attack.num_steps == (10,)
        assert config.joint is None

    @pytest.mark.parametrize("defense", DEFENSES)
    def test_no_schedule(self, defense, model):
        config = replace(small_baseline(defense), pretrain=None, joint=PhaseConfig())
        with pytest.raises(ConfigError, match=f"schedule of {defense}"):
            get(defense).phases(model, config)

    def test_seed_decides(self):
        config = small_baseline("plain")
        build = adversarial_training.build
        weights = [build(replace(config, seed=s), FACTS).network.conv1.weight for s in (0, 0, 1)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
