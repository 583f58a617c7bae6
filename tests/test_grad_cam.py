"""Grad-CAM against its formula, image by image, against captum, and against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwf.models import build_network
from dwf.models.grad_cam import captured, grad_cam, heatmaps
from dwf.models.torchvision_networks import LAST_LAYERS, build_torchvision_network

pytestmark = pytest.mark.usefixtures("one_thread")

B, K = 4, 5


class Smooth(nn.Module):
    """Feature maps, then everything that has a second derivative: softplus, tanh, two layers."""

    def __init__(self, seed=0, stride=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
            self.hidden = nn.Conv2d(3, 4, 3, padding=1)
            self.linear = nn.Linear(4, K)

    def forward(self, images):
        maps = F.softplus(self.hidden(torch.tanh(self.conv(images))))
        return self.linear(maps.mean(dim=(2, 3)))


def batch(dtype=torch.float32, channels=2, size=6):
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(B, channels, size, size, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.tensor([0, 3, 1, 4])


def maps_of(network, layer, images, labels, create_graph=True):
    with captured([layer]) as features:
        logits = network(images)
    scores = logits[torch.arange(len(labels)), labels]
    (cam,) = grad_cam(scores, features, create_graph=create_graph)
    return cam


def slow_cam(network, layer, images, labels):
    """ReLU(sum_c mean_v(d logit_y / d A_c(v)) A_c(u)), one image, map and place at a time."""
    result = []
    for b in range(len(images)):
        with captured([layer]) as features:
            logits = network(images[b : b + 1])
        (grad,) = torch.autograd.grad(logits[0, labels[b]], features)
        A, g = features[0][0].detach(), grad[0]
        C, h, w = A.shape
        cam = torch.zeros(h, w)
        for i in range(h):
            for j in range(w):
                total = 0.0
                for c in range(C):
                    alpha = sum(float(g[c, r, s]) for r in range(h) for s in range(w)) / (h * w)
                    total += alpha * float(A[c, i, j])
                cam[i, j] = max(total, 0.0)
        result.append(cam)
    return torch.stack(result)


def test_by_hand():
    """Two maps on a 1x2 grid, score = 3 A_0(0) - A_1(1)^2: alpha = (3, -2 A_1(1)) / 2."""
    A = torch.tensor([[[[2.0, 0.5]], [[1.0, 1.0]]]], requires_grad=True)
    score = 3 * A[:, 0, 0, 0] - A[:, 1, 0, 1] ** 2
    (cam,) = grad_cam(score, [A])
    # alpha = (1.5, -1): 1.5 * 2 - 1 = 2, and 1.5 * 0.5 - 1 < 0
    assert torch.equal(cam, torch.tensor([[[2.0, 0.0]]]))
    # cam(0) = 1.5 A_0(0) - A_1(1) A_1(0): its gradient needs that of alpha
    (grad,) = torch.autograd.grad(cam.sum(), A)
    assert torch.equal(grad, torch.tensor([[[[1.5, 0.0]], [[-1.0, -1.0]]]]))


@pytest.mark.parametrize("seed", range(3))
def test_slow_loop(seed):
    network = Smooth(seed)
    images, labels = batch()
    ours = maps_of(network, network.conv, images, labels)
    assert (ours > 0).any()
    torch.testing.assert_close(ours.detach(), slow_cam(network, network.conv, images, labels))


@pytest.mark.parametrize("training", [False, True])
def test_rows_do_not_see_each_other_behind_the_last_stage(training):
    """Of our ResNets also with batch statistics: the gradient of the sum is each image's own."""
    network = build_network("resnet6", num_classes=K, width=4, in_channels=2, seed=0)
    network.train(training)
    images, labels = batch(size=8)
    ours = maps_of(network, network.layer2, images, labels)
    with captured([network.layer2]) as features:
        network(images)
    A = features[0]
    alpha = network.linear.weight[labels] / A[0, 0].numel()  # [B, C]: the head is linear
    torch.testing.assert_close(ours, (alpha[:, :, None, None] * A).sum(1).relu())


def test_captum():
    captum = pytest.importorskip("captum.attr")
    network = build_network("resnet8", num_classes=K, width=4, in_channels=2, seed=1).eval()
    smooth = Smooth(3)
    for model, layer, size in (
        (network, network.layer3, 16),
        (network, network.layer1, 8),
        (smooth, smooth.conv, 6),
        (smooth, smooth.hidden, 6),
    ):
        images, labels = batch(size=size)
        theirs = captum.LayerGradCam(model, layer).attribute(
            images, target=labels, relu_attributions=True
        )
        ours = maps_of(model, layer, images, labels)
        assert (ours > 0).any()
        torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-5, atol=1e-7)


class TestSecondDerivatives:
    """A loss of heatmaps, differentiated by our graph and by central differences in float64."""

    @staticmethod
    def loss(network, images, labels):
        cam = maps_of(network, network.conv, images, labels)
        weights = torch.arange(cam[0].numel(), dtype=cam.dtype).view_as(cam[0]).sin()
        return (heatmaps([cam])[0] * weights).sum() + (cam**2).sum()

    @pytest.mark.parametrize("seed", range(3))
    def test_finite_differences(self, seed):
        network = Smooth(seed).double()
        images, labels = batch(torch.float64)
        self.loss(network, images, labels).backward()
        generator = torch.Generator().manual_seed(seed)
        for name, p in network.named_parameters():
            direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.add_(step * direction)
                values.append(self.loss(network, images, labels).item())
                with torch.no_grad():
                    p.sub_(step * direction)
            expected = (values[0] - values[1]) / 2e-5
            # what comes after the maps moves them by way of alpha alone
            actual = 0.0 if p.grad is None else float((p.grad * direction).sum())
            assert math.isclose(actual, expected, rel_tol=1e-5, abs_tol=1e-8), name
        assert network.linear.weight.grad.abs().sum() > 0
        assert network.hidden.weight.grad.abs().sum() > 0

    def test_a_first_order_graph_would_be_wrong(self):
        """The gradient that treats alpha as a constant misses the layers behind the maps."""
        network = Smooth()
        images, labels = batch()
        cam = maps_of(network, network.conv, images, labels, create_graph=False)
        cam.sum().backward()
        assert network.linear.weight.grad is None
        assert network.conv.weight.grad.abs().sum() > 0


class TestHeatmaps:
    def test_sum_to_one_and_zero_is_uniform(self):
        maps = torch.tensor([[[3.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
        maps.requires_grad_()
        found = heatmaps([maps])
        assert torch.equal(found[0, 0], torch.tensor([[0.75, 0.25], [0.0, 0.0]]))
        assert torch.equal(found[0, 1], torch.full((2, 2), 0.25))
        found[0, :, 0, 0].sum().backward()
        # d (a / s) / da = (s - a) / s^2 = 1/16, else -a / s^2 = -3/16; nothing for the empty map
        expected = torch.tensor([[[1 / 16, -3 / 16], [-3 / 16, -3 / 16]], [[0.0, 0.0], [0.0, 0.0]]])
        torch.testing.assert_close(maps.grad, expected)

    def test_common_grid(self):
        fine = torch.arange(1.0, 17).view(1, 4, 4)
        coarse = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        found = heatmaps([fine, coarse])
        assert found.shape == (2, 1, 2, 2)
        # sums of 2x2 blocks: 1 + 2 + 5 + 6 and so on, of 136
        expected = torch.tensor([[14.0, 22.0], [46.0, 54.0]]) / 136
        torch.testing.assert_close(found[0, 0], expected)
        assert torch.equal(found[1, 0], coarse[0] / 2)

    @pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e30])
    def test_extreme_maps_have_finite_gradients(self, scale):
        maps = (scale * torch.rand(2, 3, 3)).requires_grad_()
        heatmaps([maps])[0, :, 1].sum().backward()
        assert maps.grad.isfinite().all()


class TestCaptured:
    def test_hooks_are_gone_even_after_an_error(self):
        network = Smooth()
        with pytest.raises(KeyError), captured([network.conv]):
            raise KeyError
        with captured([network.conv]) as features:
            network(batch()[0])
        network(batch()[0])
        assert len(features) == 1
        assert not network.conv._forward_hooks

    def test_a_frozen_network(self):
        network = Smooth()
        images, labels = batch()
        expected = maps_of(network, network.conv, images, labels).detach()
        network.requires_grad_(False)
        assert torch.equal(maps_of(network, network.conv, images, labels).detach(), expected)

    def test_without_gradients_it_only_looks(self):
        network = Smooth()
        with torch.no_grad(), captured([network.conv]) as features:
            network(batch()[0])
        assert not features[0].requires_grad


class TestTorchvisionNetworks:
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("name", LAST_LAYERS)
    def test_last_layer(self, name, frozen):
        """What is captured is what the linear layer sees the mean of, rectified."""
        network = build_torchvision_network(name, num_classes=K, width=8, in_channels=1, seed=0)
        network.eval().requires_grad_(not frozen)
        images, labels = batch(channels=1, size=32)
        layer = network.get_submodule(LAST_LAYERS[name])
        head = network.fc if name == "googlenet" else network.classifier
        ours = maps_of(network, layer, images, labels)
        with torch.no_grad(), captured([layer]) as features, captured([head]) as logits:
            network(images)
        A = features[0]
        assert A.shape[2:] == (4, 4)
        assert (A >= 0).all()
        torch.testing.assert_close(head(A.mean(dim=(2, 3))), logits[0])
        cam = (head.weight[labels][:, :, None, None] / 16 * A).sum(dim=1).relu()
        torch.testing.assert_close(ours, cam, rtol=1e-4, atol=1e-6)

    def test_seeds_decide(self):
        state = torch.get_rng_state()
        weights = [
            build_torchvision_network("densenet121", num_classes=K, width=4, in_channels=1, seed=s)
            .get_submodule("features.conv0")
            .weight
            for s in (0, 0, 1)
        ]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert torch.equal(torch.get_rng_state(), state)
