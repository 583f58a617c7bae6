"""Plans of parts of networks, which read and return feature maps."""

from __future__ import annotations

import pytest
import torch
from plan_networks import BACK_ENDS, unless_missing
from torch import Tensor, nn

from dwf.models import Normalize
from dwf.models.networks import BasicBlock
from dwf.models.pre_activation import PreActBlock
from moe_kernels import CannotPlan, Plan
from moe_kernels.plan import choose


class Doubled(nn.Module):
    """Reads its map twice: by a convolution and in the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


# what it is, channels of the map, and those of what it returns
PARTS = {
    "block": (lambda: BasicBlock(16, 16, 1), 16, 16),
    "block of stride 2": (lambda: BasicBlock(24, 40, 2), 24, 40),
    "pre-activation": (lambda: PreActBlock(16, 32, 2), 16, 32),
    "two blocks": (lambda: nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1)), 16, 32),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(20, 12, 3, padding=1)), 20, 12),
    "pooling": (lambda: nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.MaxPool2d(2)), 16, 16),
    "read twice": (lambda: Doubled(16), 16, 16),
    "of an image": (
        lambda: nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), nn.Conv2d(3, 8, 3)),
        3,
        8,
    ),
}
SIZE = 9, 12


def made(name: str) -> tuple[nn.Module, int, int]:
    """A part in eval mode, with statistics that are not those of birth."""
    torch.manual_seed(0)
    make, C, O = PARTS[name]  # noqa: E741, as in layers.py
    part = make()
    for module in part.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return part.eval(), C, O


def normal(*shape: int, seed: int) -> Tensor:
    """Maps of both signs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_computes(plan: Plan, part: nn.Module, x: Tensor, tolerance: float) -> None:
    """Values and the gradient along some gradient, relative to their norms."""
    leaf = x.clone().requires_grad_()
    wanted = part(leaf)
    cotangent = normal(*wanted.shape, seed=5)
    (wanted_grad,) = torch.autograd.grad(wanted, leaf, cotangent)
    found, way_back = plan.differentiable(x)
    grad = way_back(cotangent)
    for ours, theirs in ((found, wanted.detach()), (grad, wanted_grad)):
        assert ours.dtype is torch.float32
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", PARTS)
def test_equals_autograd(name, back_end):
    unless_missing(back_end, torch.float32)
    part, C, _ = made(name)
    with choose.back_end(back_end):
        plan = Plan([part], dtype=torch.float32, maps=True)
        for count in (1, 5):
            assert_computes(plan, part, normal(count, C, *SIZE, seed=count), 1e-4)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1.1)
        plan.refresh()
        assert_computes(plan, part, normal(3, C, *SIZE, seed=7), 1e-4)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_bfloat16(back_end):
    unless_missing(back_end, torch.bfloat16)
    part, C, _ = made("two blocks")
    with choose.back_end(back_end):
        plan = Plan([part], dtype=torch.bfloat16, maps=True)
        assert_computes(plan, part, normal(4, C, *SIZE, seed=1), 0.1)


def test_batches_in_parts():
    """More images than run at once, in any memory format."""
    part, C, _ = made("block of stride 2")
    plan = Plan([part], dtype=torch.float32, maps=True)
    x = normal(700, C, *SIZE, seed=1)
    assert_computes(plan, part, x, 1e-4)
    assert_computes(plan, part, x.to(memory_format=torch.channels_last), 1e-4)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("size", [SIZE, (1, 1)])
def test_maps_may_change_in_place(back_end, size):
    """As by an activation behind the part, or by `x += part(x)`."""
    unless_missing(back_end, torch.float32)
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    with choose.back_end(back_end):
        plan = Plan([part], dtype=torch.float32, maps=True)
        x = normal(1, 16, *size, seed=1).to(memory_format=torch.channels_last)
        found, way_back = plan.differentiable(x)
        wanted = way_back(torch.ones_like(found))
        found, way_back = plan.differentiable(x)
        cotangent = torch.ones_like(found)
        x.zero_()
        found.neg_()
        assert torch.equal(way_back(cotangent), wanted)


def test_operations_are_those_of_the_convolutions():
    part, C, _ = made("convolution")
    plan = Plan([part], dtype=torch.float32, maps=True)
    plan.prepare(normal(1, C, *SIZE, seed=0))
    forward = 2 * 20 * 12 * 9 * SIZE[0] * SIZE[1]
    assert plan.gflop_per_image((C, *SIZE)) == pytest.approx(2e-9 * forward)


def test_declined_unless_asked_for():
    part, C, _ = made("convolution")
    with pytest.raises(CannotPlan, match="its output is not that of a linear layer"):
        Plan([part]).prepare(normal(1, C, *SIZE, seed=0))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("last", [nn.BatchNorm1d(7), nn.ReLU()], ids=["BatchNorm1d", "ReLU"])
def test_rows_behind_the_last_linear_layer_are_no_map(last, maps):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7), last
    )
    with torch.no_grad():
        for tensor in (x for x in last.state_dict().values() if x.is_floating_point()):
            tensor.add_(0.3)
    network.eval()
    images = normal(4, 3, *SIZE, seed=1)
    logits, way_back = Plan([network], maps=maps).differentiable(images)
    leaf = images.requires_grad_()
    truth = network(leaf)
    (expected,) = torch.autograd.grad(truth.sum(), leaf)
    torch.testing.assert_close(logits, truth.detach())
    torch.testing.assert_close(way_back(torch.ones_like(logits)), expected)
