"""MoRE, RT-ER and JTDMoE: routing, blend and steps against formulas by hand and slow loops."""

import copy
from dataclasses import replace

import pytest
import slow_reference
import small_defenses
import torch
import torch.nn.functional as F
from small_defenses import (
    CRAFTER,
    EPSILON,
    NUM_STEPS,
    STEP_SIZE,
    assert_same_gradients,
    lived_in,
    make_batch,
    recorded,
)
from small_runs import assert_same_run, rows, small_config, train_interrupted
from torch import nn

import moe_kernels
from dwf import distributed
from dwf.attacks import attack_target, input_gradient
from dwf.checks import ConfigError
from dwf.config import apply_overrides
from dwf.defenses import load, more, rt_er
from dwf.defenses.more import MoreOptions
from dwf.defenses.rt_er import JtdmoeOptions, RtErOptions
from dwf.models import DualMixture, ForcedExperts, Mixture, RoutedMixture
from dwf.models.routed import combine, linear_router, one_hot_choice, straight_through
from dwf.presets import find, single
from dwf.training import train
from dwf.training.optimizer import learning_rate_factor

B, K, E = 6, 4, 3
FACTS = replace(small_defenses.FACTS, num_classes=K)

pytestmark = pytest.mark.usefixtures("one_thread", "reference")


def small(defense, *overrides):
    config = single(small_config(), defense)
    if defense == "more":
        config = replace(config, joint=replace(small_config().joint, num_epochs=3))
    config = replace(config, attack=replace(config.attack, num_steps=(2,)))
    return apply_overrides(config, ["seed=3", *overrides])


def make(defense, *overrides):
    """Experts whose answers differ, gates that route; statistics are not those of birth."""
    module = more if defense == "more" else rt_er
    made = module.build(small(defense, "model.width=4", *overrides), FACTS)
    return lived_in(made, noise=0.3).eval()


@pytest.fixture
def routed():
    return make("rt-er", "options.num_experts=3")


@pytest.fixture
def dual():
    return make("jtdmoe", "options.num_experts=2", "options.alpha=0.6")


@pytest.fixture
def mixture():
    return make("more", "options.expert_epsilon=0,0.05,0.1")


@pytest.fixture
def batch():
    return make_batch(B, K)


def step_of(phase, u=0):
    return phase.updates[u].step


def kl(p_logits, q_logits):
    """sum_k p_k (log p_k - log q_k), one class at a time."""
    p, q = p_logits.softmax(0), q_logits.softmax(0)
    return sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))


class TestRouting:
    def test_straight_through_by_hand(self):
        """soft (.2, .8), logits 3 and -1: value -1, d/d gate_j = soft_j (logit_j - mean)."""
        scores = torch.tensor([[0.2, 0.8]]).log().requires_grad_()
        expert_logits = torch.tensor([[[3.0]], [[-1.0]]])
        hard = one_hot_choice(scores)
        assert hard.tolist() == [[0.0, 1.0]]
        value = combine(straight_through(hard, scores.softmax(1)), expert_logits)
        assert value.tolist() == [[-1.0]]
        value.sum().backward()
        mean = 0.2 * 3 - 0.8
        expected = torch.tensor([[0.2 * (3 - mean), 0.8 * (-1 - mean)]])
        torch.testing.assert_close(scores.grad, expected)

    def test_exact_and_honest(self):
        hard = one_hot_choice(torch.tensor([[0.3, 0.3, 0.1]]))  # the first of equal ones
        soft = torch.tensor([[0.1, 0.7, 0.2]])
        assert torch.equal(straight_through(hard, soft), torch.tensor([[1.0, 0.0, 0.0]]))
        broken = straight_through(hard, torch.full_like(soft, torch.nan))
        assert broken.isnan().all()

    def test_forward(self, routed, batch):
        """Image by image: the expert of the largest score answers."""
        output = routed(batch.images, return_aux=True)
        x = routed.normalize(batch.images)
        chosen = set()
        for b in range(B):
            scores = routed.gate(x[b : b + 1])[0]
            best = int(scores.argmax())
            chosen.add(best)
            assert output.gate_weights[b].tolist() == [float(e == best) for e in range(E)]
            torch.testing.assert_close(output.gate_logits[b], scores)
            assert torch.equal(output.logits[b], output.expert_logits[best, b])
            torch.testing.assert_close(
                output.logits[b], routed.experts[best](x[b : b + 1])[0], rtol=1e-4, atol=1e-5
            )
        assert len(chosen) > 1
        assert torch.equal(routed(batch.images), output.logits)
        assert torch.equal(routed.gate_weights(batch.images), output.gate_weights)

    def test_input_gradient_in_eval_mode(self, routed, batch):
        """That of the chosen logits plus the softmax's, and the gate learns."""
        cost = torch.randn(B, K, generator=torch.Generator().manual_seed(2))
        leaf = batch.images.clone().requires_grad_()
        (found,) = torch.autograd.grad((routed(leaf) * cost).sum(), leaf)
        output = routed(leaf, return_aux=True)
        value = 0.0
        for b in range(B):
            best, soft = int(output.gate_logits[b].argmax()), output.gate_logits[b].softmax(0)
            value = value + output.expert_logits[best, b] @ cost[b]
            for e in range(E):
                value = value + soft[e] * (output.expert_logits[e, b] @ cost[b]).item()
        (expected,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        routed(batch.images).square().sum().backward()
        assert routed.gate[1].weight.grad.any()

    def test_forced_experts(self, routed, batch):
        """Each image through its own; also where an expert has none."""
        for index in ([0, 2, 1, 2, 0, 1], [2, 2, 0, 2, 0, 0], [1] * B):
            found = ForcedExperts(routed, torch.tensor(index)).eval()(batch.images)
            for b, e in enumerate(index):
                expected = routed.expert(e)(batch.images)[b]
                torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-5)

    def test_forced_expert_is_the_hand_built_path(self, routed, dual, batch):
        x = routed.normalize(batch.images)
        for e in range(E):
            assert torch.equal(routed.expert(e)(batch.images), routed.experts[e](x))
        experts = [*dual.standard.experts, *dual.robust.experts]
        assert dual.num_experts == len(experts) == 4
        for e, expert in enumerate(experts):
            assert torch.equal(dual.expert(e)(batch.images), expert(x))

    def test_dual(self, dual, batch):
        """.4 standard(x) + .6 robust(x), and one expert of each counts."""
        output = dual(batch.images, return_aux=True)
        expected = 0.4 * dual.standard(batch.images) + 0.6 * dual.robust(batch.images)
        torch.testing.assert_close(output.logits, expected)
        assert torch.equal(dual(batch.images), output.logits)
        assert torch.equal(dual.gate_weights(batch.images), output.gate_weights)
        for b in range(B):
            weights = output.gate_weights[b].tolist()
            assert sorted(weights[:2]) == pytest.approx([0, 0.4])
            assert sorted(weights[2:]) == pytest.approx([0, 0.6])
            mixed = sum(w * output.expert_logits[e, b] for e, w in enumerate(weights))
            torch.testing.assert_close(mixed, output.logits[b])
        assert dual.expert_names == [
            "standard expert 0",
            "standard expert 1",
            "robust expert 0",
            "robust expert 1",
        ]

    @pytest.mark.parametrize("defense", ["rt-er", "jtdmoe", "more"])
    def test_state_dict_round_trip(self, defense, batch):
        model = make(defense)
        module = more if defense == "more" else rt_er
        other = module.build(small(defense, "model.width=4", "seed=9"), FACTS).eval()
        assert not torch.equal(other(batch.images), model(batch.images))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(batch.images), model(batch.images))

    @pytest.mark.parametrize("defense", ["rt-er", "jtdmoe", "more"])
    def test_seed_alone_decides(self, defense):
        module = more if defense == "more" else rt_er
        state = torch.get_rng_state()
        first, again = (module.build(small(defense), FACTS) for _ in range(2))
        other = module.build(small(defense, "seed=4"), FACTS)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in first.named_parameters():
            assert torch.equal(value, again.get_parameter(name))
        names = [n for n, p in first.named_parameters() if n.endswith("conv1.weight")]
        stems = [n for n in names if ".layer" not in n]
        weights = [m.get_parameter(n) for m in (first, other) for n in stems]
        assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])

    def test_impossible(self):
        with pytest.raises(ConfigError, match="experts: an empty list"):
            RoutedMixture([], nn.Flatten())
        with pytest.raises(ConfigError, match="2 names for 1 experts"):
            RoutedMixture([nn.Flatten()], nn.Flatten(), expert_names=["a", "b"])
        with pytest.raises(ConfigError, match="num_experts: 0"):
            linear_router((1, 8, 8), 0, seed=0)
        one = RoutedMixture([nn.Flatten()], nn.Flatten())
        with pytest.raises(ConfigError, match=r"alpha: 1.5 is not in \[0, 1\]"):
            DualMixture(one, one, alpha=1.5)


def attacked(model, x, y, epsilon=EPSILON):
    return slow_reference.pgd(model, x, y, epsilon, STEP_SIZE, NUM_STEPS)


class TestRtEr:
    def test_second_ranked(self, routed, batch):
        scores = routed.gate(routed.normalize(batch.images))
        expected = [sorted(range(E), key=lambda e: -row[e])[1] for row in scores.tolist()]
        assert rt_er.second_ranked(routed, batch.images).tolist() == expected

    def test_step(self, routed, batch):
        """CE(F(x'), y) + 6 / B sum_b KL(f_e(x), f_e(x'_e)), image by image."""
        x, y, *_ = batch
        expected = copy.deepcopy(routed)
        second = rt_er.second_ranked(expected, x).tolist()
        assert len(set(second)) > 1
        of_all = attacked(expected, x, y)
        of_one = torch.cat(
            [attacked(expected.expert(e), x, y)[b : b + 1] for b, e in enumerate(second)]
        )
        expected.zero_grad()
        output = expected.train()(torch.cat([x, of_all, of_one]), return_aux=True)
        loss = sum(-output.logits[B + b].log_softmax(0)[y[b]] for b in range(B)) / B
        for b, e in enumerate(second):
            clean, other = output.expert_logits[e, b], output.expert_logits[e, 2 * B + b]
            loss = loss + 6 / B * kl(clean, other)
        loss.backward()

        (phase,) = rt_er.phases(routed, small("rt-er"))
        assert phase.gate_prefix == "gate."
        assert all(name.startswith(("gate.", "experts.")) for name, _ in routed.named_parameters())
        result = step_of(phase)(routed, routed.train(), batch, CRAFTER)
        result.loss.backward()
        torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=0)
        assert result.num_clean == B
        torch.testing.assert_close(result.logits, output.logits[: 2 * B])
        assert torch.equal(result.labels, y.repeat(2))
        assert_same_gradients(routed, expected)
        assert routed.gate[1].weight.grad.any()

    def test_beta(self, routed, batch):
        losses = []
        for beta in (0, 1, 2):
            (phase,) = rt_er.phases(routed, small("rt-er", f"options.beta={beta}"))
            losses.append(step_of(phase)(routed, routed.eval(), batch, CRAFTER).loss.item())
        assert losses[0] < losses[1] < losses[2]
        assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


class TestJtdmoe:
    def test_first_step(self, dual, batch):
        """CE(F_R(x'), y) + 6 / B sum of KL over images and experts; F_S is not touched."""
        x, y, *_ = batch
        expected = copy.deepcopy(dual)
        of_all = attacked(expected.robust, x, y)
        of_each = [attacked(expected.robust.expert(e), x, y) for e in range(2)]
        expected.zero_grad()
        expected.train()
        output = expected.robust(torch.cat([x, of_all]), return_aux=True)
        loss = sum(-output.logits[B + b].log_softmax(0)[y[b]] for b in range(B)) / B
        for e in range(2):
            other = expected.robust.expert(e)(of_each[e])
            for b in range(B):
                loss = loss + 6 / B * kl(output.expert_logits[e, b], other[b])
        loss.backward()

        (phase,) = rt_er.phases(dual, small("jtdmoe"))
        first, _ = phase.updates
        result = first.step(dual, dual.train(), batch, CRAFTER)
        result.loss.backward()
        torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=0)
        assert (result.num_clean, result.logits.shape) == (0, (B, K))
        assert_same_gradients(dual, expected, lambda name: name.startswith("robust."))
        assert all(p.grad is None for p in dual.standard.parameters())
        assert {n for n, _ in dual.named_parameters() if first.is_trained(n)} == {
            n for n, _ in dual.named_parameters() if n.startswith("robust.")
        }

    def test_second_step(self, dual, batch):
        """CE(F_D(x), y): gradients of F_S alone, F_R as it is at test time, to the bit."""
        x, y, *_ = batch
        expected = copy.deepcopy(dual)
        fixed = expected.eval().robust(x).detach()
        before = copy.deepcopy(dual.robust.state_dict())
        logits = 0.4 * expected.train().standard(x) + 0.6 * fixed
        loss = F.cross_entropy(logits, y)
        loss.backward()

        (phase,) = rt_er.phases(dual, small("jtdmoe"))
        _, second = phase.updates
        result = second.step(dual, dual.train(), batch, CRAFTER)
        result.loss.backward()
        torch.testing.assert_close(result.loss, loss)
        assert result.num_clean == B
        assert_same_gradients(dual, expected, lambda name: name.startswith("standard."))
        assert all(p.grad is None for p in dual.robust.parameters())
        for name, value in dual.robust.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(module.training for module in dual.robust.modules())
        assert {n for n, _ in dual.named_parameters() if second.is_trained(n)} == {
            n for n, _ in dual.named_parameters() if n.startswith("standard.")
        }


class TestMore:
    def test_expert_phases(self, mixture, batch):
        """Clean, .05 and .1: each attacked at its own radius, on itself."""
        phases = more.phases(mixture, small("more", "options.expert_epsilon=0,0.05,0.1"))
        names = [phase.name for phase in phases]
        assert names == ["expert-0-clean", "expert-1-linf-0.05", "expert-2-linf-0.1", "joint"]
        assert mixture.expert_names == ["0 clean", "1 linf-0.05", "2 linf-0.1"]
        for e, epsilon in enumerate((0.0, 0.05, 0.1)):
            phase = phases[e]
            assert next(phase.module.parameters()) is next(mixture.experts[e].parameters())
            if epsilon == 0:
                assert phase.step(phase.module, phase.module, batch, CRAFTER).num_clean == B
                continue
            expert = copy.deepcopy(mixture.expert(e)).eval()
            expected = attacked(expert, batch.images, batch.labels, epsilon)
            seen = recorded(phase.module)
            result = phase.step(phase.module, phase.module.train(), batch, CRAFTER)
            assert result.num_clean == 0
            found = seen[-1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_passes(self, mixture, batch):
        """Two clean updates, then one at each radius, each of CE(mixture(x'), y)."""
        config = small("more", "options.expert_epsilon=0,0.05,0.1")
        *_, joint = more.phases(mixture, config)
        assert len(joint.updates) == 4
        assert joint.gate_prefix == "gate."
        x, y, *_ = batch
        for u, epsilon in enumerate((0, 0, 0.05, 0.1)):
            expected = copy.deepcopy(mixture).eval()
            images = attacked(expected, x, y, epsilon) if epsilon else x
            expected.zero_grad()
            expected.gate.train()  # and nothing else
            loss = F.cross_entropy(expected(images), y)
            loss.backward()
            mixture.zero_grad()
            result = step_of(joint, u)(mixture, mixture.train(), batch, CRAFTER)
            result.loss.backward()
            torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=0)
            assert result.num_clean == (0 if epsilon else B)
            assert_same_gradients(mixture, expected)

    def test_only_gate_and_last_layers_train(self, mixture):
        *_, joint = more.phases(mixture, small("more"))
        for update in joint.updates:
            trained = {n for n, _ in mixture.named_parameters() if update.is_trained(n)}
            assert trained == {
                n
                for n, _ in mixture.named_parameters()
                if n.startswith("gate.") or n.split(".")[2] == "linear"
            }
            assert sum(n.startswith("experts.") for n in trained) == 2 * mixture.num_experts

    def test_experts_keep_their_mode(self, mixture):
        mixture.train()
        assert mixture.gate.bn1.training
        assert not any(m.training for m in mixture.experts.modules())
        mixture.expert(1).train()  # as its own phase does
        assert mixture.experts[1].bn1.training
        mixture.eval()
        assert not any(m.training for m in mixture.modules())

    def test_frozen_parts_keep_their_bits_in_a_run(self, tmp_path):
        """From the pretrained checkpoint to the end: backbones and their statistics stand still."""
        config = small("more", "options.expert_epsilon=0,0.1", "joint.num_epochs=1")
        train(config, tmp_path / "run", quiet=True)
        before, after = (load(tmp_path / "run", x).state_dict() for x in ("pretrained", "last"))
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert not {n for n in moved if n.startswith("experts.") and ".linear." not in n}
        assert {"experts.0.linear.weight", "experts.1.linear.bias"} <= moved
        assert {"gate.conv1.weight", "gate.bn1.running_mean"} <= moved

    def test_gate_is_a_network(self, mixture, batch):
        assert isinstance(mixture, Mixture)
        weights = mixture.gate_weights(batch.images)
        scores = mixture.gate(mixture.normalize(batch.images))
        assert scores.shape == (B, 3)
        torch.testing.assert_close(weights, scores.softmax(1))

    def test_planned_attack(self, mixture, batch):
        """A mixture whose gate is a network is lowered to a plan, with the same gradient."""
        with moe_kernels.implementation("native"):
            target = attack_target(mixture, batch.images, dtype=torch.float32)
            assert target.plan is not None
            found = input_gradient(target, batch.images, batch.labels)
        expected = slow_reference.input_gradient(mixture, batch.images, batch.labels)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


class TestSettings:
    @pytest.mark.parametrize(
        ("defense", "override", "message"),
        [
            ("rt-er", "options.num_experts=1", "num_experts: 1 is not possible, .*>= 2"),
            ("rt-er", "options.beta=-1", "options.beta: -1"),
            ("jtdmoe", "options.num_experts=0", "options.num_experts: 0"),
            ("jtdmoe", "options.beta=-1", "options.beta: -1"),
            ("jtdmoe", "options.alpha=1", "options.alpha: 1 is not between 0 and 1"),
            ("jtdmoe", "options.alpha=0", "options.alpha: 0 is not between 0 and 1"),
            ("more", "options.expert_epsilon=", "expert_epsilon: empty"),
            ("more", "options.expert_epsilon=0,8", "8 is larger than the whole pixel range"),
            ("more", "options.expert_epsilon=-0.1", "options.expert_epsilon: -0.1"),
        ],
    )
    def test_bad_options(self, defense, override, message):
        with pytest.raises(ConfigError, match=message):
            small(defense, override)

    @pytest.mark.parametrize(
        ("defense", "message"),
        [
            ("rt-er", "defense rt-er trains RoutedMixture, found Mixture"),
            ("jtdmoe", "defense jtdmoe trains DualMixture, found Mixture"),
            ("more", "defense more trains FrozenExperts, found Mixture"),
        ],
    )
    def test_model_of_another_kind(self, defense, message):
        module = more if defense == "more" else rt_er
        with pytest.raises(ConfigError, match=message):
            module.phases(Mixture([nn.Flatten()], nn.Flatten()), small(defense))

    def test_no_schedule(self, routed, dual):
        for model, defense in ((routed, "rt-er"), (dual, "jtdmoe")):
            config = small(defense)
            config = replace(config, pretrain=None, joint=config.pretrain)
            with pytest.raises(ConfigError, match=f"pretrain: None.*schedule of {defense}"):
                rt_er.phases(model, config)

    def test_several_processes(self, dual, monkeypatch):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        with pytest.raises(ConfigError, match="one process, not several"):
            rt_er.phases(dual, small("jtdmoe"))

    def test_another_number_of_experts(self, mixture):
        config = small("more", "options.expert_epsilon=0,0.1")
        with pytest.raises(ConfigError, match=r"3 experts, but options.expert_epsilon is for 2"):
            more.phases(mixture, config)
        joint_only = replace(config, pretrain=None)
        assert [phase.name for phase in more.phases(mixture, joint_only)] == ["joint"]


class TestRecipes:
    def test_more(self):
        config = find("more_cifar10")
        assert config.options == MoreOptions((0.0, 6 / 255, 8 / 255))
        attack, joint = config.attack, config.joint
        assert (attack.num_steps, attack.step_size, attack.random_start) == ((10,), 2 / 255, True)
        assert (config.pretrain.learning_rate, config.pretrain.weight_decay) == (0.1, 5e-4)
        assert (joint.num_epochs, joint.batch_size, joint.optimizer) == (100, 100, "adam")
        assert joint.learning_rate == joint.gate_learning_rate == 0.1
        rates = [0.1 * learning_rate_factor(joint, t) for t in (0, 0.2, 0.4, 0.8, 0.9, 1)]
        assert rates == pytest.approx([0, 0.05, 0.1, 0.005, 0.0025, 0])

    @pytest.mark.parametrize("name", ["rt_er_cifar10", "jtdmoe_cifar10"])
    def test_rt_er(self, name):
        config = find(name)
        assert config.options == (
            RtErOptions(4, 6.0) if "rt" in name else JtdmoeOptions(4, 6.0, 0.7)
        )
        attack, schedule = config.attack, config.pretrain
        assert (attack.epsilon, attack.step_size) == (8 / 255, 2 / 255)
        assert (attack.num_steps, attack.random_start) == ((10,), True)
        assert (schedule.num_epochs, schedule.batch_size) == (130, 512)
        assert (schedule.optimizer, schedule.weight_decay) == ("adam", 0)
        assert schedule.learning_rate == schedule.gate_learning_rate == 1e-4
        rates = [
            schedule.learning_rate * learning_rate_factor(schedule, i / 240) for i in range(241)
        ]
        assert (min(rates), max(rates)) == pytest.approx((5e-5, 1e-4))
        # twelve cycles: the rate turns at every tenth of the 240 points
        assert rates[::20] == pytest.approx([5e-5] * 13)
        assert rates[10::20] == pytest.approx([1e-4] * 12)


class TestRuns:
    """Interrupted before one step of each kind: in the middle of an epoch, and of each phase."""

    @pytest.mark.parametrize(
        ("defense", "steps", "options"),
        [
            ("more", (5, 12, 22), ["options.expert_epsilon=0,0.1", "pretrain.num_epochs=2"]),
            ("jtdmoe", (3, 9), ["options.num_experts=2"]),
        ],
    )
    @pytest.mark.slow
    def test_resume_is_exact(self, defense, steps, options, tmp_path):
        settings = ["pretrain.optimizer=adam", "pretrain.learning_rate=0.01"]
        config = small(defense, *options, *settings)
        config = replace(config, attack=replace(config.attack, random_start=True))
        model = train(config, tmp_path / "whole", quiet=True)
        train_interrupted(config, tmp_path / "parts", *steps)
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
        images = torch.rand(3, 1, 8, 8)
        assert torch.equal(load(tmp_path / "whole")(images), model(images))

    @pytest.mark.slow
    @pytest.mark.parametrize("defense", ["rt-er", "jtdmoe"])
    def test_training_lowers_the_loss(self, defense, tmp_path):
        config = small(
            defense,
            "options.num_experts=2",
            "model.width=4",
            "log_every=4",
            "validate_every=0",
            "pretrain.num_epochs=8",
            "pretrain.optimizer=adam",
            "pretrain.learning_rate=0.01",
            "pretrain.weight_decay=0",
        )
        train(config, tmp_path / "run", quiet=True)
        losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
