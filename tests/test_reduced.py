"""Modules that no plan knows: autograd with products in bfloat16, where that is right."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from small_models import SmallNet
from torch import Tensor, nn

import dwf
from dwf.attacks import AttackReport, attack_target
from moe_kernels import CannotPlan, ReducedPlan
from moe_kernels.plan.choose import default_dtype

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(5)
BUDGET = {"epsilon": 0.1, "step_size": 0.02, "num_steps": 5, "random_start": False}
pytestmark = pytest.mark.skipif(
    default_dtype(torch.device("cpu")) is not torch.bfloat16, reason="no fast bfloat16 here"
)


class Transformer(nn.Module):
    """Patches, two blocks of attention, a mean, a linear layer; a buffer and a dropout besides."""

    def __init__(self, width: int = 64, **options: object) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.mix = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True) for _ in "ab")
        )
        self.register_buffer("scale", torch.tensor(1.5))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.patches(x)).flatten(2).transpose(1, 2)
        return self.last(self.blocks(self.scale * x).mean(dim=1))


def transformer(width: int = 64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(width).eval()


def gradient(model: nn.Module) -> Tensor:
    leaf = IMAGES.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), LABELS, reduction="sum"), leaf)[0]


def test_computes_what_the_module_computes():
    model = transformer()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    plan = ReducedPlan(model)
    plan.prepare(IMAGES)
    assert str(plan) == "autograd, products in bfloat16"
    ours, logits = plan.gradient(IMAGES, LABELS)
    theirs = gradient(model)
    assert not torch.equal(ours, theirs)  # products are rounded
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999
    torch.testing.assert_close(logits, model(IMAGES).detach(), rtol=0.02, atol=0.02)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert {type(x) for x in model.modules()} == {type(x) for x in transformer().modules()}


def test_new_weights_are_taken_over():
    model = transformer()
    plan = ReducedPlan(model)
    plan.prepare(IMAGES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    plan.prepare(IMAGES)
    ours, theirs = plan.gradient(IMAGES, LABELS)[0], gradient(model)
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999


def test_attacks_use_it_and_say_so():
    model, report = dwf.accelerate(transformer()), AttackReport()
    found = dwf.pgd(model, IMAGES, LABELS, **BUDGET, report=report)
    assert report.back_end == "autograd, products in bfloat16"
    assert report.reason == "mix is dilated or does not pad with zeros"
    with torch.no_grad():
        assert F.cross_entropy(model(found), LABELS) > F.cross_entropy(model(IMAGES), LABELS)
    target = attack_target(model, IMAGES)
    assert attack_target(target, IMAGES).reason == report.reason  # handed on
    assert attack_target(model, IMAGES, dtype=torch.float32).plan is None
    assert "_reduced" not in vars(copy.deepcopy(model))


class Counting(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.999)
        return super().forward(x)


class CountingCalls(Transformer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Adapting(Transformer):
    """Test-time adaptation: each pass moves the weights."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.mul_(0.999)
        return super().forward(x)


class Thresholds(Transformer):
    """Tiny differences decide, which bfloat16 products do not keep."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3e3 * super().forward(x))


class Generator(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        return super().forward(x) + 0.1 * torch.randn(10, generator=self.generator)


DECLINED = {
    "changes the module": Counting,
    "forward changes the module": Adapting,
    "its forward changes the module": CountingCalls,
    "differ from the module": Thresholds,
    "from call to call|changes the module|cannot be copied": Generator,
    "products are small": lambda: SmallNet(channels=12),
    "not float32": lambda: Transformer().double(),
    "has hooks": lambda: hooked(Transformer()),
}


def hooked(model: nn.Module) -> nn.Module:
    model.last.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("reason", DECLINED)
def test_declined_with_the_reason(reason, caplog):
    model = DECLINED[reason]().eval()
    state, facts = copy.deepcopy(model.state_dict()), dict(vars(model))
    with pytest.raises(CannotPlan, match=reason):
        ReducedPlan(model).prepare(IMAGES.to(next(model.parameters()).dtype))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert vars(model) == facts
    if not isinstance(model, SmallNet) and "float32" not in reason:
        with caplog.at_level(logging.INFO, "dwf"):
            assert attack_target(dwf.accelerate(model), IMAGES).plan is None
        assert "keeps its own precision" in caplog.text
