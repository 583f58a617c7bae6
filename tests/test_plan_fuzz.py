"""Networks written in many ways: a plan computes what the module computes, or there is none.

Weights and statistics change after the plan was made: a new network's BatchNorms and zero branches
hide much of what a plan might have misunderstood.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from plan_networks import BACK_ENDS, resnet, trained, unless_missing
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import dwf
import moe_kernels
from dwf.attacks import AttackTarget, attack_target
from dwf.models import MlpGate
from moe_kernels.ops import grouped_conv_tiles
from moe_kernels.plan import CannotPlan, Plan, choose
from moe_kernels.plan.modules import RandomState

IMAGES = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)
C = 6


def conv(kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, C, kernel, **{"padding": 1, **options})


class Network(nn.Module):
    """Stem, whatever is tested, mean and classifier."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, C, 3, padding=1), nn.Linear(C, 5)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self, torch.relu(self.stem(x))).mean((2, 3)))


class OfImages(Network):
    """The same with something before the stem."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.stem(self.body(self, x))).mean((2, 3)))


class Head(Network):
    """The same with something at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, torch.relu(self.stem(x)))


def network(body: Callable[[Any, Tensor], Tensor], kind: type[Network] = Network) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(
            body,
            a=conv(),
            b=conv(),
            one=conv(1, padding=0),
            n=nn.BatchNorm2d(C),
            m=nn.BatchNorm2d(C, eps=0.3, affine=False),
            same=nn.Identity(),
            drop=nn.Dropout(),
            relu_=nn.ReLU(inplace=True),
            x=nn.Linear(C, C),
            y=nn.Linear(C, C),
            w=parametrizations.weight_norm(conv()),
        ).eval()


def gradient_of(model: nn.Module, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    own = copy.deepcopy(model).double().eval()
    leaf = images.double().requires_grad_()
    logits = own(leaf)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, LABELS, reduction="sum"), leaf)
    return grad, logits.detach()


def assert_right(plan: Plan, model: nn.Module) -> None:
    for ours, truth in zip(plan.gradient(IMAGES, LABELS), gradient_of(model), strict=True):
        assert (ours - truth).norm() <= 1e-4 * truth.norm()


def then(first: Callable[[Any, Tensor], Tensor], statement: Callable[[Any, Tensor], Any]) -> Any:
    """`z = first(h); statement(z)`, and z is read again."""

    def body(self: Any, h: Tensor) -> Tensor:
        z = first(self, h)
        statement(self, z)
        return self.b(z)

    return body


def read_twice(name: Callable[[Any, Tensor], Tensor]) -> Any:
    """A ReLU on another name of a map that is read without it, too."""

    def body(self: Any, h: Tensor) -> Tensor:
        z = self.a(h)
        return torch.relu(self.b(torch.relu(name(self, z))) + z)

    return body


def added_in_place(self: Any, h: Tensor) -> Tensor:
    z = self.a(h)
    old = z
    z += self.b(h)
    return self.b(old)


def without_gradient(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        z = self.a(h)
    return torch.relu(self.b(h) + z)


def counting(self: Any, h: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return self.a(h)


RIGHT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a module called twice": lambda s, h: torch.relu(s.a(torch.relu(s.a(h)))),
    "called twice, with other norms": lambda s, h: torch.relu(s.m(s.a(torch.relu(s.n(s.a(h)))))),
    "one norm behind two": lambda s, h: torch.relu(s.n(s.a(torch.relu(s.n(s.b(h)))))),
    "called twice in one sum": lambda s, h: torch.relu(s.a(h) + s.a(h)),
    "called twice at two sizes": lambda s, h: torch.relu(s.a(F.max_pool2d(torch.relu(s.a(h)), 2))),
    "two projections": lambda s, h: torch.relu(s.one(h) + s.one(h)),
    "three terms": lambda s, h: torch.relu(s.a(h) + s.one(h) + s.b(h)),
    "sum in place": lambda s, h: s.a(h).add_(h).relu_(),
    "checked twice": lambda s, h: torch.relu(torch.relu(s.a(s.same(h)))),
    "dropout": lambda s, h: F.dropout(torch.relu(s.a(s.drop(h))), 0.3, s.training),
    "weight norm": lambda s, h: torch.relu(s.w(h)),
    "twice itself": lambda s, h: (lambda z: s.b(z + z))(s.one(h)),
    "the square of itself": lambda s, h: (lambda z: s.b(z * z))(s.one(h)),
    "norm of a sum": lambda s, h: torch.relu(s.n(s.a(h) + h)),
    "norm of a projection": lambda s, h: torch.relu(s.n(s.a(h) + s.one(h))),
    "norm of a norm": lambda s, h: s.b(s.m(s.n(s.a(h)))),
    "norm of a ReLU": lambda s, h: s.b(s.n(torch.relu(s.a(h)))),
    "norm by its tensors": lambda s, h: torch.relu(
        F.batch_norm(s.a(h), s.n.running_mean, s.n.running_var, s.n.weight, s.n.bias)
    ),
    "ReLU beside an identity": read_twice(lambda s, z: s.same(z)),
    "ReLU beside dropout": read_twice(lambda s, z: s.drop(z)),
    "ReLU beside its copy": read_twice(lambda s, z: z.contiguous()),
    "ReLU beside a pool of 1": read_twice(lambda s, z: F.max_pool2d(z, 1)),
    "sum of ReLUs": lambda s, h: s.b(torch.relu(s.a(h)) + torch.relu(s.one(h))),
    "options by place and by name": lambda s, h: F.softplus(
        F.leaky_relu(F.elu(s.a(h), 0.5), negative_slope=0.3), 2, threshold=10
    ),
    "in place and read under its new name": lambda s, h: s.b(F.silu(s.a(h), True)),
    "keepdim by place": lambda s, h: s.a(h) * s.one(h.mean((2, 3), True)).sigmoid(),
    "concatenation of views": lambda s, h: s.one(s.a(h)) * torch.cat([s.b(h)], -3),
}
RIGHT_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear layers added": lambda s, h: s.fc(
        (lambda z: torch.relu(s.x(z) + s.y(z)))(torch.relu(s.x(h.mean((2, 3)))))
    ),
    "a linear layer twice": lambda s, h: s.fc(torch.relu(s.x(torch.relu(s.x(h.mean((2, 3))))))),
}
RIGHT_IMAGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a constant made of a buffer": lambda s, x: (x - 0.1) / s.n.running_var.mean().view(1, 1, 1),
    "own copy in place": lambda s, x: (x * 2).sub_(0.3),
}
DECLINED: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "alpha": ("add with alpha", lambda s, h: torch.relu(torch.add(s.a(h), h, alpha=1.02))),
    "keyword": ("add with other", lambda s, h: torch.relu(torch.add(s.a(h), other=h))),
    "another norm's mean": (
        "other statistics",
        lambda s, h: F.batch_norm(s.a(h), s.m.running_mean, s.n.running_var, s.n.weight, s.n.bias),
    ),
    "another epsilon": (
        "is not what",
        lambda s, h: F.batch_norm(
            s.a(h), s.n.running_mean, s.n.running_var, s.n.weight, s.n.bias, eps=0.1
        ),
    ),
    "a batch's statistics": (
        "other statistics",
        lambda s, h: F.batch_norm(s.a(h), s.n.running_mean, s.n.running_var, training=True),
    ),
    "along pixels": ("another axis", lambda s, h: s.a(torch.cat([h, h], 2))),
    "silu in place": ("in place", then(lambda s, h: s.a(h), lambda s, z: F.silu(z, True))),
    "F.relu": ("in place", then(lambda s, h: s.a(h), lambda s, z: F.relu(z, inplace=True))),
    "F.relu by place": ("in place", then(lambda s, h: s.a(h), lambda s, z: F.relu(z, True))),
    "relu_": ("in place", then(lambda s, h: s.a(h), lambda s, z: z.relu_())),
    "nn.ReLU": ("in place", then(lambda s, h: s.a(h), lambda s, z: s.relu_(z))),
    "of an alias": ("in place", then(lambda s, h: s.a(h), lambda s, z: s.same(z).relu_())),
    "mul_": ("in place", then(lambda s, h: s.a(h), lambda s, z: z.mul_(1.02))),
    "iadd": ("in place", added_in_place),
    "no_grad": ("gradients differ", without_gradient),
    "divisor": ("divides", lambda s, h: s.a(F.avg_pool2d(h, 9, divisor_override=80))),
    "divisor of 1": ("divides", lambda s, h: s.a(F.avg_pool2d(h, 1, divisor_override=2))),
    "count": ("changes the module", counting),
}
DECLINED_IMAGES: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "alpha": ("sub with alpha", lambda s, x: torch.sub(x, 0.2, alpha=1.02)),
    "rounding": ("rounding_mode", lambda s, x: torch.div(x, 1e-4, rounding_mode="floor") / 1e4),
    "caller's images": ("in place", lambda s, x: x.sub_(0.1)),
    "torch": ("random", lambda s, x: x + 0.001 * torch.rand(1, 3, 1, 1)),
    "python": ("random", lambda s, x: x + 0.001 * random.random()),
    "numpy": ("random", lambda s, x: x + 0.001 * float(numpy.random.rand())),
}


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1e-4 * torch.randn_like(weight)


class Stuck(nn.Sequential):
    def train(self, mode: bool = True) -> Stuck:
        super().train(mode)
        self[1].training = True
        return self


def with_own_forward() -> nn.Module:
    module = conv()
    plain = module.forward
    module.forward = lambda x: plain(x) * 1.01
    return module


def with_backward_hook() -> nn.Module:
    module = conv()
    module.register_full_backward_pre_hook(lambda _, grad: (grad[0] * 2,))
    return module


def noisy() -> nn.Module:
    module = conv()
    parametrize.register_parametrization(module, "weight", Noisy())
    return module


MODULES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "same 3x5": ("another stride or padding", lambda: conv((3, 5), padding="same")),
    "derived class": ("conv2d", lambda: Doubled(C, C, 3, padding=1)),
    "own forward": ("a forward of its own", with_own_forward),
    "backward hook": ("has hooks", with_backward_hook),
    "noisy weights": ("parametrized by a Noisy", noisy),
    "stuck": ("stays in train mode", lambda: Stuck(conv(), nn.BatchNorm2d(C))),
    "quantized": (
        "is a Conv2d",
        lambda: torch.ao.nn.qat.Conv2d(
            *(C, C, 3), padding=1, qconfig=torch.ao.quantization.get_default_qat_qconfig()
        ),
    ),
}


def kinds(*tables: tuple[dict[str, Any], type[Network]]) -> list[Any]:
    return [
        pytest.param(kind, table[name], id=f"{kind.__name__}-{name}")
        for table, kind in tables
        for name in table
    ]


@pytest.mark.parametrize(
    ("kind", "body"), kinds((RIGHT, Network), (RIGHT_HEADS, Head), (RIGHT_IMAGES, OfImages))
)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_understood_for_good(name, kind, body):
    unless_missing(name, torch.float32)
    model = network(body, kind)
    with choose.back_end(name):
        plan = Plan([model], dtype=torch.float32)
        assert_right(plan, model)
        trained(model, seed=1)
        plan.refresh()
        assert_right(plan, model)


@pytest.mark.parametrize(("kind", "case"), kinds((DECLINED, Network), (DECLINED_IMAGES, OfImages)))
def test_declined_for_its_structure(kind, case):
    """In bfloat16, where a small difference would pass for rounding."""
    reason, body = case
    model = network(body, kind)
    state = RandomState()
    facts = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(CannotPlan, match=reason):
        Plan([model], dtype=torch.bfloat16).prepare(IMAGES)
    assert not state.restore()
    assert facts == {name: vars(module) for name, module in model.named_modules()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_not_what_they_seem(name):
    reason, make = MODULES[name]
    model = network(lambda s, h: torch.relu(s.tested(h)))
    model.tested = make()
    with pytest.raises(CannotPlan, match=reason):
        Plan([model.eval()], dtype=torch.bfloat16).prepare(IMAGES)


def test_a_forward_of_the_outermost_module():
    model = network(lambda s, h: h)
    plain = model.forward
    model.forward = lambda x: plain(x) * 1.01
    with pytest.raises(CannotPlan, match="a forward of its own"):
        Plan([model]).prepare(IMAGES)


def test_a_gradient_that_the_logits_do_not_show(monkeypatch):
    """A back end whose way back is wrong is not used."""
    device = torch.device("cpu")
    option = choose.option("aten", device, torch.bfloat16)

    def breaks():
        back_end = option.make()
        image_grad = back_end.image_grad
        back_end.image_grad = lambda *args: -image_grad(*args)
        return back_end

    monkeypatch.setattr("moe_kernels.plan.build.options", lambda *_: [option._replace(make=breaks)])
    with pytest.raises(CannotPlan, match="gradients differ"):
        Plan([resnet("resnet6", 8)]).prepare(IMAGES)


def test_what_cannot_be_planned_is_not_tried_again(monkeypatch):
    tries = []
    monkeypatch.setattr("moe_kernels.plan.build.graph_of", lambda _: tries.append(0) or _decline())
    model = dwf.accelerate(resnet("resnet6", 8))
    for _ in range(3):
        assert attack_target(model, IMAGES).reason == "not today"
    assert len(tries) == 1


def _decline() -> None:
    raise CannotPlan("not today")


def test_networks_that_differ_by_a_bias_or_a_normalization():
    """Those run together that have equal layers; each keeps what it has alone."""
    makers = [lambda s, h: torch.relu(s.n(s.a(h)))] * 3
    models = [network(body) for body in makers]
    models[1].a = conv(bias=False)
    models[2].n = nn.BatchNorm2d(C, affine=False, eps=0.5)
    for model in models:
        trained(model)
    normalized = [
        nn.Sequential(dwf.Normalize((0.4 + e, 0.5, 0.6), (0.2, 0.25, 0.3)), x)
        for e, x in enumerate(models)
    ]
    with choose.back_end("slab"):
        together = Plan(models, independent=True, dtype=torch.float32)
        images, labels = IMAGES.repeat(3, 1, 1, 1), LABELS.repeat(3)
        for ours, model in zip(together.gradient(images, labels)[0].chunk(3), models, strict=True):
            torch.testing.assert_close(ours, gradient_of(model)[0].float(), rtol=1e-4, atol=1e-6)
        gate = MlpGate((3, 9, 9), 3)
        model = dwf.Mixture(normalized, gate).eval()
        parts = model.plan_parts()
        assert_right(Plan(parts.networks, parts.gate, dtype=torch.float32), model)


# After the plan was made ------------------------------------------------------------------------


def mixture() -> Any:
    gate = MlpGate((3, 8, 8), 2, hidden=8)
    nn.init.normal_(gate.layers[-1].weight, generator=torch.Generator().manual_seed(0))
    experts = [resnet("resnet6", 8, seed=e) for e in range(2)]
    return dwf.Mixture(experts, gate, dwf.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))).eval()


def _train(model: Any) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    F.cross_entropy(model(SMALL), LABELS).backward()
    optimizer.step()
    model.eval()


SMALL = IMAGES[:, :, :8, :8].contiguous()
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a training step": _train,
    "running statistics": lambda m: [m.train(), m(SMALL * 2), m.eval()],
    "train mode": lambda m: m.train(),
    "a state dict": lambda m: m.load_state_dict(mixture().state_dict(), assign=True),
    "another parameter": lambda m: setattr(
        m.experts[0].conv1, "weight", nn.Parameter(torch.ones_like(m.experts[0].conv1.weight))
    ),
    "another module": lambda m: setattr(m.experts[0], "conv1", nn.Conv2d(3, 8, 3, padding=1)),
    "a bias": lambda m: setattr(m.experts[0].conv1, "bias", nn.Parameter(torch.ones(8))),
    "epsilon": lambda m: setattr(m.experts[0].bn1, "eps", 0.5),
    "stride": lambda m: setattr(m.experts[0].conv1, "stride", (2, 2)),
    "normalization in place": lambda m: m.normalize.mean.add_(0.3),
    "another normalization": lambda m: setattr(m, "normalize", nn.Identity()),
    "a hook": lambda m: m.experts[0].layer1.register_forward_hook(lambda _, i, out: out / 2),
    "a hook of the model": lambda m: m.register_forward_hook(lambda _, i, out: -out),
    "a forward": lambda m: setattr(m.experts[0].conv1, "forward", m.experts[0].conv1.forward),
    "another gate": lambda m: setattr(
        m, "gate", nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    ),
    "the order": lambda m: setattr(m, "experts", nn.ModuleList(reversed(m.experts))),
    "architecture": lambda m: m.experts.__setitem__(0, resnet("resnet10", 8)),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.train().experts[0].conv1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_attack_knows_of(change):
    model = mixture()
    options = {"epsilon": 0.03, "step_size": 0.01, "num_steps": 2, "random_start": False}
    attack_target(model, SMALL, dtype=torch.float32)
    CHANGES[change](model)
    state = copy.deepcopy(model.state_dict())
    modes = [x.training for x in model.modules()]
    ours = dwf.pgd(attack_target(model, SMALL, dtype=torch.float32), SMALL, LABELS, **options)
    assert [x.training for x in model.modules()] == modes
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    theirs = dwf.pgd(AttackTarget(model), SMALL, LABELS, **options)
    assert ((ours - theirs).abs() > 1e-6).double().mean() < 5e-3


def test_a_model_that_is_more_than_its_parts():
    class Colder(dwf.Mixture):
        def forward(self, images: Tensor, return_aux: bool = False) -> Tensor:
            return super().forward(images) * torch.linspace(-1, 1, 10)

    model = mixture()
    reason = attack_target(Colder(model.experts, model.gate).eval(), SMALL).reason
    assert reason == "Colder has a forward of its own, and the plan_parts of another class"


def test_a_target_for_other_images_and_modes():
    """Its plan holds where it can, and never where it was not asked for."""
    model = dwf.accelerate(network(lambda s, h: s.a(F.avg_pool2d(h, 8))))
    target = attack_target(model, SMALL)
    assert target.plan is not None
    assert attack_target(target, SMALL[:2]).plan is target.plan
    assert "BatchNorm" in attack_target(target, SMALL, bn_mode="train").reason
    with moe_kernels.implementation("reference"):
        assert attack_target(target, SMALL).plan is None
    assert "larger window" in attack_target(target, SMALL[:, :, :4, :4]).reason
    assert target.plan is not None


# Around the call ----------------------------------------------------------------------------------


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": float64_by_default,
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_the_same_bits_whatever_is_on(name, around):
    unless_missing(name, torch.float32)
    parts = mixture().plan_parts()
    with choose.back_end(name):
        expected = Plan(parts.networks, parts.gate, dtype=torch.float32).gradient(SMALL, LABELS)
        with AROUND[around]():
            plan = Plan(parts.networks, parts.gate, dtype=torch.float32)
            inside = plan.gradient(SMALL, LABELS)
            images = SMALL.clone() if around == "inference_mode" else SMALL
    plan.refresh()
    for found in (inside, plan.gradient(images, LABELS)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_threads_and_a_module_running_in_a_third():
    """torch.fx patches nn.Module while it traces."""
    model = mixture()
    expected = model(SMALL)
    found: list[Tensor] = []
    stop = threading.Event()

    def attack() -> None:
        own = copy.deepcopy(model)
        for _ in range(3):
            parts = own.plan_parts()
            found.append(Plan(parts.networks, parts.gate, dtype=torch.float32)(SMALL))

    def run() -> None:
        while not stop.is_set():
            found.append(model(SMALL).detach())

    runner = threading.Thread(target=run)
    threads = [threading.Thread(target=attack) for _ in range(2)]
    runner.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    runner.join()
    assert len(found) > 6
    for logits in found:
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-5)
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


class Gate(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.bias, self.function = nn.Parameter(torch.tensor([0.5, -0.5])), function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self, images)


def test_gates_without_a_gradient_or_with_noise():
    parts = mixture().plan_parts()
    constant = Gate(lambda s, x: s.bias.expand(len(x), -1))
    frozen = Gate(lambda s, x: s.bias.detach().expand(len(x), -1))
    noise = Gate(lambda s, x: s.bias + 0 * torch.randn(len(x), 2))
    plans = [Plan(parts.networks, gate, dtype=torch.float32) for gate in (constant, frozen, noise)]
    grads = [plan.gradient(SMALL, LABELS)[0] for plan in plans]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert [plan.deterministic for plan in plans] == [True, True, False]
    with pytest.raises(CannotPlan, match=r"gate_logits of shape \[2, 2\]"):
        Plan(parts.networks, Gate(lambda s, x: s.bias)).prepare(SMALL)


def test_a_loss_that_is_constant_has_no_gradient():
    plan = Plan([resnet("resnet6", 8)], dtype=torch.float32)
    grad, _ = plan.gradient(SMALL, LABELS, lambda logits, labels: torch.zeros(len(labels)))
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8], ids=str)
def test_images_of_another_dtype(dtype):
    plan = Plan([resnet("resnet6", 8)], dtype=torch.float32)
    images = (SMALL * 200).to(dtype)
    found = plan.gradient(images, LABELS)
    expected = plan.gradient(images.float(), LABELS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        plan.gradient(SMALL, LABELS[:3])


def test_an_empty_first_batch_is_checked_all_the_same():
    model = network(without_gradient)
    with pytest.raises(CannotPlan, match="gradients differ"):
        Plan([model]).prepare(IMAGES[:0])
    grad, logits = Plan([resnet("resnet6", 8)]).gradient(SMALL[:0], LABELS[:0])
    assert grad.shape == (0, 3, 8, 8)
    assert logits.shape == (0, 10)


def test_the_only_right_tile_is_remembered(monkeypatch):
    """While a graph is captured nothing is checked: a tile known to be wrong must not come back."""
    call = SimpleNamespace(
        x=SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float32),
        key=("a layer",),
    )
    capturing = [False]
    checked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(grouped_conv_tiles, "fitting_tiles", lambda _: ["wrong", "right"])
    monkeypatch.setattr(grouped_conv_tiles, "_compile", lambda call, tiles: None)
    monkeypatch.setattr(grouped_conv_tiles, "_fastest_tiles", {})
    monkeypatch.setattr(
        grouped_conv_tiles, "_right", lambda *_: checked.append(0) or {"right": "right"}
    )
    for now in (False, False, True):
        capturing[0] = now
        assert grouped_conv_tiles._ranked(call) == ["right"]
    assert len(checked) == 1
