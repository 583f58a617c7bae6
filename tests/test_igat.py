"""iGAT: the ensemble, whom an error is handed to, each term of the loss, and the step, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from small_defenses import CRAFTER, FACTS, Spy, lived_in, make_batch, make_crafter
from small_runs import small_config

import dwf
from dwf.checks import ConfigError
from dwf.config import apply_overrides
from dwf.data import Batch
from dwf.defenses import igat
from dwf.defenses.igat import IgatOptions, drawn_member, igat_loss
from dwf.models import AveragedExperts
from dwf.models.averaged import AveragedOutput
from dwf.presets import single

# p of two members for an image of class 0: the mean is (.35, .4, .25), so the ensemble is wrong
P = torch.tensor([[[0.6, 0.2, 0.2]], [[0.1, 0.6, 0.3]]])
NOTHING = {name: 0.0 for name in ("members", "distributed", "rescue", "entropy", "diversity")}
LABEL = torch.tensor([0])


def output_of(probabilities):
    return AveragedOutput(probabilities.mean(dim=0).log(), probabilities.log())


def loss_of(probabilities=P, noise=0.9, wanted=LABEL, **weights):
    options = IgatOptions(num_experts=2, **{**NOTHING, **weights})
    noise = torch.full((probabilities.shape[1],), noise)
    return float(igat_loss(output_of(probabilities), wanted, noise, options))


def test_the_mean_of_probabilities():
    class Fixed(torch.nn.Module):
        def __init__(self, *p):
            super().__init__()
            self.p = torch.tensor([p])

        def forward(self, images):
            return self.p.log().expand(len(images), -1)

    model = AveragedExperts([Fixed(0.6, 0.2, 0.2), Fixed(0.1, 0.6, 0.3)])
    images = torch.zeros(2, 1, 2, 2)
    expected = torch.tensor([[0.35, 0.4, 0.25]] * 2)
    torch.testing.assert_close(model(images).exp(), expected)
    torch.testing.assert_close(model.expert(1)(images).exp(), P[1].repeat(2, 1))
    assert model.gate_weights(images).tolist() == [[0.5, 0.5]] * 2


class TestDraw:
    def test_chances_double_with_the_rank(self):
        """Ranks of three members by p[y] .2, .7, .1: chances 2/7, 4/7 and 1/7."""
        p = torch.tensor([[[0.2, 0.8]], [[0.7, 0.3]], [[0.1, 0.9]]])
        noise = (torch.arange(7) + 0.5) / 7
        rows = p.log().expand(3, 7, 2)
        found = drawn_member(rows, torch.zeros(7, dtype=torch.int64), noise)
        assert found.tolist() == [2, 0, 0, 1, 1, 1, 1]

    def test_ends_of_the_noise(self):
        noise = torch.tensor([0.0, 1 - 2**-24])
        p = torch.rand(20, 2, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
        labels = torch.zeros(2, dtype=torch.int64)
        found = drawn_member(p.log(), labels, noise)
        assert found.tolist() == [int(p[:, 0, 0].argmin()), int(p[:, 1, 0].argmax())]


class TestLoss:
    def test_members(self):
        """The sum over members, as in ADP: more of them do not weaken it beside H(p)."""
        assert loss_of(members=1.0) == pytest.approx(-math.log(0.6) - math.log(0.1), rel=1e-5)

    @pytest.mark.parametrize(("noise", "p"), [(0.9, 0.6), (0.2, 0.1)])
    def test_an_error_is_handed_to_one(self, noise, p):
        """Of two members the weaker has a third of the chance."""
        assert loss_of(noise=noise, distributed=5.0) == pytest.approx(-5 * math.log(p), rel=1e-5)

    def test_rescue(self):
        """Surest wrong classes .2 and .6."""
        expected = -10 * (math.log(0.8) + math.log(0.4))
        assert loss_of(rescue=10.0) == pytest.approx(expected, rel=1e-5)

    def test_rescue_is_flat_at_99_percent(self):
        p = torch.tensor([[[0.001, 0.998, 0.001]], [[0.1, 0.6, 0.3]]])
        expected = -(math.log(0.01) + math.log(0.4))
        assert loss_of(p, rescue=1.0) == pytest.approx(expected, rel=1e-4)

    def test_rows_that_the_ensemble_gets_right_count_but_add_nothing(self):
        p = torch.cat([P, torch.tensor([[[0.8, 0.1, 0.1]], [[0.6, 0.3, 0.1]]])], dim=1)
        wanted = torch.tensor([0, 0])
        expected = -(5 * math.log(0.6) + 10 * (math.log(0.8) + math.log(0.4))) / 2
        found = loss_of(p, wanted=wanted, distributed=5.0, rescue=10.0)
        assert found == pytest.approx(expected, rel=1e-5)

    def test_entropy_is_rewarded(self):
        mean = (0.35, 0.4, 0.25)
        expected = 2 * sum(q * math.log(q) for q in mean)
        assert loss_of(entropy=2.0) == pytest.approx(expected, rel=1e-5)

    def test_diversity_is_rewarded(self):
        """Wrong classes (1, 1)/sqrt 2 and (2, 1)/sqrt 5: cosine^2 is .9, the determinant .1."""
        assert loss_of(diversity=0.5) == pytest.approx(-0.5 * math.log(0.1), rel=1e-3)

    def test_shares_of_classes(self):
        wanted = torch.tensor([[0.9, 0.1, 0.0]])
        of = [0.9 * math.log(q[0]) + 0.1 * math.log(q[1]) for q in P[:, 0].tolist()]
        assert loss_of(wanted=wanted, members=1.0) == pytest.approx(-sum(of), rel=1e-5)

    def test_a_right_answer_costs_less_than_a_constant_one(self):
        """Eight members at 90 % in the label, or each at equal odds: H(p) may not outweigh that."""
        right = torch.full((8, 1, 10), 0.1 / 9)
        right[:, :, 0] = 0.9
        same = torch.full((8, 1, 10), 0.1)
        weights = {"members": IgatOptions().members, "entropy": IgatOptions().entropy}
        assert loss_of(right, **weights) < loss_of(same, **weights)


class TestPhases:
    def test_errors_wait_for_a_trained_ensemble(self):
        config = apply_overrides(
            single(small_config(), "igat"), ["options.num_experts=2", "options.members=0.5"]
        )
        config = replace(config, joint=replace(config.pretrain, learning_rate=0.25))
        first, second = igat.phases(igat.build(config, FACTS), config)
        assert (first.name, first.schedule) == ("ensemble", config.pretrain)
        assert (second.name, second.schedule) == ("igat", config.joint)
        assert first.step.keywords["options"] == replace(
            config.options, distributed=0.0, rescue=0.0
        )
        assert second.step.keywords["options"] == config.options

    def test_both_schedules_are_needed(self):
        config = single(small_config(), "igat")
        with pytest.raises(ConfigError, match="joint: None, but in it iGAT hands out"):
            igat.phases(igat.build(config, FACTS), config)

    def test_eight_members_learn(self):
        """From scratch the loss of the second phase ends in constant answers, at 10 %."""
        digits = dwf.data.load("digits")
        images, labels = digits.images.float() / 255, digits.labels
        torch.manual_seed(0)
        model = AveragedExperts(
            torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(64, 32),
                torch.nn.ReLU(),
                torch.nn.Linear(32, 10),
            )
            for _ in range(8)
        )
        for phase in igat.phases(model, dwf.presets.find("igat_digits")):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for seed in range(40 if phase.name == "ensemble" else 10):
                rows = torch.randint(0, len(images), (64,))
                batch = Batch(images[rows], labels[rows], rows)
                optimizer.zero_grad()
                phase.step(model, model, batch, make_crafter(seed=seed)).loss.backward()
                optimizer.step()
        with torch.no_grad():
            right = (model.eval()(images).argmax(dim=1) == labels).float().mean()
        assert right > 0.8


class TestStep:
    def test_half_is_attacked(self):
        config = apply_overrides(single(small_config(), "igat"), ["options.num_experts=2"])
        model = lived_in(igat.build(config, FACTS), noise=0.3)
        batch, spy = make_batch(6), Spy(model)
        # before the step moves BatchNorm's statistics
        expected = CRAFTER.pgd(model, batch.split(2)[1])
        result = igat.step(model, spy, batch, CRAFTER, options=config.options)
        ((seen, training),) = spy.seen
        assert training
        assert torch.equal(seen[:3], batch.images[:3])
        assert not torch.equal(expected, batch.images[3:])
        torch.testing.assert_close(seen[3:], expected)
        assert result.num_clean == 3
        assert torch.equal(result.labels, batch.labels)
        result.loss.backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_more_members_than_can_be_drawn(self):
        with pytest.raises(ConfigError, match=r"options.num_experts: 21"):
            IgatOptions(num_experts=21)
