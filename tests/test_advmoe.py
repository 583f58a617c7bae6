"""Both objectives against their formulas written out, NaN that is not ours, and exact resumes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_defenses import (
    FACTS,
    Spy,
    assert_same_statistics,
    lived_in,
    make_batch,
    make_crafter,
)
from small_runs import assert_same_run, train_interrupted
from torch import nn

import moe_kernels
from dwf.attacks import pgd
from dwf.attacks.losses import kl_from
from dwf.checks import ConfigError, ModelOutputError
from dwf.config import AttackConfig, ModelConfig, PhaseConfig, apply_overrides, from_dict
from dwf.data import load
from dwf.defenses import Batch, ModelFacts, advmoe, get
from dwf.defenses.advmoe import AdvMoeOptions, check_gate_logits, router_loss, trades_loss
from dwf.models import PathwayMixture, PixelModel
from dwf.presets import find
from dwf.training import train
from dwf.training.optimizer import Optimizer

B, K, E = 8, 10, 2
EPSILON, STEP_SIZE = 0.1, 0.0625
BETA = 6.0
ATTACK = AttackConfig(num_steps=(2,), epsilon=EPSILON, step_size=STEP_SIZE)
CRAFTER = make_crafter(ATTACK, seed=3)
SMALL = """
    device=cpu data.num_train=64 data.num_validation=20 model.width=4 options.router_width=2
    attack.num_steps=2 pretrain.num_epochs=2 pretrain.batch_size=16 validate_every=2
    validation_steps=2 checkpoint_every=3 log_every=3
"""
OBJECTIVES = ("trades_bilevel", "released")

pytestmark = pytest.mark.usefixtures("one_thread")


def small_config(*overrides):
    return apply_overrides(find("advmoe_digits"), [*SMALL.split(), *overrides])


def make_model(objective="trades_bilevel"):
    """Statistics are not those of birth, and the router uses both pathways."""
    made = lived_in(advmoe.build(small_config(f"options.objective={objective}"), FACTS), noise=0.1)
    with torch.no_grad():
        linear = made.gate[0].linear if isinstance(made.gate, nn.Sequential) else made.gate.linear
        scores = made.eval().gate(make_batch(B).images)
        linear.bias[0] -= (scores[:, 0] - scores[:, 1]).median() + 1e-3
    return made


@pytest.fixture
def batch():
    return make_batch(B, first=40)


def steps_of(objective, model):
    config = small_config(f"options.objective={objective}")
    (phase,) = advmoe.phases(model, config)
    assert (phase.name, phase.module, phase.gate_prefix) == ("train", model, "gate.")
    return phase.updates


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def softmax(row):
    powers = [math.exp(float(v)) for v in row]
    return [p / sum(powers) for p in powers]


class TestLosses:
    def test_trades_by_hand(self):
        """p = (1/2, 1/2), p' = (3/4, 1/4): CE = ln 2, KL = ln(4/3) / 2."""
        logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
        expected = math.log(2) + BETA * math.log(4 / 3) / 2
        assert float(trades_loss(logits, torch.tensor([1]), BETA)) == pytest.approx(expected)

    def test_router_by_hand(self):
        """s = (3/4, 1/4), s' = (1/2, 1/2), label 5 is 1 mod 2: CE = ln 4."""
        scores = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
        divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        expected = BETA * (math.log(4) + divergence)
        assert float(router_loss(scores, torch.tensor([5]), BETA)) == pytest.approx(expected)

    def test_loops(self):
        torch.manual_seed(0)
        logits, scores = torch.randn(2 * B, K), torch.randn(2 * B, 3)
        labels = torch.randint(0, K, (B,))
        of_logits = of_router = 0.0
        for b, y in enumerate(labels.tolist()):
            p, attacked = softmax(logits[b]), softmax(logits[B + b])
            of_logits += (-math.log(p[y]) + BETA * kl(p, attacked)) / B
            s, attacked = softmax(scores[b]), softmax(scores[B + b])
            of_router += BETA * (-math.log(s[y % 3]) + kl(s, attacked)) / B
        assert float(trades_loss(logits, labels, BETA)) == pytest.approx(of_logits, rel=1e-5)
        assert float(router_loss(scores, labels, BETA)) == pytest.approx(of_router, rel=1e-5)

    def test_gradients(self):
        """TRADES has a gradient through p too; the router's target has none."""
        torch.manual_seed(0)
        logits = torch.randn(2 * B, K, dtype=torch.float64, requires_grad=True)
        labels = torch.arange(B) % K
        trades_loss(logits, labels, BETA).backward()
        other = logits.detach().clone().requires_grad_()
        p, q = other.softmax(dim=1).chunk(2)
        divergence = (p * (p.log() - q.log())).sum(dim=1).mean()
        (F.cross_entropy(other[:B], labels) + BETA * divergence).backward()
        torch.testing.assert_close(logits.grad, other.grad, rtol=1e-5, atol=1e-6)

        scores = torch.randn(2 * B, E, dtype=torch.float64, requires_grad=True)
        router_loss(scores, labels, BETA).backward()
        clean, attacked = scores.detach().softmax(dim=1).chunk(2)
        residue = F.one_hot(labels % E, E)
        expected = torch.cat([clean - residue, attacked - clean]) * BETA / B
        torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-6)


class TestNaN:
    """Gaps of 320 between scores, which the released router reaches in its third batch."""

    scores = torch.tensor([[320.0, 0.0], [0.0, 320.0], [0.0, 320.0], [320.0, 0.0]])

    def test_the_formula_that_fails(self):
        """KL with a softmax that has a gradient as its target: 0 * log 0 in the backward pass."""
        scores = self.scores.clone().requires_grad_()
        clean, attacked = scores.chunk(2)
        target = clean.softmax(dim=1)
        assert (target == 0).any()
        F.kl_div(attacked.log_softmax(dim=1), target, reduction="batchmean").backward()
        assert scores.grad.isnan().any()
        assert int(scores.grad.isnan().any(dim=1)[:1]) == 1

    def test_ours_is_finite(self):
        scores = self.scores.clone().requires_grad_()
        loss = router_loss(scores, torch.tensor([0, 1]), BETA)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(BETA * 320)
        # softmax s' - softmax s, whole probabilities apart
        expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-1.0, 1.0], [1.0, -1.0]]) * BETA / 2
        torch.testing.assert_close(scores.grad, expected)

    def test_logits_with_the_same_gaps(self):
        logits = (self.scores + 0).requires_grad_()
        trades_loss(logits, torch.tensor([0, 1]), BETA).backward()
        assert logits.grad.isfinite().all()

    def test_attack_is_finite(self):
        loss = advmoe._kl_from_both(self.scores[:2], self.scores[:2])
        both = torch.cat([self.scores[2:], self.scores[2:]], dim=1).requires_grad_()
        found = loss(both, torch.tensor([0, 1]))
        torch.testing.assert_close(found.detach(), torch.tensor([640.0, 640.0]))
        found.sum().backward()
        assert both.grad.isfinite().all()

    @pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
    def test_check(self, bad):
        scores = torch.zeros(4, 2)
        check_gate_logits(scores)
        scores[3, 1] = bad
        with pytest.raises(ModelOutputError, match=r"gate: (nan|-inf) at \[3, 1\] of gate_logits"):
            check_gate_logits(scores)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_a_broken_router_stops_the_step(self, objective, batch):
        """The original sends every image to pathway 0 and goes on."""
        model = make_model(objective)
        next(model.gate.parameters()).data.fill_(torch.nan)
        for update in steps_of(objective, model):
            with pytest.raises(ModelOutputError, match="gate: nan at"):
                update.step(model, model.train(), batch, CRAFTER)


def slow_attack(model, batch, objective, seed=3):
    """start x + .001 N(0, 1), two steps up KL(p, p') (+ KL(s, s')), by autograd and a loop."""
    x = batch.images
    noise = moe_kernels.uniform_noise(seed, batch.sample_index, tuple(x.shape[1:]))
    normal = 2**0.5 * torch.erfinv((2 * noise - 1).clamp(-1 + 2e-7, 1 - 2e-7))
    adversarial = (x + 0.001 * normal).clamp(0, 1)
    model.eval()
    clean = model(x, return_aux=True)
    p, s = clean.logits.detach().softmax(1), clean.gate_logits.detach().softmax(1)
    for _ in range(2):
        leaf = adversarial.clone().requires_grad_()
        output = model(leaf, return_aux=True)
        loss = (p * (p.log() - output.logits.log_softmax(1))).sum()
        if objective == "released":
            loss = loss + (s * (s.log() - output.gate_logits.log_softmax(1))).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        adversarial = adversarial + STEP_SIZE * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, x - EPSILON), x + EPSILON).clamp(0, 1)
    return adversarial


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestStep:
    def test_against_the_formulas(self, objective, batch):
        """Images, loss, every gradient and every statistic."""
        model = make_model(objective)
        assert 0 < model.gate_weights(batch.images)[:, 0].sum() < B
        expected, twice = copy.deepcopy(model), copy.deepcopy(model)
        slow = slow_attack(expected, batch, objective)
        y = batch.labels

        forward = Spy(model)
        step, *_ = (update.step for update in steps_of(objective, model))
        result = step(model.train(), forward, batch, CRAFTER)
        result.loss.backward()

        ((images, was_training),) = forward.seen
        assert was_training
        assert torch.equal(images[:B], batch.images)
        # the sign of a gradient near zero is that of its rounding error
        assert torch.isclose(images[B:], slow, rtol=0, atol=1e-6).float().mean() >= 0.98
        assert (images[B:] - batch.images).abs().max() <= EPSILON + 1e-6

        def loss_of_phi(output):
            p, q = output.logits.softmax(dim=1).chunk(2)
            divergence = (p * (p.log() - q.log())).sum(dim=1).mean()
            return -(p.log()[torch.arange(B), y]).mean() + BETA * divergence

        output = expected.train().zero_grad() or expected(images, return_aux=True)
        loss = loss_of_phi(output)
        loss.backward()  # of the paper's L, for phi and for psi
        if objective == "released":
            for p in expected.gate.parameters():
                p.grad = None
            scores = twice.train()(images, return_aux=True).gate_logits
            s, attacked = scores.softmax(dim=1).chunk(2)
            target = s.detach()
            of_psi = -s.log()[torch.arange(B), y % E].mean()
            of_psi = of_psi + (target * (target.log() - attacked.log())).sum(dim=1).mean()
            of_psi = BETA * of_psi
            gate = dict(twice.gate.named_parameters())
            grads = torch.autograd.grad(of_psi, list(gate.values()))
            for name, grad in zip(gate, grads, strict=True):
                expected.gate.get_parameter(name).grad = grad
            loss = loss.detach() + of_psi.detach()

        assert (result.num_clean, len(result.logits)) == (B, 2 * B)
        assert torch.equal(result.labels, torch.cat([y, y]))
        torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-5)
        for name, p in model.named_parameters():
            theirs = expected.get_parameter(name).grad
            assert theirs.abs().sum() > 0, name
            torch.testing.assert_close(p.grad, theirs, rtol=2e-3, atol=2e-4, msg=name)
        assert_same_statistics(model, expected, rtol=1e-4, atol=1e-5)

    def test_attack_raises_what_it_is_to_raise(self, objective, batch):
        """More than its start does, for logits, and with the code's attack for scores."""
        model = make_model(objective).eval()
        forward = Spy(model)
        step, *_ = (update.step for update in steps_of(objective, model))
        step(model, forward, batch, CRAFTER)
        attacked = forward.seen[0][0][B:]
        start = pgd(
            model,
            batch.images,
            batch.labels,
            epsilon=EPSILON,
            step_size=1e-9,
            num_steps=1,
            random_start="normal",
            seed=3,
            sample_index=batch.sample_index,
        )
        with torch.no_grad():
            clean, noisy, found = (
                model(x, return_aux=True) for x in (batch.images, start, attacked)
            )
        parts = [(clean.logits, noisy.logits, found.logits)]
        if objective == "released":
            parts.append((clean.gate_logits, noisy.gate_logits, found.gate_logits))
        total = [0.0, 0.0]
        for p, *others in parts:
            for i, q in enumerate(others):
                total[i] += float(kl_from(p)(q, batch.labels).sum())
        assert total[1] > 2 * total[0]

    def test_batch_statistics_in_attacks(self, objective, batch):
        model = make_model(objective)
        step, *_ = (update.step for update in steps_of(objective, model))
        seen = {}
        for bn_mode in ("eval", "train"):
            forward = Spy(copy.deepcopy(model))
            crafter = make_crafter(replace(ATTACK, bn_mode=bn_mode), seed=3)
            step(forward.model.train(), forward, batch, crafter)
            ((seen[bn_mode], _),) = forward.seen
        assert not torch.equal(seen["eval"], seen["train"])

    @pytest.mark.slow
    def test_training_lowers_the_loss(self, objective):
        """Twenty steps on one batch of the data set, attacked anew at each."""
        config = small_config(f"options.objective={objective}", "model.width=16")
        data = load("digits", split="train").subset(torch.arange(32))
        batch = Batch(data.images.float() / 255, data.labels, torch.arange(32))
        model = advmoe.build(config, FACTS).train()
        (phase,) = advmoe.phases(model, config)
        optimizer, losses = Optimizer(phase, 20), []
        for step in range(20):
            optimizer.set_step(step)
            for update in phase.updates:
                optimizer.zero_grad()
                result = update.step(model, model, batch, make_crafter(ATTACK, step))
                result.loss.backward()
                optimizer.step(update.is_trained)
            losses.append(float(result.loss.detach()))
        assert losses[-1] < 0.85 * losses[0]

    @pytest.mark.slow
    def test_a_stopped_run_ends_with_the_same_bits(self, objective, tmp_path):
        config = small_config(f"options.objective={objective}")
        train(config, tmp_path / "whole", quiet=True)
        train_interrupted(config, tmp_path / "run", 1, 4, 6)
        assert_same_run(tmp_path / "run", tmp_path / "whole")


class TestUpdates:
    def changed(self, objective, batch):
        """Parameters that each update of one batch moves."""
        model = make_model(objective)
        config = small_config(f"options.objective={objective}")
        (phase,) = advmoe.phases(model, config)
        optimizer, result = Optimizer(phase, 10), []
        for update in phase.updates:
            before = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            update.step(model.train(), model, batch, CRAFTER).loss.backward()
            optimizer.step(update.is_trained)
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            result.append(moved)
        everything = dict(model.named_parameters())
        router = {name for name in everything if name.startswith("gate.")}
        return result, router, set(everything) - router

    def test_pathways_then_router(self, batch):
        moved, router, pathways = self.changed("trades_bilevel", batch)
        assert moved == [pathways, router]

    def test_released_moves_both_at_once(self, batch):
        moved, router, pathways = self.changed("released", batch)
        assert moved == [router | pathways]

    def test_second_attack_sees_the_new_pathways(self, batch):
        model = make_model()
        first, second = steps_of("trades_bilevel", model)
        forward = Spy(model)
        first.step(model.train(), forward, batch, CRAFTER)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if first.is_trained(name):
                    p.add_(0.2 * torch.randn_like(p))
        expected = slow_attack(copy.deepcopy(model), batch, "trades_bilevel")
        second.step(model, forward, batch, CRAFTER)
        torch.testing.assert_close(forward.seen[1][0][B:], expected, rtol=0, atol=1e-6)
        assert not torch.equal(forward.seen[0][0], forward.seen[1][0])

    def test_released_leaves_psi_out_of_l_and_phi_out_of_the_router(self, batch):
        """So that one backward pass is both of the code's steps."""
        model = make_model("released")
        output = model.train()(batch.images, return_aux=True, detach_gate=True)
        gate, rest = list(model.gate.parameters()), list(model.network.parameters())
        grads = torch.autograd.grad(output.logits.sum(), gate, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
        grads = torch.autograd.grad(output.gate_logits.sum(), rest, allow_unused=True)
        assert all(g is None for g in grads)


class TestBuild:
    def test_parts(self):
        model = advmoe.build(small_config("options.num_pathways=3"), FACTS)
        assert isinstance(model, PathwayMixture)
        assert model.num_experts == 3
        assert isinstance(model.normalize, nn.Identity)
        model = advmoe.build(small_config("options.normalize=true"), FACTS)
        x = torch.full((1, 1, 8, 8), 0.7)
        torch.testing.assert_close(model.normalize(x), torch.ones(1, 1, 8, 8))

    @pytest.mark.parametrize(
        ("objective", "wanted", "normalized"),
        [
            ("trades_bilevel", "auto", True),
            ("released", "auto", False),
            ("trades_bilevel", "never", False),
            ("released", "always", True),
        ],
    )
    def test_scores(self, objective, wanted, normalized):
        settings = [f"options.objective={objective}", f"options.normalize_scores={wanted}"]
        model = advmoe.build(small_config(*settings), FACTS)
        scores = 5 + 100 * model.train().gate(torch.rand(64, 1, 8, 8))
        whole = scores.detach().mean(dim=0)
        assert torch.allclose(whole, torch.full((E,), 5.0), atol=1e-2) == normalized

    def test_both_pathways_are_used_from_the_start(self):
        """On images of the data set, before any step."""
        config = find("advmoe_digits")
        images = load("digits", split="train").images[:256].float() / 255
        for seed in range(3):
            model = advmoe.build(replace(config, seed=seed), FACTS).train()
            share = model.gate_weights(images).detach().mean(dim=0)
            assert share.min() > 0.2

    def test_seed_decides(self):
        config = small_config()
        models = [advmoe.build(replace(config, seed=s), FACTS) for s in (0, 0, 1)]
        weights = [m.state_dict() for m in models]
        assert all(torch.equal(v, weights[1][n]) for n, v in weights[0].items())
        assert not torch.equal(*(w["network.conv1.weight"] for w in weights[1:]))

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("options.num_pathways=1", "options.num_pathways: 1 is not possible.* >= 2"),
            ("options.width_ratio=0", "options.width_ratio: 0.0 is not possible"),
            ("options.beta=-1", "options.beta: -1.0 is not possible"),
            ("options.router_width=0", "options.router_width: 0 is not possible"),
            ("options.objective=realeased", "did you mean 'released'"),
            ("options.normalize_scores=batch", "options.normalize_scores: 'batch' is unknown"),
            ("options.num_pathway=3", "unknown key; did you mean options.num_pathways"),
        ],
    )
    def test_bad_settings(self, override, message):
        with pytest.raises(ConfigError, match=message):
            small_config(override)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("options.width_ratio=0.1", "width_ratio: 0.1 of width 4 leaves no channels"),
            ("model.network=resnet50", "pathways are for basic blocks, resnet50 has bottlenecks"),
            ("model.network=resnet9", "model.network: 'resnet9' is unknown"),
        ],
    )
    def test_networks_that_cannot_be(self, override, message):
        config = small_config(override)
        with pytest.raises(ConfigError, match=message):
            advmoe.build(config, FACTS)

    def test_phases_that_cannot_be(self):
        config = small_config()
        with pytest.raises(ConfigError, match="trains PathwayMixture, found PixelModel"):
            advmoe.phases(PixelModel(nn.Identity(), nn.Identity()), config)
        with pytest.raises(ConfigError, match="schedule of advmoe"):
            advmoe.phases(make_model(), replace(config, pretrain=None, joint=PhaseConfig()))

    def test_bad_values_by_code(self):
        for options in ({"objective": "both"}, {"num_pathways": True}, {"beta": float("nan")}):
            with pytest.raises(ConfigError):
                AdvMoeOptions(**options)


class TestPresets:
    def test_the_papers_recipe(self):
        config = find("advmoe_cifar10")
        assert get(config.defense).title == "ADVMoE"
        assert config.model == ModelConfig("resnet18", width=64)
        attack, phase, options = config.attack, config.pretrain, config.options
        assert (attack.num_steps, attack.step_size, attack.epsilon) == ((2,), 5 / 255, 8 / 255)
        assert (phase.learning_rate, phase.gate_learning_rate) == (0.1, 0.1)
        assert (phase.momentum, phase.weight_decay, phase.schedule) == (0.9, 5e-4, "cosine")
        assert (phase.num_epochs, phase.batch_size) == (100, 128)
        assert (options.num_pathways, options.width_ratio, options.beta) == (2, 0.5, 6.0)
        assert (options.objective, options.router_width) == ("trades_bilevel", 16)
        assert not options.normalize
        assert (config.data.crop_padding, config.data.flip) == (4, True)
        model = advmoe.build(config, ModelFacts((3, 32, 32), 10, (0.5,) * 3, (0.5,) * 3))
        assert sum(p.numel() for p in model.gate.parameters()) == 269_202

    @pytest.mark.parametrize("data", ["digits", "cifar10_small"])
    def test_small_ones_are_those_of_dwf(self, data):
        config, theirs = find(f"advmoe_{data}"), find(f"dwf_{data}")
        for part in ("data", "evaluation"):
            assert getattr(config, part) == getattr(theirs, part)
        assert config.attack.epsilon == theirs.attack.epsilon
        assert config.attack.step_size == pytest.approx(5 / 8 * config.attack.epsilon)
        assert config.model.network == theirs.model.network
        width = config.options.width_ratio * config.model.width
        assert width >= theirs.model.width
        facts = ModelFacts((3, 32, 32), K, (0.5,) * 3, (0.5,) * 3)
        sizes = [
            sum(p.numel() for p in get(c.defense).build(c, facts).parameters())
            for c in (config, theirs)
        ]
        assert sizes[0] <= sizes[1]

    @pytest.mark.parametrize("name", ["advmoe_digits", "advmoe_cifar10", "advmoe_cifar10_small"])
    def test_json(self, name):
        assert from_dict(find(name).to_dict()) == find(name)
