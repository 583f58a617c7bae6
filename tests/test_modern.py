"""DWF with a modern objective: its terms by hand, the experts' rate, and what is trained."""

import math
from dataclasses import replace

import pytest
import torch
from small_runs import small_config
from torch import nn

import dwf
from dwf.checks import ConfigError
from dwf.config import PhaseConfig
from dwf.data import Batch
from dwf.defenses import Crafter, Phase, get, modern
from dwf.defenses.modern import ModernOptions, diversity, entropy, made_up_for
from dwf.models import MixtureOutput
from dwf.training import train
from dwf.training.optimizer import Optimizer


def modern_config(*overrides, **options):
    config = replace(
        small_config(), defense="dwf-modern", pretrain=None, options=ModernOptions(**options)
    )
    return dwf.apply_overrides(config, overrides)


class TestTerms:
    def test_entropy(self):
        gate_logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
        expected = [math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
        torch.testing.assert_close(entropy(gate_logits), torch.tensor(expected))

    def test_diversity(self):
        """Wrong classes (.3, .1) and (.1, .3): cosine 0.6, so the determinant is 1 - 0.36."""
        logits = torch.tensor([[[0.6, 0.3, 0.1]], [[0.6, 0.1, 0.3]]]).log()
        found = diversity(logits, torch.tensor([0]))
        torch.testing.assert_close(found, torch.tensor([math.log(0.64)]), atol=1e-4, rtol=0)
        equal = diversity(logits[[0, 0]], torch.tensor([0]))
        assert equal < -10

    def test_more_experts_than_wrong_classes(self):
        with pytest.raises(ConfigError, match=r"3 experts, but .* at most 2 with 3 classes"):
            diversity(torch.zeros(3, 4, 3), torch.zeros(4, dtype=torch.int64))


class Constant(nn.Module):
    """Logits that are a parameter."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1) + 0 * images.flatten(1).sum(1, keepdim=True)


def constant_mixture():
    return dwf.Mixture([Constant(1.0, 0.0), Constant(0.0, 0.0)], Constant(0.0, 0.0))


def one_step(model, options):
    """The loss of a batch of label 1, and the numbers of the step."""
    batch = Batch(torch.full((2, 1, 2, 2), 0.5), torch.ones(2, dtype=torch.int64), torch.arange(2))
    crafter = Crafter(modern_config().attack, 0, (0.5,), (0.5,))
    return modern.joint_step(model, model, batch, crafter, options=options)


class TestStep:
    @pytest.mark.parametrize("objective", ["trades", "mart", "ce"])
    def test_loss_of_a_constant_model(self, objective):
        """Logits (0.5, 0): p_0 = s(0.5), and images change nothing, so KL is 0."""
        result = one_step(constant_mixture(), ModernOptions(objective=objective))
        wrong = 1 / (1 + math.exp(-0.5))
        expected = -math.log(1 - wrong)
        if objective == "mart":
            expected -= math.log(1.0001 - wrong)
        assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)
        assert (len(result.labels), result.num_clean) == ((2, 0) if objective == "ce" else (4, 2))

    def test_gate_entropy_is_rewarded(self):
        plain = one_step(constant_mixture(), ModernOptions())
        rewarded = one_step(constant_mixture(), ModernOptions(gate_entropy=0.5))
        assert float((plain.loss - rewarded.loss).detach()) == pytest.approx(
            0.5 * math.log(2), rel=1e-5
        )

    def test_smoothed_labels(self):
        """CE with .75 and .25: -.75 log(1 - p) - .25 log p."""
        model = constant_mixture()
        batch = Batch(
            torch.full((2, 1, 2, 2), 0.5),
            torch.ones(2, dtype=torch.int64),
            torch.arange(2),
            torch.tensor([[0.25, 0.75]] * 2),
        )
        crafter = Crafter(modern_config().attack, 0, (0.5,), (0.5,))
        result = modern.joint_step(model, model, batch, crafter, options=ModernOptions())
        wrong = 1 / (1 + math.exp(-0.5))
        expected = -0.75 * math.log(1 - wrong) - 0.25 * math.log(wrong)
        assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)


class TestRate:
    @pytest.mark.parametrize(("rate", "factor"), [("own", 2), ("shared", 1)])
    def test_of_experts(self, rate, factor):
        """Under a uniform gate half of the gradient is left; with its own rate an expert steps
        as far as it would alone."""
        mixture = constant_mixture()
        schedule = PhaseConfig(
            learning_rate=0.1, gate_learning_rate=0.3, weight_decay=0, momentum=0
        )
        config = replace(modern_config(expert_rate=rate), joint=schedule)
        (phase,) = modern.phases(mixture, config)
        optimizer = Optimizer(phase, 10)
        assert optimizer.set_step(0) == 0.1
        alone = Constant(1.0, 0.0)
        by_itself = Optimizer(Phase("alone", alone, schedule, None), 10)
        by_itself.set_step(0)
        images = torch.zeros(3, 1, 2, 2)
        mixture(images)[:, 0].mean().backward()
        alone(images)[:, 0].mean().backward()
        optimizer.step()
        by_itself.step()
        moved = 1 - float(mixture.experts[0].logits[0].detach())
        assert moved == pytest.approx(factor / 2 * (1 - float(alone.logits[0].detach())), rel=1e-5)


class TestGradientThroughTheGate:
    def test_what_the_gate_leaves_is_made_up_for(self):
        """Gate weights .75 and .25: each expert's logits have the gradient of the mixture's."""
        gate = torch.tensor([[math.log(3.0), 0.0]] * 2)
        experts = torch.tensor([[[1.0, 0.0]] * 2, [[0.0, 2.0]] * 2], requires_grad=True)
        weights = gate.softmax(dim=1)
        output = MixtureOutput(torch.zeros(2, 2), gate, weights, experts)
        logits = made_up_for(output)
        torch.testing.assert_close(logits, torch.tensor([[0.75, 0.5]] * 2))
        logits[:, 0].sum().backward()
        torch.testing.assert_close(experts.grad, torch.tensor([[[1.0, 0.0]] * 2] * 2))

    def test_the_loss_is_the_same(self):
        one = one_step(constant_mixture(), ModernOptions())
        other = one_step(constant_mixture(), ModernOptions(expert_rate="gate"))
        assert float(one.loss.detach()) == pytest.approx(float(other.loss.detach()), rel=1e-6)


class TestTrained:
    @pytest.mark.parametrize("trained", ["gate", "experts"])
    def test_a_part(self, trained, tmp_path):
        config = modern_config("joint.num_epochs=1", trained=trained)
        facts = dwf.defenses.ModelFacts((1, 8, 8), 10, (0.3,), (0.4,))
        before = get("dwf-modern").build(config, facts).state_dict()
        after = train(config, tmp_path, quiet=True).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        changed = {name for name in changed if not name.startswith("normalize.")}
        parts = {name.split(".")[0] for name in changed}
        assert parts == {"gate" if trained == "gate" else "experts"}

    def test_needs_a_joint_phase(self, tmp_path):
        config = replace(modern_config(), joint=None, pretrain=PhaseConfig())
        with pytest.raises(ConfigError, match="joint: None"):
            train(config, tmp_path / "run", quiet=True)
