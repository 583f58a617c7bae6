"""Immunity: its gate, its two losses, its step, and the models that it is compared with."""

import contextlib
import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import slow_reference
import torch
import torch.nn.functional as F
from small_defenses import (
    FACTS,
    SHAPE,
    assert_same_gradients,
    assert_same_statistics,
    lived_in,
    make_batch,
    make_crafter,
)
from small_models import disordered, everything, make_dataset
from small_runs import assert_same_run, train_interrupted
from torch import nn

import dwf
import moe_kernels
from dwf import checkpoint, presets
from dwf.attacks import attack_target, input_gradient, pgd
from dwf.checks import ConfigError
from dwf.config import AttackConfig, EvaluationConfig, ModelConfig, apply_overrides, from_dict
from dwf.defenses import Batch, ModelFacts, get, immunity
from dwf.defenses.immunity import ImmunityOptions
from dwf.models import LinearGate, Mixture, RandomSwitch, SwitchedMixture, build_network
from dwf.presets.immunity import immunity_digits
from dwf.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

B, E, K = 6, 3, 10
BUDGET = {"epsilon": 0.15, "step_size": 0.05, "num_steps": 4, "random_start": False}
CRAFTER = make_crafter(AttackConfig(epsilon=0.15, step_size=0.06, num_steps=(3,)))


SETTINGS = """
    device=cpu data.num_train=64 data.num_validation=20 model.width=2 options.num_experts=3
    pretrain.num_epochs=3 pretrain.batch_size=16 attack.num_steps=2 validate_every=2
    validation_steps=2 checkpoint_every=5 log_every=3
"""
SMALL = apply_overrides(immunity_digits(), SETTINGS.split())


def small(*overrides):
    return apply_overrides(SMALL, overrides)


def trained(model):
    """Another model than the newborn one: its gate tells images and experts apart."""
    lived_in(model, noise=0.1)
    model.gate.gate.linear.bias.data.copy_(torch.linspace(-2, 2, model.num_experts))
    return model


@pytest.fixture
def model():
    return trained(immunity.build(small("model.width=4"), FACTS))


@pytest.fixture
def batch():
    return make_batch(B)


class TestRandomSwitch:
    @pytest.fixture
    def gate(self):
        gate = LinearGate(SHAPE, E)
        nn.init.normal_(gate.linear.weight, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(gate.linear.bias, generator=torch.Generator().manual_seed(1))
        return gate

    def test_off_in_training(self, gate, batch):
        switch = RandomSwitch(gate)
        state = torch.get_rng_state()
        assert torch.equal(switch.train()(batch.images), gate(batch.images))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(RandomSwitch(gate, scope="off").eval()(batch.images), gate(batch.images))

    def test_permutes_rows_of_weight_and_bias(self, gate, batch):
        """Each result is that of the linear layer with its rows in some order, all orders occur."""
        switch = RandomSwitch(gate).eval()
        seen = dict.fromkeys(itertools.permutations(range(E)), 0)
        x = batch.images.flatten(1)
        weight, bias = gate.linear.weight, gate.linear.bias
        torch.manual_seed(0)
        for _ in range(600):
            found = switch(batch.images)
            (order,) = (
                order
                for order in seen
                if torch.allclose(found, F.linear(x, weight[list(order)], bias[list(order)]))
            )
            seen[order] += 1
        # 100 of each expected, the standard deviation is 9
        assert all(60 < count < 140 for count in seen.values()), seen

    def test_one_draw_for_each_image(self, gate):
        switch = RandomSwitch(gate, scope="image").eval()
        images = torch.rand(1, *SHAPE).expand(600, -1, -1, -1)
        learned = gate(images).tolist()
        torch.manual_seed(0)
        rows = [
            tuple(map(own.index, row))
            for own, row in zip(learned, switch(images).tolist(), strict=True)
        ]
        counts = {order: rows.count(order) for order in set(rows)}
        assert set(counts) == set(itertools.permutations(range(E)))
        assert all(60 < count < 140 for count in counts.values()), counts

    def test_drawn_from_the_global_generator(self, gate, batch):
        switch = RandomSwitch(gate, scope="image").eval()
        made = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            made.append(switch(batch.images))
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])

    @pytest.mark.parametrize("scope", ["batch", "image"])
    def test_only_the_largest(self, scope):
        gate = LinearGate(SHAPE, 5)
        nn.init.normal_(gate.linear.weight, generator=torch.Generator().manual_seed(0))
        images = torch.rand(50, *SHAPE)
        learned = gate(images)
        switch = RandomSwitch(gate, scope=scope, top=2).eval()
        torch.manual_seed(0)
        moved = torch.stack([switch(images) for _ in range(20)])
        for b in range(50):
            first, second, *rest = learned[b].argsort(descending=True).tolist()
            assert torch.equal(moved[:, b, rest], learned[b, rest].expand(20, -1))
            pairs = {tuple(row) for row in moved[:, b, [first, second]].tolist()}
            a, c = learned[b, [first, second]].tolist()
            assert pairs == {(a, c), (c, a)}

    def test_gradient_is_that_of_the_permuted_gate(self, gate, batch):
        switch = RandomSwitch(gate, scope="image").eval()
        cotangent = torch.randn(B, E)
        images = batch.images.clone().requires_grad_()
        torch.manual_seed(3)
        found = switch(images)
        (grad,) = torch.autograd.grad(found, images, cotangent)
        learned = gate(batch.images).tolist()
        for b in range(B):
            order = [learned[b].index(v) for v in found[b].tolist()]
            expected = sum(
                float(c) * gate.linear.weight[e] for c, e in zip(cotangent[b], order, strict=True)
            )
            torch.testing.assert_close(grad[b].flatten(), expected)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scope": "batches"}, "scope: 'batches'"),
            ({"top": 1}, "top: 1 is not possible"),
        ],
    )
    def test_bad_settings(self, options, message):
        with pytest.raises(ConfigError, match=message):
            RandomSwitch(LinearGate(SHAPE, E), **options)


class TestControls:
    def test_what_they_compute(self, model, batch):
        """By hand: softmax of the gate's row, in the order asked for, times the experts' logits."""
        model.eval()
        experts = [model.expert(e)(batch.images) for e in range(E)]
        gate_logits = model.gate.gate(model.normalize(batch.images)).detach()
        for order in itertools.permutations(range(E)):
            control = model.permuted(order)
            expected = torch.zeros(B, K)
            for b in range(B):
                weights = [math.exp(gate_logits[b, order[e]]) for e in range(E)]
                for e in range(E):
                    expected[b] += weights[e] / sum(weights) * experts[e][b].detach()
            torch.testing.assert_close(control(batch.images), expected)
        assert torch.equal(model.unpermuted()(batch.images), model.permuted(range(E))(batch.images))
        torch.testing.assert_close(model.uniform()(batch.images), torch.stack(experts).mean(dim=0))

    def test_their_plans(self, model, batch):
        """Deterministic ones, also where the gate does not look at the image."""
        model.eval()
        for control in (model.unpermuted(), model.uniform(), model.permuted((2, 0, 1))):
            plan = control.attack_plan(dtype=torch.float32)
            assert plan.deterministic
            found, _ = plan.gradient(batch.images, batch.labels)
            expected = slow_reference.input_gradient(control, batch.images, batch.labels)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    def test_train_mode_is_unpermuted(self, model, batch):
        control = copy.deepcopy(model).unpermuted().train()
        assert torch.equal(model.train()(batch.images), control(batch.images))

    def test_eval_mode_is_one_of_the_permutations(self, model, batch):
        model.eval()
        possible = {
            order: model.permuted(order)(batch.images) for order in itertools.permutations(range(E))
        }
        torch.manual_seed(0)
        seen = set()
        for _ in range(60):
            found = model(batch.images)
            seen |= {order for order, logits in possible.items() if torch.equal(found, logits)}
        assert seen == set(possible)

    def test_nothing_leaks(self, model, batch):
        disordered(model)
        before = everything(model)
        for control in (model.unpermuted(), model.uniform(), model.permuted((2, 0, 1))):
            pgd(control, batch.images, batch.labels, **BUDGET)
        assert everything(model) == before

    @pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (0, 1, 3)])
    def test_bad_order(self, order, model):
        with pytest.raises(ConfigError, match="expected a permutation of 0 to 2"):
            model.permuted(order)

    def test_forced_expert(self, model, batch):
        network = model.experts[1].eval()
        expected = network((batch.images - 0.4) / 0.3)
        torch.testing.assert_close(model.expert(1)(batch.images), expected)


class TestAttacks:
    def test_a_plan_draws_for_each_gradient(self, model, batch):
        """Gradients of the plan are those of the model with the same draws, and differ."""
        plan = model.eval().attack_plan(dtype=torch.float32)
        plan.prepare(batch.images)
        assert not plan.deterministic
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            ours, logits = plan.gradient(batch.images, batch.labels)
            torch.manual_seed(seed)
            images = batch.images.clone().requires_grad_()
            expected = model(images)
            (grad,) = torch.autograd.grad(
                F.cross_entropy(expected, batch.labels, reduction="sum"), images
            )
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours, grad, rtol=1e-3, atol=1e-5)
            found.append(ours)
        assert any(not torch.allclose(found[0], other, atol=1e-3) for other in found)

    @pytest.mark.parametrize("planned", [False, True])
    def test_eot_is_the_mean_over_draws(self, planned, model, batch):
        """One step with S samples follows the mean of S gradients, each with its own draw."""
        model.eval()
        way = contextlib.nullcontext() if planned else moe_kernels.implementation("reference")
        with way:
            target = attack_target(model, batch.images, dtype=torch.float32)
            assert (target.plan is not None) == planned
            found = pgd(
                target,
                batch.images,
                batch.labels,
                epsilon=0.1,
                step_size=0.05,
                num_steps=1,
                random_start=False,
                eot_samples=16,
                seed=5,
            )
        torch.manual_seed(5)
        total = torch.zeros_like(batch.images)
        for _ in range(16):
            total += slow_reference.input_gradient(model, batch.images, batch.labels)
        clear = (total / 16).abs() > 1e-5
        assert clear.float().mean() > 0.9
        expected = (batch.images + 0.05 * total.sign()).clamp(0, 1)
        torch.testing.assert_close(found[clear], expected[clear])

    def test_every_step_of_pgd_draws_anew(self, model, batch):
        """Without EoT too, by the plan's own step."""
        model.eval()
        target = attack_target(model, batch.images, dtype=torch.float32)
        found = pgd(target, batch.images, batch.labels, seed=2, **BUDGET)
        torch.manual_seed(2)
        expected = slow_reference.pgd(model, batch.images, batch.labels, 0.15, 0.05, 4)
        assert (found - expected).abs().gt(1e-5).float().mean() < 0.05
        with torch.random.fork_rng():
            other = pgd(target, batch.images, batch.labels, seed=3, **BUDGET)
        assert (found - other).abs().gt(1e-5).float().mean() > 0.05

    @pytest.mark.slow
    def test_evaluation_says_that_it_is_random(self, model):
        settings = EvaluationConfig(
            fgsm_epsilon=(0.1,), num_steps=(2,), multi_start_steps=0, adaptive_steps=2,
            eot_samples=3, epsilon=0.1, step_size=0.05,
        )  # fmt: skip
        model.eval()
        result = dwf.evaluate(model, make_dataset(20, SHAPE, K), settings, suite="paper")
        findings = {f.name: f for f in result.findings}
        assert findings["random"].severity == "suspect"
        assert "masked gradients" in findings["model"].message
        assert findings["model"].severity == "note"
        again = dwf.evaluate(model, make_dataset(20, SHAPE, K), settings, suite="paper")
        assert [row.accuracy for row in result.attacks] == [row.accuracy for row in again.attacks]
        control = dwf.evaluate(
            model.unpermuted(), make_dataset(20, SHAPE, K), settings, suite="paper"
        )
        assert not {"random", "model"} & {f.name for f in control.findings}


def slow_information(maps):
    """The mutual information of the joint distribution p(e, u) = H_e(u) / E, term by term."""
    result = []
    for b in range(maps.shape[1]):
        total = 0.0
        places = [h.flatten().tolist() for h in maps[:, b]]
        count = len(places)
        for e in range(count):
            for u in range(len(places[0])):
                joint = places[e][u] / count
                p_u = sum(place[u] for place in places) / count
                if joint > 0:
                    total += joint * math.log(joint / (p_u / count))
        result.append(total)
    return torch.tensor(result)


class TestLosses:
    def test_information_by_hand(self):
        same = torch.full((4, 1, 2, 2), 0.25)
        assert immunity.mutual_information(same).item() == pytest.approx(0.0, abs=1e-7)
        apart = torch.eye(4).view(4, 1, 2, 2)
        assert immunity.mutual_information(apart).item() == pytest.approx(math.log(4))
        # H_0 = (1, 0), H_1 = (1/2, 1/2): mean (3/4, 1/4)
        maps = torch.tensor([[[[1.0, 0.0]]], [[[0.5, 0.5]]]])
        expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
        assert immunity.mutual_information(maps).item() == pytest.approx(expected)

    def test_information_slow(self):
        maps = torch.rand(5, 7, 4, 3).square()
        maps[:, :, 0] *= torch.rand(5, 7, 3) > 0.5
        maps = maps / maps.sum(dim=(2, 3), keepdim=True)
        found = immunity.mutual_information(maps)
        torch.testing.assert_close(found, slow_information(maps), rtol=1e-5, atol=1e-6)
        assert ((found > 0) & (found < math.log(5))).all()

    def test_gradients_are_finite_where_a_map_is_zero(self):
        maps = torch.eye(4).view(4, 1, 2, 2).requires_grad_()
        immunity.mutual_information(maps).sum().backward()
        assert maps.grad.isfinite().all()

    def test_centers_by_hand(self):
        maps = torch.zeros(1, 3, 2, 4)
        maps[0, 0, 0, 0] = 1
        maps[0, 1, 1, 3] = 1
        maps[0, 2] = 1 / 8
        found = immunity.centers_of_mass(maps)
        expected = torch.tensor([[[0.25, 0.125], [0.75, 0.875], [0.5, 0.5]]])
        torch.testing.assert_close(found, expected)
        # variances over the three: rows 2 / 3 * .25^2, columns 2 / 3 * .375^2
        expected = 2 / 3 * (0.25**2 + 0.375**2)
        assert immunity.center_variance(maps).item() == pytest.approx(expected)

    def test_center_variance_slow(self):
        maps = torch.rand(3, 5, 4, 4)
        maps = maps / maps.sum(dim=(2, 3), keepdim=True)
        total = 0.0
        for e in range(3):
            centers = []
            for b in range(5):
                rows = [(i + 0.5) / 4 for i in range(4)]
                y = sum(rows[i] * float(maps[e, b, i, j]) for i in range(4) for j in range(4))
                x = sum(rows[j] * float(maps[e, b, i, j]) for i in range(4) for j in range(4))
                centers.append((y, x))
            for axis in (0, 1):
                mean = sum(c[axis] for c in centers) / 5
                total += sum((c[axis] - mean) ** 2 for c in centers) / 5
        assert immunity.center_variance(maps).item() == pytest.approx(total / 3, rel=1e-4)

    def test_one_image_has_no_variance(self):
        assert immunity.center_variance(torch.full((2, 1, 2, 2), 0.25)).item() == 0

    def test_scores_of_a_data_set(self, model):
        """As if it were one batch, whatever the size of the batches; nothing changes."""
        dataset = make_dataset(23, SHAPE, K)
        disordered(model)
        before = everything(model)
        found = immunity.heatmap_scores(model, dataset, batch_size=10)
        assert everything(model) == before
        model.eval().requires_grad_(True)
        output = model(dataset.images.float() / 255, return_aux=True)
        maps = immunity.expert_heatmaps(output, dataset.labels).detach()
        assert found.i_score == pytest.approx(slow_information(maps).mean().item(), rel=1e-4)
        assert found.c_score == pytest.approx(immunity.center_variance(maps).item(), rel=1e-4)
        assert 0 < found.i_score < math.log(E)


@pytest.mark.parametrize("attack", ["none", "pgd"])
class TestStep:
    def run_step(self, model, batch, attack, **options):
        config = small(
            f"options.attack={attack}", *(f"options.{k}={v}" for k, v in options.items())
        )
        (phase,) = immunity.phases(model, config)
        assert (phase.name, phase.gate_prefix) == ("train", "gate.")
        model.train()
        # attacks by autograd: a plan rounds otherwise
        with moe_kernels.implementation("reference"):
            result = phase.step(model, model, batch, CRAFTER)
        result.loss.backward()
        return result

    @pytest.mark.parametrize(("mi", "ps"), [(0.1, 0.1), (0.7, 0.0), (0.0, 2.0), (0.0, 0.0)])
    def test_step(self, attack, mi, ps, model, batch):
        """CE + mi L_MI + ps L_PS, each image's heatmaps made on their own graph."""
        expected = copy.deepcopy(model)
        x, y = batch.images, batch.labels
        if attack == "pgd":
            control = copy.deepcopy(model).eval().unpermuted()
            x = slow_reference.pgd(control, x, y, 0.15, 0.06, 3).detach()
        experts = [expected.train().expert(e) for e in range(E)]
        z = (x - 0.4) / 0.3
        maps, logits = [], []
        for expert in experts:
            network = expert.network
            A = F.relu(network.bn1(network.conv1(z)))
            for name in network.stages:
                A = network.get_submodule(name)(A)
            logits.append(network.linear(A.mean(dim=(2, 3))))
            # the head is linear, so alpha is its weight
            cam = (network.linear.weight[y][:, :, None, None] / A[0, 0].numel() * A).sum(dim=1)
            cam = cam.relu()
            total = cam.sum(dim=(1, 2), keepdim=True)
            maps.append(torch.where(total > 0, cam / (total + (total == 0)), 1 / cam[0].numel()))
        H = torch.stack(maps)
        mean = H.mean(dim=0)
        information = (H * ((H + 1e-30).log() - (mean + 1e-30).log())).sum() / E / B
        weights = expected.gate.gate(z).softmax(dim=1)
        mixed = sum(weights[:, e : e + 1] * logits[e] for e in range(E))
        loss = F.cross_entropy(mixed, y) - mi * information + ps * immunity.center_variance(H)
        loss.backward()

        result = self.run_step(model, batch, attack, mi_weight=mi, ps_weight=ps)
        assert result.num_clean == (B if attack == "none" else 0)
        torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.logits, mixed.detach())
        assert torch.equal(result.labels, y)
        assert_same_gradients(model, expected)
        assert_same_statistics(model, expected)

    @pytest.mark.slow
    def test_heatmap_losses_do_their_work(self, attack, batch):
        """Each lowers what it is about, compared with a training that leaves it out."""
        scores = {}
        for mi, ps in ((0, 0), (1, 0), (0, 20)):
            model = immunity.build(small("model.width=4"), FACTS)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            losses = []
            for _ in range(25):
                optimizer.zero_grad()
                result = self.run_step(model, batch, attack, mi_weight=mi, ps_weight=ps)
                optimizer.step()
                losses.append(result.loss.item())
            assert losses[-1] < losses[0]
            output = model.train()(batch.images, return_aux=True)
            maps = immunity.expert_heatmaps(output, batch.labels)
            information = immunity.mutual_information(maps).mean().item()
            scores[mi, ps] = information, immunity.center_variance(maps).item()
        assert scores[1, 0][0] > scores[0, 0][0]
        assert scores[0, 20][1] < scores[0, 0][1]


class TestAttackInTraining:
    def test_sees_the_learned_gate(self, model, batch, monkeypatch):
        """Eval mode, but not permuted: the random state plays no part, and no draw is made."""
        (phase,) = immunity.phases(model, small("options.attack=pgd"))
        monkeypatch.setattr(torch, "rand", None)
        phase.step(model, model.train(), batch, CRAFTER)

    def test_one_plan_for_all_steps(self, model, batch):
        (phase,) = immunity.phases(model, small("options.attack=pgd"))
        attacked = phase.step.keywords["attacked"]
        plans = []
        for _ in range(2):
            phase.step(model, model.train(), batch, CRAFTER)
            plans += attacked.__dict__["_plans"].values()
        assert plans[0] is plans[1]
        assert plans[0].deterministic
        assert all(x is y for x, y in zip(attacked.experts, model.experts, strict=True))


class TestBuild:
    def test_five_equal_experts(self):
        model = immunity.build(presets.find("immunity_digits"), FACTS)
        assert model.expert_names == [f"{e} resnet6" for e in range(5)]
        assert model.gate.gate.linear.weight.shape == (5, 64)
        weights = [expert.conv1.weight for expert in model.experts]
        for a, b in itertools.combinations(weights, 2):
            assert a.shape == b.shape
            assert not torch.equal(a, b)
        torch.testing.assert_close(
            model.train()(torch.rand(2, *SHAPE), return_aux=True).gate_weights,
            torch.full((2, 5), 0.2),
        )

    def test_seeds_decide(self):
        first, again, other = (immunity.build(small(f"seed={s}"), FACTS) for s in (0, 0, 1))
        for name, value in first.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(first.experts[0].conv1.weight, other.experts[0].conv1.weight)

    @pytest.mark.slow
    def test_mixed_backbones(self):
        """Three families on one grid; second derivatives reach all of them."""
        config = small("options.backbones=resnet10,googlenet,densenet121", "model.width=4")
        facts = ModelFacts((3, 32, 32), 4, (0.4,) * 3, (0.3,) * 3)
        model = immunity.build(config, facts)
        assert model.expert_names == ["0 resnet10", "1 googlenet", "2 densenet121"]
        batch = Batch(torch.rand(4, 3, 32, 32), torch.arange(4), torch.arange(4))
        (phase,) = immunity.phases(model, config)
        phase.step(model, model.train(), batch, CRAFTER).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        target = attack_target(model.eval(), batch.images)
        gradient = input_gradient(target, batch.images, batch.labels)
        assert gradient.abs().sum() > 0

    def test_without_torchvision(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
        config = small("options.backbones=googlenet,resnet6,resnet6")
        with pytest.raises(ConfigError, match="googlenet: needs torchvision, which cannot be"):
            immunity.build(config, FACTS)

    def test_state_dict_round_trip(self, model, batch):
        other = immunity.build(small("model.width=4", "seed=9"), FACTS)
        other.load_state_dict(model.state_dict())
        logits = []
        for m in (model, other):
            torch.manual_seed(0)
            logits.append(m.eval()(batch.images))
        assert torch.equal(*logits)
        assert all(
            key.split(".")[0] in ("experts", "gate", "normalize") for key in other.state_dict()
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_experts": 1}, "options.num_experts: 1"),
            ({"backbones": ("resnet6",)}, "options.backbones: 1 names for 5 experts"),
            ({"num_experts": 2, "backbones": ("resnet6", "alex")}, "options.backbones: 'alex'"),
            ({"attack": "fgsm"}, "options.attack: 'fgsm'"),
            ({"mi_weight": -0.1}, "options.mi_weight"),
            ({"ps_weight": math.nan}, "options.ps_weight"),
            ({"switch": "never"}, "options.switch: 'never'"),
            ({"switch_top": 1}, "options.switch_top: 1"),
            ({"switch_top": 6}, "options.switch_top: 6 of 5 experts"),
        ],
    )  # fmt: skip
    def test_bad_options(self, options, message):
        with pytest.raises(ConfigError, match=message):
            ImmunityOptions(**options)

    def test_wrong_model_or_schedule(self, model):
        network = build_network("resnet6", num_classes=K, width=2, in_channels=1, seed=0)
        mixture = Mixture([network] * 3, LinearGate(SHAPE, 3))
        with pytest.raises(ConfigError, match="immunity trains Immunity, found Mixture"):
            immunity.phases(mixture, small())
        config = replace(small(), pretrain=None, joint=small().pretrain)
        with pytest.raises(ConfigError, match="schedule of immunity"):
            immunity.phases(model, config)
        with pytest.raises(ConfigError, match="last_layers: 1 names for 3 experts"):
            immunity.Immunity(model.experts, model.gate, last_layers=["layer2"])


@pytest.mark.slow
def test_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "prune", lambda folder: None)
    config = small("options.attack=pgd")
    whole = train(config, tmp_path / "whole", quiet=True)
    train_interrupted(config, tmp_path / "parts", 2, 7, 8)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    loaded = dwf.load(tmp_path / "whole")
    assert isinstance(loaded, SwitchedMixture)
    images = torch.rand(4, *SHAPE)
    assert torch.equal(loaded.unpermuted()(images), whole.unpermuted()(images))


class TestPresets:
    @pytest.mark.parametrize("data", ["digits", "cifar10"])
    def test_pairs(self, data):
        plain, at = (presets.find(f"immunity_{kind}{data}") for kind in ("", "at_"))
        assert plain.options == ImmunityOptions()
        assert at.options == ImmunityOptions(attack="pgd")
        assert (at.attack.num_steps, at.attack.random_start) == ((10,), True)
        for config in (plain, at):
            assert config.defense == "immunity"
            assert config.evaluation.eot_samples == 20
            assert config.evaluation.adaptive_steps * config.evaluation.step_size > 0.15
            assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert replace(at, preset=plain.preset, options=plain.options, attack=plain.attack) == plain

    def test_cifar10(self):
        config = presets.find("immunity_at_cifar10")
        assert config.model.network == "resnet18"
        assert config.model.width == ModelConfig().width
        assert (config.attack.epsilon, config.attack.step_size) == (8 / 255, 2 / 255)
        assert get("immunity").title == "Immunity (reconstructed)"
