"""Robust Experts: balance losses, steps, options and runs against the formulas written out."""

import copy
import math
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
    lived_in,
    make_batch,
    recorded,
)
from small_runs import assert_same_run, rows, small_config, train_interrupted

import dwf
from dwf import checkpoint
from dwf.checks import ConfigError
from dwf.config import PhaseConfig, apply_overrides
from dwf.defenses import get, robust_experts
from dwf.defenses.robust_experts import (
    BALANCE,
    RobustExpertsOptions,
    column_entropy_loss,
    entropy_loss,
    switch_loss,
    variance_loss,
)
from dwf.models import Normalize, PixelModel, SparseModel
from dwf.presets import single
from dwf.training import train

pytestmark = pytest.mark.usefixtures("one_thread", "reference")
B = 16


def config(*overrides):
    made = single(small_config(), "robust-experts")
    return apply_overrides(
        made, ["attack.num_steps=2", "attack.random_start=true", "model.width=4", *overrides]
    )


@pytest.fixture
def batch():
    return make_batch(B)


def build(settings):
    """With statistics that are not those of birth, so that modes of the model matter."""
    return lived_in(robust_experts.build(settings, FACTS))


def entropy_by_hand(row):
    return -sum(float(p) * math.log(float(p)) for p in row if p > 0)


def balance_by_loops(name, p):
    """The four formulas in Python numbers."""
    T, E = p.shape
    mean = [sum(float(p[t, i]) for t in range(T)) / T for i in range(E)]
    largest = [max(range(E), key=lambda i, t=t: float(p[t, i])) for t in range(T)]
    share = [largest.count(i) / T for i in range(E)]
    switch = E * sum(f * P for f, P in zip(share, mean, strict=True)) - 1
    std = [math.sqrt(sum((float(p[t, i]) - mean[i]) ** 2 for t in range(T)) / T) for i in range(E)]
    return {
        "switch": switch,
        "entropy": sum(entropy_by_hand(row) for row in p) / T - entropy_by_hand(mean),
        "column_entropy": -entropy_by_hand(mean),
        "variance": switch - sum(std) / E + 1,
    }[name]


class TestBalance:
    P = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])

    def test_by_hand(self):
        """P = (.625, .375); f = (.75, .25), of a tie the first."""
        mean_entropy = -0.625 * math.log(0.625) - 0.375 * math.log(0.375)
        quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        switch = 2 * (0.75 * 0.625 + 0.25 * 0.375) - 1
        std = math.sqrt((0.125**2 + 0.125**2 + 0.375**2 + 0.375**2) / 4)
        expected = {
            switch_loss: switch,
            entropy_loss: (2 * quarter + math.log(2)) / 4 - mean_entropy,
            column_entropy_loss: -mean_entropy,
            variance_loss: switch - std + 1,
        }
        assert switch == 0.125
        for loss, value in expected.items():
            torch.testing.assert_close(float(loss(self.P)), value, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("name", BALANCE)
    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
    def test_by_loops(self, name, sharpness):
        generator = torch.Generator().manual_seed(0)
        gate_logits = sharpness * torch.randn(30, 5, generator=generator, dtype=torch.float64)
        p = gate_logits.softmax(dim=1)
        assert float(BALANCE[name](p)) == pytest.approx(balance_by_loops(name, p), abs=1e-12)

    def test_at_the_extremes(self):
        """Uniform; every image sure, evenly spread; every image sure of one expert."""
        uniform, even = torch.full((8, 4), 0.25), torch.eye(4).repeat(2, 1)
        collapsed = torch.eye(4)[[1] * 8]
        values = {
            name: [float(loss(p)) for p in (uniform, even, collapsed)]
            for name, loss in BALANCE.items()
        }
        nats = math.log(4)
        std = math.sqrt(3 / 16)
        assert values["switch"] == pytest.approx([0, 0, 3])
        assert values["entropy"] == pytest.approx([0, -nats, 0], abs=1e-6)
        assert values["column_entropy"] == pytest.approx([-nats, -nats, 0])
        assert values["variance"] == pytest.approx([1, 1 - std, 4])

    def test_column_entropy_is_a_divergence(self):
        p = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
        mean, uniform = p.mean(dim=0), torch.full((5,), 0.2)
        kl = (mean * (mean / uniform).log()).sum()
        torch.testing.assert_close(column_entropy_loss(p), kl - math.log(5))

    @pytest.mark.parametrize("name", BALANCE)
    def test_gradcheck(self, name):
        generator = torch.Generator().manual_seed(0)
        gate_logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        loss = BALANCE[name]
        torch.autograd.gradcheck(lambda x: loss(x.softmax(dim=1)), gate_logits.requires_grad_())

    @pytest.mark.parametrize("name", BALANCE)
    @pytest.mark.parametrize("rows", [1, 4])
    def test_gradient_of_sure_gates_is_finite(self, name, rows):
        """Probabilities of exactly 0 and 1, and a batch of one image or of equal ones."""
        gate_logits = torch.tensor([[500.0, 0.0, -500.0]]).repeat(rows, 1).requires_grad_()
        p = gate_logits.softmax(dim=1)
        assert p[0].tolist() == [1, 0, 0]
        loss = BALANCE[name](p)
        loss.backward()
        assert loss.isfinite()
        assert gate_logits.grad.isfinite().all()

    def test_switch_pushes_from_the_crowded_expert(self):
        gate_logits = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.1]]).requires_grad_()
        switch_loss(gate_logits.softmax(dim=1)).backward()
        assert (gate_logits.grad[:, 0] > 0).all()


class TestStep:
    @pytest.mark.parametrize("balance", BALANCE)
    @pytest.mark.parametrize("moe", ["block", "conv"])
    def test_pgd(self, moe, balance, batch):
        """CE over attacked images + .3 * the balance of every gate; every gradient of it."""
        settings = config(
            f"options.moe={moe}",
            f"options.balance={balance}",
            "options.balance_weight=.3",
            "options.top_k=2",
            "options.num_experts=3",
            "model.network=resnet8",
        )
        model = build(settings)
        expected = copy.deepcopy(model).eval()
        attacked = slow_reference.pgd(expected, *batch[:2], EPSILON, STEP_SIZE, 3)
        (phase,) = get("robust-experts").phases(model, settings)
        seen = recorded(model)
        torch.manual_seed(5)
        result = phase.step(model, model, batch, CRAFTER)
        result.loss.backward()
        images = seen[-1]
        torch.testing.assert_close(images, attacked)
        assert result.num_clean == 0
        assert model.training

        expected.train().zero_grad()
        gates = {}
        for name, layer in expected.layers.items():
            layer.gate.register_forward_hook(lambda m, x, p, name=name: gates.update({name: p}))
        torch.manual_seed(5)
        loss = F.cross_entropy(expected(images), batch.labels)
        assert len(gates) == (3 if moe == "conv" else 1)
        loss = loss + 0.3 * sum(BALANCE[balance](p) for p in gates.values())
        loss.backward()
        torch.testing.assert_close(result.loss, loss)
        assert_same_gradients(model, expected, rtol=1.3e-6)

    def test_noise_is_for_all_but_entropy(self):
        for balance in BALANCE:
            model = robust_experts.build(config(f"options.balance={balance}"), FACTS)
            noisy = {layer.noisy for layer in model.layers.values()}
            assert noisy == {balance != "entropy"}

    def test_none(self, batch):
        settings = config("options.attack=none")
        model = build(settings)
        (phase,) = robust_experts.phases(model, settings)
        assert phase.step(model, model, batch, CRAFTER).num_clean == B

    def test_fast(self, batch):
        """One step of .12 from a random point of the ball."""
        settings = config("options.attack=fast", "options.fast_step_size=.12")
        model = build(settings)
        (phase,) = robust_experts.phases(model, settings)
        expected = dwf.pgd(
            model,
            batch.images,
            batch.labels,
            epsilon=EPSILON,
            step_size=0.12,
            num_steps=1,
            random_start=True,
            sample_index=batch.sample_index,
        )
        seen = recorded(model)
        assert phase.step(model, model, batch, CRAFTER).num_clean == 0
        # a public attack ends with a rounding into the ball
        torch.testing.assert_close(seen[-1], expected, rtol=0, atol=6e-8)

    def test_free(self, batch):
        """Three updates a batch; each moves delta along the gradient of its own loss."""
        settings = config("options.attack=free", "options.replays=3")
        model = build(settings)
        (phase,) = robust_experts.phases(model, settings)
        assert len(phase.updates) == 3
        delta = torch.zeros_like(batch.images)
        for update in phase.updates:
            leaf = (batch.images + delta).requires_grad_()
            expected = copy.deepcopy(model)
            output = expected(leaf, return_aux=True)
            p = output.probabilities["layer2.0"]
            loss = F.cross_entropy(output.logits, batch.labels) + 0.5 * entropy_loss(p)
            loss.backward()
            delta = (delta + EPSILON * leaf.grad.sign()).clamp(-EPSILON, EPSILON)
            delta = (batch.images + delta).clamp(0, 1) - batch.images
            result = update.step(model, model, batch, CRAFTER)
            torch.testing.assert_close(result.loss, loss)
            result.loss.backward()
            torch.testing.assert_close(phase.state["delta"], delta)

    def test_free_attacks_pixels(self):
        settings = config("options.attack=free", "attack.protocol=paper-compat")
        with pytest.raises(ConfigError, match="protocol 'paper-compat'"):
            robust_experts.phases(build(settings), settings)


class TestOptions:
    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("top_k=5", "options.top_k: 5 is not possible, expected at most num_experts, 4"),
            ("top_k=0", "options.top_k: 0 is not possible, expected an integer >= 1"),
            ("num_experts=0", "options.num_experts: 0"),
            ("gate=gap", "options.gate: 'gap' is unknown.*did you mean 'gap_fc'"),
            ("moe=blocks", "options.moe: 'blocks' is unknown.*did you mean 'block'"),
            ("stage=0", "options.stage: 0 is not possible"),
            ("balance=kl", "options.balance: 'kl' is unknown"),
            ("balance_weight=-1", "options.balance_weight: -1"),
            ("attack=apgd", "options.attack: 'apgd' is unknown"),
            ("fast_step_size=0", "options.fast_step_size: 0"),
            ("replays=0", "options.replays: 0"),
            ("exclude_shortcut=true", "options.exclude_shortcut: true, but moe is 'block'"),
            ("topk=2", "options.topk: unknown key; did you mean options.top_k"),
        ],
    )
    def test_impossible(self, override, words):
        with pytest.raises(ConfigError, match=words.replace(".", r"\.").replace(r"\.*", ".*")):
            config(f"options.{override}")

    def test_stage_that_the_network_has_not(self):
        with pytest.raises(ConfigError, match="stage: 3, but this network has 2"):
            robust_experts.build(config("options.stage=3"), FACTS)

    def test_maps_too_small_for_the_gate(self):
        """resnet8 reads 8x8 images at 2x2 pixels in its last stage."""
        settings = config("options.moe=conv", "options.gate=conv_gap", "model.network=resnet8")
        with pytest.raises(ConfigError, match="map of 2 x 2 is smaller; use gap_fc"):
            robust_experts.build(settings, FACTS)
        earlier = apply_overrides(settings, ["options.stage=1"])
        assert robust_experts.build(earlier, FACTS).subpath == "layer1.0.conv1"

    def test_model_of_another_kind(self):
        model = PixelModel(Normalize(FACTS.mean, FACTS.std), torch.nn.Flatten())
        with pytest.raises(ConfigError, match="trains SparseModel, found PixelModel"):
            robust_experts.phases(model, config())

    def test_no_schedule(self):
        settings = replace(config(), pretrain=None, joint=PhaseConfig())
        with pytest.raises(ConfigError, match="pretrain: None"):
            robust_experts.phases(build(config()), settings)


class TestPresets:
    def test_the_papers_setting(self):
        settings = dwf.presets.find("robust_experts_cifar100")
        assert settings.options == RobustExpertsOptions(
            "block", None, 4, 1, "gap_fc", "entropy", 0.5, "pgd"
        )
        assert (settings.model.network, settings.model.width) == ("resnet18", 64)
        attack, schedule = settings.attack, settings.pretrain
        assert (attack.epsilon, attack.step_size) == (8 / 255, 2 / 255)
        assert (attack.num_steps, attack.random_start) == ((7,), True)
        assert (schedule.num_epochs, schedule.batch_size, schedule.learning_rate) == (200, 640, 0.1)
        assert (schedule.schedule, schedule.nesterov) == ("polynomial", True)
        assert (schedule.momentum, schedule.weight_decay) == (0.9, 5e-4)
        assert (settings.data.name, settings.data.crop_padding, settings.data.flip) == (
            "cifar100",
            4,
            True,
        )

    def test_the_others(self):
        find = dwf.presets.find
        conv = find("robust_experts_conv_cifar100")
        assert conv.options == RobustExpertsOptions(moe="conv")
        paper = find("robust_experts_cifar100")
        assert replace(conv, preset=paper.preset, options=paper.options) == paper
        small = find("robust_experts_top2_cifar10_small")
        assert (small.options.moe, small.options.top_k) == ("block", 2)
        assert small.data == dwf.presets.dwf_cifar10_small().data
        digits = find("robust_experts_digits")
        assert digits.attack.num_steps[0] * digits.attack.step_size >= digits.attack.epsilon


RUN = ("pretrain.num_epochs=4", "attack.num_steps=1", "options.balance=switch")


class TestRuns:
    @pytest.mark.parametrize("attack", ["pgd", pytest.param("free", marks=pytest.mark.slow)])
    def test_exact_resume(self, attack, tmp_path, monkeypatch):
        """With gate noise and, in free training, a carried perturbation."""
        settings = config(*RUN, f"options.attack={attack}", "options.replays=2")
        monkeypatch.setattr(checkpoint, "prune", lambda folder: None)
        train(settings, tmp_path / "whole", quiet=True)
        model = train_interrupted(settings, tmp_path / "parts", 5, 10, 11)
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
        loaded = dwf.load(tmp_path / "whole")
        assert isinstance(loaded, SparseModel)
        images = torch.rand(4, 1, 8, 8)
        assert torch.equal(loaded(images), model(images))

    @pytest.mark.slow
    @pytest.mark.parametrize("moe", ["block", "conv"])
    def test_training_lowers_the_loss(self, moe, tmp_path):
        settings = config(
            "pretrain.num_epochs=12",
            "attack.num_steps=1",
            "options.num_experts=2",
            "model.width=8",
            "validate_every=0",
            "attack.epsilon=.02",
            f"options.moe={moe}",
        )
        train(settings, tmp_path / "run", quiet=True)
        losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
        assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
