"""Synergy-of-Experts: confidence, choice, both losses and the step, against formulas by hand."""

import copy
import math
from dataclasses import replace

import pytest
import slow_reference
import small_defenses
import torch
from small_defenses import (
    CRAFTER,
    EPSILON,
    NUM_STEPS,
    STEP_SIZE,
    Spy,
    assert_same_gradients,
    assert_same_statistics,
    lived_in,
    make_batch,
)
from small_runs import assert_same_run, rows, small_config, train_interrupted

from dwf.checks import ConfigError
from dwf.config import apply_overrides
from dwf.defenses import load, soe
from dwf.defenses.soe import SoeOptions, synergy_loss
from dwf.models import Mixture, Normalize, SoeOutput, SynergyOfExperts, build_network
from dwf.presets import find, single
from dwf.training import train

B, K, E = 6, 4, 3
FACTS = replace(small_defenses.FACTS, num_classes=K)

pytestmark = pytest.mark.usefixtures("one_thread", "reference")


def small_soe(*overrides):
    config = apply_overrides(single(small_config(), "soe"), ["seed=3", *overrides])
    return replace(config, attack=replace(config.attack, num_steps=(2,)))


@pytest.fixture
def model():
    """Each sub-model is the surest for some images; statistics are not those of birth."""
    made = lived_in(soe.build(small_soe("model.width=4"), FACTS), noise=0.3).eval()
    with torch.no_grad():
        x = made.normalize(make_batch(64, seed=2).images)
        for expert, head in zip(made.experts, made.heads, strict=True):
            head.weight.mul_(8)
            head.bias.copy_(-(expert.features(x) @ head.weight[0]).mean())
    return made


@pytest.fixture
def batch():
    return make_batch(B, K)


def parts_of(model, images):
    """Per sub-model i and image b: probabilities, confidence a and rectified r, by loops."""
    x = model.normalize(images)
    p, a = [], []
    for i in range(model.num_experts):
        p.append(model.expert(i)(images).softmax(dim=1))
        h = model.experts[i].features(x)
        a.append(torch.sigmoid(h @ model.heads[i].weight[0] + model.heads[i].bias[0]))
    r = [[p[i][b].max() * a[i][b] for b in range(len(images))] for i in range(len(p))]
    return p, a, r


def loss_of(model, images, labels, weighting, temperature, confidence_weight):
    """L(x, y) as the table of the paper's code writes it: one image and sub-model at a time."""
    p, a, _ = parts_of(model, images)
    n, num_images = len(p), len(images)
    total, aux = 0.0, 0.0
    for b in range(num_images):
        y = int(labels[b])
        scores, losses = [], []
        for i in range(n):
            largest = p[i][b].max()
            scores.append(temperature * (largest * a[i][b]).item())
            losses.append(-p[i][b][y].log())
            if int(p[i][b].argmax()) == y:
                largest = largest.detach()
            r, t = largest * a[i][b], p[i][b][y].item()
            aux = aux - (t * r.log() + (1 - t) * (1 - r).log())
        if weighting == "true_best":
            scores = [-loss.item() for loss in losses]
        if weighting == "equal":
            scores = [0.0] * n
        norm = sum(math.exp(s) for s in scores)
        total = total + sum(
            math.exp(s) / norm * loss for s, loss in zip(scores, losses, strict=True)
        )
    return total / num_images + confidence_weight * aux / (n * num_images)


class TestModel:
    def test_output(self, model, batch):
        p, a, r = parts_of(model, batch.images)
        output = model(batch.images, return_aux=True)
        torch.testing.assert_close(output.confidence, torch.stack(a))
        torch.testing.assert_close(output.expert_logits.softmax(2), torch.stack(p))
        chosen = set()
        for b in range(B):
            best = max(range(E), key=lambda i: r[i][b].item())
            chosen.add(best)
            assert output.gate_weights[b].tolist() == [float(i == best) for i in range(E)]
            assert torch.equal(output.logits[b], output.expert_logits[best, b])
            for i in range(E):
                torch.testing.assert_close(output.rectified[i, b], r[i][b])
        assert len(chosen) > 1
        assert torch.equal(model(batch.images), output.logits)
        assert torch.equal(model.gate_weights(batch.images), output.gate_weights)

    def test_forced_expert_is_the_hand_built_path(self, model, batch):
        output = model(batch.images, return_aux=True)
        normalize = Normalize(FACTS.mean, FACTS.std)
        for e in range(E):
            by_hand = model.experts[e](normalize(batch.images))
            assert torch.equal(model.expert(e)(batch.images), by_hand)
            assert torch.equal(output.expert_logits[e], by_hand)
        assert model.expert_names == ["expert 0", "expert 1", "expert 2"]

    def test_the_choice_has_no_gradient(self, model, batch):
        model(batch.images).square().sum().backward()
        assert all(head.weight.grad is None for head in model.heads)

    @pytest.mark.parametrize("temperature", [1.0, 7.0])
    def test_surrogate(self, model, batch, temperature):
        """Equal logits; gradient = that of the chosen logits + that of the softmax, by hand."""
        cost = torch.randn(B, K, generator=torch.Generator().manual_seed(2))
        leaf = batch.images.clone().requires_grad_()
        logits = model.surrogate(temperature)(leaf)
        assert torch.equal(logits, model(batch.images))
        (gradient,) = torch.autograd.grad((logits * cost).sum(), leaf)

        leaf = batch.images.clone().requires_grad_()
        output = model(leaf, return_aux=True)
        value = (output.logits * cost).sum()
        for b in range(B):
            gain = [(output.expert_logits[i, b] @ cost[b]).item() for i in range(E)]
            norm = sum(math.exp(temperature * output.rectified[i, b].item()) for i in range(E))
            soft = [math.exp(temperature * output.rectified[i, b].item()) / norm for i in range(E)]
            mean = sum(s * g for s, g in zip(soft, gain, strict=True))
            for i in range(E):  # d sum_j soft_j gain_j / d r_i = T soft_i (gain_i - mean)
                slope = temperature * soft[i] * (gain[i] - mean)
                value = value + slope * output.rectified[i, b]
        (expected,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        (plain,) = torch.autograd.grad((model(leaf) * cost).sum(), leaf)
        assert not torch.allclose(gradient, plain, rtol=1e-2, atol=1e-4)

    def test_seed_alone_decides(self):
        state = torch.get_rng_state()
        first, again = (soe.build(small_soe(), FACTS) for _ in range(2))
        other = soe.build(small_soe("seed=4"), FACTS)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in first.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(first.heads[0].weight, other.heads[0].weight)
        assert not torch.equal(first.heads[0].weight, first.heads[1].weight)
        assert not torch.equal(first.experts[0].conv1.weight, first.experts[1].conv1.weight)

    def test_state_dict_round_trip(self, model, batch):
        other = soe.build(small_soe("model.width=4", "seed=9"), FACTS).eval()
        assert not torch.equal(other(batch.images), model(batch.images))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(batch.images), model(batch.images))

    def test_impossible(self):
        with pytest.raises(ConfigError, match="experts: an empty list"):
            SynergyOfExperts([])
        network = build_network("resnet6", num_classes=2, width=1, in_channels=1, seed=0)
        with pytest.raises(ConfigError, match="2 names for 1 experts"):
            SynergyOfExperts([network], expert_names=["a", "b"])
        with pytest.raises(ConfigError, match="temperature: 0"):
            SynergyOfExperts([network]).surrogate(0.0)


class TestLoss:
    """Two sub-models, p_0 = (.8, .2) right and p_1 = (.4, .6) wrong, a = (.5, .25), label 0.

    r = (.4, .15), t = (.8, .4), CE = (.2231, .9163),
    BCE = (-.8 ln .4 - .2 ln .6, -.4 ln .15 - .6 ln .85) = (.8352, .8564), mean .8458.
    """

    # softmax(.4, .15) = (.5622, .4378);  softmax(-CE) = (.8, .4) / 1.2
    @pytest.mark.parametrize(
        ("weighting", "expected"),
        [("predicted_best", 0.526619), ("true_best", 0.454193), ("equal", 0.569717)],
    )
    def test_by_hand(self, weighting, expected):
        output, _ = self.example()
        for confidence_weight in (0.0, 1.0, 2.5):
            options = SoeOptions(
                num_experts=2, weighting=weighting, confidence_weight=confidence_weight
            )
            loss = synergy_loss(output, torch.tensor([0]), options)
            assert loss.item() == pytest.approx(expected + confidence_weight * 0.845779, abs=2e-6)

    def test_temperature_by_hand(self):
        """softmax(4 * .4, 4 * .15) = (.7311, .2689)"""
        output, _ = self.example()
        options = SoeOptions(temperature=4.0, confidence_weight=0.0)
        loss = synergy_loss(output, torch.tensor([0]), options)
        assert loss.item() == pytest.approx(0.731059 * 0.223144 + 0.268941 * 0.916291, abs=2e-6)

    def test_gradients_by_hand(self):
        """Of the confidence loss: none to a right sub-model's logits, some to a wrong one's.

        d BCE / d r = (r - t) / (r (1 - r)) = (-1.6667, -1.9608), and half of it is in the mean.
        """
        output, (logits, confidence) = self.example()
        with_, without = (
            torch.autograd.grad(
                synergy_loss(output, torch.tensor([0]), SoeOptions(confidence_weight=w)),
                (logits, confidence),
                retain_graph=True,
                allow_unused=True,
            )
            for w in (1.0, 0.0)
        )
        difference = with_[0] - without[0]
        # m = .6 has d m / d logits = (-.24, .24); times a = .25
        expected = torch.tensor([[[0.0, 0.0]], [[0.0588235, -0.0588235]]])
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-6)
        assert without[1] is None or not without[1].any()
        torch.testing.assert_close(with_[1], torch.tensor([[-0.6666667], [-0.5882353]]))

    def example(self):
        logits = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]]).log().requires_grad_()
        confidence = torch.tensor([[0.5], [0.25]]).requires_grad_()
        rectified = logits.softmax(2).amax(2) * confidence
        weights = torch.tensor([[1.0, 0.0]])
        return SoeOutput(logits[0], weights, logits, confidence, rectified), (logits, confidence)

    @pytest.mark.parametrize("weighting", soe.WEIGHTINGS)
    def test_by_loops(self, weighting, model, batch):
        """Value and every gradient; the weights of the images have none."""
        options = SoeOptions(weighting=weighting, temperature=3.0, confidence_weight=0.7)
        output = model(batch.images, return_aux=True)
        right = (output.expert_logits.argmax(2) == batch.labels).float().mean()
        assert 0 < right < 1
        expected_model = copy.deepcopy(model)
        synergy_loss(output, batch.labels, options).backward()
        loss = loss_of(expected_model, batch.images, batch.labels, weighting, 3.0, 0.7)
        loss.backward()
        found = synergy_loss(output, batch.labels, options)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        assert_same_gradients(model, expected_model)

    def test_under_autocast(self, model, batch):
        output = model(batch.images, return_aux=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = synergy_loss(output, batch.labels, SoeOptions())
        torch.testing.assert_close(loss, synergy_loss(output, batch.labels, SoeOptions()))

    def test_saturated(self):
        """Certain and wrong: the loss is large, and it and its gradient are finite."""
        logits = torch.tensor([[[200.0, -200.0]], [[-200.0, 200.0]]]).requires_grad_()
        head = torch.full((2, 1), 60.0).requires_grad_()
        rectified = logits.softmax(2).amax(2) * head.sigmoid()
        output = SoeOutput(logits[0], torch.eye(2)[:1], logits, head.sigmoid(), rectified)
        loss = synergy_loss(output, torch.tensor([0]), SoeOptions())
        loss.backward()
        assert loss.item() > 10
        assert logits.grad.isfinite().all()
        assert head.grad.isfinite().all()


class TestStep:
    @pytest.mark.parametrize("weighting", ["predicted_best", "true_best"])
    @pytest.mark.parametrize("attack_each", [False, True])
    def test_step(self, attack_each, weighting, model, batch):
        """Loss, gradients and statistics of L(x, y) + L(x', y), slowly."""
        settings = [f"options.attack_each={attack_each}", f"options.weighting={weighting}"]
        expected = copy.deepcopy(model)
        x, y, *_ = batch
        targets = [expected.expert(e).eval() for e in range(E)] if attack_each else [expected]
        attacked = torch.cat(
            [slow_reference.pgd(t, x, y, EPSILON, STEP_SIZE, NUM_STEPS) for t in targets]
        )
        labels = y.repeat(len(targets))
        expected.zero_grad()
        expected.train()
        for images, wanted in ((x, y), (attacked, labels)):
            state = copy.deepcopy(expected.state_dict())
            loss_of(expected, images, wanted, weighting, 1.0, 1.0).backward()
            # the loop above passes twice; statistics are to move once
            expected.load_state_dict(state)
            expected(images)

        (phase,) = soe.phases(model, small_soe("model.width=4", *settings))
        assert phase.module is model
        forward = Spy(model.train())
        result = phase.step(model, forward, batch, CRAFTER)
        result.loss.backward()
        assert [training for _, training in forward.seen] == [True, True]
        assert torch.equal(forward.seen[0][0], x)
        torch.testing.assert_close(forward.seen[1][0], attacked, rtol=0, atol=1e-6)
        assert result.num_clean == B
        assert torch.equal(result.labels, torch.cat([y, labels]))
        assert result.logits.shape == (B + len(labels), K)
        assert_same_gradients(model, expected, atol=1e-4)
        assert_same_statistics(model, expected, rtol=1e-4, atol=1e-5)

    def test_attacks_differ(self, model, batch):
        """Through the prediction or through a sub-model: other images."""
        through_all = CRAFTER.pgd(model, batch)
        for e in range(E):
            assert not torch.equal(CRAFTER.pgd(model.expert(e), batch), through_all)


class TestSettings:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("options.num_experts=0", "options.num_experts: 0"),
            ("options.weighting=best", r"weighting: 'best'.*did you mean 'true_best'"),
            ("options.temperature=0", "options.temperature: 0"),
            ("options.confidence_weight=-1", "options.confidence_weight: -1"),
            ("options.temprature=1", "did you mean options.temperature"),
        ],
    )
    def test_bad_options(self, override, message):
        with pytest.raises(ConfigError, match=message):
            small_soe(override)

    def test_phases(self, model):
        with pytest.raises(ConfigError, match="trains SynergyOfExperts, found Mixture"):
            soe.phases(Mixture([torch.nn.Flatten()], torch.nn.Flatten()), small_soe())
        config = replace(small_soe(), pretrain=None, joint=small_soe().pretrain)
        with pytest.raises(ConfigError, match="pretrain: None, but it is the schedule of soe"):
            soe.phases(model, config)

    def test_recipe(self):
        config, wide = find("soe_cifar10"), find("soe_r18_cifar10")
        assert (config.model.network, config.model.width) == ("resnet20", 16)
        assert (wide.model.network, wide.model.width) == ("resnet18", 64)
        for made in (config, wide):
            attack, schedule = made.attack, made.pretrain
            assert (attack.epsilon, attack.step_size, attack.num_steps) == (0.02, 0.01, (10,))
            assert not attack.random_start
            assert (schedule.num_epochs, schedule.batch_size) == (200, 128)
            assert (schedule.learning_rate, schedule.momentum) == (0.1, 0.9)
            assert schedule.weight_decay == 1e-4
            assert [t * 200 for t in schedule.at] == [50, 75]
            assert schedule.factors == pytest.approx((0.1, 0.01))
            assert made.options == SoeOptions(3, "predicted_best", 1.0, 1.0, False)

    def test_resnet20(self):
        """19 convolutions in three stages of 16, 32 and 64 channels, with 1x1 shortcuts."""
        network = build_network("resnet20", num_classes=10, width=16, in_channels=3, seed=0)
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert sum(m.kernel_size == (3, 3) for m in convolutions) == 19
        assert [len(network.get_submodule(f"layer{i}")) for i in (1, 2, 3)] == [3, 3, 3]
        assert network.linear.in_features == 64
        assert network.features(torch.rand(2, 3, 32, 32)).shape == (2, 64)
        # 3 -> 16, 6 x 16 -> 16, then 32 and 64 channels likewise; two BatchNorm numbers a channel
        conv = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
        norm = 2 * (7 * 16 + 6 * 32 + 6 * 64)
        shortcuts = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
        assert sum(p.numel() for p in network.parameters()) == conv + norm + shortcuts + 650


class TestRuns:
    @pytest.mark.slow
    def test_resume_is_exact(self, tmp_path):
        config = small_soe("options.attack_each=true")
        model = train(config, tmp_path / "whole", quiet=True)
        train_interrupted(config, tmp_path / "parts", 3, 8, 15)
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
        loaded = load(tmp_path / "whole")
        images = torch.rand(3, 1, 8, 8)
        assert torch.equal(loaded(images), model(images))

    @pytest.mark.slow
    def test_training_lowers_the_loss(self, tmp_path):
        config = small_soe(
            "pretrain.num_epochs=8", "model.width=4", "log_every=4", "validate_every=0"
        )
        train(config, tmp_path / "run", quiet=True)
        losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
        assert losses[-1] < 0.85 * losses[0]
