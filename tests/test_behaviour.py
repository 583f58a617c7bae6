"""The look at a model where attacks walk: silent about sound models, each lie is found by its name.

Every wrong model differs from a sound one by one lie.
"""

from __future__ import annotations

import pytest
import torch
from small_models import NUM_CLASSES, SHAPE, Linear, SmallNet, disordered, everything, make_images
from torch import nn

from dwf.evaluation.behaviour import NUM_BACKWARDS, NUM_FORWARDS, behaviour, untouched_copy
from dwf.evaluation.behaviour_findings import findings_of, one_pass
from dwf.evaluation.inner_gradients import num_inner_gradients
from dwf.evaluation.measures import answer_change, answer_scale
from dwf.models import ExpertModel, MixedModel, Mixture, MlpGate, RoutedMixture, Stretch
from dwf.models.routed import linear_router

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = make_images(12)
INDEX = torch.arange(12)


class Changed(nn.Module):
    """A network whose answer passes through ``function(network, images)``."""

    def __init__(self, function, network=None):
        super().__init__()
        self.network = network or SmallNet()
        self.other = SmallNet(seed=5)
        self._function = function

    def forward(self, images):
        return self._function(self, images)


def look(model, **more):
    copied = untouched_copy(model)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        labels = model(IMAGES).argmax(dim=1)
    settings = {"epsilon": 0.1, "untouched": copied, "sample_index": INDEX, **more}
    return behaviour(model, IMAGES, labels, **settings)


def names(measured):
    return [finding.name for finding in findings_of(measured)]


def on_grid(images):
    away = images * 255 - (images * 255).round()
    return (away.abs().amax(dim=(1, 2, 3)) < 1e-3)[:, None]


def false_gradient(model, images):
    value = model.network(images)
    other = model.other(images)
    return value.detach() + other - other.detach()


def another_if_recorded(model, images):
    recorded = torch.is_grad_enabled() and images.requires_grad
    return (model.other if recorded else model.network)(images)


def another_alone(model, images):
    return (model.other if len(images) == 1 else model.network)(images)


def another_off_the_grid(model, images):
    return torch.where(on_grid(images), model.network(images), model.other(images))


def purified(model, images):
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.network(x).amax(dim=1).sum(), x)
    return model.network(images + 0.01 * gradient.sign())


def reversed_margin(model, images):
    """A larger margin is nearer to another answer."""
    logits = model.network(images)
    top, own = logits.topk(2, dim=1)
    margin = top[:, :1] - top[:, 1:]
    return logits.scatter(1, own[:, :1], top[:, 1:] + 0.02 / (margin + 0.02))


class TestSound:
    @pytest.mark.parametrize(
        "model",
        [
            Linear(),
            SmallNet(),
            Mixture([Linear(seed=1), Linear(seed=2)], MlpGate(SHAPE, 2, hidden=4)),
            RoutedMixture([Linear(seed=1), Linear(seed=2)], linear_router(SHAPE, 2, seed=0)),
        ],
        ids=["linear", "network", "mixture", "routed"],
    )
    def test_nothing_to_say(self, model):
        measured = look(model)
        assert findings_of(measured) == []
        assert not measured.random
        assert max(measured.differs.values()) < 1e-5
        assert "by a copy from before the first pass" in measured.differs

    def test_the_gradient_of_a_sound_model_is_its_derivative(self):
        measured = look(SmallNet())
        assert (measured.derivative - 1).abs().max() < 0.05
        assert measured.inner_gradients == 0

    def test_leaves_no_trace(self):
        model = disordered(SmallNet())
        before = everything(model)
        labels = torch.arange(12) % NUM_CLASSES
        behaviour(model, IMAGES, labels, epsilon=0.1, sample_index=INDEX)
        assert everything(model) == before

    def test_its_cost_is_counted(self):
        """15 percent of the quick suite, on one image of four."""
        rows = []
        model = Changed(lambda own, images: rows.append(len(images)) or own.network(images))
        look(model)
        passes = (sum(rows) - 12) / 12  # without the labels
        assert passes <= NUM_FORWARDS
        assert passes >= 0.8 * NUM_FORWARDS
        quick = 1010 + 2 * 1010 + 500  # forward and backward passes for an image that stands
        assert (NUM_FORWARDS + 2 * NUM_BACKWARDS) / 4 < 0.15 * quick

    def test_no_images(self):
        none = torch.zeros(0, dtype=torch.int64)
        measured = behaviour(SmallNet(), IMAGES[:0], none, epsilon=0.1, sample_index=none)
        assert findings_of(measured) == []


class TestLies:
    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (false_gradient, "wrong_gradient"),
            (another_if_recorded, "answers_differ"),
            (another_alone, "answers_differ"),
            (another_off_the_grid, "jumps"),
            (another_off_the_grid, "rounding"),
            (purified, "inner_optimization"),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_is_found(self, function, name):
        assert name in names(look(Changed(function)))

    def test_a_margin_that_is_turned_around(self):
        assert {"reversed_margin", "not_stationary"} & set(
            names(look(Changed(reversed_margin), epsilon=0.5))
        )

    def test_state_that_is_no_buffer(self):
        """The copy from before the first pass still answers as the model did then."""
        passes = []

        def later_another(model, images):
            passes.append(len(passes))
            return (model.other if model.worn else model.network)(images)

        model = Changed(later_another)
        model.worn = []
        copied = untouched_copy(model)
        model.worn.append(1)
        measured = look(model, untouched=copied)
        assert measured.differs["by a copy from before the first pass"] > 0.1
        assert "answers_differ" in names(measured)

    def test_a_lying_mixture(self):
        class Lying(ExpertModel):
            def __init__(self):
                super().__init__()
                self.parts = nn.ModuleList([Linear(seed=1), Linear(seed=2)])
                self.expert_names = ["a", "b"]

            def expert(self, index):
                return self.parts[index]

            def gate_weights(self, images):
                return torch.tensor([[0.9, 0.1]]).expand(len(images), 2)

            def forward(self, images):
                return 0.1 * self.parts[0](images) + 0.9 * self.parts[1](images)

        measured = look(Lying())
        assert measured.unlike.all()
        assert "unlike_statements" in names(measured)
        honest = Lying()
        honest.gate_weights = lambda images: torch.tensor([[0.1, 0.9]]).expand(len(images), 2)
        assert not look(honest).unlike.any()

    def test_a_mixture_of_stretched_probabilities_is_what_it_says(self):
        stretch = Stretch(2.0, 1.5, 0.1)
        model = MixedModel(SmallNet(), Linear(), 0.6, stretch=stretch, accurate_scale=3.0)
        assert not look(model).unlike.any()
        model.expert = lambda index: model.experts[index]
        assert look(model).unlike.any()

    def test_a_random_model_is_left_to_its_own_finding(self):
        model = Changed(lambda own, x: own.network(x) + torch.randn(len(x), NUM_CLASSES))
        measured = look(model, num_votes=5)
        assert measured.random
        assert findings_of(measured) == []
        note = one_pass(measured.one_pass, 5, 0.9, 0.8)
        assert (note.name, note.severity) == ("one_pass", "note")
        assert "5 passes: 90.0 % clean" in note.message


class TestInnerGradients:
    def test_counts_both_ways(self):
        x = torch.ones(3, requires_grad=True)

        def forward():
            torch.autograd.grad(x.square().sum(), x)
            x.square().sum().backward()

        assert num_inner_gradients(forward) == 2
        assert num_inner_gradients(lambda: x.square().sum()) == 0


class TestMeasures:
    def test_scale_is_not_stretched_by_one_class(self):
        logits = torch.tensor([[1.0, 2.0, 5.0, -1e6], [0.0, 3.0, 1.0, -1e6]])
        assert answer_scale(logits) < 5
        moved = logits.clone()
        moved[0, 0] += 1
        change = answer_change(logits, moved, answer_scale(logits))
        assert change[0] > 0.2
        assert change[1] == 0

    def test_not_finite(self):
        rows = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.nan, 1.0]])
        other = torch.tensor([[1.0, 2.0], [1.0, 1.0], [torch.nan, 5.0]])
        assert answer_change(rows, other, 1.0).tolist() == [0.0, torch.inf, 0.0]
