"""Sparse layers against the formulas, image by image: gates, routing, gradients, forced experts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwf
from dwf import distributed
from dwf.checks import ConfigError, ModelOutputError
from dwf.models import Normalize, PixelModel, build_network
from dwf.models.networks import BasicBlock
from dwf.models.sparse import ConvGapGate, GapFcGate, SparseLayer
from dwf.models.sparse_network import SparseModel, make_sparse

pytestmark = pytest.mark.usefixtures("one_thread")
B, C, E = 12, 3, 4


class Table(nn.Module):
    """A gate whose logits are those of the images' mean pixel: fixed rows, in any order."""

    def __init__(self, gate_logits):
        super().__init__()
        self.gate_logits = nn.Parameter(gate_logits)

    def forward(self, x):
        return self.gate_logits[x[:, 0, 0, 0].detach().round().long()].softmax(dim=1)


class Scale(nn.Module):
    """y = factor * x, and how many rows it saw."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.factor * x


def numbered(num_images, size=4):
    """Images [T, 2, size, size]; the first pixel of image t is t."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_images, 2, size, size, generator=generator)
    x[:, 0, 0, 0] = torch.arange(num_images)
    return x


def by_hand(top_k=1, noisy=False):
    """Three images, three experts that multiply by 1, 10, 100; p in tenths."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.4, 0.35]])
    experts = [Scale(1), Scale(10), Scale(100)]
    return SparseLayer(experts, Table(p.log()), top_k=top_k, noisy=noisy), numbered(3)


def block_layer(top_k=1, num_experts=E, *, seed=0, noisy=False, stride=2):
    """Residual blocks under a sure gate; statistics are not those of birth."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        experts = [BasicBlock(C, 2 * C, stride) for _ in range(num_experts)]
        gate = GapFcGate(C, num_experts)
        nn.init.normal_(gate.linear.weight, std=8)
        for module in (m for e in experts for m in e.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        x = torch.randn(B, C, 6, 6)
    return SparseLayer(experts, gate, top_k=top_k, noisy=noisy), x


def slow(layer, x):
    """The definition, one image at a time, without straight-through: eval mode only."""
    rows = []
    for b in range(len(x)):
        one = x[b : b + 1]
        p = layer.gate(one)[0]
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: layer.top_k]
        if layer.top_k == 1:
            weights = [1.0]
        else:
            total = sum(p[e] for e in chosen) + 1e-5
            weights = [p[e] / total for e in chosen]
        rows.append(sum(w * layer.experts[e](one) for w, e in zip(weights, chosen, strict=True)))
    return torch.cat(rows)


class TestGates:
    def test_gap_fc_by_hand(self):
        """Means 2 and -1; logits 2 - 1 + 0 = 1 and 4 + 1 + 1 = 6."""
        gate = GapFcGate(2, 2)
        gate.linear.weight.data = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
        gate.linear.bias.data = torch.tensor([0.0, 1.0])
        x = torch.tensor([[[[1.0, 3.0]], [[-3.0, 1.0]]]])
        expected = torch.tensor([[1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))]])
        torch.testing.assert_close(gate(x), expected)

    def test_conv_gap_by_loops(self):
        torch.manual_seed(0)
        gate, x = ConvGapGate(2, 3), torch.randn(2, 2, 4, 5)
        assert gate.conv.bias is None
        w = gate.conv.weight.detach()
        for b in range(2):
            logits = []
            for e in range(3):
                sums = [
                    float((w[e] * x[b, :, i : i + 3, j : j + 3]).sum())
                    for i in range(2)
                    for j in range(3)
                ]
                logits.append(sum(sums) / len(sums))
            total = sum(math.exp(v) for v in logits)
            expected = torch.tensor([math.exp(v) / total for v in logits])
            torch.testing.assert_close(gate(x)[b], expected)

    @pytest.mark.parametrize(("H", "W"), [(2, 2), (3, 2), (1, 4)])
    def test_conv_gap_on_small_maps(self, H, W):
        with pytest.raises(ConfigError, match=f"map of {H} x {W} is smaller; use gap_fc"):
            ConvGapGate(2, 3)(torch.zeros(1, 2, H, W))
        assert ConvGapGate(2, 3)(torch.zeros(1, 2, 3, 3)).shape == (1, 3)

    @pytest.mark.parametrize("gate", [GapFcGate(C, E), ConvGapGate(C, E)])
    def test_probabilities_under_autocast(self, gate):
        with torch.autocast("cpu", torch.bfloat16):
            p = gate(torch.randn(B, C, 6, 6))
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.sum(dim=1), torch.ones(B))


class TestRouting:
    def test_top_1_by_hand(self):
        """Experts 0, 2, 1 with weight exactly 1."""
        layer, x = by_hand()
        chosen, weights = layer.route(layer.gate(x))
        assert chosen.tolist() == [[0], [2], [1]]
        assert weights.tolist() == [[1.0], [1.0], [1.0]]
        assert torch.equal(layer(x), torch.stack([x[0], 100 * x[1], 10 * x[2]]))

    def test_top_2_by_hand(self):
        """.5 and .3 of .8; .8 and a tie of .1; .4 and .35 of .75, all over their sum + 1e-5."""
        layer, x = by_hand(top_k=2)
        chosen, weights = layer.route(layer.gate(x))
        assert chosen[[0, 2]].tolist() == [[0, 1], [1, 2]]
        expected = torch.tensor(
            [
                [0.5 / 0.80001, 0.3 / 0.80001],
                [0.8 / 0.90001, 0.1 / 0.90001],
                [0.4 / 0.75001, 0.35 / 0.75001],
            ]
        )
        torch.testing.assert_close(weights, expected)
        y = layer(x)
        torch.testing.assert_close(y[0], (0.5 + 0.3 * 10) / 0.80001 * x[0])
        torch.testing.assert_close(y[2], (0.4 * 10 + 0.35 * 100) / 0.75001 * x[2])

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    def test_equals_the_slow_loop(self, top_k):
        layer, x = block_layer(top_k)
        layer.eval()
        y = layer(x)
        assert y.shape == (B, 2 * C, 3, 3)
        torch.testing.assert_close(y, slow(layer, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("top_k", [1, 2])
    @pytest.mark.parametrize("training", [True, False])
    def test_only_routed_rows_are_computed(self, top_k, training):
        torch.manual_seed(0)
        p = torch.rand(50, E)
        p[:, 2] = 0  # expert 2 is nobody's first or second choice
        experts = [Scale(e) for e in range(E)]
        layer = SparseLayer(experts, Table(p.log()), top_k=top_k).train(training)
        layer(numbered(50))
        counts = [0] * E
        for row in p:
            for e in sorted(range(E), key=lambda e: -float(row[e]))[:top_k]:
                counts[e] += 1
        assert sum(counts) == 50 * top_k
        assert counts[2] == 0
        assert [expert.rows for expert in experts] == [[n] if n else [] for n in counts]

    def test_empty_batch(self):
        layer, x = block_layer()
        assert layer.eval()(x[:0]).shape == (0, 2 * C, 3, 3)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_broken_gate_is_nobodys_choice(self, value):
        layer, x = by_hand()
        layer.gate.gate_logits.data[1, 2] = value
        with pytest.raises(ModelOutputError, match=r"gate: nan at \[1, 0\], expected probab"):
            layer(x)

    @pytest.mark.parametrize(("top_k", "words"), [(4, "4 is not possible"), (0, "integer >= 1")])
    def test_impossible(self, top_k, words):
        with pytest.raises(ConfigError, match=f"top_k: .*{words}"):
            by_hand(top_k=top_k)


class TestNoise:
    def test_formula(self):
        """argmax of p / std(p) + N(0, .01), the noise drawn once for all entries."""
        torch.manual_seed(0)
        p = torch.rand(200, E).softmax(dim=1)
        layer = SparseLayer([nn.Identity()] * E, nn.Identity(), noisy=True).train()
        torch.manual_seed(7)
        chosen, weights = layer.route(p)
        torch.manual_seed(7)
        spread = ((p - p.mean()) ** 2).mean().sqrt()
        noisy = p / spread + 0.1 * torch.randn(200, E)
        assert torch.equal(chosen[:, 0], noisy.argmax(dim=1))
        assert 0 < int((chosen[:, 0] != p.argmax(dim=1)).sum()) < 100
        assert torch.equal(weights, torch.ones(200, 1))

    @pytest.mark.parametrize(("noisy", "training"), [(True, False), (False, True)])
    def test_none(self, noisy, training):
        p = torch.rand(200, E).softmax(dim=1)
        layer = SparseLayer([nn.Identity()] * E, nn.Identity(), noisy=noisy).train(training)
        state = torch.get_rng_state()
        assert torch.equal(layer.route(p)[0][:, 0], p.argmax(dim=1))
        assert torch.equal(torch.get_rng_state(), state)

    def test_equal_probabilities_are_spread_by_it(self):
        torch.manual_seed(0)
        layer = SparseLayer([nn.Identity()] * E, nn.Identity(), noisy=True).train()
        counts = layer.route(torch.full((400, E), 1 / E))[0].flatten().bincount(minlength=E)
        assert counts.min() > 60


class TestGradients:
    @pytest.mark.parametrize("training", [True, False])
    def test_straight_through_by_hand(self, training):
        """d sum(y) / d p[b, chosen] = sum(expert(x)[b]), as if the weight were p; 0 elsewhere."""
        layer, x = by_hand()
        layer.train(training)
        p = layer.gate(x)
        p.retain_grad()
        layer.gate.forward = lambda x: p
        layer(x).sum().backward()
        expected = torch.zeros(3, 3)
        expected[0, 0], expected[1, 2], expected[2, 1] = (
            x[0].sum(),
            100 * x[1].sum(),
            10 * x[2].sum(),
        )
        torch.testing.assert_close(p.grad, expected)
        factors = [expert.factor.grad for expert in layer.experts]
        torch.testing.assert_close(
            torch.stack(factors), torch.stack([x[b].sum() for b in (0, 2, 1)])
        )

    def test_top_2_is_an_ordinary_derivative(self):
        layer, x = block_layer(2)
        layer.eval().double()
        x = x.double()
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(layer(x).shape, generator=generator, dtype=torch.float64)
        (layer(x) * upstream).sum().backward()
        ours = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        (slow(layer, x) * upstream).sum().backward()
        for mine, p in zip(ours, layer.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad)

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_an_attack_sees_the_gate(self, top_k):
        """Input gradient in eval mode: of sum(p_chosen / stop(p_chosen) * expert(x)) for k = 1."""
        layer, x = block_layer(top_k)
        layer.eval().double()
        mine = x.double().requires_grad_()
        layer(mine).square().sum().backward()
        theirs = x.double().requires_grad_()
        rows = []
        for b in range(B):
            one = theirs[b : b + 1]
            p = layer.gate(one)[0]
            chosen = p.argsort(descending=True)[:top_k].tolist()
            if top_k == 1:
                weights = [1 + p[chosen[0]] - p[chosen[0]].detach()]
            else:
                weights = [p[e] / (p[chosen].sum() + 1e-5) for e in chosen]
            rows.append(
                sum(w * layer.experts[e](one) for w, e in zip(weights, chosen, strict=True))
            )
        torch.cat(rows).square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)

    def test_skipped_experts_get_none(self):
        layer, x = block_layer()
        layer.train()
        layer.gate.linear.bias.data[1] = -1e3
        x = x.repeat(2, 1, 1, 1)  # at least two rows each
        used = set(layer.gate(x).argmax(dim=1).tolist())
        assert 1 < len(used) < E
        before = copy.deepcopy(layer.state_dict())
        layer(x).square().sum().backward()
        for e, expert in enumerate(layer.experts):
            assert all((p.grad is not None) == (e in used) for p in expert.parameters())
            for name, buffer in expert.named_buffers():
                same = torch.equal(buffer, before[f"experts.{e}.{name}"])
                assert same == (e not in used), (e, name)
        assert layer.gate.linear.weight.grad.abs().sum() > 0

    def test_among_processes_all_experts_get_one(self, monkeypatch):
        """Their gradients are summed; zero where no process had a row, with equal statistics."""
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "total", lambda counts: 2 * counts)
        layer, x = block_layer()
        layer.gate.linear.bias.data[1] = -1e3
        before = copy.deepcopy(layer.state_dict())
        layer.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        assert all(not p.grad.any() for p in layer.experts[1].parameters())
        for name, buffer in layer.experts[1].named_buffers():
            assert torch.equal(buffer, before[f"experts.1.{name}"]), name


class TestStatistics:
    def test_of_routed_images_alone(self):
        layer, x = block_layer()
        layer.train()
        chosen = layer.gate(x).argmax(dim=1)
        expected, rows = copy.deepcopy(layer.experts).train(), {}
        for e in chosen.unique().tolist():
            rows[e] = expected[e](x[chosen == e])
        y = layer(x)
        assert max(len(r) for r in rows.values()) > 1
        for e in rows:
            if len(rows[e]) > 1:
                torch.testing.assert_close(y[chosen == e], rows[e])
                for name, buffer in layer.experts[e].named_buffers():
                    torch.testing.assert_close(buffer, expected[e].get_buffer(name))

    def test_a_single_image_uses_the_running_ones(self):
        """Of maps of one pixel too, which torch's BatchNorm refuses."""
        layer, x = block_layer()
        expected = copy.deepcopy(layer).eval()(x[:1, :, :2, :2])
        before = copy.deepcopy(layer.state_dict())
        layer.train()
        y = layer(x[:1, :, :2, :2])
        assert y.shape[2:] == (1, 1)
        assert torch.equal(y, expected)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        assert all(m.training for m in layer.modules())
        y.sum().backward()


def make(place="block", network="resnet18", **settings):
    made = build_network(network, num_classes=5, width=2, in_channels=3, seed=0)
    subpath = make_sparse(made, place, **settings)
    return SparseModel(Normalize((0.5,) * 3, (0.2,) * 3), made, subpath)


@pytest.fixture
def images():
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def lively(model):
    """Gates that are sure and use several experts, and statistics that are not those of birth."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for layer in model.layers.values():
            nn.init.normal_(layer.gate.linear.weight, std=20)
        for _ in range(5):
            model.train()(torch.rand(32, 3, 16, 16))
        for name, layer in model.layers.items():
            p = model.eval()(torch.rand(32, 3, 16, 16), return_aux=True).probabilities[name]
            layer.gate.linear.bias.sub_(p.clamp(min=1e-30).log().mean(dim=0))
    return model


class TestMakeSparse:
    @pytest.mark.parametrize(
        ("network", "place", "settings", "layers", "subpath"),
        [
            ("resnet18", "block", {}, ["layer4.0", "layer4.1"], "layer4.1"),
            ("resnet50", "block", {}, ["layer4.0", "layer4.1", "layer4.2"], "layer4.2"),
            ("resnet18", "residual", {}, ["layer4.1"], "layer4.1"),
            ("resnet18", "block", {"stage": 3}, ["layer3.0", "layer3.1"], "layer3.1"),
            ("resnet6", "residual", {"stage": 1}, ["layer1.0"], "layer1.0"),
            (
                "resnet18",
                "conv",
                {},
                ["4.0.conv1", "4.0.conv2", "4.0.shortcut.0", "4.1.conv1", "4.1.conv2"],
                "layer4.1.conv1",
            ),
            (
                "resnet18",
                "conv",
                {"exclude_shortcut": True},
                ["4.0.conv1", "4.0.conv2", "4.1.conv1", "4.1.conv2"],
                "layer4.1.conv1",
            ),
        ],
    )
    def test_places(self, network, place, settings, layers, subpath, images):
        model = make(place, network, **settings)
        names = [name if name.startswith("layer") else f"layer{name}" for name in layers]
        assert list(model.layers) == names
        assert model.subpath == subpath
        assert model.num_experts == 4
        output = model.eval()(images, return_aux=True)
        assert output.logits.shape == (16, 5)
        assert sorted(output.probabilities) == sorted(names)
        for name, p in output.probabilities.items():
            assert p.shape == (16, 4), name
        assert torch.equal(output.logits, model(images))
        if place == "conv":  # BatchNorm stays dense
            assert isinstance(model.network.layer4[0].bn1, nn.BatchNorm2d)

    @pytest.mark.parametrize("network", ["resnet6", "resnet8", "resnet10", "resnet34", "resnet50"])
    @pytest.mark.parametrize("place", ["block", "conv"])
    def test_every_network_trains(self, network, place):
        model = make(place, network, num_experts=2, top_k=2).train()
        model(torch.rand(4, 3, 16, 16)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_experts_differ_and_seed_decides(self):
        state = torch.get_rng_state()
        first, again, other = make(seed=1), make(seed=1), make(seed=2)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in first.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])
        weights = [
            expert.conv1.weight
            for model in (first, other)
            for layer in model.layers.values()
            for expert in layer.experts
        ]
        for i, one in enumerate(weights):
            assert not any(torch.equal(one, two) for two in weights[:i])

    def test_kaiming(self):
        """Standard deviation sqrt(2 / (out_channels * kernel size)); BatchNorm at 1 and 0."""
        network = build_network("resnet18", num_classes=5, width=16, in_channels=3, seed=0)
        make_sparse(network, "block")
        for expert in network.layer4[1].experts:
            std = math.sqrt(2 / (128 * 9))
            assert abs(expert.conv1.weight.std().item() / std - 1) < 0.02
            assert torch.equal(expert.bn1.weight, torch.ones(128))
            assert torch.equal(expert.bn1.running_mean, torch.zeros(128))

    @pytest.mark.parametrize(
        ("place", "settings", "words"),
        [
            ("blocks", {}, "moe: 'blocks' is unknown.*did you mean 'block'"),
            ("block", {"stage": 5}, "stage: 5, but this network has 4, counted from 1"),
            ("block", {"stage": 0}, "stage: 0"),
            ("block", {"gate": "gap"}, "gate: 'gap' is unknown"),
            ("conv", {"top_k": 5}, "top_k: 5 is not possible, expected at most num_experts, 4"),
            ("conv", {"num_experts": 0}, "num_experts: 0"),
        ],
    )
    def test_impossible(self, place, settings, words):
        with pytest.raises(ConfigError, match=words):
            make(place, **settings)


class TestSparseModel:
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_forced_block_equals_the_path_by_hand(self, top_k, images):
        """layer4.1 is one expert; layer4.0 keeps routing."""
        model = lively(make(top_k=top_k))
        net = model.network
        for e in range(4):
            x = F.relu(net.bn1(net.conv1(model.normalize(images))))
            x = net.layer3(net.layer2(net.layer1(x)))
            x = net.layer4[1].experts[e](net.layer4[0](x))
            expected = net.linear(x.mean(dim=(2, 3)))
            assert torch.equal(model.expert(e)(images), expected)

    def test_forced_convolution_equals_the_path_by_hand(self, images):
        model = lively(make("conv"))
        net = model.network
        x = F.relu(net.bn1(net.conv1(model.normalize(images))))
        x = net.layer4[0](net.layer3(net.layer2(net.layer1(x))))
        block = net.layer4[1]
        for e in range(4):
            out = F.relu(block.bn1(block.conv1.experts[e](x)))
            out = F.relu(block.bn2(block.conv2(out)) + x)
            assert torch.equal(model.expert(e)(images), net.linear(out.mean(dim=(2, 3))))

    def test_images_of_an_expert_are_its_own(self, images):
        """With k = 1 the model gives each image the logits of the forced expert that it chose."""
        model = lively(make("residual"))
        chosen = model.gate_weights(images).argmax(dim=1)
        assert len(chosen.unique()) > 1
        for b, e in enumerate(chosen.tolist()):
            one = images[b : b + 1]
            torch.testing.assert_close(model(one), model.expert(e)(one))

    def test_any_layer_can_be_forced(self, images):
        model = lively(make())
        net = model.network
        forced = model.expert(3, "layer4.0")
        x = F.relu(net.bn1(net.conv1(model.normalize(images))))
        x = net.layer4[1](net.layer4[0].experts[3](net.layer3(net.layer2(net.layer1(x)))))
        assert torch.equal(forced(images), net.linear(x.mean(dim=(2, 3))))
        with pytest.raises(ConfigError, match=r"layer: 'layer3\.0' is unknown"):
            model.expert(0, "layer3.0")

    def test_weights_are_shared_and_the_model_stays(self, images):
        model = lively(make())
        before = model(images)
        forced = model.expert(1)
        assert {id(p) for p in forced.parameters()} < {id(p) for p in model.parameters()}
        dwf.pgd(
            forced,
            images,
            torch.zeros(16).long(),
            epsilon=0.1,
            step_size=0.1,
            num_steps=1,
            random_start=False,
        )
        assert torch.equal(model(images), before)
        with torch.no_grad():
            model.layers["layer4.1"].experts[1].bn2.bias.add_(1)
        assert not torch.equal(forced(images), model.expert(0)(images))
        assert torch.equal(forced(images), model.expert(1)(images))

    def test_a_single_sparse_layer_leaves_experts_that_can_be_planned(self, images):
        forced = lively(make("residual")).expert(2)
        assert isinstance(forced, PixelModel)
        plan = forced.attack_plan(torch.float32)
        plan.prepare(images)
        torch.testing.assert_close(plan(images), forced(images), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_gate_weights(self, top_k, images):
        model = lively(make(top_k=top_k))
        weights = model.gate_weights(images)
        p = model(images, return_aux=True).probabilities["layer4.1"]
        for b in range(16):
            chosen = p[b].argsort(descending=True)[:top_k]
            expected = torch.zeros(4)
            expected[chosen] = 1.0 if top_k == 1 else p[b, chosen] / (p[b, chosen].sum() + 1e-5)
            torch.testing.assert_close(weights[b], expected)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(16), rtol=0, atol=1e-4)

    def test_no_hook_stays(self, images):
        model = make()
        model.eval()(images, return_aux=True)
        assert not any(m._forward_hooks for m in model.modules())

    def test_state_dict_round_trip(self, images):
        model, other = lively(make(seed=1)), make(seed=2).eval()
        assert not torch.equal(model(images), other(images))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(images), other(images))

    def test_autocast(self, images):
        model = lively(make(top_k=2))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        assert logits.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_by_all_experts_as_by_the_chosen(monkeypatch, top_k):
    """What a graph for export computes; an expert nobody chose may overflow."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.45, 0.35, 0.2]])
    layer = SparseLayer([Scale(2), Scale(10), Scale(torch.inf)], Table(p.log()), top_k=top_k)
    x = numbered(3).abs() + 1
    x[:, 0, 0, 0] = torch.arange(3)
    layer.eval()
    expected = layer(x)
    assert bool(expected.isfinite().all())
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(layer(x), expected)
    assert layer.experts[2].rows == [3]
