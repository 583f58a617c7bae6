"""Pathways against loops over images and networks built by hand; the router's size; sparsity."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import make_images
from torch import nn

from dwf.checks import ConfigError, ModelOutputError
from dwf.models import RESNETS, Normalize, PathwayMixture, PathwayResNet, build_router
from dwf.models.networks import BasicBlock
from dwf.models.pathway_convs import PathwayConv2d, Taken
from dwf.models.pathways import AllPathways, route
from moe_kernels import PartPlans

B, E, K = 7, 3, 5

pytestmark = pytest.mark.usefixtures("one_thread")


def shaken(module, seed=0):
    """With statistics and BatchNorm weights that are not those of birth, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean):
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
                m.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def small_network(**options):
    return PathwayResNet((1, 1), num_pathways=E, num_classes=K, width=8, **options)


class FirstPixels(nn.Module):
    """A gate that prefers one pathway or another, by three pixels."""

    def forward(self, images):
        return images[:, 0, 0, :E] + 2 * images[:, 1, 1, :E].square()


@pytest.fixture
def mixture():
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return PathwayMixture(shaken(small_network()), FirstPixels(), normalize).eval()


@pytest.fixture
def images(mixture):
    found = make_images(B)
    assert (mixture.gate_weights(found).sum(dim=0) > 0).all()  # every pathway is used
    return found


class TestRoute:
    def test_by_hand(self):
        scores = torch.tensor([[1.0, 3.0, 2.0], [-320.0, -1e-30, -1.0], [5.0, 5.0, 1e30]])
        expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        assert torch.equal(route(scores), expected)

    def test_gradient_goes_to_the_chosen_score_alone(self):
        """As the released code's does; to all scores only for a view."""
        scores = torch.randn(B, E, requires_grad=True)
        cotangent = torch.randn(B, E)
        route(scores).backward(cotangent)
        chosen = torch.nn.functional.one_hot(scores.argmax(dim=1), E)
        assert torch.equal(scores.grad, cotangent * chosen)
        scores.grad = None
        route(scores, to_all=True).backward(cotangent)
        assert torch.equal(scores.grad, cotangent)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_is_no_choice(self, bad):
        scores = torch.tensor([[0.0, 1.0], [bad, 0.0]])
        found = route(scores)
        assert torch.equal(found[0], torch.tensor([0.0, 1.0]))
        assert not found[1].isfinite().all()


class TestConvolution:
    def test_by_hand(self):
        """The identity times 2 in pathway 0, times -1 in pathway 1."""
        conv = PathwayConv2d(1, 1, 2)
        conv.weight.data.zero_()
        conv.weight.data[:, 0, 1, 1] = torch.tensor([2.0, -1.0])
        x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(2, 1, 2, 2)
        found = conv(x, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        assert torch.equal(found[0, 0], torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
        assert torch.equal(found[1, 0], torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
        assert torch.equal(conv(x, Taken(1)), -x)
        weighted = conv(x, Taken(0, torch.tensor([3.0, 5.0])))
        assert torch.equal(weighted, torch.stack([6 * x[0], 10 * x[1]]))

    @pytest.mark.parametrize("stride", [1, 2])
    def test_loop_over_images(self, stride):
        """Values, and every gradient: the routing's is <gradient, slice> for each slice."""
        torch.manual_seed(0)
        conv = PathwayConv2d(4, 6, E, stride=stride).double()
        x = torch.randn(B, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        choice = torch.arange(B) % E
        routing = F.one_hot(choice, E).double().requires_grad_()
        found = conv(x, routing)
        cotangent = torch.randn_like(found)
        grads = torch.autograd.grad(found, (x, conv.weight, routing), cotangent)

        def slice_of(b, e):
            return F.conv2d(x[b : b + 1], conv.weight[6 * e : 6 * e + 6], None, stride, 1)[0]

        expected = torch.stack([slice_of(b, int(choice[b])) for b in range(B)])
        torch.testing.assert_close(found, expected)
        theirs = torch.autograd.grad(expected, (x, conv.weight), cotangent)
        torch.testing.assert_close(grads[:2], theirs)
        for b in range(B):
            for e in range(E):
                torch.testing.assert_close(
                    grads[2][b, e], (cotangent[b] * slice_of(b, e)).sum().detach()
                )
        for e in range(E):
            alone = torch.stack([slice_of(b, e) for b in range(B)])
            torch.testing.assert_close(conv(x, Taken(e)), alone)

    def test_starts_like_as_many_convolutions_of_torch(self):
        torch.manual_seed(0)
        weight = PathwayConv2d(16, 64, 4).weight.detach()
        bound = (16 * 9) ** -0.5
        assert weight.abs().max() <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)

    def test_memory_format_stays(self):
        last = torch.channels_last
        conv = PathwayConv2d(4, 6, E).to(memory_format=last)
        x = torch.rand(B, 4, 5, 5).to(memory_format=last)
        for routing in (Taken(1), torch.eye(E)[torch.arange(B) % E]):
            assert conv(x, routing).is_contiguous(memory_format=last)


class TestNetwork:
    def test_shape_of_the_paper(self):
        """16 convolutions in ResNet-18 of 32 to 256 channels a pathway; the rest is dense."""
        _, num_blocks = RESNETS["resnet18"]
        network = PathwayResNet(num_blocks)
        convs = [m for m in network.modules() if isinstance(m, PathwayConv2d)]
        stages = [32, 64, 128, 256]
        assert [len(m.weight) for m in convs] == [2 * c for c in stages for _ in range(4)]
        assert network.conv1.weight.shape == (64, 3, 3, 3)
        assert network.linear.weight.shape == (10, 256)
        dense = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert [m.kernel_size for m in dense] == [(3, 3)] + 4 * [(1, 1)]
        strides = [m.stride for m in convs]
        assert strides == [1] * 4 + 3 * [2, 1, 1, 1]

    @pytest.mark.parametrize("e", range(E))
    def test_forced_pathway_is_a_network_built_by_hand(self, e, mixture, images):
        network = mixture.network
        out = F.relu(network.bn1(network.conv1(mixture.normalize(images))))
        for block in network.blocks:
            state = block.state_dict()
            O = len(state["conv1.weight"]) // E  # noqa: E741, as in the layer
            for name in ("conv1.weight", "conv2.weight"):
                state[name] = state[name][e * O : (e + 1) * O]
            plain = BasicBlock(out.shape[1], O, block.conv1.stride).eval()
            plain.load_state_dict(state)
            out = plain(out)
        expected = network.linear(out.mean(dim=(2, 3)))
        torch.testing.assert_close(mixture.expert(e)(images), expected)

    def test_seed_alone_decides_the_weights(self):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first, router = small_network(seed=5), build_router(E, width=4, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        again, other = small_network(seed=5), small_network(seed=6)
        for name, value in first.named_parameters():
            assert torch.equal(value, again.get_parameter(name))
        conv = first.blocks[0].conv1.weight
        assert not torch.equal(conv, other.blocks[0].conv1.weight)
        assert not torch.equal(*conv.chunk(E)[:2])
        assert torch.equal(router.linear.weight, build_router(E, width=4, seed=5).linear.weight)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_pathways": 1}, "num_pathways: 1 is not possible, expected an integer >= 2"),
            ({"width_ratio": 0.05}, "width_ratio: 0.05 of width 8 leaves no channels.* 0.125"),
            ({"width_ratio": 0.0}, "width_ratio: 0.0 is not possible"),
            ({"width_ratio": float("nan")}, "width_ratio: nan is not possible"),
        ],
    )
    def test_impossible(self, options, message):
        with pytest.raises(ConfigError, match=message):
            PathwayResNet((1, 1), width=8, **options)


class TestRouter:
    def test_size_of_the_paper(self):
        router = build_router(2, seed=0)
        assert sum(p.numel() for p in router.parameters()) == 269_202
        assert router.linear.weight.shape == (2, 64)
        assert router(torch.rand(2, 3, 32, 32)).shape == (2, 2)

    def test_small_images(self):
        router = build_router(4, width=2, in_channels=1, seed=0)
        assert router(torch.rand(3, 1, 8, 8)).shape == (3, 4)
        assert [m.weight.shape[0] for m in router.modules() if isinstance(m, nn.Conv2d)] == (
            7 * [2] + 6 * [4] + 6 * [8]
        )

    def test_shortcut_by_hand(self):
        """Every second pixel, between channels of zeros."""
        shortcut = build_router(2, width=2, seed=0).layer2[0].shortcut
        x = torch.arange(32.0).view(1, 2, 4, 4)
        found = shortcut(x)
        assert found.shape == (1, 4, 2, 2)
        assert not found[0, [0, 3]].any()
        assert torch.equal(found[0, 1], torch.tensor([[0.0, 2.0], [8.0, 10.0]]))
        assert torch.equal(found[0, 2], torch.tensor([[16.0, 18.0], [24.0, 26.0]]))


class TestMixture:
    def test_each_image_takes_its_own_pathway(self, mixture, images):
        output = mixture(images, return_aux=True)
        choice = FirstPixels()(images).argmax(dim=1)
        expected = torch.stack([mixture.expert(int(e))(images)[b] for b, e in enumerate(choice)])
        torch.testing.assert_close(output.logits, expected)
        assert torch.equal(output.gate_logits, FirstPixels()(images))
        assert torch.equal(output.gate_weights, F.one_hot(choice, E).float())
        assert torch.equal(mixture.gate_weights(images), output.gate_weights)
        assert mixture.expert_names == ["pathway 0", "pathway 1", "pathway 2"]

    def test_only_chosen_pathways_are_computed(self, mixture, images):
        """The same logits, from B rows in each layer instead of E * B; in train mode from all."""
        rows = []
        for module in mixture.modules():
            if isinstance(module, PathwayConv2d):
                module.register_forward_hook(
                    lambda m, inputs, out: rows.append(
                        (m, len(inputs[0]) * (1 if isinstance(inputs[1], Taken) else E))
                    )
                )

        def computed():
            sums = {m: sum(n for other, n in rows if other is m) for m, _ in rows}
            rows.clear()
            return set(sums.values())

        routing = mixture.gate_weights(images)
        whole = mixture.network(mixture.normalize(images), routing).detach()
        assert computed() == {E * B}
        divided = mixture(images.clone().requires_grad_()).detach()
        assert computed() == {B}
        torch.testing.assert_close(divided, whole, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(mixture(images), divided)
        assert computed() == {B}
        copy.deepcopy(mixture).train()(images)
        assert computed() == {E * B}
        with torch.inference_mode():
            torch.testing.assert_close(mixture(images), whole, rtol=1e-5, atol=1e-6)

    def test_pathways_without_images(self, mixture, images):
        mixture.gate = nn.Sequential(nn.Flatten(), nn.Linear(192, E))
        nn.init.zeros_(mixture.gate[1].weight)
        mixture.gate[1].bias.data = torch.tensor([0.0, 0.0, 1.0])
        with torch.no_grad():
            torch.testing.assert_close(mixture(images), mixture.expert(2)(images))
            assert mixture(images[:0]).shape == (0, K)
        leaf = images.clone().requires_grad_()
        found = torch.autograd.grad(mixture(leaf).square().sum(), leaf)[0]
        other = images.clone().requires_grad_()
        wanted = torch.autograd.grad(mixture.expert(2)(other).square().sum(), other)[0]
        torch.testing.assert_close(found, wanted)  # this gate gives none

    @pytest.mark.parametrize("part", ["all", "bn1"])
    def test_batch_statistics_are_those_of_the_whole_batch(self, part, mixture, images):
        """In train mode, and where an attack has put BatchNorm into it, with and without tape."""
        (mixture if part == "all" else mixture.network.bn1).train()
        state = copy.deepcopy(mixture.state_dict())
        expected = mixture(images.clone().requires_grad_()).detach()
        mixture.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(mixture(images), expected)

    def test_gradient_goes_through_pathways_and_gate(self, mixture, images):
        """d logits / d x at fixed routing, plus that of the gate times d logits / d routing."""
        x = images.clone().requires_grad_()
        cotangent = torch.randn(B, K, generator=torch.Generator().manual_seed(0))
        mixture(x).backward(cotangent)

        other = images.clone().requires_grad_()
        routing = mixture.gate_weights(images).requires_grad_()
        mixture.network(mixture.normalize(other), routing).backward(cotangent)
        fixed = other.grad.clone()
        of_chosen = routing.grad * routing.detach()
        through_gate = torch.autograd.grad(FirstPixels()(other), other, of_chosen)[0]
        assert through_gate.abs().max() > 1e-3
        torch.testing.assert_close(x.grad, fixed + through_gate)

        z = images.clone().requires_grad_()
        mixture.surrogates()["gradient to all pathways"](z).backward(cotangent)
        to_all = torch.autograd.grad(FirstPixels()(other), other, routing.grad)[0]
        torch.testing.assert_close(z.grad, fixed + to_all)

        y = images.clone().requires_grad_()
        mixture(y, detach_gate=True).backward(cotangent)
        torch.testing.assert_close(y.grad, fixed)

    def test_scores_that_are_not_finite_break_their_images_alone(self, mixture, images):
        bad = images.clone()
        bad[2, 0, 0, 0] = torch.nan
        mixture.normalize = nn.Hardtanh()  # the network itself would survive
        mixture.network.conv1.weight.data[:, 0] = 0
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                logits = mixture(bad)
                assert logits[2].isnan().all()
                keep = [b for b in range(B) if b != 2]
                torch.testing.assert_close(logits[keep], mixture(images)[keep])
        assert not mixture.gate_weights(bad)[2].isfinite().all()

    def test_wrong_gate(self, mixture, images):
        mixture.gate = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        with pytest.raises(
            ModelOutputError, match=r"expected gate_logits \[7, 3\], found \[7, 2\]"
        ):
            mixture(images)

    def test_experts_share_weights(self, mixture):
        assert set(mixture.expert(0).parameters()) == set(mixture.network.parameters())
        with pytest.raises(IndexError):
            mixture.expert(E)

    def test_experts_follow_a_module_that_is_replaced(self, mixture, images):
        first = mixture.pathways
        assert mixture.pathways is first
        mixture.network.bn1 = nn.Identity()
        assert mixture.pathways is not first
        routing = torch.eye(E)[torch.ones(len(images), dtype=torch.int64)]
        expected = mixture.network(mixture.normalize(images), routing)
        torch.testing.assert_close(mixture.expert(1)(images), expected)

    def test_an_expert_has_a_plan(self, mixture, images):
        """Of a plain network of its slices of the weights, whatever they are at the time."""
        for factor in (1.0, 0.7):
            with torch.no_grad():
                for name, parameter in mixture.network.named_parameters():
                    if "conv" in name:
                        parameter.mul_(factor)
            expert = mixture.expert(1)
            plan = expert.attack_plan()
            torch.testing.assert_close(plan(images), expert(images).detach())
            assert "fused convolutions" in str(plan)

    @pytest.mark.parametrize("stem", [{}, {"stride": 2, "bias": True}])
    def test_all_pathways_have_a_plan(self, mixture, images, stem):
        """With weights for each image: logits, and the gradients of images and weights."""
        mixture.network.conv1 = nn.Conv2d(3, 8, 3, **{"padding": 1, "bias": False} | stem)
        whole = mixture.all_pathways
        assert mixture.all_pathways is whole
        weights = torch.rand(len(images), E).softmax(dim=1)
        x = AllPathways.with_planes(images, weights)
        torch.testing.assert_close(whole(x), mixture.network(images, weights))
        torch.testing.assert_close(whole.planned_as(x), whole(x))
        plan = PartPlans().of(whole, None)
        cotangent = torch.randn(len(images), K)
        found = []
        for f in (whole, plan):
            leaves = [y.clone().requires_grad_() for y in (images, weights)]
            logits = f(AllPathways.with_planes(*leaves))
            found.append((logits.detach(), *torch.autograd.grad(logits, leaves, cotangent)))
        assert plan.fault is None
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    def test_a_stem_of_another_kind_has_none(self, mixture, images):
        mixture.network.conv1 = nn.Sequential(nn.Conv2d(3, 8, 1))
        weights = torch.rand(len(images), E).softmax(dim=1)
        logits = mixture.all_pathways(AllPathways.with_planes(images, weights))
        torch.testing.assert_close(logits, mixture.network(images, weights))
        assert not hasattr(mixture.all_pathways, "planned_as")

    def test_state_dict_round_trip(self, images):
        def make(seed):
            return PathwayMixture(small_network(seed=seed), build_router(E, width=2, seed=seed))

        first, second = shaken(make(0)), make(1).eval()
        with torch.no_grad():
            assert not torch.equal(first(images), second(images))
            second.load_state_dict(first.state_dict())
            assert torch.equal(first(images), second(images))

    def test_bfloat16(self, mixture, images):
        """Under autocast layers stay in bfloat16, and both ways agree."""
        with torch.autocast("cpu", torch.bfloat16):
            whole = mixture(images.clone().requires_grad_())
            with torch.no_grad():
                divided = mixture(images)
        assert whole.dtype == divided.dtype == torch.bfloat16
        torch.testing.assert_close(whole, divided, rtol=0.05, atol=0.05)
