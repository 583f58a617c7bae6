"""Plans and captured attack steps on a GPU: what they compute, and what they leave as it was.

The layers have tests of their own (test_plan_slab.py), and so have captures (test_graphs.py); here
whole networks run, on every back end that a GPU has.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rehearsal
import torch
import torch.nn.functional as F
from plan_networks import Dense, MobileBlocks, Skips, TwoLayerHead, Vgg, resnet, seeded
from small_models import Noisy, SmallNet
from torch import Tensor, nn

import dwf
import moe_kernels
from dwf.attacks import AttackReport, AttackTarget, attack_target, cross_entropy
from dwf.attacks.ascent import AscentStep
from dwf.attacks.autograd import Autograd
from dwf.attacks.losses import Loss, parted
from dwf.attacks.source import GradientSource
from dwf.attacks.target import AttackPlan
from dwf.models import Group, MlpGate
from moe_kernels import linf_step_
from moe_kernels.plan import Plan, choose
from moe_kernels.testing import without_tf32

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BACK_ENDS = ["slab", "aten"]
DTYPES = [torch.float32, torch.bfloat16]
SLACK, FLOOR = 2, {torch.float32: 1e-6, torch.bfloat16: 2**-8}
# Of an image's gradient, what a ReLU that rounding moved over zero may cost: of a hundred images
# one in float32, and not the same one as in plain torch.
JUMP = 1e-2
EPSILON, STEP_SIZE = 8 / 255, 2 / 255
# A rehearsed device computes on one CPU core.
WIDTH, COUNT, NUM_STEPS = (32, 64, 4) if rehearsal.running else (64, 128, 10)
BUDGET = {"epsilon": EPSILON, "step_size": STEP_SIZE, "random_start": False}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 is float32, and cuDNN takes the same algorithm every time."""
    with without_tf32():
        yield


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plans in the test run on this back end."""
    with choose.back_end(request.param):
        yield request.param


def images_of(size: int, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, size, size, generator=generator).to(DEVICE)


def labels_of(batch: int, num_classes: int = 10, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_classes, (batch,), generator=generator).to(DEVICE)


def mixture(num_experts: int = 3, width: int = 16, name: str = "resnet6") -> dwf.Mixture:
    """Experts on images of 8 pixels, with a gate that prefers some."""
    gate = MlpGate((3, 8, 8), num_experts, hidden=8)
    nn.init.normal_(gate.layers[-1].weight, generator=torch.Generator().manual_seed(0))
    experts = [resnet(name, width, seed=e) for e in range(num_experts)]
    normalize = dwf.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return dwf.Mixture(experts, gate, normalize).eval().to(DEVICE)


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd, of a copy of the model in the dtype of the images; and the logits."""
    own = copy.deepcopy(model).to(images.dtype).eval()
    leaf = images.detach().requires_grad_()
    logits = own(leaf)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    (grad,) = torch.autograd.grad(loss * len(labels), leaf)
    return grad.double(), logits.detach().double()


def assert_near_truth(
    found: tuple[Tensor, Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
) -> None:
    """Gradient and logits are at most twice as far from float64 as plain torch's in the dtype.

    In the median over the images, by their norms; and no image is far off.
    """
    plain = gradient_of(model, images.to(dtype), labels)
    truths = gradient_of(model, images.to(dtype).double(), labels)
    for ours, theirs, truth in zip(found, plain, truths, strict=True):
        assert ours.dtype is torch.float32
        assert ours.shape == truth.shape
        errors, its = (
            (x.double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
            for x in (ours, theirs)
        )
        assert errors.median() <= SLACK * its.median() + FLOOR[dtype]
        assert errors.max() <= SLACK * its.max() + JUMP


def plan_of(model: dwf.Mixture, dtype: torch.dtype | None = torch.float32) -> Plan:
    """A plan of its own, not the one that the model keeps."""
    parts = model.plan_parts()
    return Plan(parts.networks, parts.gate, dtype=dtype)


class Steps:
    """PGD steps of some attack, with the labels and radius of one batch."""

    def __init__(self, batch: int, num_classes: int = 10, seed: int = 0) -> None:
        self.images = images_of(8, batch, seed)
        self.labels = labels_of(batch, num_classes, seed)
        self.epsilon = torch.linspace(0.5 * EPSILON, EPSILON, batch, device=DEVICE)
        self.step_size = torch.linspace(STEP_SIZE, 2 * STEP_SIZE, batch, device=DEVICE)

    def by(self, plan: AttackPlan, count: int, loss: Loss = cross_entropy) -> Tensor:
        """The images after so many steps, captured where they can be."""
        source = GradientSource(plan, loss, plan=plan)
        source.checked = True  # the first pass of a source is not captured
        objective, rows = parted(loss, self.labels)
        adversarial = self.images.clone()
        state = adversarial, adversarial.new_zeros(0), torch.full_like(self.labels, count)
        given = self.images, self.epsilon, self.step_size, rows
        with source.loop(AscentStep(objective, "linf", 0.0, 0.0, 1.0), state, given) as (
            take_step,
            _,
        ):
            for _ in range(count):
                take_step()
        return adversarial

    def eager(self, gradient: Callable[..., Any], count: int, loss: Any = "ce") -> Tensor:
        """The same without a graph."""
        adversarial = self.images.clone()
        for _ in range(count):
            grad, _ = gradient(adversarial, self.labels, loss)
            linf_step_(adversarial, grad, self.images, self.epsilon, self.step_size, 0.0, 1.0)
        return adversarial


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(dim=1) - right


# What a plan computes ---------------------------------------------------------------------------

# name -> how to make it, pixels, batch; the wide one is for the kernels that need whole tiles.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (lambda: resnet("resnet18", 64), 32, 128),
    "resnet6-odd": (lambda: resnet("resnet6", 10), 9, 5),
    "resnet50": (lambda: resnet("resnet50", 8), 16, 20),
    "vgg": (lambda: seeded(Vgg), 32, 17),
    "two-layer-head": (lambda: seeded(TwoLayerHead), 22, 4),
    "skips": (lambda: seeded(Skips), 11, 3),
    "pre-activation": (lambda: resnet("preactresnet18", 8), 16, 5),
    "wide": (lambda: resnet("wrn16_4", 8), 16, 5),
    "dense": (lambda: seeded(Dense), 12, 5),
    "mobile-blocks": (lambda: seeded(MobileBlocks), 12, 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.real_gpu] * (x == "resnet18")) for x in NETWORKS],
)
def test_one_network(name: str, dtype: torch.dtype, back_end: str) -> None:
    if back_end == "slab" and name == "mobile-blocks":
        pytest.skip("slabs have no grouped convolutions")
    make, size, batch = NETWORKS[name]
    network = make().to(DEVICE)
    plan = Plan([network], dtype=dtype)
    images, labels = images_of(size, batch), labels_of(batch, 7)
    images = images.to(dtype).float()
    found = plan.gradient(images, labels)
    assert back_end in plan.back_end
    assert_near_truth(found, network, images, labels, dtype)
    torch.testing.assert_close(plan(images), found[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_experts", "width", "batch"),
    [pytest.param(9, 64, 128, marks=pytest.mark.real_gpu), (2, 12, 7)],
)
def test_mixture(
    num_experts: int, width: int, batch: int, dtype: torch.dtype, back_end: str
) -> None:
    model = mixture(num_experts, width)
    images, labels = images_of(8, batch).to(dtype).float(), labels_of(batch)
    found = plan_of(model, dtype).gradient(images, labels)
    assert_near_truth(found, model, images, labels, dtype)


def test_independent_networks(back_end: str) -> None:
    networks = [resnet("resnet6", 16, seed=e).to(DEVICE) for e in range(3)]
    images, labels = images_of(8, 12), labels_of(12)
    plan = Plan(networks, independent=True, dtype=torch.float32)
    assert_near_truth(plan.gradient(images, labels), Group(networks), images, labels, torch.float32)


# Captured steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy, margin], ids=["cross-entropy", "margin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captured_steps_are_the_eager_ones(dtype: torch.dtype, loss: Any, back_end: str) -> None:
    plan = plan_of(mixture(width=12 if rehearsal.running else 64), dtype)
    steps = Steps(16 if rehearsal.running else 128)
    found = steps.by(plan, 5, loss)
    assert plan.graphs.status == "captured"
    expected = steps.eager(plan.gradient, 5, "ce" if loss is cross_entropy else loss)
    assert torch.equal(found, expected)
    assert not torch.equal(found, steps.images)


def test_a_graph_for_each_size(back_end: str) -> None:
    """Sizes come back, more of them than graphs are kept; other images go through old graphs."""
    plan = plan_of(mixture())
    for seed, batch in enumerate((8, 5, 8, 16, 17, 33, 8, 5)):
        steps = Steps(batch, seed=seed)
        found = steps.by(plan, 3)
        assert plan.graphs.status == "captured"
        assert torch.equal(found, steps.eager(plan.gradient, 3))


def test_graphs_see_new_weights(back_end: str) -> None:
    model = mixture()
    steps = Steps(8)
    before = steps.by(model.attack_plan(torch.float32), 3)
    plan = model.attack_plan(torch.float32)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.3)
        model.experts[1].bn1.running_var.mul_(2)
    kept = steps.by(plan, 3)
    assert model.attack_plan(torch.float32) is plan
    after = steps.by(plan, 3)
    fresh = steps.eager(plan_of(model).gradient, 3)
    assert torch.equal(after, fresh)
    # Experts are folded at a refresh alone; the gate is always current.
    assert not torch.equal(kept, after)
    assert not torch.equal(before, after)


def test_a_gate_that_moved_is_captured_again(back_end: str) -> None:
    model = mixture()
    steps = Steps(8)
    plan = model.attack_plan(torch.float32)
    steps.by(plan, 3)
    with torch.no_grad():
        for x in model.gate.parameters():
            x.data = -2 * x  # in other memory
    assert model.attack_plan(torch.float32) is plan
    found = steps.by(plan, 3)
    assert plan.graphs.status == "captured"
    fresh = steps.eager(plan_of(model).gradient, 3)
    assert torch.equal(found, fresh)


def test_another_gate_is_another_plan() -> None:
    model = mixture()
    plan = model.attack_plan(torch.float32)
    parts = model.plan_parts()
    assert plan.fits(parts.networks, parts.gate, torch.float32)
    assert not plan.fits(parts.networks, parts.gate, torch.bfloat16)
    steps = Steps(8)
    before = steps.by(plan, 3)
    model.gate = MlpGate((3, 8, 8), 3, hidden=4, seed=5).to(DEVICE)
    model.gate.layers[-1].weight.data.fill_(0.1).mul_(torch.arange(3, device=DEVICE)[:, None])
    assert not plan.fits(*model.plan_parts()[:2], torch.float32)
    other = model.attack_plan(torch.float32)
    assert other is not plan
    assert not torch.equal(steps.by(other, 3), before)


# What stays as it was ---------------------------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    """What belongs to the caller, tensors by their bits."""
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    tensors.append(torch.cuda.get_rng_state(DEVICE))
    flags = [(x.requires_grad, x.grad is None) for x in model.parameters()]
    modes = [x.training for x in model.modules()]
    return [[x.detach().cpu().tolist() for x in tensors], flags, modes]


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "autograd"])
def test_nothing_changes(planned: bool) -> None:
    """Nor does what the caller draws next; steps are captured on the way, with BatchNorm inside."""
    model = mixture().train()
    model.experts[0].eval()
    images, labels = images_of(8, 6), labels_of(6)
    report = AttackReport()
    target = attack_target(model, images) if planned else AttackTarget(model)
    before = everything(model)
    dwf.pgd(target, images, labels, **BUDGET, num_steps=5, report=report)
    assert report.graph == "captured"
    assert (report.back_end == "autograd") is not planned
    assert everything(model) == before
    assert torch.randn(8, device=DEVICE).isfinite().all()


class Waits(nn.Module):
    """A network that waits for the GPU in the middle, which a capture may not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) * (2.0 if float(images.detach().sum()) > 0 else 1.0)


def test_a_capture_that_fails_costs_nothing_but_time(caplog: pytest.LogCaptureFixture) -> None:
    """The model is random: its generator was told that a capture began."""
    network = SmallNet(num_classes=10).eval().to(DEVICE)
    images, labels = images_of(8, 6), labels_of(6)
    model = Waits(Noisy(network, std=0.01))
    before, stream = everything(model), torch.cuda.current_stream()
    report = AttackReport()
    options = {**BUDGET, "num_steps": 6, "seed": 3}
    with caplog.at_level(logging.WARNING, "moe_kernels"):
        found = dwf.pgd(model, images, labels, **options, report=report)
    assert report.graph.startswith("no graph: ")
    assert caplog.text.count("a step runs without a CUDA graph") == 1
    assert torch.cuda.current_stream() == stream
    assert everything(model) == before
    assert torch.randn(8, device=DEVICE).isfinite().all()
    assert ((found - images).abs() <= EPSILON + 1e-6).all()
    assert not torch.equal(found, images)
    # The next attack may be captured again.
    dwf.pgd(network, images, labels, **options, report=report)
    assert report.graph == "captured"


# Models without a plan --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_autograd_steps_are_captured(dtype: torch.dtype | None) -> None:
    """In the model's float32, unless bfloat16 is asked for."""
    model = SmallNet(num_classes=10, channels=32).eval().to(DEVICE)
    source = Autograd(model, dtype)
    steps = Steps(64)
    found = steps.by(source, 5)
    assert source.graphs.status == "captured"
    assert torch.equal(found, steps.eager(source.gradient, 5))
    found, _ = source.gradient(steps.images, steps.labels)
    truth, _ = gradient_of(model, steps.images.double(), steps.labels)
    error = float((found - truth).norm() / truth.norm())
    # bfloat16 it was, and not worse than it has to be
    assert error <= 1e-5 if dtype is None else 1e-4 <= error <= 2e-2
    assert all(x.dtype is torch.float32 and x.grad is None for x in model.parameters())


def test_each_replay_of_a_random_model_draws_anew() -> None:
    steps = Steps(8)
    source = Autograd(Noisy(SmallNet(num_classes=10).eval().to(DEVICE), std=1.0))
    found = [steps.by(source, 1) for _ in range(8)]
    assert source.graphs.status == "captured"
    assert len({tuple(x.flatten().tolist()) for x in found}) == len(found)


def test_a_model_that_is_no_module_keeps_its_precision() -> None:
    model = SmallNet(num_classes=10).eval().to(DEVICE)
    steps = Steps(8)
    source = Autograd(lambda images: model(images), torch.bfloat16)
    found = steps.by(source, 4)
    assert torch.equal(found, steps.eager(Autograd(model).gradient, 4))


# Choices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("winner", BACK_ENDS)
def test_the_faster_back_end_is_taken(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are right, both can be timed, and the clock's word is followed."""
    asked = []

    def fastest(name: str, columns: dict[str, Callable[..., Any]], inputs: Any, *facts: Any) -> str:
        asked.append(name)
        assert list(columns) == BACK_ENDS
        for run in columns.values():
            run(*inputs)
        return winner

    monkeypatch.setattr("moe_kernels.plan.build.fastest", fastest)
    model = mixture()
    plan = plan_of(model)
    images, labels = images_of(8, 5), labels_of(5)
    found = plan.gradient(images, labels)
    assert asked == ["plan"]
    assert plan.back_end == f"{winner} float32"
    assert_near_truth(found, model, images, labels, torch.float32)


def test_the_clock_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = mixture(), images_of(8, 6)
    first = plan_of(model)
    first.prepare(images)
    remembered = first.back_end
    assert remembered in [f"{name} float32" for name in BACK_ENDS]
    monkeypatch.setattr("moe_kernels.timing.compare", lambda *_, **__: pytest.fail("timed again"))
    second = plan_of(model)
    second.prepare(images)
    assert second.back_end == remembered


def test_deterministic_mode_reads_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moe_kernels.plan.build.fastest", lambda *_: pytest.fail("a clock was read")
    )
    plan = plan_of(mixture())
    torch.use_deterministic_algorithms(True)
    try:
        plan.prepare(images_of(8, 5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert plan.back_end == "slab float32"


# Attacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_start", [False, True], ids=["", "random start"])
def test_attack_is_that_of_the_reference(random_start: bool, back_end: str) -> None:
    """In float32 both ways go to the same place, but for the sign of gradients that are nothing."""
    model, images, labels = mixture(width=WIDTH), images_of(8, COUNT), labels_of(COUNT)
    options = {**BUDGET, "random_start": random_start, "num_steps": 5}
    report = AttackReport()
    target = attack_target(model, images, dtype=torch.float32)
    found = dwf.pgd(target, images, labels, **options, report=report)
    assert report.back_end == f"{back_end} float32"
    assert report.graph == "captured"
    with moe_kernels.implementation("reference"):
        expected = dwf.pgd(AttackTarget(model), images, labels, **options)
    assert ((found - expected).abs() > 1e-6).double().mean() < 2e-3


def test_attack_in_bfloat16_is_as_strong(back_end: str) -> None:
    model, images, labels = mixture(width=WIDTH), images_of(8, COUNT), labels_of(COUNT)
    attack = functools.partial(dwf.pgd, images=images, labels=labels, num_steps=NUM_STEPS, **BUDGET)
    found = attack(attack_target(model, images, dtype=torch.bfloat16))
    with moe_kernels.implementation("reference"):
        expected = attack(AttackTarget(model))
    assert ((found - images).abs() <= EPSILON + 1e-6).all()
    assert ((found >= 0) & (found <= 1)).all()
    with torch.no_grad():
        clean, ours, theirs = (
            float(F.cross_entropy(model(x), labels)) for x in (images, found, expected)
        )
    assert ours - clean >= 0.98 * (theirs - clean) > 0
