"""What attacks cost on a GPU beside their arithmetic: one graph replay a step, and no waiting.

The rehearsed GPU counts (`pytest --rehearse-gpu`); a real one has no such counters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import rehearsal
import torch
from small_models import Noisy, SmallNet
from torch import Tensor, nn

import dwf
from dwf.attacks.source import GradientSource
from dwf.models import MlpGate, RoutedMixture
from dwf.models.networks import build_network
from dwf.models.routed import linear_router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not rehearsal.running, reason="counted by --rehearse-gpu alone"),
]

B, SHAPE, CLASSES = 6, (3, 8, 8), 4
# Too small to fool anything: an image that is done leaves, which costs a wait.
LINF = {"epsilon": 0.002, "norm": "linf"}
L2 = {"epsilon": 0.02, "norm": "l2"}
Attack = Callable[..., Tensor]


def network(seed: int = 0) -> nn.Module:
    return build_network("resnet6", num_classes=CLASSES, width=4, in_channels=3, seed=seed)


def planned() -> nn.Module:
    return dwf.Mixture([network(e) for e in range(2)], MlpGate(SHAPE, 2)).eval().cuda()


def composed() -> nn.Module:
    router = linear_router(SHAPE, 2, seed=0)
    return RoutedMixture([network(e) for e in range(2)], router).eval().cuda()


def unplanned() -> nn.Module:
    return SmallNet(num_classes=CLASSES).eval().cuda()


def random_model() -> nn.Module:
    return Noisy(SmallNet(num_classes=CLASSES), std=0.01).eval().cuda()


MODELS = {"planned": planned, "unplanned": unplanned, "random": random_model}


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images that the model gets right, far from being fooled."""
    images = torch.rand(B, *SHAPE, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        return images, model(images).argmax(dim=1)


def pgd(*args: Any, num_steps: int, **settings: Any) -> Tensor:
    step_size = settings["epsilon"] / 4
    return dwf.attacks.pgd(
        *args, num_steps=num_steps, step_size=step_size, random_start=True, **settings
    )


def mim(*args: Any, num_steps: int, **settings: Any) -> Tensor:
    step_size = settings["epsilon"] / 4
    return dwf.attacks.mim(*args, num_steps=num_steps, step_size=step_size, **settings)


def square(*args: Any, num_steps: int, **settings: Any) -> Tensor:
    return dwf.attacks.square(*args, num_queries=num_steps, **settings)


def simba(*args: Any, num_steps: int, **settings: Any) -> Tensor:
    return dwf.attacks.simba(*args, num_queries=num_steps, **settings)


ATTACKS: dict[str, tuple[Attack, dict[str, Any]]] = {
    "pgd": (pgd, LINF),
    "pgd-l2": (pgd, L2),
    "mim": (mim, LINF),
    "apgd": (dwf.attacks.apgd, {**LINF, "loss": "dlr"}),
    "apgd-l2": (dwf.attacks.apgd, L2),
    "fab": (dwf.attacks.fab, LINF),
    "fab-l2": (dwf.attacks.fab, L2),
    "square": (square, LINF),
    "square-l2": (square, L2),
    "simba": (simba, LINF),
    "simba-l2": (simba, L2),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("targeted", [False, True], ids=["", "targeted"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_step_is_one_replay(name: str, targeted: bool, model: nn.Module) -> None:
    """More steps are as many more replays and no wait; and the next attack captures nothing.

    That is between two checkpoints, at which images that are done leave.
    """
    settings = {"targets": (data(model)[1] + 1) % CLASSES} if targeted else {}
    check_replays(name, model, **settings)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_step_around_the_plans_of_parts_is_one_replay(name: str) -> None:
    check_replays(name, composed())


def check_replays(name: str, model: nn.Module, **more: Any) -> None:
    """Take few steps and many, and compare what the rehearsed GPU counted."""
    attack, settings = ATTACKS[name]
    images, labels = data(model)
    settings = {**settings, **more}
    # the same number of checkpoints in both; the first runs capture what there is to capture
    few, many = {"fab": (11, 14), "apgd": (46, 47)}.get(name.split("-")[0], (4, 8))
    attack(model, images, labels, num_steps=many, **settings)
    counts = []
    for num_steps in (few, many):
        with rehearsal.counted() as events:
            attack(model, images, labels, num_steps=num_steps, **settings)
        assert events.captures == 0, events.where("captures")
        counts.append(events)
    assert counts[1].replays - counts[0].replays == many - few
    assert counts[1].syncs == counts[0].syncs, counts[1].where("syncs")
    assert counts[1].copies == counts[0].copies, counts[1].where("copies")


def test_a_step_of_carlini_wagner_is_one_replay(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends early where nothing falls any more, so steps are watched one by one."""
    images, labels = data(model)
    take, seen = GradientSource._count, []

    def watched(source: GradientSource, run: Callable[..., tuple[int, int]]) -> None:
        with rehearsal.counted() as events:
            take(source, run)
        seen.append((events.replays, events.captures, events.syncs, events.copies))

    settings = {"num_searches": 1, "num_steps": 20, "epsilon": 0.02}
    dwf.attacks.carlini_wagner(model, images, labels, **settings)
    monkeypatch.setattr(GradientSource, "_count", watched)
    dwf.attacks.carlini_wagner(model, images, labels, **settings)
    assert len(seen) >= 4
    assert set(seen) == {(1, 0, 0, 0)}
