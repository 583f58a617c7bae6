"""Any model at every entry: the right result or one typed error, and nothing of it changed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import NUM_CLASSES, SHAPE, SmallNet, make_dataset, make_images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import dwf
from dwf import attacks
from dwf.attacks import door
from dwf.attacks.door import ask, undisturbed
from dwf.checks import DwfError, ModelError, ModelOutputError
from dwf.compat import AutoAttack
from dwf.config import EvaluationConfig

CPU = torch.device("cpu")
B, EPSILON = 4, 0.05
SLOW = [pytest.mark.slow]


def net() -> SmallNet:
    return SmallNet(SHAPE, NUM_CLASSES).eval()


class Around(nn.Module):
    """A network and something that a forward does beside it."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net() if network is None else network


class InPlace(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.1).mul_(2).div_(2).add_(0.1))


class Adapts(Around):
    """Steps an optimizer in its forward, as test-time adaptation does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.net.linear.bias.add_(0.01)
        return self.net(x)


class Counts(Around):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.scale = torch.ones(())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.scale.mul_(1.0)
        return self.net(x)


class Fixed(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(3, *SHAPE))


class Reentrant(Around):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=True)


class Draws(Around):
    """Noise from every generator that a model can have, and dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(1)
        self.others = [np.random.default_rng(2), random.Random(3)]

    def forward(self, x: Tensor) -> Tensor:
        noise = np.random.rand() + random.random() + float(torch.rand(1, generator=self.own))
        noise += self.others[0].random() + self.others[1].random()
        return self.net(F.dropout(x, 0.1, training=True)) + 1e-3 * noise * x.mean()


class Sized(Around):
    """Has a length, and state that is no tensor."""

    def __len__(self) -> int:
        return 0

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Integers(Around):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.steps[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(192, 192)
        self.two = nn.Linear(192, 192)
        self.two.weight = self.one.weight
        self.last = nn.Linear(192, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softplus(self.two(F.softplus(self.one(x.flatten(1))))))


class Complex(Around):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) * self.phase).real


class NoMode(Around):
    def train(self, mode: bool = True) -> NoMode:
        raise NotImplementedError("Calling train() or eval() is not supported")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def weight_normed() -> nn.Module:
    model = net()
    parametrizations.weight_norm(model.linear)
    return model


def pruned() -> nn.Module:
    model = net()
    prune.random_unstructured(model.linear, "weight", amount=0.3)
    return model


def hooked() -> nn.Module:
    model = net()
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def frozen() -> nn.Module:
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def scripted() -> nn.Module:
    return torch.jit.script(net())


def exported() -> nn.Module:
    from dwf.foreign import ProgramModule

    return ProgramModule(torch.export.export(net(), (torch.rand(3, *SHAPE),)).module())


def compiled() -> nn.Module:
    return torch.compile(net(), backend="eager")


def quantized() -> nn.Module:
    """Its linear layer has int8 weights, which no gradient passes."""
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})


def function() -> Callable[[Tensor], Tensor]:
    model = net().requires_grad_(False)
    return lambda x: model(x)


# kind -> how to make it, and whether it computes what `net` computes
KINDS: dict[str, tuple[Callable[[], Any], bool]] = {
    "scripted": (scripted, True),
    "frozen": (frozen, True),
    "exported": (exported, True),
    "data parallel": (lambda: nn.DataParallel(net()), True),
    "weight norm": (weight_normed, True),
    "pruned": (pruned, False),
    "complex": (Complex, True),
    "sized": (Sized, True),
    "integers": (Integers, True),
    "counts": (Counts, True),
    "draws": (Draws, False),
    "reentrant": (Reentrant, True),
    "fixed batch": (Fixed, True),
    "float64": (lambda: net().double(), True),
    "bfloat16": (lambda: net().bfloat16(), False),
    "float16": (lambda: net().half(), False),
    "in place": (InPlace, True),
    "channels last": (lambda: net().to(memory_format=torch.channels_last), True),
    "function": (function, True),
    "hooked": (hooked, False),
    "tied": (Tied, False),
    "adapts": (Adapts, False),
    "no mode": (NoMode, True),
    "compiled": (compiled, True),
    "quantized": (quantized, False),
    "train mode": (lambda: net().train(), True),
}

Attack = Callable[[Any, Tensor, Tensor], Tensor]


def auto_attack(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """The original's interface, with a short Square."""
    options = {"version": "custom", "attacks_to_run": ["square"], "device": "cpu"}
    attack = AutoAttack(model, eps=EPSILON, verbose=False, **options)
    attack.square.n_queries = 20
    return attack.run_standard_evaluation(images, labels, bs=3)


ENTRIES: dict[str, Attack] = {
    "pgd": lambda m, x, y: attacks.pgd(
        m, x, y, epsilon=EPSILON, step_size=0.02, num_steps=3, random_start=True
    ),
    "apgd": lambda m, x, y: attacks.apgd(m, x, y, epsilon=EPSILON, num_steps=5),
    "fab": lambda m, x, y: attacks.fab(m, x, y, epsilon=EPSILON, num_steps=3),
    "square": lambda m, x, y: attacks.square(m, x, y, epsilon=EPSILON, num_queries=20),
    "simba": lambda m, x, y: attacks.simba(m, x, y, epsilon=EPSILON, num_queries=20),
    "hop-skip-jump": lambda m, x, y: attacks.hop_skip_jump(m, x, y, num_queries=60),
    "noise": lambda m, x, y: attacks.random_noise(m, x, y, epsilon=EPSILON, num_draws=5),
    "carlini-wagner": lambda m, x, y: attacks.carlini_wagner(m, x, y, num_searches=1, num_steps=10),
    "ddn": lambda m, x, y: attacks.ddn(m, x, y, num_steps=10),
    "AutoAttack": auto_attack,
}


def data() -> tuple[Tensor, Tensor]:
    images = torch.rand(B, *SHAPE, generator=torch.Generator().manual_seed(0))
    return images, net()(images).argmax(dim=1)


def state(model: Any) -> list[Any]:
    """Everything that a call may not change: bits, modes, flags, attributes, generators."""
    found: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    found += [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()]
    if isinstance(model, nn.Module):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        found += [
            (name, x.detach().float().tolist() if not x.is_complex() else str(x), x.requires_grad)
            for name, x in tensors
        ]
        found += [module.training for module in model.modules()]
        found.append(getattr(model, "calls", None))
        if isinstance(model, Draws):
            numpy, python = model.others
            found += [model.own.get_state().tolist(), str(numpy.bit_generator.state)]
            found.append(python.getstate())
    return found


@pytest.mark.parametrize(
    "entry", ["pgd", *(pytest.param(x, marks=SLOW) for x in ENTRIES if x != "pgd")]
)
@pytest.mark.parametrize(
    "kind", [pytest.param(x, marks=SLOW if x == "compiled" else []) for x in KINDS]
)
@pytest.mark.filterwarnings("ignore")
def test_attack(kind: str, entry: str) -> None:
    make, equal = KINDS[kind]
    model, (images, labels) = make(), data()
    before, given = state(model), images.clone()
    found = ENTRIES[entry](model, images, labels)
    assert state(model) == before
    assert torch.equal(images, given)
    assert found.dtype is torch.float32
    assert ((found >= 0) & (found <= 1)).all()
    if entry not in ("carlini-wagner", "ddn"):
        assert ((found - images).abs() <= EPSILON + 1e-6).all()
    if equal:
        expected = ENTRIES[entry](net(), images, labels)
        # a gradient's sign may turn where it is nothing, by another order of sums
        assert ((found - expected).abs() > 1e-3).float().mean() < 0.02


SETTINGS = EvaluationConfig(
    num_steps=(2,), multi_start_steps=2, num_restarts=2, adaptive_steps=2, batch_size=3
)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["paper", "quick"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_evaluation(kind: str, suite: str) -> None:
    make, _ = KINDS[kind]
    model, dataset = make(), make_dataset(6, SHAPE, NUM_CLASSES)
    before = state(model)
    radius = {} if suite == "paper" else {"epsilon": EPSILON}
    result = dwf.evaluate(model, dataset, SETTINGS, suite=suite, **radius)
    assert state(model) == before
    assert 0 <= result.robust_accuracy <= result.clean_accuracy <= 1
    found = {finding.name: finding for finding in result.findings}
    if suite == "quick":
        assert ("state_changed" in found) == (kind in ("adapts", "counts"))
    if suite == "quick" and kind == "adapts":
        assert "net.linear.bias" in str(found["state_changed"])
        assert result.verdict == "INVALID"


class Raises(Around):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such expert\nand more")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_that_fails_is_named(entry: str) -> None:
    model = Raises()
    before = state(model)
    with pytest.raises(ModelError) as caught:
        ENTRIES[entry](model, *data())
    message = str(caught.value)
    assert "\n" not in message
    assert "model Raises fails on images [" in message
    assert "KeyError" in message
    assert isinstance(caught.value, DwfError)
    assert state(model) == before


def test_a_failure_by_chance_is_no_batch_size() -> None:
    class Once(Around):
        num_passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Once.num_passes += 1
            if Once.num_passes == 2:
                raise OSError("lost connection")
            return self.net(x)

    model, images = Once(), data()[0]
    ask(model, images)
    with pytest.raises(ModelError, match=r"model Once fails on .* OSError: lost connection"):
        ask(model, images)
    assert torch.equal(ask(model, images), net()(images))


def test_images_that_do_not_fit_are_named() -> None:
    grey = torch.rand(2, 1, 8, 8)
    with pytest.raises(ModelError, match=r"model SmallNet fails on images \[2, 1, 8, 8\]"):
        attacks.fgsm(net(), grey, torch.zeros(2, dtype=torch.long), epsilon=0.1)


def test_lazy_models_are_named() -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(NUM_CLASSES))
    with pytest.raises(ModelError, match="model Sequential is lazy: call it once before"):
        attacks.fgsm(lazy, *data(), epsilon=0.1)


def test_one_logit_is_explained() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    images, labels = data()
    for targets in (labels, torch.zeros_like(labels)):
        with pytest.raises(ModelOutputError, match=r"one logit.*torch\.cat.*zeros"):
            attacks.fgsm(model, images, targets, epsilon=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_fixed_batch_is_filled_up(count: int) -> None:
    images = torch.rand(count, *SHAPE)
    model = Fixed()
    found = ask(model, images)
    torch.testing.assert_close(found, net()(images), rtol=1e-5, atol=1e-6)
    leaf = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ask(model, leaf).square().sum(), leaf)
    other = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net()(other).square().sum(), other)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_threads_take_turns() -> None:
    """Attacks on one model from several threads leave it as one attack does."""
    model, (images, labels) = net().train(), data()
    before = state(model)
    expected = ENTRIES["pgd"](model, images, labels)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(ENTRIES["pgd"](model, images, labels)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(x, expected) for x in found)
    assert state(model) == before


def test_random_models_draw_the_same_each_time() -> None:
    """From numpy, from Python and from generators of their own."""
    images, labels = data()
    one, two = (ENTRIES["pgd"](Draws(), images, labels) for _ in range(2))
    np.random.rand()
    random.random()
    assert torch.equal(one, two)
    assert torch.equal(ENTRIES["pgd"](Draws(), images, labels), one)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_default_dtype_does_not_matter(entry: str) -> None:
    model, (images, labels) = net(), data()
    expected = ENTRIES[entry](model, images, labels)
    torch.set_default_dtype(torch.float64)
    try:
        found = ENTRIES[entry](model, images, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)


def test_wrapped_models_keep_their_plan() -> None:
    network = dwf.models.build_network("resnet6", num_classes=10, width=8, in_channels=3, seed=0)
    wrapped = nn.DataParallel(dwf.accelerate(network)).eval()
    report = attacks.AttackReport()
    images = torch.rand(2, 3, 8, 8)
    attacks.fgsm(wrapped, images, torch.tensor([0, 1]), epsilon=0.1, report=report)
    assert report.reason is None
    assert report.back_end != "autograd"


def test_an_error_inside_leaves_no_trace() -> None:
    model = Counts().train()
    before = state(model)

    def disturb() -> None:
        with undisturbed(model, CPU):
            model(torch.rand(2, *SHAPE))
            model.net.linear.weight.data.zero_()
            torch.manual_seed(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert state(model) == before


class Warms(nn.Module):
    """A gate that changes what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.mul_(1.01)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def attack_by_plan(model: nn.Module, loss: Any = "ce") -> None:
    images, labels, report = make_images(2), torch.tensor([0, 1]), attacks.AttackReport()
    attacks.bim(
        model, images, labels, epsilon=0.1, step_size=0.05, num_steps=2, loss=loss, report=report
    )
    assert report.reason is None


def mixture_with_plan() -> dwf.Mixture:
    seeds = range(2)
    build = dwf.models.build_network
    experts = [
        build("resnet6", num_classes=10, width=8, in_channels=3, seed=seed) for seed in seeds
    ]
    return dwf.Mixture(experts, Warms()).eval()


@pytest.mark.parametrize("who", ["gate", "loss"])
def test_what_runs_beside_a_plan_leaves_the_model_as_it_was(who: str) -> None:
    model = mixture_with_plan()
    attack_by_plan(model)  # its making calls everything
    before = state(model)

    def adapting(logits: Tensor, labels: Tensor) -> Tensor:
        next(model.experts[0].parameters()).data.mul_(1.01)
        return F.cross_entropy(logits, labels, reduction="none")

    attack_by_plan(model, adapting if who == "loss" else "ce")
    assert state(model) == before


def test_a_plan_costs_no_copy_of_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture_with_plan()
    copied: list[nn.Module] = []
    keep = door._Kept

    def watched(modules: Sequence[nn.Module], *, parameters: bool) -> door._Kept:
        copied.extend(modules)
        return keep(modules, parameters=parameters)

    monkeypatch.setattr(door, "_Kept", watched)
    attack_by_plan(model)
    assert model.gate in copied
    assert model.experts[0] not in copied
    attacks.apgd(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), epsilon=0.1, num_steps=2)
    assert model.experts[0] in copied  # the model itself decides who is fooled


def test_a_model_is_copied_at_the_latest_when_it_is_asked() -> None:
    model = Counts().train()
    before = state(model)
    with undisturbed(model, CPU, called=[]):
        assert not model.training
        ask(model, torch.rand(2, *SHAPE))
        model.net.linear.weight.data.zero_()
    assert state(model) == before


class Merges(Around):
    """Merges weights for evaluation, as low-rank adapters do."""

    def train(self, mode: bool = True) -> Any:
        if self.training and not mode:
            self.net.linear.bias.data.add_(1)
        return super().train(mode)


def test_what_a_change_of_mode_does_is_undone() -> None:
    model = Merges().train()
    before = state(model)
    with undisturbed(model, CPU, called=[]):
        assert state(model) != before
    assert state(model) == before
