"""A plan computes what its networks compute: logits and input gradients, on every back end."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from plan_networks import (
    BACK_ENDS,
    ConvNext,
    Dense,
    MobileBlocks,
    Skips,
    Stems,
    TwoLayerHead,
    Vgg,
    resnet,
    seeded,
    unless_missing,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn

import moe_kernels
from dwf.models import MlpGate, Normalize, PreActResNet, WideResNet, build_network
from moe_kernels.plan import CannotPlan, Plan, build, choose

DTYPES = [torch.float32, torch.bfloat16]
# Of all elements together, by their norm: where rounding moves a ReLU over zero a gradient jumps,
# and plain torch's does at other places than ours. The tests of the back ends hold single layers to
# every element.
SLACK = 2
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def torchvision_model(name: str, **options: object) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.get_model(name, num_classes=10, **options)


def timm_model(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, num_classes=10)


# name -> how to make it, [H, W], batch
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]] = {
    "resnet18-32px": (lambda: resnet("resnet18", 8), (32, 32), 5),
    "resnet18-8px": (lambda: resnet("resnet18", 16), (8, 8), 3),
    "resnet18-odd": (lambda: resnet("resnet18", 10), (15, 9), 2),
    "resnet18-64px": (lambda: resnet("resnet18", 8), (64, 64), 1),
    "resnet6-257": (lambda: resnet("resnet6", 8), (8, 8), 257),
    "resnet34": (lambda: resnet("resnet34", 8), (16, 16), 12),
    "resnet50": (lambda: resnet("resnet50", 4), (16, 16), 2),
    "vgg": (lambda: seeded(Vgg), (32, 32), 3),
    "vgg-without-norm": (lambda: seeded(lambda: Vgg(batch_norm=False)), (32, 32), 2),
    "two-layer-head": (lambda: seeded(TwoLayerHead), (17, 22), 4),
    "skips": (lambda: seeded(Skips), (11, 8), 3),
    "pre-activation": (lambda: seeded(lambda: PreActResNet((1, 1, 2, 1), width=8)), (16, 16), 3),
    "wide": (lambda: seeded(lambda: WideResNet(1, width=12)), (9, 12), 3),
    "dense": (lambda: seeded(Dense), (12, 12), 3),
    "normalized": (
        lambda: nn.Sequential(Normalize(MEAN, STD), resnet("resnet10", 8)),
        (16, 16),
        3,
    ),
    "torchvision-resnet18": (lambda: seeded(lambda: torchvision_model("resnet18")), (64, 64), 1),
    "torchvision-resnet50": (lambda: seeded(lambda: torchvision_model("resnet50")), (32, 32), 1),
    "torchvision-vgg11": (lambda: seeded(lambda: torchvision_model("vgg11_bn")), (32, 32), 1),
    "mobile-blocks": (lambda: seeded(MobileBlocks), (13, 16), 6),
    "convnext": (lambda: seeded(ConvNext), (12, 12), 4),
    "stems": (lambda: seeded(lambda: Stems(groups=1)), (12, 10), 4),
    "stems-grouped": (lambda: seeded(Stems), (12, 10), 4),
    "timm-resnet34": (lambda: seeded(lambda: timm_model("resnet34")), (32, 32), 1),
}
# Networks of seconds, and the dtype in which they are in every run of the tests.
LARGE = {
    "torchvision-resnet18": torch.bfloat16,
    "torchvision-resnet50": None,
    "timm-resnet34": None,
    "torchvision-vgg11": None,
}
NOT_IN_SLABS = {"mobile-blocks", "convnext", "stems-grouped"}
SLOW_IN_SLABS = {"torchvision-vgg11", "torchvision-resnet50", "timm-resnet34", "resnet18-64px"}


@pytest.fixture(params=BACK_ENDS)
def back_end(request):
    """Plans in the test run on this back end."""
    with choose.back_end(request.param):
        yield request.param


def images_of(size: tuple[int, int], batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def labels_of(batch: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randint(num_classes, (batch,), generator=torch.Generator().manual_seed(seed))


def by_autograd(model: nn.Module, labels: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Input gradient and logits in the dtype of the images, as plain torch computes them."""

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        own = copy.deepcopy(model).to(images.dtype).eval()
        leaf = images.detach().requires_grad_()
        logits = own(leaf).to(torch.promote_types(images.dtype, torch.float32))
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)
        return grad.to(logits.dtype), logits.detach()

    return run


class Mixed(nn.Module):
    """The mixture that a plan of several networks computes, in plain torch."""

    def __init__(self, networks: list[nn.Module], gate: nn.Module) -> None:
        super().__init__()
        self.networks, self.gate = nn.ModuleList(networks), gate

    def forward(self, images: Tensor) -> Tensor:
        weights = self.gate(images).softmax(dim=1)
        return sum(
            weights[:, e : e + 1] * network(images) for e, network in enumerate(self.networks)
        )


def gate_of(size: tuple[int, int], num_experts: int) -> MlpGate:
    gate = MlpGate((3, *size), num_experts, hidden=8)
    nn.init.normal_(gate.layers[-1].weight, generator=torch.Generator().manual_seed(1))
    return gate.eval()


def check(plan: Plan, model: nn.Module, images: Tensor, num_classes: int = 10) -> None:
    """Gradient and logits of a plan are at most twice as far from the truth as plain torch's."""
    labels = labels_of(len(images), num_classes)
    reference = by_autograd(model, labels)
    found, plain = plan.gradient(images.float(), labels), reference(images)
    for ours, theirs, truth in zip(found, plain, reference(images.double()), strict=True):
        assert ours.dtype is torch.float32
        assert ours.shape == truth.shape
        error, its = ((x.double() - truth).norm() for x in (ours, theirs))
        allowed = SLACK * its + FLOOR[images.dtype] * truth.norm()
        assert error <= allowed, f"{error:.3g}, plain torch {its:.3g} of {truth.norm():.3g}"


ONE_NETWORK = [
    pytest.param(
        name,
        dtype,
        id=f"{name}-{dtype}",
        marks=pytest.mark.slow if name in LARGE and dtype is not LARGE[name] else (),
    )
    for name, dtype in itertools.product(NETWORKS, DTYPES)
]


@pytest.mark.parametrize(("name", "dtype"), ONE_NETWORK)
def test_one_network(name, dtype, back_end):
    unless_missing(back_end, dtype)
    if back_end == "slab" and name in SLOW_IN_SLABS:
        pytest.skip("the definition of a slab convolution is slow")
    if back_end == "slab" and name in NOT_IN_SLABS:
        pytest.skip("slabs have no grouped convolutions")
    make, size, batch = NETWORKS[name]
    network = make()
    images = images_of(size, batch).to(dtype)
    classes = 7 if name in ("skips", "dense") else 10
    plan = Plan([network], dtype=dtype)
    check(plan, network, images, classes)
    assert back_end in plan.back_end


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [1, 3, 16])
def test_mixture(num_experts, dtype, back_end):
    unless_missing(back_end, dtype)
    networks = [resnet("resnet6", 8, seed=e) for e in range(num_experts)]
    gate = gate_of((8, 8), num_experts)
    plan = Plan(networks, gate, dtype=dtype)
    images = images_of((8, 8), 5).to(dtype)
    check(plan, Mixed(networks, gate), images)
    logits = plan(images.float())
    torch.testing.assert_close(logits, plan.gradient(images.float(), labels_of(5, 10))[1])


def test_experts_of_several_architectures(back_end):
    unless_missing(back_end, torch.float32)
    networks = [resnet("resnet6", 8), seeded(Vgg), resnet("resnet6", 8, seed=3), seeded(Vgg, 5)]
    gate = gate_of((32, 32), 4)
    plan = Plan(networks, gate, dtype=torch.float32)
    check(plan, Mixed(networks, gate), images_of((32, 32), 2))


def test_independent_networks(back_end):
    """Block e of the batch is attacked on network e: results are those of plans of one network."""
    unless_missing(back_end, torch.float32)
    networks = [resnet("resnet6", 8, seed=e) for e in range(3)]
    images, labels = images_of((8, 8), 12), labels_of(12, 10)
    together = Plan(networks, independent=True, dtype=torch.float32)
    grad, logits = together.gradient(images, labels)
    for e, network in enumerate(networks):
        block = slice(4 * e, 4 * e + 4)
        alone = Plan([network], dtype=torch.float32).gradient(images[block], labels[block])
        torch.testing.assert_close(grad[block], alone[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(logits[block], alone[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="10 images do not divide among 3"):
        together.gradient(images[:10], labels[:10])


def test_another_loss(back_end):
    unless_missing(back_end, torch.float32)
    networks = [resnet("resnet6", 8, seed=e) for e in range(2)]
    gate = gate_of((8, 8), 2)

    def margin(logits, labels):
        right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        return logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(dim=1) - right

    images, labels = images_of((8, 8), 4), labels_of(4, 10)
    found, _ = Plan(networks, gate, dtype=torch.float32).gradient(images, labels, margin)
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(margin(Mixed(networks, gate)(leaf), labels).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("independent", [False, True])
def test_a_loss_of_rows(independent):
    """What goes with an image may be a row of numbers; a batch in parts is cut everywhere alike."""
    networks = [resnet("resnet6", 8, seed=e) for e in range(2)]
    plan = Plan(
        networks if independent else networks[:1], independent=independent, dtype=torch.float32
    )
    images, rows = images_of((8, 8), 280), torch.rand(280, 10)

    def distance(logits, rows):
        return (logits - rows).square().sum(dim=1)

    found, _ = plan.gradient(images, rows, distance)
    blocks = zip(images.chunk(2), rows.chunk(2), networks, strict=True)
    for i, (block, its_rows, network) in enumerate(blocks):
        leaf = block.clone().requires_grad_()
        network = network if independent else networks[0]
        (expected,) = torch.autograd.grad(distance(network(leaf), its_rows).sum(), leaf)
        own = found[140 * i : 140 * (i + 1)]
        # a ReLU may cut elsewhere where its input is a rounding error from zero
        right = torch.isclose(own, expected, rtol=1e-3, atol=1e-5).flatten(1).all(dim=1)
        assert right.float().mean() >= 0.98


def test_refresh_takes_over_new_weights_and_nothing_before(back_end):
    unless_missing(back_end, torch.float32)
    network = resnet("resnet6", 8)
    images, labels = images_of((8, 8), 3), labels_of(3, 10)
    plan = Plan([network], dtype=torch.float32)
    before = plan.gradient(images, labels)[0]
    with torch.no_grad():
        network.conv1.weight.mul_(1.5)
        network.bn1.running_mean.add_(0.1)
    assert torch.equal(plan.gradient(images, labels)[0], before)
    plan.refresh()
    after = plan.gradient(images, labels)[0]
    fresh = Plan([network], dtype=torch.float32).gradient(images, labels)[0]
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_large_batches_run_in_parts(back_end):
    unless_missing(back_end, torch.float32)
    network = resnet("resnet6", 8)
    images, labels = images_of((8, 8), 150), labels_of(150, 10)
    plan = Plan([network], dtype=torch.float32)
    grad, logits = plan.gradient(images, labels)
    part, part_logits = plan.gradient(images[140:], labels[140:])
    torch.testing.assert_close(grad[140:], part, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits[140:], part_logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(plan(images), logits)


@pytest.fixture(scope="module")
def trained_on_digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network after a few epochs of adversarial training, and images that it never saw."""
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = (images.float() / 16).view(-1, 1, 8, 8)
    network = build_network("resnet6", num_classes=10, width=48, in_channels=1, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    for _ in range(150):
        rows = torch.randint(1500, (64,), generator=generator)
        leaf = images[rows].requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(network(leaf), labels[rows]), leaf)
        attacked = (leaf.detach() + 0.1 * grad.sign()).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(network(attacked), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return network.eval(), images[1500:], labels[1500:]


@pytest.mark.slow
def test_sign_agreement_of_bfloat16(trained_on_digits, back_end):
    """The direction of an attack step survives bfloat16, most of all where it matters."""
    unless_missing(back_end, torch.bfloat16)
    network, images, labels = trained_on_digits
    ours, logits = Plan([network], dtype=torch.bfloat16).gradient(images, labels)
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.8
    truth, _ = by_autograd(network, labels)(images)
    wrong = ours.sign() != truth.sign()
    assert wrong.double().mean() <= 0.03
    assert truth.abs()[wrong].sum() <= 0.001 * truth.abs().sum()


def test_nothing_changes(back_end):
    """Modes, buffers, gradients and random state are the caller's, before and after."""
    unless_missing(back_end, torch.float32)
    network = resnet("resnet6", 8).train()
    network.layer1.eval()
    state = copy.deepcopy(network.state_dict())
    modes = [x.training for x in network.modules()]
    random_state = torch.get_rng_state()
    Plan([network], dtype=torch.float32).gradient(images_of((8, 8), 2), labels_of(2, 10))
    assert [x.training for x in network.modules()] == modes
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_public_names_and_what_they_print():
    plan = moe_kernels.Plan([resnet("resnet6", 8)], dtype=torch.float32)
    assert moe_kernels.CannotPlan is CannotPlan
    assert repr(plan) == "Plan(1 networks, not run yet)"
    with choose.back_end("aten"):
        plan.prepare(images_of((8, 8), 2))
    assert repr(plan) == "Plan(1 networks, aten float32)"
    assert str(plan).endswith("images 3x8x8: 1 of 5 fused convolutions each, aten float32")


def test_count_of_operations():
    """ResNet-18 at 32x32: 1.11 GFLOP forward, twice that with the input gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    network = resnet("resnet18", 16)
    plan = Plan([network])
    images = images_of((32, 32), 1)
    plan.prepare(images)
    with FlopCounterMode(display=False) as counter:
        network(images)
    assert plan.gflop_per_image((3, 32, 32)) == pytest.approx(2e-9 * counter.get_total_flops())
    assert plan.gflop_per_image((3, 16, 16)) is None


# What cannot be planned -------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module, function: Callable) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.network, images)


class Squash(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv, self.middle = nn.Conv2d(3, 8, 3, padding=1), middle
        self.linear = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.middle(self.conv(images)).mean(dim=(2, 3)))


class Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


class TwoScales(nn.Module):
    """Reads the image in two normalizations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)
        self.linear = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        sides = self.a(images) + self.b(images * 2)
        return self.linear(torch.relu(sides).mean(dim=(2, 3)))


class Optional(nn.Module):
    """Takes more than images, all with defaults or all without."""

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet("resnet6", 8)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, twice: bool = False
    ) -> Tensor:
        if mask is not None:
            images = images * mask
        images = images / scale
        return self.network(images - 0.5) if not twice else self.network(self.network(images))


class TwoInputs(Optional):
    def forward(self, images: Tensor, other: Tensor) -> Tensor:
        return self.network(images + other)


def test_arguments_beside_the_images_have_their_defaults(back_end):
    unless_missing(back_end, torch.float32)
    network, images, labels = Optional().eval(), images_of((8, 8), 3), labels_of(3, 10)
    grad, logits = Plan([network], dtype=torch.float32).gradient(images, labels)
    leaf = images.clone().requires_grad_()
    wanted = network(leaf)
    F.cross_entropy(wanted, labels, reduction="sum").backward()
    torch.testing.assert_close(logits, wanted.detach(), rtol=1e-4, atol=1e-5)
    assert (grad - leaf.grad).norm() <= 1e-4 * leaf.grad.norm()


NOT_PLANNED = {
    "a second input, other": TwoInputs,
    "middle is a PReLU": lambda: Squash(nn.PReLU()),
    "middle is dilated or": lambda: Squash(nn.Conv2d(8, 8, 3, padding=2, dilation=2)),
    "middle is dilated or does not pad": lambda: Squash(
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    ),
    "bn cannot normalize": lambda: nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU(), bn=nn.BatchNorm2d(3))
    ),
    "middle keeps no running statistics": lambda: Squash(
        nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "cannot trace it": lambda: nn.Sequential(Branches(), resnet("resnet6", 8)),
    "it calls softmax": lambda: Wrapped(
        resnet("resnet6", 8), lambda network, x: network(x).softmax(dim=1)
    ),
    "not that of a linear layer": lambda: nn.Sequential(nn.Conv2d(3, 8, 3)),
    "reads something that is not a feature map|computes with": lambda: Wrapped(
        resnet("resnet6", 8), lambda network, x: network(x) * 2
    ),
    "it draws random numbers": lambda: Wrapped(
        resnet("resnet6", 8), lambda network, x: network((x - torch.rand(3, 1, 1)) / 0.2)
    ),
    "b reads the image in another normalization": TwoScales,
}


@pytest.mark.parametrize("reason", NOT_PLANNED)
def test_declined_with_the_reason(reason):
    with pytest.raises(CannotPlan, match=reason):
        Plan([NOT_PLANNED[reason]().eval()]).prepare(images_of((8, 8), 2))


def test_hooks_are_not_overlooked():
    network = resnet("resnet6", 8)
    network.layer1.register_forward_hook(lambda module, inputs, output: output * 0)
    with pytest.raises(CannotPlan, match="layer1 has hooks"):
        Plan([network]).prepare(images_of((8, 8), 2))


def test_logits_that_are_not_finite_are_left_to_autograd():
    network = resnet("resnet6", 8)
    nn.init.constant_(network.linear.bias, torch.nan)
    with pytest.raises(CannotPlan, match="differ from the module's"):
        Plan([network]).prepare(images_of((8, 8), 2))


def test_a_back_end_that_is_wrong_is_not_used(monkeypatch, caplog):
    """The next one runs, and the log says so."""
    unless_missing("slab", torch.float32)
    network = resnet("resnet6", 8)
    images, labels = images_of((8, 8), 2), labels_of(2, 10)
    device = torch.device("cpu")
    wrong, right = (choose.option(name, device, torch.float32) for name in ("slab", "aten"))
    broken = wrong.make

    def breaks():
        back_end = broken()
        head = back_end.head
        back_end.head = lambda layer, source: head(layer, source) + 1.0
        return back_end

    monkeypatch.setattr(
        "moe_kernels.plan.build.options", lambda *_: [wrong._replace(make=breaks), right]
    )
    plan = Plan([network], dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "moe_kernels"):
        plan.gradient(images, labels)
    assert "aten" in plan.back_end
    assert "the slab back end is not used" in caplog.text


def failing(option, *, in_layer: str, from_batch: int, error: type[Exception] = RuntimeError):
    """A back end without a kernel for some batches, as libraries say it: when they are asked."""

    def make():
        back_end = option.make()
        layer = getattr(back_end, in_layer)

        def asked(*args, **settings):
            source = args[1]
            if (len(source) if isinstance(source, Tensor) else source.num_images) >= from_batch:
                raise error("GET was unable to find an engine\nmore")
            return layer(*args, **settings)

        setattr(back_end, in_layer, asked)
        return back_end

    return option._replace(make=make)


def plan_on(monkeypatch, *options) -> Plan:
    monkeypatch.setattr("moe_kernels.plan.build.options", lambda *_: list(options))
    return Plan([resnet("resnet6", 8)], dtype=torch.float32)


@pytest.mark.parametrize("from_batch", [1, 4], ids=["at the check", "at a larger batch"])
@pytest.mark.parametrize("in_layer", ["conv", "conv_input_grad"])
def test_a_back_end_that_fails_is_not_used(in_layer, from_batch, monkeypatch, caplog):
    build._log_once.cache_clear()
    device = torch.device("cpu")
    slab, aten = (choose.option(name, device, torch.float32) for name in ("slab", "aten"))
    plan = plan_on(monkeypatch, failing(slab, in_layer=in_layer, from_batch=from_batch), aten)
    with caplog.at_level(logging.WARNING, "moe_kernels"):
        for batch in (2, 5, 5, 2):
            images, labels = images_of((8, 8), batch), labels_of(batch, 10)
            _, logits = plan.gradient(images, labels)
            expected = plan._request.networks[0].eval()(images).detach()
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-5)
    assert plan.back_end == "aten float32"
    said = [x.message for x in caplog.records if "GET was unable to find an engine" in x.message]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert "slab" in said[0]


def test_where_all_back_ends_fail_there_is_no_plan(monkeypatch, caplog):
    device = torch.device("cpu")
    aten = choose.option("aten", device, torch.float32)
    plan = plan_on(monkeypatch, failing(aten, in_layer="conv", from_batch=4))
    plan.gradient(images_of((8, 8), 2), labels_of(2, 10))
    with pytest.raises(CannotPlan, match="nothing is left to run on"):
        plan.gradient(images_of((8, 8), 4), labels_of(4, 10))


def test_memory_that_is_short_is_no_reason_for_another_back_end(monkeypatch):
    device = torch.device("cpu")
    slab, aten = (choose.option(name, device, torch.float32) for name in ("slab", "aten"))
    short = failing(slab, in_layer="conv", from_batch=4, error=torch.OutOfMemoryError)
    plan = plan_on(monkeypatch, short, aten)
    with pytest.raises(torch.OutOfMemoryError):
        plan.gradient(images_of((8, 8), 4), labels_of(4, 10))
    assert plan.back_end == "slab float32"


def test_float32_is_not_tf32(monkeypatch):
    """Whatever the caller's flags: a plan is verified in float32, so that is what runs."""
    network = resnet("resnet6", 8)
    plan = Plan([network], dtype=torch.float32)
    plan.prepare(images_of((8, 8), 2))
    seen = []
    member = plan._programs[(3, 8, 8)].members[0]
    logits = member.logits
    monkeypatch.setattr(
        member,
        "logits",
        lambda values: (
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())),
            logits(values),
        )[1],
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.backends.cudnn.allow_tf32
        plan(images_of((8, 8), 2))
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(False, "highest")]
