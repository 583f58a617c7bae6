"""The cheap measurements: what they see of broken models, and that they leave no trace."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import (
    NUM_CLASSES,
    SHAPE,
    FailsAt,
    Injected,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    disordered,
    everything,
    make_images,
)
from torch import nn

from dwf.checks import LabelError, ModelOutputError, PixelRangeError
from dwf.evaluation.contracts import contracts
from dwf.evaluation.doubts import doubts
from dwf.models import Mixture, MlpGate

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = make_images(30)


def labels_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES).argmax(dim=1)


def names(measured) -> list[str]:
    return [finding.name for finding in measured.findings()]


class Quantized(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((images * 4).round() / 4)


def mixture(scale: float = 1.0) -> Mixture:
    gate = MlpGate(SHAPE, 2, hidden=4)
    with torch.no_grad():
        gate.layers[3].weight.copy_(scale * torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))
    return Mixture([Linear(seed=1), Linear(seed=2)], gate)


class TestContracts:
    @pytest.mark.parametrize("model", [Linear(), SmallNet(), mixture()])
    def test_nothing_to_say_of_a_sound_model(self, model):
        measured = contracts(model, IMAGES, labels_of(model), batch_size=7)
        assert names(measured) == []
        assert measured.finite.all()
        assert measured.difference < 1e-5
        assert torch.equal(measured.logits.argmax(dim=1), labels_of(model))

    def test_leaves_no_trace(self):
        model = disordered(SmallNet())
        before = everything(model)
        contracts(model, IMAGES, torch.zeros(30, dtype=torch.int64))
        assert everything(model) == before

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_leaves_no_trace_when_the_model_raises(self, call):
        model = FailsAt(disordered(SmallNet()), call)
        before = everything(model)
        with pytest.raises(Injected):
            contracts(model, IMAGES, torch.zeros(30, dtype=torch.int64))
        assert everything(model) == before

    def test_a_plain_function(self):
        model = Linear()
        assert names(contracts(lambda x: model(x), IMAGES, labels_of(model))) == []

    def test_non_finite_names_the_images(self):
        model = Linear()
        bright = IMAGES.flatten(1)[:, 0] > 0.5
        broken = Mapped(model, lambda z: z)
        broken.forward = lambda x: torch.where(
            (x.flatten(1)[:, 0] > 0.5)[:, None], torch.nan, model(x)
        )
        index = torch.arange(30) + 100
        measured = contracts(broken, IMAGES, labels_of(model), sample_index=index)
        assert torch.equal(measured.finite, ~bright)
        finding = measured.findings()[0]
        assert (finding.name, finding.num_images) == ("non_finite", int(bright.sum()))
        assert finding.sample_indices == tuple(index[bright].tolist()[:20])

    def test_bad_weights(self):
        model = Linear()
        with torch.no_grad():
            model.bias[2] = torch.inf
        measured = contracts(model, IMAGES, torch.zeros(30, dtype=torch.int64))
        assert measured.bad_weights == ["bias"]

    def test_probabilities_are_measured_not_refused(self):
        model = Mapped(Linear(), lambda z: z.softmax(dim=1))
        measured = contracts(model, IMAGES, labels_of(model))
        assert [f.severity for f in measured.findings()] == ["invalid"]
        assert [f.severity for f in measured.findings(allow_probabilities=True)] == ["suspect"]

    def test_noise(self):
        measured = contracts(Noisy(Linear()), IMAGES, labels_of(Linear()))
        assert names(measured) == ["random"]
        declared = {"declared_random": True, "eot_samples": 20, "num_votes": 10}
        assert measured.findings(**declared) == []

    def test_other_neighbors_in_the_batch(self):
        """Two passes over one batch agree; the same image in another batch does not."""

        class Centered(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = Linear()

            def forward(self, images):
                return self.network(images - images.mean(dim=0))

        measured = contracts(Centered(), IMAGES, labels_of(Linear()))
        assert names(measured) == ["batch_dependent"]
        declared = {"declared_random": True, "eot_samples": 20, "num_votes": 10}
        assert [f.name for f in measured.findings(**declared)] == ["batch_dependent"]

    def test_statistics_that_move(self):
        class Stubborn(nn.BatchNorm2d):
            def train(self, mode=True):
                return super().train(True)

        model = nn.Sequential(Stubborn(3), Linear())
        before = everything(model)
        measured = contracts(model, IMAGES, labels_of(Linear()))
        assert measured.changed_tensors == [
            "0.running_mean",
            "0.running_var",
            "0.num_batches_tracked",
        ]
        assert measured.training_modules == ["0"]
        assert {"batch_dependent", "state_changed"} <= set(names(measured))
        assert everything(model) == before

    def test_one_class(self):
        model = Mapped(Linear(), lambda z: z * torch.tensor([0.0, 0, 0, 0, 0]) + torch.arange(5))
        measured = contracts(model, IMAGES, torch.arange(30) % NUM_CLASSES)
        assert names(measured) == ["constant_output"]

    def test_dark_images(self):
        assert names(contracts(Linear(), IMAGES / 255, labels_of(Linear()))) == ["input_scale"]

    def test_gates(self):
        sound = mixture()
        labels = labels_of(sound)
        assert not contracts(sound, IMAGES, labels).gate_blind.any()
        lost = mixture()
        lost.gate_weights = lambda x: sound.gate_weights(x) * torch.nan
        measured = contracts(lost, IMAGES, labels)
        assert "gate_weights" in measured.findings()[0].message
        detached = mixture(30.0)
        detached.gate_weights = lambda x: sound.gate_weights(x).detach()
        measured = contracts(detached, IMAGES, labels)
        assert measured.gate_blind.all()
        assert measured.gate_cut.sum() >= 29  # one image lies where the nudge changes nothing
        hard = mixture(30.0)
        hard.gate_weights = lambda x: (sound.gate_weights(x) > 0.5).float().detach()
        assert not contracts(hard, IMAGES, labels).gate_cut.any()
        assert "blind_gate" in names(measured)
        dead = mixture()
        dead.gate_weights = lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
        assert names(contracts(dead, IMAGES, labels)) == ["dead_gate"]

    def test_bad_input(self):
        labels = labels_of(Linear())
        with pytest.raises(PixelRangeError, match="images"):
            contracts(Linear(), IMAGES * 255, labels)
        with pytest.raises(LabelError, match="expected 0 to 4"):
            contracts(Linear(), IMAGES, labels + 5)
        with pytest.raises(ModelOutputError, match="tuple"):
            contracts(Mapped(Linear(), lambda z: (z,)), IMAGES, labels)

    def test_no_images(self):
        empty = torch.zeros(0, dtype=torch.int64)
        assert names(contracts(Linear(), IMAGES[:0], empty)) == []


def doubt(model, correct=None, **more):
    labels = more.pop("labels", None)
    labels = labels_of(model) if labels is None else labels
    correct = torch.ones(30, dtype=torch.bool) if correct is None else correct
    settings = {"epsilon": 0.1, "num_draws": 20, "batch_size": 13, **more}
    return doubts(model, IMAGES, labels, correct=correct, **settings)


class TestDoubts:
    def test_a_linear_model_that_was_well_attacked(self):
        none_left = torch.zeros(30, dtype=torch.bool)
        measured = doubt(Linear(), none_left, sources={"twin": Linear(seed=5)})
        assert measured.findings() == []
        assert not measured.zero_cross_entropy.any()
        assert not measured.stands_unbounded.any()
        assert measured.accuracy == sorted(measured.accuracy, reverse=True)
        assert measured.epsilons == [0.05, 0.1, 0.2, 1.0]

    def test_what_a_suite_left_is_found_by_weaker_attacks(self):
        measured = doubt(Linear(), epsilon=0.5, sources={"itself": Linear()})
        found = {f.name: f.severity for f in measured.findings()}
        assert found["single_step_wins"] == found["transfer_wins"] == "invalid"
        assert found["pgd_wins"] == "invalid"
        # what breaks within epsilon is broken, not only a share
        assert 1 - float(measured.pgd.double().mean()) <= measured.accuracy[1]
        assert measured.transfer["itself"].sum() >= measured.single_step.sum() - 1

    def test_in_l2_everything_is_allowed_at_the_diameter(self):
        """Not at 1, where a robust network may well stand."""

        class Brightness(nn.Module):
            def forward(self, images):
                above = images.mean(dim=(1, 2, 3)) - 0.3
                return torch.stack([above, -above], dim=1)

        measured = doubt(Brightness(), epsilon=0.5, norm="l2", num_draws=1)
        assert measured.epsilons == [0.25, 0.5, 1.0, math.sqrt(3 * 8 * 8)]
        assert measured.accuracy == [1.0, 1.0, 1.0, 0.0]
        assert not measured.stands_unbounded.any()
        assert "unbounded" not in names(measured)

    def test_quantized(self):
        measured = doubt(Quantized(Linear()))
        assert int(measured.looked_at.sum()) == 24
        assert torch.equal(measured.zero_cross_entropy, measured.looked_at)
        assert torch.equal(measured.zero_margin, measured.looked_at)
        assert "zero_gradient" in names(measured)

    def test_cross_entropy_that_underflows(self):
        measured = doubt(Mapped(Linear(), lambda z: 1e4 * z), num_draws=1)
        assert measured.zero_cross_entropy.double().mean() > 0.5
        assert not measured.zero_margin.any()
        assert "vanishing_gradient" in names(measured)

    def test_no_gradient_at_all_is_no_warning_but_a_finding(self):
        measured = doubt(Mapped(Linear(), torch.Tensor.detach), num_draws=1)
        assert "zero_gradient" in names(measured)

    def test_only_what_the_suite_left_counts(self):
        left = torch.arange(30) < 4
        measured = doubt(Linear(), left, epsilon=0.5, sources={"itself": Linear()})
        transferred = measured.transfer["itself"]
        for mask in (measured.pgd, measured.noise, measured.single_step, transferred):
            assert not mask[4:].any()

    def test_wrong_images_are_nobodys_success(self):
        labels = (labels_of(Linear()) + 1) % NUM_CLASSES
        measured = doubt(Linear(), labels=labels, epsilon=0.5)
        assert not measured.single_step.any()
        assert not measured.pgd.any()
        assert measured.accuracy == [0.0] * len(measured.epsilons)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_batch_size_and_order_change_nothing(self, norm):
        model, labels = Linear(), labels_of(Linear())
        correct = torch.ones(30, dtype=torch.bool)
        common = {"epsilon": 0.3, "num_draws": 5, "num_steps": 4, "norm": norm}
        first = doubts(model, IMAGES, labels, correct=correct, batch_size=30, **common)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
        again = doubts(
            model,
            IMAGES[order],
            labels[order],
            correct=correct,
            sample_index=order,
            batch_size=7,
            **common,
        )
        for name in ("pgd", "noise", "single_step", "stands_unbounded"):
            assert torch.equal(getattr(first, name)[order], getattr(again, name)), name
        assert first.accuracy == again.accuracy

    def test_leaves_no_trace(self):
        model = disordered(SmallNet())
        labels = torch.arange(30) % NUM_CLASSES
        before = everything(model)
        doubt(model, labels=labels, num_steps=2, num_draws=2)
        assert everything(model) == before

    def test_images_made_elsewhere_break_less(self):
        labels = labels_of(Linear())
        same = doubt(Linear(), epsilon=0.5, sources={"a": Linear()}, num_draws=1).transfer["a"]
        away = doubt(
            Linear(), labels=labels, epsilon=0.01, sources={"a": Linear(seed=9)}, num_draws=1
        ).transfer["a"]
        assert same.double().mean() > 0.9
        assert away.sum() < same.sum()
