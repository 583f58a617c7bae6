"""What evaluate asks after its attacks: sources, twins, broken plans, harder attacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import Linear, Mapped, SmallNet, labeled_by, make_dataset
from torch import nn

import dwf
from dwf.attacks.target import AttackTarget
from dwf.checks import ConfigError
from dwf.config import EvaluationConfig
from dwf.evaluation import Budget, harder
from dwf.evaluation.plan_check import trusted
from dwf.evaluation.stand_in import smooth_stand_in
from dwf.evaluation.twins import twins

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # flat models are what these tests are about
    pytest.mark.filterwarnings("ignore:the model's output does not depend"),
]
SETTINGS = EvaluationConfig(epsilon=0.05, batch_size=64, diagnostic_images=0)
BUDGET = Budget(num_steps=3, num_queries=10)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """What runs where gradients lie, cut short: these tests ask that it runs, not what it finds."""
    monkeypatch.setattr(harder, "NUM_QUERIES", 100)
    monkeypatch.setattr(harder, "NUM_LESSONS", 40)


def judged(model, dataset, settings=SETTINGS, **more):
    return dwf.evaluate(model, dataset, settings, suite="quick", budget=BUDGET, **more)


def row(result, name):
    return next(row for row in result.attacks if row.name == name)


class Grid(nn.Module):
    """One network for images of 8 bits, a constant answer of another for all others."""

    def __init__(self):
        super().__init__()
        self.inside = SmallNet()

    def forward(self, images):
        logits = self.inside(images)
        away = (images * 255 - (images * 255).round()).abs().amax(dim=(1, 2, 3))
        near = self.inside((images * 8).round() / 8).detach()
        return torch.where((away < 1e-3)[:, None], logits, logits.detach() * 0 + near)


class TestSources:
    def test_images_made_on_another_model_count(self):
        inside = SmallNet().eval()
        flat = Mapped(inside, lambda z: nn.functional.one_hot(z.argmax(1), 5).float() * 9).eval()
        dataset = labeled_by(flat, wrong=0)
        result = judged(flat, dataset, replace(SETTINGS, epsilon=0.2), sources={"inside": inside})
        transfer = row(result, "transfer from inside")
        assert transfer.kind == "transfer"
        assert result.finding("transfer_wins") is not None
        assert result.worst_case.num_correct <= transfer.num_correct < 60
        assert "transfer from inside" in result.worst_case.attacks

    def test_not_for_the_grid(self):
        model = Linear()
        with pytest.raises(ConfigError, match="sources"):
            dwf.evaluate(model, make_dataset(8), SETTINGS, suite="paper", sources={"a": model})


class TestTwins:
    def test_counts_equal_pixels(self):
        dataset = make_dataset(20)
        other = replace(make_dataset(30, seed=4), split="train")
        assert twins(dataset, other).count == 0
        images = other.images.clone()
        images[7], images[9] = dataset.images[3], dataset.images[5]
        found = twins(dataset, replace(other, images=images))
        assert (found.count, found.sample_indices) == (2, (3, 5))
        as_floats = replace(dataset, images=dataset.images.float() / 255)
        assert twins(as_floats, replace(other, images=images)).count == 2
        assert twins(dataset, make_dataset(5, shape=(1, 8, 8))).count == 0

    def test_is_a_finding(self):
        model = Linear().eval()
        dataset = labeled_by(model, wrong=0)
        result = judged(model, dataset, training_data=dataset)
        finding = result.finding("twins")
        assert (finding.severity, finding.num_images) == ("invalid", 60)
        assert judged(model, dataset).finding("twins") is None


class TestPlans:
    class Wrong:
        """A plan whose gradient is that of another loss."""

        deterministic, back_end, graphs = True, "wrong", None

        def __init__(self, model, sign):
            self.model, self.sign = model, sign

        def __call__(self, images):
            return self.model(images)

        def gradient(self, images, labels, loss="ce"):
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                logits = self.model(leaf)
                (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), leaf)
            return self.sign * gradient.roll(1, dims=3 if self.sign < 0 else 0), logits.detach()

    def test_a_wrong_one_is_not_used_and_not_the_models_fault(self):
        model = SmallNet().eval().requires_grad_(False)
        images = make_dataset(8).images.float() / 255
        labels = model(images).argmax(dim=1)
        planned = AttackTarget(model, self.Wrong(model, -1.0))
        searched, finding = trusted(planned, model, images, labels)
        assert isinstance(searched, AttackTarget)
        assert searched.plan is None
        assert (finding.name, finding.severity) == ("plan_gradient", "note")
        assert finding.measured < finding.limit

    def test_a_right_one_stays(self):
        model = SmallNet().eval().requires_grad_(False)
        images = make_dataset(1).images.float() / 255
        planned = AttackTarget(model, self.Wrong(model, 1.0))  # a roll of one row is none
        labels = model(images).argmax(dim=1)
        assert trusted(planned, model, images, labels) == (planned, None)
        assert trusted(model, model, images, labels) == (model, None)


class TestHarder:
    @pytest.mark.slow
    def test_runs_where_a_finding_says_so_and_counts(self):
        model = Grid().eval()
        dataset = labeled_by(model, wrong=0)
        result = judged(model, dataset)
        assert result.finding("jumps") is not None
        kinds = [row.kind for row in result.attacks]
        assert kinds[-4:] == [
            "harder-eight-bits",
            "harder-stand-in",
            "harder-backward",
            "harder-rays",
        ]
        counts = [row.num_correct for row in result.attacks]
        assert counts == sorted(counts, reverse=True)
        assert result.worst_case.num_correct == counts[-1]

    @pytest.mark.slow
    def test_a_sound_model_is_spared(self):
        model = SmallNet().eval()
        result = judged(model, labeled_by(model))
        assert not [row for row in result.attacks if row.kind.startswith("harder-")]

    def test_a_stand_in_learns_the_answers_and_leaves_no_trace(self):
        model = Linear().eval()
        images = make_dataset(64).images.float() / 255
        before = torch.get_rng_state()
        made = smooth_stand_in(model, images, epsilon=0.05, num_classes=5, num_steps=100)
        assert torch.equal(torch.get_rng_state(), before)
        agree = (made(images).argmax(dim=1) == model(images).argmax(dim=1)).float().mean()
        assert agree > 0.8
        few = {"epsilon": 0.05, "num_classes": 5, "num_steps": 3}
        first, again = (smooth_stand_in(model, images, **few) for _ in "ab")
        assert torch.equal(first(images), again(images))


def test_sixty_images_are_too_few():
    model = SmallNet().eval()
    result = judged(model, labeled_by(model))
    assert result.verdict in ("UNPROVEN", "SUSPECT")
    finding = result.finding("small_sample")
    assert (finding.severity, finding.limit) == ("unproven", 100)


class TestTime:
    def test_only_some_images_are_traced(self):
        """Three walks of 50 steps on all images of a small suite would cost a tenth of it."""
        model = Linear().eval()
        settings = replace(SETTINGS, diagnostic_images=100)
        result = judged(model, labeled_by(model, wrong=0), settings)  # 60 images
        assert result.traces.num_images == 6
        assert len(result.arrays["trace_sample_index"]) == 6

    @pytest.mark.slow
    def test_questions_are_at_most_15_percent_of_the_passes(self):
        class Counting(Linear):
            num_forwards = num_backwards = 0

            def forward(self, images):
                Counting.num_forwards += len(images)
                logits = super().forward(images)
                if logits.requires_grad:
                    logits.register_hook(self.went_back)
                return logits

            def went_back(self, gradient):
                Counting.num_backwards += len(gradient)

        model = Counting().eval()
        dataset = labeled_by(model, 100, wrong=0)
        Counting.num_forwards = Counting.num_backwards = 0
        settings = replace(SETTINGS, epsilon=0.005, diagnostic_images=100)
        result = dwf.evaluate(model, dataset, settings, suite="standard")
        assert result.robust_accuracy > 0.5
        attacks = sum(row.num_forwards + 2 * row.num_backwards for row in result.attacks)
        everything = Counting.num_forwards + 2 * Counting.num_backwards
        assert attacks > 100_000
        assert everything <= 1.15 * attacks
