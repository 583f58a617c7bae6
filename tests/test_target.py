"""What an attack gets its gradients from: the plan that a model offers, or the model itself."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from plan_networks import resnet
from small_models import SmallNet, everything, make_images, make_labels
from torch import nn

import dwf
import moe_kernels
from dwf.attacks import AttackReport, AttackTarget, attack_target, cross_entropy
from dwf.attacks.autograd import Autograd
from dwf.attacks.source import GradientSource
from dwf.attacks.target import _log_once
from dwf.models import Group, MlpGate
from moe_kernels import CannotPlan

BUDGET = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 4, "random_start": True}
IMAGES, LABELS = make_images(6), make_labels(6, 10)


def mixture(num_experts: int = 3) -> dwf.Mixture:
    """Experts with a gate that prefers some."""
    gate = MlpGate((3, 8, 8), num_experts, hidden=8)
    nn.init.normal_(gate.layers[-1].weight, generator=torch.Generator().manual_seed(0))
    experts = [resnet("resnet6", 8, seed=e) for e in range(num_experts)]
    return dwf.Mixture(experts, gate, dwf.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))).eval()


def offers() -> dict[str, nn.Module]:
    network = resnet("resnet6", 8)
    return {
        "mixture": mixture(),
        "pixel model": dwf.as_pixel_model(network, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)).eval(),
        "accelerated": dwf.accelerate(network).eval(),
        "group": Group([resnet("resnet6", 8, seed=e) for e in range(2)]).eval(),
    }


@pytest.mark.parametrize("name", offers())
def test_a_model_that_offers_a_plan_is_attacked_by_it(name):
    """In float32 both ways go to the same place, but for the sign of gradients that are nothing."""
    model = offers()[name]
    report = AttackReport()
    target = attack_target(model, IMAGES, dtype=torch.float32)
    ours = dwf.pgd(target, IMAGES, LABELS, **BUDGET, report=report)
    assert "float32" in report.back_end
    assert report.reason is None
    with moe_kernels.implementation("reference"):
        theirs = dwf.pgd(model, IMAGES, LABELS, **BUDGET, report=report)
    assert report.back_end == "autograd"
    assert report.reason == "the reference was asked for"
    assert ((ours - theirs).abs() > 1e-6).double().mean() < 1e-3


@pytest.mark.parametrize("width", [8, 32])
def test_the_default_is_the_processors_dtype_but_for_narrow_networks(width):
    attack = dwf.PGD(dwf.accelerate(resnet("resnet6", width)).eval(), num_steps=3)
    attack(IMAGES, LABELS)
    fastest = moe_kernels.plan.choose.default_dtype(torch.device("cpu"))
    name = str(torch.float32 if width < 32 else fastest).removeprefix("torch.")
    assert name in attack.report().back_end
    assert attack.report().passes == 3 * len(IMAGES)
    assert attack.report().num_images == len(IMAGES)
    assert attack.report().steps_per_s > 0
    assert attack.report().tflop_per_s > 0
    assert "image-passes" in str(attack.report())


def test_reports_before_and_without_a_plan():
    attack = dwf.FGSM(SmallNet(num_classes=10).eval())
    assert attack.report() == AttackReport()
    attack(IMAGES, LABELS)
    assert attack.report().back_end == "autograd"
    assert "dwf.accelerate" in attack.report().reason
    assert attack.report().tflop_per_s is None
    assert "autograd" in str(attack.report())


class Recorded(Autograd):
    """A plan that notes how it was asked."""

    def __init__(self, model):
        super().__init__(model)
        self.losses = []

    def gradient(self, images, labels, loss="ce"):
        self.losses.append(loss)
        return super().gradient(images, labels, loss)


def test_a_plan_is_asked_for_cross_entropy_by_name():
    """Except at the first pass, whose loss looks at the logits."""
    model = SmallNet(num_classes=10).eval()
    for loss, name in ((cross_entropy, "ce"), (dwf.attacks.losses.dlr, dwf.attacks.losses.dlr)):
        plan = Recorded(model)
        found = dwf.pgd(plan, IMAGES, LABELS, **BUDGET, loss=loss)
        assert plan.losses[1:] == [name] * 3
        assert torch.equal(found, dwf.pgd(model, IMAGES, LABELS, **BUDGET, loss=loss))


def test_targets_and_reports_print_no_tensors():
    model, report = mixture(), AttackReport()
    target = attack_target(model, IMAGES, dtype=torch.float32)
    dwf.pgd(target, IMAGES, LABELS, **BUDGET, report=report)
    assert repr(target).startswith("AttackTarget(Mixture, plan of 3 networks; images 3x8x8: ")
    assert repr(AttackTarget(model, reason="why")) == "AttackTarget(Mixture, autograd (why))"
    assert repr(AttackReport()) == "AttackReport(empty)"
    assert repr(report) == f"AttackReport({report})"
    source = GradientSource(model, cross_entropy)
    assert repr(source) == "GradientSource(autograd, 0 image-passes)"


def test_nothing_changes_when_a_plan_attacks():
    model = mixture().train()
    before = everything(model)
    dwf.pgd(model, IMAGES, LABELS, **BUDGET)
    assert everything(model) == before


def test_copies_and_files_know_nothing_of_the_plan():
    model = mixture()
    plan = model.attack_plan()
    plan.prepare(IMAGES)
    assert model.attack_plan() is plan
    copied = copy.deepcopy(model)
    assert "_plans" not in vars(copied)
    assert "_plans" not in vars(pickle.loads(pickle.dumps(model)))
    assert copied.attack_plan() is not plan
    assert set(model.state_dict()) == set(copied.state_dict())


def test_attacks_in_two_dtypes_take_turns():
    """As a float32 training and its validations do: neither makes the other plan anew."""
    model = mixture()
    plans = [model.attack_plan(dtype) for dtype in (torch.float32, None)]
    assert plans[0] is not plans[1]
    assert [model.attack_plan(dtype) for dtype in (torch.float32, None)] == plans


@pytest.mark.parametrize("planned", [True, False])
def test_what_an_attack_needed_is_free_when_nobody_needs_it(planned):
    """Without a garbage collection, which does not know how much memory it would give back."""
    model = mixture() if planned else SmallNet(num_classes=10).eval()
    gc.disable()
    try:
        target = attack_target(model, IMAGES)
        dwf.pgd(target, IMAGES, LABELS, epsilon=0.1, step_size=0.01, num_steps=3, random_start=True)
        seen = weakref.ref(target.plan if planned else model)
        del target, model
        assert seen() is None
    finally:
        gc.enable()


def change_weight(model):
    model.experts[0].conv1.weight.data.mul_(-1)


def load_weights(model):
    model.load_state_dict(mixture_of_others().state_dict())


def mixture_of_others():
    other = mixture()
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    return other


def replace_an_expert(model):
    model.experts[1] = resnet("resnet6", 8, seed=9)


def replace_the_gate(model):
    model.gate = MlpGate((3, 8, 8), 3, hidden=4, seed=5)
    nn.init.normal_(model.gate.layers[-1].weight, generator=torch.Generator().manual_seed(2))


def replace_the_normalization(model):
    model.normalize = dwf.Normalize((0.1, 0.2, 0.3), (0.3, 0.3, 0.3))


def change_statistics(model):
    model.experts[2].bn1.running_var.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        load_weights,
        replace_an_expert,
        replace_the_gate,
        replace_the_normalization,
        change_statistics,
    ],
)
def test_the_next_attack_sees_a_changed_model(change):
    model = mixture()
    attack_target(model, IMAGES, dtype=torch.float32)
    change(model)
    target = attack_target(model, IMAGES, dtype=torch.float32)
    torch.testing.assert_close(target.plan(IMAGES), model(IMAGES).detach(), rtol=1e-4, atol=1e-5)


def test_a_target_keeps_its_weights():
    """Several attacks of one step see one model, whatever happens to the weights meanwhile."""
    model = mixture()
    target = attack_target(model, IMAGES)
    before = dwf.fgsm(target, IMAGES, LABELS, epsilon=0.1)
    change_weight(model)
    assert torch.equal(dwf.fgsm(target, IMAGES, LABELS, epsilon=0.1), before)


class Smooth(nn.Module):
    """Something that no plan holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 10)

    def forward(self, images):
        return self.linear(torch.sin(images).flatten(1))


def test_what_cannot_be_planned_is_attacked_all_the_same_and_says_why_once(caplog):
    _log_once.cache_clear()
    model = dwf.accelerate(Smooth()).eval()
    report = AttackReport()
    with caplog.at_level(logging.WARNING, "dwf"):
        ours = dwf.pgd(model, IMAGES, LABELS, **BUDGET, report=report)
        dwf.pgd(model, IMAGES, LABELS, **BUDGET)
    assert report.reason == "it calls sin"
    assert caplog.text.count("is attacked by autograd: it calls sin") == 1
    assert torch.equal(ours, dwf.pgd(model.network, IMAGES, LABELS, **BUDGET))


def test_batch_statistics_are_no_matter_for_a_plan():
    target = attack_target(mixture(), IMAGES, bn_mode="train")
    assert target.plan is None
    assert target.reason == "BatchNorm uses batch statistics"


def test_a_plan_of_ones_own():
    """Whoever has the members of `AttackPlan` is attacked by them."""
    plan = mixture().attack_plan(dtype=torch.float32)
    assert attack_target(plan, IMAGES).plan is plan
    found = dwf.pgd(plan, IMAGES, LABELS, **BUDGET)
    model = mixture()
    target = attack_target(model, IMAGES, dtype=torch.float32)
    torch.testing.assert_close(found, dwf.pgd(target, IMAGES, LABELS, **BUDGET), rtol=0, atol=1e-6)


def test_each_image_its_own_radius_and_steps():
    model = mixture()
    target = attack_target(model, IMAGES, dtype=torch.float32)
    epsilon = torch.linspace(0, 0.1, 6)
    steps = torch.tensor([1, 2, 3, 3, 2, 1])
    together = dwf.pgd(
        target, IMAGES, LABELS, epsilon=epsilon, step_size=0.02, num_steps=steps, random_start=False
    )
    assert ((together - IMAGES).abs().flatten(1).amax(dim=1) <= epsilon + 1e-6).all()
    for b in range(6):
        alone = dwf.pgd(
            target,
            IMAGES[b : b + 1],
            LABELS[b : b + 1],
            epsilon=float(epsilon[b]),
            step_size=0.02,
            num_steps=int(steps[b]),
            random_start=False,
        )
        assert ((together[b] - alone[0]).abs() > 1e-6).double().mean() < 0.01


def test_errors_stay_the_same():
    experts = [resnet("resnet6", 8), resnet("resnet6", 8, num_classes=7)]
    odd = dwf.Mixture(experts, MlpGate((3, 8, 8), 2, hidden=4)).eval()
    with pytest.raises(dwf.checks.ModelOutputError, match=r"experts\[1\]: expected logits"):
        dwf.pgd(odd, IMAGES, LABELS, **BUDGET)
    with pytest.raises(dwf.checks.LabelError, match="10 at"):
        dwf.pgd(mixture(), IMAGES, torch.full((6,), 10), **BUDGET)


@pytest.mark.slow
def test_evaluation_says_what_searched():
    digits = dwf.data.load("digits", split="test").subset(torch.arange(6))
    network = dwf.models.build_network(
        "resnet6", num_classes=10, width=4, in_channels=1, seed=0
    ).eval()
    model = dwf.as_pixel_model(network, digits.mean, digits.std)
    settings = dwf.config.EvaluationConfig(
        num_steps=(2,), multi_start_steps=2, adaptive_steps=3, batch_size=6
    )
    table = dwf.evaluate(model, digits, settings, suite="paper")
    assert "5 fused convolutions" in table.attack_path
    assert "attacks searched by: plan of 1 networks" in str(table)
    with moe_kernels.implementation("reference"):
        table = dwf.evaluate(model, digits, settings, suite="paper")
    assert table.attack_path == "autograd (the reference was asked for)"


def test_a_plan_that_fails_for_good_leaves_autograd(monkeypatch, caplog):
    """The attack goes on, and its report says why it was slow."""
    model = dwf.accelerate(resnet("resnet6", 8)).eval()
    target = attack_target(model, IMAGES)
    monkeypatch.setattr(type(target.plan), "_program", gone)
    report = AttackReport()
    budget = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 3, "random_start": False}
    with caplog.at_level("WARNING", "dwf"):
        found = dwf.pgd(target, IMAGES, LABELS, **budget, report=report)
    expected = dwf.pgd(AttackTarget(model), IMAGES, LABELS, **budget)
    assert torch.equal(found, expected)
    assert (report.back_end, report.reason) == ("autograd", "nothing is left to run on")
    assert caplog.text.count("is attacked by autograd: nothing is left to run on") == 1


def gone(self, images):
    raise CannotPlan("nothing is left to run on")
