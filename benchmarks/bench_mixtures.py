"""PGD on mixtures and on their views: eager torch, the best stock torch, ours.

    pytest benchmarks/bench_mixtures.py                      # one mixture, in a minute
    DWF_BENCH_FULL=1 pytest benchmarks/bench_mixtures.py     # all, stock compiled too

A suite attacks a mixture through about twenty views of it; two of them stand for the others here.
Experts are ResNet-10 of 32 channels, Robust Experts and ADVMoE ResNet-18, untrained. Attacks and
columns are those of bench_architectures.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bench import Bench
from bench_architectures import IMAGE_SHAPE, batch_of, side_by_side
from torch import Tensor, nn

from dwf.models import (
    ExpertModel,
    MixedModel,
    Mixture,
    MlpGate,
    Normalize,
    RoutedMixture,
    Stretch,
    SynergyOfExperts,
    attack_views,
    build_network,
)
from dwf.models.pathways import PathwayMixture, PathwayResNet, build_router
from dwf.models.planned import AroundNetworks
from dwf.models.routed import linear_router
from dwf.models.sparse_network import SparseModel, make_sparse

pytestmark = pytest.mark.filterwarnings("default")  # a compiler's remark ends no measurement

VIEWS = ("re-weighted members", "soft inside, T 1")
QUICK = "rt_er"


def network(name: str = "resnet10", *, seed: int = 0) -> nn.Module:
    return build_network(name, num_classes=10, width=32, in_channels=3, seed=seed)


def experts(count: int) -> list[nn.Module]:
    return [network(seed=e) for e in range(count)]


def normalize() -> Normalize:
    return Normalize((0.5,) * 3, (0.25,) * 3)


def robust_experts() -> SparseModel:
    made = network("resnet18")
    shown = make_sparse(made, "block", num_experts=4)
    return SparseModel(normalize(), made, shown)


def pathways() -> PathwayMixture:
    return PathwayMixture(
        PathwayResNet((2, 2, 2, 2), width=32), build_router(2, seed=1), normalize()
    )


# named like the presets
MIXTURES: dict[str, Callable[[], ExpertModel]] = {
    "dwf": lambda: Mixture(experts(9), MlpGate(IMAGE_SHAPE, 9), normalize()),
    "rt_er": lambda: RoutedMixture(experts(4), linear_router(IMAGE_SHAPE, 4, seed=0), normalize()),
    "soe": lambda: SynergyOfExperts(experts(3), normalize()),  # type: ignore[arg-type]
    "mixednuts": lambda: MixedModel(*experts(2), 0.6, stretch=Stretch(2.0, 1.5, 0.1)),
    "robust_experts": robust_experts,
    "advmoe": pathways,
}


def cases(model: ExpertModel, images: Tensor) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """A name, what is attacked, and what our column is given: it may offer plans of its parts."""
    yield "whole", model, model
    for view in attack_views(model):
        if view.name in VIEWS:
            made = view.make(images)
            assert isinstance(made, AroundNetworks)
            yield f"view {view.name}", made.module, made


@pytest.mark.parametrize("name", MIXTURES)
def test_pgd_step(name: str, bench: Bench) -> None:
    full = bool(os.environ.get("DWF_BENCH_FULL"))
    bench.require(gpu=bench.device.type == "cuda", minutes=name != QUICK)
    batch_size = 16 if full else 4
    images, labels = batch_of(batch_size, bench.device)
    model = MIXTURES[name]().eval().to(bench.device)
    for what, attacked, offered in cases(model, images):
        row: dict[str, Any] = {
            "bench": "mixtures",
            "case": f"pgd-{name}-{what}-B{batch_size}",
            "mixture": name,
            "experts": repr(model),
            "attacked": what,
            **side_by_side(attacked, bench, images, labels, offered=offered, compiles=full),
        }
        bench.record(row)
