"""Networks in train mode by compiled kernels, held to plain autograd in float64."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_dtypes import DTYPES, dtypes
from small_runs import small_config
from torch import Tensor, nn
from torch.func import functional_call

from dwf.models import Mixture, MlpGate, Normalize
from dwf.models.networks import build_network
from dwf.progress import read_metrics
from dwf.training import train
from moe_kernels import TrainingPlan, TrainMode, implementation
from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.back_ends.simd_calls import instructions_for
from moe_kernels.plan.back_ends.simd_training import TrainingBackEnd
from moe_kernels.plan.back_ends.simd_weights import PackedWeights
from moe_kernels.plan.layers import Conv

float32 = pytest.mark.parametrize("dtype", DTYPES[1:])


class Odd(nn.Module):
    """What our ResNets lack: biases, norms with options, shared parts, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32, eps=1e-3, momentum=None)
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.plain = nn.BatchNorm2d(32, affine=False, momentum=0.3)
        self.down = nn.Conv2d(64, 40, 5, stride=2, padding=2)
        self.side = nn.Conv2d(40, 72, 1, stride=2)
        self.side_norm = nn.BatchNorm2d(72)
        self.main = nn.Conv2d(40, 72, 3, stride=2, padding=1)
        self.main_norm = nn.BatchNorm2d(72)
        self.head = nn.Linear(72, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.plain(self.conv(x)))
        y = self.conv(y) + x
        x = F.max_pool2d(F.relu(torch.cat([x, y], dim=1)), 2)
        x = F.relu(self.down(x))
        x = F.relu(self.main_norm(self.main(x)) + self.side_norm(self.side(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def network(name: str = "resnet18", width: int = 32, seed: int = 0) -> nn.Module:
    made: nn.Module
    if name == "odd":
        torch.manual_seed(seed)
        made = Odd()
    else:
        made = build_network(name, num_classes=7, width=width, in_channels=3, seed=seed)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):  # no norm is the identity
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.add_(0.1 * p.std(correction=0).clamp_min(0.1) * noise)
    return made.train()


def batch(count: int = 9, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, size, size, generator=generator)
    return images, torch.randint(0, 7, (count,), generator=generator)


def passed(model: nn.Module, call: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Everything that a pass makes or moves."""
    leaf = images.clone().requires_grad_()
    logits = call(leaf)
    F.cross_entropy(logits, labels).backward()
    assert leaf.grad is not None
    made = {"logits": logits.detach(), "images": leaf.grad}
    made |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return made | {name: b.clone() for name, b in model.named_buffers()}


def error(mine: Tensor, its: Tensor, floor: float) -> float:
    mine, its = mine.detach().double(), its.detach().double()
    return float((mine - its).norm() / (its.norm() + floor))


@float32
@pytest.mark.parametrize("name", ["resnet10", "preactresnet18", "wrn16_4", "odd"])
def test_float32_is_that_of_autograd_in_float64(name: str, dtype: torch.dtype) -> None:
    model, (images, labels) = network(name), batch()
    truth = copy.deepcopy(model).double()
    plan = TrainingPlan(model, dtype)
    assert plan.fault(images) is None
    for _ in range(2):  # statistics move on
        model.zero_grad()
        truth.zero_grad()
        ours = passed(model, plan, images, labels)
        theirs = passed(truth, truth, images.double(), labels)
        assert ours.keys() == theirs.keys()
        # the gradient of a bias in front of a BatchNorm is nothing but rounding
        worst = {x: error(ours[x], theirs[x], 1e-2) for x in ours}
        assert max(worst.values()) < 2e-4, worst


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_bfloat16_is_as_close_as_autocast(dtype: torch.dtype) -> None:
    model, (images, labels) = network("resnet10"), batch(16, 12)
    stock, truth = copy.deepcopy(model), copy.deepcopy(model)
    plan = TrainingPlan(model, dtype)
    assert plan.fault(images) is None

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = stock(x)
        return logits.float()

    theirs = passed(truth, truth, images, labels)
    mine, its = passed(model, plan, images, labels), passed(stock, autocast, images, labels)
    names = [name for name, _ in model.named_parameters()] + ["images", "logits"]
    errors = [
        sorted(error(made[x], theirs[x], 0.0) for x in names)[len(names) // 2]
        for made in (mine, its)
    ]
    assert errors[0] < 1.5 * errors[1] + 0.01


@float32
def test_a_frozen_parameter_gets_no_gradient(dtype: torch.dtype) -> None:
    model, (images, labels) = network("odd"), batch()
    truth = copy.deepcopy(model)
    for one in (model, truth):
        one.get_parameter("conv.weight").requires_grad_(False)
        one.get_parameter("main_norm.weight").requires_grad_(False)
    plan = TrainingPlan(model, dtype)
    assert plan.fits(images)
    ours, theirs = (passed(m, c, images, labels) for m, c in ((model, plan), (truth, truth)))
    assert ours.keys() == theirs.keys()
    assert "conv.weight" not in ours


@float32
def test_an_image_gradient_alone_leaves_parameters_alone(dtype: torch.dtype) -> None:
    model, (images, labels) = network("odd"), batch()
    plan = TrainingPlan(model, dtype)
    assert plan.fits(images)
    leaf = images.clone().requires_grad_()
    loss = F.cross_entropy(plan(leaf), labels)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)


@float32
def test_a_gradient_can_be_differentiated_again(dtype: torch.dtype) -> None:
    model, (images, labels) = network("odd"), batch()
    truth = copy.deepcopy(model)
    plan = TrainingPlan(model, dtype)
    assert plan.fits(images)
    found = []
    for one, call in ((model, plan), (truth, truth)):
        leaf = images.clone().requires_grad_()
        loss = F.cross_entropy(call(leaf), labels)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.square().sum().backward()
        found.append([p.grad for p in one.parameters() if p.grad is not None])
        found.append(list(one.buffers()))
    for mine, its in ((found[0], found[2]), (found[1], found[3])):
        assert len(mine) == len(its)
        assert all(error(a, b, 1e-2) < 1e-3 for a, b in zip(mine, its, strict=True))


@float32
def test_changed_weights_are_seen_and_told(dtype: torch.dtype) -> None:
    model, (images, labels) = network("odd"), batch()
    plan = TrainingPlan(model, dtype)
    assert plan.fits(images)
    before = plan(images)
    with torch.no_grad():
        model.get_parameter("conv.weight").mul_(1.5)
    assert error(plan(images), before, 0.0) > 1e-3
    assert error(plan(images), copy.deepcopy(model)(images), 0.0) < 1e-4
    logits = plan(images)
    with torch.no_grad():
        model.get_parameter("conv.weight").mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.cross_entropy(logits, labels).backward()


@float32
def test_what_it_does_not_fit(dtype: torch.dtype) -> None:
    model, (images, _) = network("odd"), batch()
    plan = TrainingPlan(model, dtype)
    assert plan.fits(images)
    assert not plan.fits(images.double())
    assert not plan.fits(images[0])
    model.get_submodule("plain").eval()
    assert not plan.fits(images)  # normalizes by its running statistics
    model.train()
    assert plan.fits(images)
    with pytest.raises(ValueError, match="more than one value"):
        plan(torch.rand(1, 3, 1, 1)) if plan.fits(torch.rand(1, 3, 1, 1)) else plan(images[:0])
    model.get_submodule("norm").register_forward_hook(lambda *_: None)
    assert not plan.fits(images)


class Dropping(nn.Sequential):
    """Draws random numbers in train mode, where the traced graph shows none."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


@float32
def test_a_forward_that_differs_in_train_mode_is_declined(dtype: torch.dtype) -> None:
    images, _ = batch()
    model = Dropping(network("odd")).train()
    assert not TrainingPlan(model, dtype).fits(images)
    assert TrainingPlan(model[0], dtype).fits(images)


@float32
@pytest.mark.parametrize("method", ["_before_norm", "_weight_gradient", "_normalized"])
def test_a_wrong_back_end_is_declined(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bugs: a gradient, a weight's gradient, an output; of one call among many."""
    right, calls = getattr(TrainingBackEnd, method), []

    def wrong(self: TrainingBackEnd, *args: Any, **options: Any) -> Any:
        calls.append(method)
        made = right(self, *args, **options)
        if len(calls) == 2:
            if isinstance(made, Tensor):
                made = made.mul_(1.8)
            else:
                made.affine[1] += 1
        return made

    monkeypatch.setattr(TrainingBackEnd, method, wrong)
    fault = TrainingPlan(network("odd"), dtype).fault(batch()[0])
    assert fault is not None
    assert "train mode" in str(fault)


def mixture() -> Mixture:
    experts = [network("resnet10" if e else "odd", seed=e) for e in range(2)]
    gate = MlpGate((3, 9, 9), 2, hidden=8, seed=1)
    return Mixture(experts, gate, Normalize((0.5,) * 3, (0.25,) * 3)).train()


@float32
def test_a_mixture_trains_as_it_would_by_itself(dtype: torch.dtype) -> None:
    model, (images, labels) = mixture(), batch()
    truth = copy.deepcopy(model)
    losses: list[list[float]] = [[], []]
    forward = TrainMode(model)
    for calls, one, found in ((forward, model, losses[0]), (truth, truth, losses[1])):
        optimizer = torch.optim.SGD(one.parameters(), 0.02, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(calls(images), labels)
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]  # the experts did run by other kernels
    assert all("forward" not in vars(x) for x in model.modules())


@float32
def test_train_mode_calls_the_model_itself_where_it_was_asked_to(dtype: torch.dtype) -> None:
    model, (images, _) = network("odd"), batch()
    forward = TrainMode(model)
    with implementation("reference"):
        assert torch.equal(forward(images), copy.deepcopy(model)(images))
    with torch.no_grad():
        assert torch.equal(forward(images), copy.deepcopy(model)(images))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(forward(images), copy.deepcopy(model)(images))
    assert not forward._found


@float32
def test_weights_that_are_computed_get_their_gradients(dtype: torch.dtype) -> None:
    """As adversarial weight perturbation calls it."""
    model, (images, labels) = network("odd"), batch()
    forward = TrainMode(model)
    found = []
    for call, prefix in ((forward, "module."), (copy.deepcopy(model), "")):
        base = dict(call.named_parameters())
        moved = {f"{prefix}conv.weight": base[f"{prefix}conv.weight"] * 1.1}
        F.cross_entropy(functional_call(call, moved, (images,)), labels).backward()
        found.append(base[f"{prefix}conv.weight"].grad)
    assert forward._found
    assert all(forward._found.values())
    assert error(found[0], found[1], 0.0) < 1e-4


# N, C, O, size, kernel, stride; odd numbers of images, ragged tiles, narrow and wide panels, sums
# in several chunks
GRADIENTS = [
    (3, 32, 64, 8, 3, 1),
    (4, 96, 32, 7, 3, 1),
    (1, 160, 128, 5, 3, 1),
    (41, 32, 32, 9, 3, 1),
    (5, 32, 48, 7, 3, 2),
    (3, 64, 32, 8, 1, 2),
    (2, 32, 16, 6, 5, 1),
    (41, 48, 32, 9, 3, 2),
    (150, 16, 32, 3, 1, 2),
]


@dtypes
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_of_weights_are_those_of_float64(
    case: tuple[int, ...], dtype: torch.dtype
) -> None:
    N, C, O, size, kernel, stride = case  # noqa: E741  (the letter of an axis)
    torch.manual_seed(0)
    conv = nn.Conv2d(C, O, kernel, stride, kernel // 2)
    x = torch.randn(N, C, size, size).to(dtype)
    out = F.conv2d(x.float(), conv.weight, None, stride, kernel // 2)
    grad = torch.randn_like(out).to(dtype)
    truth = torch.nn.grad.conv2d_weight(
        x.double(), conv.weight.shape, grad.double(), stride, kernel // 2
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = conv.to(memory_format=layout)
        mine = weight_gradient(conv, x, grad)
        assert mine.shape == truth.shape
        # each transform rounds once, as factors of up to 3.4
        assert error(mine, truth, 0.0) < (2e-2 if dtype is torch.bfloat16 else 1e-5)


def weight_gradient(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> Tensor:
    outputs, channels, kernel = conv.out_channels, conv.in_channels, conv.kernel_size[0]
    layer = Conv("conv", 1, 2, channels, outputs, (kernel, kernel), conv.stride[0], kernel // 2)
    weights = PackedWeights(x.dtype, instructions_for(x.dtype))
    weights.load([layer], [Weights(conv.weight.detach()[None], torch.zeros(1, outputs))])
    weights.of(layer, *x.shape[2:])
    back_end = TrainingBackEnd({}, {}, weights, x.dtype)
    source, given = (padded_value(y, weights.multiple) for y in (x, grad))
    return back_end._weight_gradient(layer, given, source, conv.weight.detach())


def padded_value(x: Tensor, multiple: int) -> Tensor:
    """[B, C, H, W] to [H, W, B, C], with zero channels up to a multiple."""
    return F.pad(x.permute(2, 3, 0, 1), (0, -x.shape[1] % multiple)).contiguous()


@pytest.mark.slow
@float32
def test_dwf_train_follows_the_reference(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four joint steps of three experts, in both precisions, beside plain autograd."""
    calls: list[torch.Size] = []
    right = TrainingPlan.__call__

    def counted(self: TrainingPlan, images: Tensor) -> Tensor:
        calls.append(images.shape)
        return right(self, images)

    monkeypatch.setattr(TrainingPlan, "__call__", counted)
    small = small_config("model.width=20", "joint.num_epochs=1", "log_every=1", "validate_every=0")
    losses = {}
    for name, precision in (("reference", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        with implementation("reference") if name == "reference" else contextlib.nullcontext():
            train(replace(small, pretrain=None, precision=precision), tmp_path / name, quiet=True)
        losses[name] = [x["loss"] for x in read_metrics(tmp_path / name) if x["kind"] == "train"]
        assert bool(calls) is (name != "reference")
    assert losses["fp32"] == pytest.approx(losses["reference"], rel=0.01)
    assert losses["bf16"] == pytest.approx(losses["reference"], rel=0.05)
