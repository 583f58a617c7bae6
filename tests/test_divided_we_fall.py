"""Algorithms 1 to 3 against the paper's text, written out slowly."""

import copy
from dataclasses import replace

import pytest
import slow_reference
import torch
import torch.nn.functional as F
from small_defenses import (
    FACTS,
    Spy,
    assert_same_gradients,
    assert_same_statistics,
    lived_in,
    make_batch,
    make_crafter,
)
from torch import nn

from dwf.checks import ConfigError
from dwf.config import AttackConfig, ModelConfig, PhaseConfig, apply_overrides
from dwf.defenses import crafter as crafter_module
from dwf.defenses import divided_we_fall
from dwf.defenses.side_by_side import one_by_one
from dwf.models import Mixture, PixelModel
from dwf.presets import dwf_cifar10, smoke

B, K = 6, FACTS.num_classes
EPSILON, STEP_SIZE = 0.15, 0.06
ATTACK = AttackConfig(
    fgsm_epsilon=(0.02, 0.1, 0.2), num_steps=(1, 3, 4), epsilon=EPSILON, step_size=STEP_SIZE
)


pytestmark = pytest.mark.usefixtures("reference")


@pytest.fixture
def config():
    return apply_overrides(smoke(), ["model.width=4", "model.gate_hidden=8", "seed=3"])


@pytest.fixture
def mixture(config):
    """Its gate tells images apart, and its statistics are not those of birth."""
    model = lived_in(divided_we_fall.build(config, FACTS), noise=0.1)
    model.gate.layers[-1].weight.data.mul_(20)
    return model


@pytest.fixture
def batch():
    return make_batch(B)


def crafter_of(seed=0, **changes):
    return make_crafter(replace(ATTACK, **changes), seed)


def drawn(crafter, batch):
    """The strengths of this step; test_crafter.py looks at how they are drawn."""
    attack = crafter.attack
    return (
        crafter.draw("fgsm_epsilon", attack.fgsm_epsilon, batch.sample_index),
        crafter.draw("num_steps", attack.num_steps, batch.sample_index),
    )


def reference_rows(kind, model, crafter, batch):
    """What one step trains on: images and labels, in the order of the paper."""
    epsilon, num_steps = drawn(crafter, batch)
    x, y, *_ = batch
    model.eval()
    a1 = slow_reference.fgsm(model, x, y, epsilon)
    a2 = slow_reference.pgd(model, x, y, EPSILON, STEP_SIZE, num_steps)
    model.train()
    model.zero_grad()
    return {
        "benign": (x, y),
        "fgsm": (a1, y),
        "pgd": (a2, y),
        "joint": (torch.cat([x, a1, a2]), torch.cat([y, y, y])),
    }[kind]


def phases_of(model, config):
    """All of them, one by one."""
    return one_by_one(divided_we_fall.phases(model, config))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["benign", "fgsm", "pgd", "joint"])
def test_step(kind, seed, mixture, config, batch):
    """Loss, every gradient and every statistic are those of the algorithm; and nothing else is."""
    (phase,) = (p for p in phases_of(mixture, config) if p.name.endswith(kind))
    module = phase.module
    expected = copy.deepcopy(module)
    crafter = crafter_of(seed)
    images, labels = reference_rows(kind, expected, crafter, batch)
    loss = F.cross_entropy(expected(images), labels)  # the mean over all rows, 3B in joint training
    loss.backward()

    forward = Spy(module)
    module.train()
    result = phase.step(module, forward, batch, crafter)
    result.loss.backward()

    assert len(forward.seen) == 1
    rows, was_training = forward.seen[0]
    assert was_training
    assert torch.equal(rows, images)
    assert torch.equal(result.labels, labels)
    assert result.num_clean == {"benign": B, "fgsm": 0, "pgd": 0, "joint": B}[kind]
    assert result.logits.shape == (len(images), K)
    torch.testing.assert_close(result.loss, loss, rtol=1e-6, atol=0)
    assert_same_gradients(module, expected, rtol=1e-4, atol=1e-6)
    # statistics moved once, by the train-mode forward over all rows, never by an attack
    assert_same_statistics(module, expected, rtol=1e-6, atol=1e-7)


def test_the_mixture_of_these_tests_is_hard_to_get_wrong(mixture, batch):
    """Attacks on an expert, on a frozen gate or in train mode would give other images."""
    x, y, *_ = batch
    mixture.eval()
    truth = slow_reference.input_gradient(mixture, x, y).sign()
    weights = mixture(x, return_aux=True).gate_weights.detach()

    def frozen_gate(images):
        expert_logits = mixture(images, return_aux=True).expert_logits
        return (weights.T[:, :, None] * expert_logits).sum(0)

    def train_mode(images):
        return copy.deepcopy(mixture).train()(images)

    for wrong in (mixture.expert(0), frozen_gate, train_mode):
        signs = slow_reference.input_gradient(wrong, x, y).sign()
        assert (signs != truth).float().mean() > 0.02


class TestSharedGradient:
    @pytest.mark.parametrize("draw", ["batch", "image"])
    @pytest.mark.parametrize("bn_mode", ["eval", "train"])
    def test_same_bits_as_without_sharing(self, bn_mode, draw, mixture, batch):
        crafter = crafter_of(bn_mode=bn_mode, draw=draw)
        gradient = crafter.gradient(mixture, batch)
        for attack in (crafter.fgsm, crafter.pgd):
            assert torch.equal(attack(mixture, batch, gradient), attack(mixture, batch))

    @pytest.mark.parametrize(
        ("fgsm_start", "pgd_start", "passes"),
        # of PGD's 4 passes and FGSM's one, one is saved; with one random start none can be shared,
        # but the other attack still uses it; with two there is nothing to share
        [(False, False, 4), (True, False, 5), (False, True, 5), (True, True, 5)],
    )
    def test_number_of_passes(self, fgsm_start, pgd_start, passes, mixture, batch, monkeypatch):
        crafter = crafter_of(num_steps=(4,), fgsm_random_start=fgsm_start, random_start=pgd_start)
        forward = mixture.forward
        calls = []
        monkeypatch.setattr(mixture, "forward", lambda x: (calls.append(len(x)), forward(x))[1])
        divided_we_fall.joint_step(mixture, mixture, batch, crafter)
        assert calls == [B] * passes + [3 * B]

    @pytest.mark.parametrize(("draw", "protocol"), [("batch", "pixels"), ("image", "paper-compat")])
    def test_both_attacks_see_one_target(self, draw, protocol, mixture, batch, monkeypatch):
        """Made ready once, of the mixture itself: its wrapper would start communication."""
        made, seen = [], []
        attack_target = crafter_module.attack_target

        def make(model, images, **options):
            made.append(attack_target(model, images, **options))
            return made[-1]

        monkeypatch.setattr(crafter_module, "attack_target", make)
        for name in ("ascend", "gradient_at_images"):
            original = getattr(crafter_module, name)

            def spy(setup, *arguments, original=original):
                seen.append(setup.model.model)
                return original(setup, *arguments)

            monkeypatch.setattr(crafter_module, name, spy)
        crafter = crafter_of(draw=draw, protocol=protocol)
        divided_we_fall.joint_step(mixture, Spy(mixture), batch, crafter)
        (target,) = made
        assert all(model is target for model in seen)
        assert len(seen) == 3
        assert (target.model is mixture) == (protocol == "pixels")


def test_batch_statistics_in_attacks(mixture, batch):
    """bn_mode="train": other images, still no trace in the running statistics."""
    before = {name: b.clone() for name, b in mixture.named_buffers()}
    made = {}
    for bn_mode in ("eval", "train"):
        crafter = crafter_of(bn_mode=bn_mode)
        made[bn_mode] = crafter.pgd(mixture, batch)
    assert not torch.equal(made["eval"], made["train"])
    assert all(torch.equal(b, before[name]) for name, b in mixture.named_buffers())


@pytest.mark.parametrize("clamp", ["unit", "none"])
def test_paper_compat_attacks_normalized_images(clamp, mixture, batch):
    """x3 holds x and what became of z = (x - mean) / std, attacked and clamped there."""
    crafter = crafter_of(protocol="paper-compat", clamp=clamp)
    epsilon, _ = drawn(crafter, batch)
    mean, std = FACTS.mean[0], FACTS.std[0]
    z = (batch.images - mean) / std
    mixture.eval()
    gradient = slow_reference.input_gradient(lambda z: mixture(z * std + mean), z, batch.labels)
    attacked = z + epsilon * gradient.sign()
    if clamp == "unit":
        attacked = attacked.clamp(0, 1)
    forward = Spy(mixture.train())
    divided_we_fall.joint_step(mixture, forward, batch, crafter)
    ((rows, _),) = forward.seen
    assert torch.equal(rows[:B], batch.images)
    torch.testing.assert_close(rows[B : 2 * B], attacked * std + mean)


class TestBuild:
    def test_experts_of_the_paper(self):
        kinds = divided_we_fall.expert_kinds(ModelConfig())
        assert kinds == ["benign"] + 4 * ["fgsm"] + 4 * ["pgd"]
        phases = phases_of(Mixture([nn.Flatten()] * 9, nn.Flatten()), dwf_cifar10())
        assert [p.name for p in phases] == [
            *(f"expert-{e}-{kind}" for e, kind in enumerate(kinds)),
            "joint",
        ]
        assert [p.schedule.learning_rate for p in phases] == [0.1] * 9 + [0.01]
        assert [p.gate_prefix for p in phases] == [None] * 9 + ["gate."]

    def test_experts_differ_and_seeds_decide(self, config):
        first = divided_we_fall.build(config, FACTS)
        again = divided_we_fall.build(config, FACTS)
        other = divided_we_fall.build(replace(config, seed=4), FACTS)
        for name, value in first.named_parameters():
            assert torch.equal(value, again.get_parameter(name))
        convs = [m.experts[e].conv1.weight for m in (first, other) for e in range(3)]
        for i, conv in enumerate(convs):
            assert not any(torch.equal(conv, convs[j]) for j in range(i))

    def test_joint_training_starts_from_equal_weights(self, config):
        output = divided_we_fall.build(config, FACTS)(torch.rand(5, 1, 8, 8), return_aux=True)
        torch.testing.assert_close(output.gate_weights, torch.full((5, 3), 1 / 3))

    def test_a_phase_trains_its_expert_and_nothing_else(self, mixture, config):
        first, *_ = phases_of(mixture, config)
        names = {id(p): name for name, p in mixture.named_parameters()}
        trained = {names[id(p)] for p in first.module.parameters()}
        assert trained == {name for name in names.values() if name.startswith("experts.0.")}

    def test_joint_training_trains_everything(self, mixture, config, batch):
        *_, joint = divided_we_fall.phases(mixture, config)
        joint.step(mixture, mixture, batch, crafter_of()).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())

    def test_model_of_another_kind(self, config):
        with pytest.raises(ConfigError, match="trains Mixture, found PixelModel"):
            divided_we_fall.phases(PixelModel(nn.Identity(), nn.Identity()), config)

    def test_model_of_another_size(self, config):
        two = Mixture([nn.Flatten()] * 2, nn.Flatten())
        with pytest.raises(ConfigError, match="2 experts, but the configuration pretrains 3"):
            divided_we_fall.phases(two, config)
        joint_only = replace(config, pretrain=None, joint=PhaseConfig())
        assert [p.name for p in divided_we_fall.phases(two, joint_only)] == ["joint"]
