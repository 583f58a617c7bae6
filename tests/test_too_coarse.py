"""Networks that a dtype is too coarse for: judged, or run, in the next finer one."""

from __future__ import annotations

import copy

import pytest
import torch
from plan_networks import ConvNext, Dense, MobileBlocks, Vgg, resnet, seeded

from moe_kernels.plan import CannotPlan, Plan, choose, verify
from moe_kernels.plan.back_ends.aten import AtenBackEnd

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "resnet": lambda: resnet("resnet6", 8),
    "dense": lambda: seeded(Dense),
    "convnext": lambda: seeded(ConvNext),
    "mobile-blocks": lambda: seeded(MobileBlocks),
    "vgg": lambda: seeded(Vgg),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_is_computed_in_float64_throughout(name, monkeypatch):
    """One float32 number on the way would show."""
    monkeypatch.setattr(verify, "_TRACED", (1e-12, 1e-10))
    network = copy.deepcopy(NETWORKS[name]()).double()
    size = 32 if name == "vgg" else 8
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    verify._compare_trace(network, images.double(), torch.float64)


def coarse(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Let float32 differ by too much; filled with the dtypes that are tried."""
    tried = []
    compare = verify._compare_trace

    def compared(network, images, dtype, maps):
        tried.append(dtype)
        if dtype is torch.float32:
            raise CannotPlan("the plan's gradients differ from the module's")
        compare(network, images, dtype, maps)

    monkeypatch.setattr(verify, "_compare_trace", compared)
    return tried


def test_a_trace_that_float32_cannot_judge(monkeypatch):
    tried = coarse(monkeypatch)
    network = resnet("resnet6", 8)
    Plan([network]).prepare(IMAGES)
    assert tried == [torch.float32, torch.float64]
    assert network.conv1.weight.dtype is torch.float32


def test_a_wrong_trace_is_wrong_in_float64(monkeypatch):
    coarse(monkeypatch)
    image_grad = AtenBackEnd.image_grad
    monkeypatch.setattr(AtenBackEnd, "image_grad", lambda *args: 1.02 * image_grad(*args))
    with pytest.raises(CannotPlan, match="gradients differ"):
        Plan([resnet("resnet6", 8)]).prepare(IMAGES)


class OnlyFloat32(torch.nn.Sequential):
    def double(self):
        raise TypeError("not in float64")


def test_a_network_that_has_no_float64_keeps_its_first_reason(monkeypatch):
    coarse(monkeypatch)
    with pytest.raises(CannotPlan, match="gradients differ"):
        Plan([OnlyFloat32(resnet("resnet6", 8))]).prepare(IMAGES)


@pytest.mark.skipif(
    choose.default_dtype(torch.device("cpu")) is not torch.bfloat16, reason="no fast bfloat16 here"
)
def test_a_network_that_bfloat16_is_too_coarse_for(monkeypatch):
    """Its plan is float32, unless bfloat16 was asked for."""
    strict = verify._COMPUTED | {torch.bfloat16: (1e-6, 1e-6)}
    network = resnet("resnet6", 32)
    plan = Plan([network])
    plan.prepare(IMAGES)
    assert plan.back_end.endswith("bfloat16")
    monkeypatch.setattr(verify, "_COMPUTED", strict)
    plan = Plan([network])
    plan.prepare(IMAGES)
    assert plan.back_end.endswith("float32")
    torch.testing.assert_close(plan(IMAGES), network(IMAGES).detach(), rtol=1e-3, atol=1e-4)
    with pytest.raises(CannotPlan, match="differ from the module's"):
        Plan([network], dtype=torch.bfloat16).prepare(IMAGES)
