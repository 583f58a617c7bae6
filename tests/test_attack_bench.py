"""The tally of benchmarks/attack_bench.py counts what was asked; optimality by hand."""

from __future__ import annotations

import math

import attack_bench
import pytest
import torch
from attack_bench import Counted, Tally, measure
from small_models import Linear, make_images
from torch import Tensor, nn

import dwf
from dwf.attacks import AttackTarget, minimum_norm
from dwf.bench.optimality import optimality

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 0.3 + 0.4 * make_images(4)
INF = math.inf


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_optimality_by_hand() -> None:
    best = tensor(0, 1, 2, 4)  # the curve ends at 4; its mean is 7/4, that of nothing 3
    assert optimality(best, best) == 1
    assert optimality(tensor(0, INF, INF, INF), best) == pytest.approx(0)
    assert optimality(tensor(0, 2, 2, 4), best) == pytest.approx(1 - (1 / 4) / (3 - 7 / 4))
    # what lies beyond the end of the best curve counts no more than its end
    assert optimality(tensor(0, 1, 2, 40), best) == 1
    assert optimality(tensor(0, 1, 9, 4), best) == optimality(tensor(0, 1, INF, 4), best)


def test_what_is_no_best_is_refused() -> None:
    with pytest.raises(ValueError, match="1 images that no attack broke"):
        optimality(tensor(1, 1), tensor(1, INF))
    with pytest.raises(ValueError, match="closer"):
        optimality(tensor(0.5, 1), tensor(1, 1))


def classes(model: nn.Module) -> Tensor:
    return model(IMAGES).argmax(dim=1)


class TestTally:
    def counted(self, norm: str = "linf", limit: int = 100) -> tuple[Counted, Tally]:
        model = Linear()
        tally = Tally(IMAGES, classes(model), norm, limit)
        return Counted(model, tally), tally

    def test_passes_of_each_image_in_any_order(self) -> None:
        counted, tally = self.counted()
        images = IMAGES[[2, 0, 2]].requires_grad_()
        logits = counted(images)
        assert tally.propagations.tolist() == [1, 0, 2, 0]
        logits[0].sum().backward()  # of one row alone
        assert tally.propagations.tolist() == [1, 0, 3, 0]
        with torch.no_grad():
            counted(IMAGES[3:])
        assert tally.propagations.tolist() == [1, 0, 3, 1]
        assert torch.equal(logits, Linear()(images))

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_the_closest_failure_counts(self, norm: str) -> None:
        counted, tally = self.counted(norm)
        labels = classes(counted.model)
        target = AttackTarget(counted.model, reason="alone")
        found = minimum_norm(dwf.fab, target, IMAGES, labels, norm=norm, num_steps=20)
        assert bool(found.distance.isfinite().all())
        with torch.no_grad():
            counted(found.images)
            torch.testing.assert_close(tally.distance, found.distance.double(), rtol=1e-5, atol=0)
            counted(IMAGES + 1.2 * (found.images - IMAGES))
        torch.testing.assert_close(tally.distance, found.distance.double(), rtol=1e-5, atol=0)

    def test_nothing_outside_of_the_range_or_the_limit(self) -> None:
        counted, tally = self.counted(limit=1)
        with torch.no_grad():
            counted.model.weight.neg_()  # wrong everywhere
            outside = IMAGES.clone()
            outside[:, :, 0, 0] = 1.5
            counted(outside)
            assert bool(tally.distance.isinf().all())
            tally.note(IMAGES, counted.model(IMAGES))  # one more than the limit
            assert bool(tally.distance.isinf().all())
            assert tally.is_used_up


def test_an_attack_of_ours_is_counted() -> None:
    model = Linear()

    def attack(counted: nn.Module, images: Tensor, labels: Tensor) -> None:
        target = AttackTarget(counted, reason="its passes are counted")
        minimum_norm(dwf.apgd, target, images, labels, norm="linf", num_radii=3, num_steps=5)

    found = measure(attack, model, IMAGES, classes(model), "linf")
    assert bool(found.distance.isfinite().all())
    assert 3 < float(found.propagations.min())
    assert float(found.propagations.max()) <= 3 * (2 * 6 + 12)


def test_an_attack_ends_when_nothing_is_left() -> None:
    asked = []

    def attack(counted: nn.Module, images: Tensor, labels: Tensor) -> None:
        while True:
            asked.append(counted(images))

    def broken(counted: nn.Module, images: Tensor, labels: Tensor) -> None:
        raise RuntimeError("of its own")

    found = measure(attack, Linear(), IMAGES, classes(Linear()), "linf")
    assert found.propagations.tolist() == [len(asked)] * 4 == [2000] * 4
    with pytest.raises(RuntimeError, match="of its own"):
        measure(broken, Linear(), IMAGES, classes(Linear()), "linf")


def test_the_limit_is_attack_benchs() -> None:
    assert attack_bench.NUM_PROPAGATIONS == 2000
