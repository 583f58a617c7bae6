"""N-FGSM, FGSM-PGI, LIET and several norms: attacks and losses by hand, and runs."""

import math
from dataclasses import replace

import pytest
import torch
from small_runs import assert_same_run, small_config, train_interrupted
from torch import nn

import dwf
from dwf.attacks import norms
from dwf.checks import ConfigError
from dwf.config import OPTIONS, AttackConfig
from dwf.data import Batch
from dwf.defenses import Crafter, get, prior_guided
from dwf.defenses.multi_norm import MultiNormOptions, multi_norm_step, steepest, worse
from dwf.defenses.prior_guided import FgsmPgiOptions, LietOptions, jensen_shannon
from dwf.defenses.single_step import NFgsmOptions, noisy_attack
from dwf.training import train

EPSILON = 0.1
ATTACK = AttackConfig(epsilon=EPSILON, step_size=0.04, num_steps=(4,))
CRAFTER = Crafter(ATTACK, 7, (0.5,), (0.5,))


def linear(weight=(1.0, -2.0, 0.5, 3.0)):
    """Logits (w x, 0) of four pixels: the loss of label 0 falls along w."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([weight, (0.0,) * 4]))
    return model


def batch_of(count=3, value=0.5):
    images = torch.full((count, 1, 2, 2), value)
    return Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count))


UPHILL = torch.tensor([-1.0, 1.0, -1.0, -1.0]).view(1, 1, 2, 2)  # against w


class TestNFgsm:
    def test_a_step_from_noise_that_may_leave_the_ball(self):
        batch = batch_of(200)
        found = noisy_attack(CRAFTER, linear(), batch, options=NFgsmOptions())
        start = found - EPSILON * UPHILL - batch.images
        assert start.abs().max() <= 2 * EPSILON + 1e-6
        assert start.abs().max() > 1.9 * EPSILON
        assert abs(float(start.mean())) < 0.02
        assert (found - batch.images).abs().max() > 2.8 * EPSILON

    def test_without_noise_it_is_fgsm(self):
        found = noisy_attack(CRAFTER, linear(), batch_of(), options=NFgsmOptions(noise=0.0))
        torch.testing.assert_close(found, batch_of().images + EPSILON * UPHILL)


class TestFgsmPgi:
    def test_loss_and_state_of_three_epochs(self):
        """Epoch 0 starts in a corner, from where two steps lead to the corner uphill; the third
        starts there: x' is x0 and the squared difference is 0."""
        model, batch, state = linear(), batch_of(), {}
        options = FgsmPgiOptions(weight=10.0)
        step = prior_guided.pgi_step
        first = step(model, model, batch, CRAFTER, options=options, state=state)
        assert set(state["block"].tolist()) == {0}
        for epoch in (1, 2):
            now = replace(CRAFTER, epoch=epoch)
            later = step(model, model, batch, now, options=options, state=state)
        torch.testing.assert_close(
            EPSILON * state["delta"].float(),
            (EPSILON * UPHILL).expand(3, 1, 2, 2),
            rtol=1e-2,
            atol=1e-4,
        )
        z = float((batch.images + EPSILON * UPHILL)[0].flatten() @ model[1].weight[0].detach())
        assert float(later.loss.detach()) == pytest.approx(math.log(1 + math.exp(-z)), rel=1e-3)
        assert float(first.loss.detach()) > float(later.loss.detach()) + 0.01

    def test_a_new_prior_after_some_epochs(self):
        model, batch, state = linear(), batch_of(), {}
        for epoch in (0, 1):
            prior_guided.pgi_step(
                model,
                model,
                batch,
                replace(CRAFTER, epoch=epoch),
                options=FgsmPgiOptions(reset_epochs=1),
                state=state,
            )
            assert set(state["block"].tolist()) == {epoch}


class TestLiet:
    def test_label_information_of_a_linear_model(self):
        labels = torch.tensor([0, 1, 0])
        found = prior_guided.label_information(linear(), batch_of().images, labels, EPSILON)
        expected = EPSILON * UPHILL * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
        torch.testing.assert_close(found, expected.expand(3, 1, 2, 2))

    def test_jensen_shannon(self):
        """p = (.8, .2), q = (.5, .5), m = (.65, .35)."""
        p = torch.tensor([[0.8, 0.2]]).log()
        q = torch.tensor([[0.5, 0.5]]).log()
        kl_p = 0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35)
        kl_q = 0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35)
        torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([(kl_p + kl_q) / 2]))

    def test_the_second_term_grows_with_the_epochs(self):
        model, batch = linear(), batch_of()
        losses = [
            float(
                prior_guided.liet_step(
                    model,
                    model,
                    batch,
                    replace(CRAFTER, epoch=epoch),
                    options=LietOptions(weight=weight),
                    num_epochs=2,
                ).loss.detach()
            )
            for epoch, weight in ((0, 0.0), (0, 50.0), (1, 50.0))
        ]
        assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)
        assert losses[1] > losses[0]


class TestSeveralNorms:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_pgd_in_the_configured_norm(self, norm):
        crafter = CRAFTER.changed(norm=norm)
        delta = crafter.pgd(linear(), batch_of()) - batch_of().images
        w = torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 1, 2, 2)
        direction = UPHILL if norm == "linf" else -w / w.norm()
        torch.testing.assert_close(delta, (EPSILON * direction).expand(3, 1, 2, 2))

    def test_radii_over_one_are_for_l2(self):
        assert AttackConfig(norm="l2", epsilon=2.0, step_size=1.5).epsilon == 2.0
        with pytest.raises(ConfigError, match="epsilon"):
            AttackConfig(epsilon=2.0)

    @pytest.mark.parametrize(("l2_epsilon", "norm"), [(0.05, "linf"), (1.0, "l2")])
    def test_the_larger_loss_is_chosen(self, l2_epsilon, norm):
        options = MultiNormOptions("max", l2_epsilon, l2_epsilon / 2)
        model, batch = linear(), batch_of()
        result = multi_norm_step(model, model, batch, CRAFTER, options=options)
        epsilon = EPSILON if norm == "linf" else l2_epsilon
        alone = CRAFTER.changed(norm=norm, epsilon=epsilon, step_size=epsilon / 2)
        torch.testing.assert_close(result.logits, model(alone.pgd(model, batch)).detach())

    def test_average(self):
        options = MultiNormOptions("average", 1.0, 0.5)
        model, batch = linear(), batch_of()
        result = multi_norm_step(model, model, batch, CRAFTER, options=options)
        assert len(result.logits) == 6
        halves = result.logits.chunk(2)
        each = [nn.functional.cross_entropy(x, batch.labels) for x in halves]
        assert float(result.loss.detach()) == pytest.approx(float(sum(each)) / 2, rel=1e-5)

    def test_steepest_descent_takes_the_norm_of_larger_loss_at_each_step(self):
        """Four L-inf steps of .04 gain .04 * 6.5 each until the ball ends at .1; L2 steps of .2
        gain .2 * |w| each: with the larger one at each step both balls are used up."""
        options = MultiNormOptions("msd", 0.3, 0.2)
        model, batch = linear(), batch_of()
        space = CRAFTER.target(model, batch)
        found = steepest(CRAFTER, space, batch, options) - batch.images
        w = torch.tensor([1.0, -2.0, 0.5, 3.0])
        gain = -(found[0].flatten() @ w)
        assert float(gain) == pytest.approx(max(0.3 * float(w.norm()), 0.1 * 6.5), rel=1e-4)
        assert float(norms.length(found, "l2").max()) <= 0.3 + 1e-5

    def test_first_of_equal_candidates(self):
        batch = batch_of()
        space = CRAFTER.target(linear(), batch)
        found = worse(CRAFTER, space, batch, [batch.images, batch.images.clone()])
        assert torch.equal(found, batch.images)


def method_config(defense, *overrides):
    config = dwf.presets.single(small_config(), defense)
    return dwf.apply_overrides(config, ["pretrain.num_epochs=2", "validate_every=1", *overrides])


class TestRuns:
    @pytest.mark.parametrize("defense", ["fgsm-pgi", "liet"])
    def test_an_interrupted_run_ends_with_the_same_bits(self, defense, tmp_path):
        config = method_config(defense)
        train(config, tmp_path / "whole", quiet=True)
        train_interrupted(config, tmp_path / "parts", 3, 6)
        assert_same_run(tmp_path / "parts", tmp_path / "whole")

    def test_l2_run(self, tmp_path):
        config = method_config("madry-at", "attack.norm=l2", "attack.epsilon=1.5")
        train(config, tmp_path, quiet=True)

    @pytest.mark.parametrize("defense", ["n-fgsm", "fgsm-pgi", "liet", "free-at"])
    def test_refuse_other_norms(self, defense):
        config = method_config(defense, "attack.norm=l2")
        with pytest.raises(ConfigError, match="attacks pixels in linf"):
            get(defense).phases(linear(), config)

    def test_all_have_options(self):
        assert {"n-fgsm", "fgsm-pgi", "liet", "multi-norm"} <= set(OPTIONS)
