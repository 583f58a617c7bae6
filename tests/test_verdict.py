"""Findings: from what was measured to a name and a severity, on both sides of each limit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from dwf.attacks.outcomes import logit_difference
from dwf.evaluation import findings, model_findings
from dwf.evaluation.measures import (
    Seen,
    are_probabilities,
    held,
    seen,
)
from dwf.evaluation.record import Finding, verdict
from dwf.typed_json import to_json


def of(count: int, total: int = 1000) -> Seen:
    return Seen(count, total, tuple(range(min(count, 20))))


def severity(finding: Finding | None) -> str | None:
    return None if finding is None else finding.severity


class TestVerdict:
    @pytest.mark.parametrize(
        ("severities", "expected"),
        [
            ([], "VALID"),
            (["note"], "VALID"),
            (["note", "unproven"], "UNPROVEN"),
            (["unproven", "suspect"], "SUSPECT"),
            (["note", "suspect"], "SUSPECT"),
            (["suspect", "invalid", "note"], "INVALID"),
        ],
    )
    def test_is_the_worst(self, severities, expected):
        assert verdict(Finding("any", severity, "") for severity in severities) == expected

    def test_held_keeps_what_holds(self):
        finding = Finding("any", "note", "")
        assert held(None, finding, None) == [finding]


class TestFinding:
    def test_json(self):
        finding = Finding("any", "note", "m", "r", 1.5, 1.0, 3, (4, 7, 9))
        assert json.loads(json.dumps(to_json(finding), allow_nan=False)) == {
            "name": "any",
            "severity": "note",
            "message": "m",
            "remedy": "r",
            "measured": 1.5,
            "limit": 1.0,
            "num_images": 3,
            "sample_indices": [4, 7, 9],
        }

    @pytest.mark.parametrize("value", [math.nan, math.inf, None])
    def test_json_has_no_nan(self, value):
        assert to_json(Finding("any", "note", "", measured=value))["measured"] is None

    def test_an_unknown_severity_is_our_bug(self):
        with pytest.raises(AssertionError, match="fatal"):
            Finding("any", "fatal", "")


class TestSeen:
    def test_first_twenty_by_their_places(self):
        mask = torch.arange(60) % 2 == 1
        found = seen(mask, torch.arange(60) + 1000)
        assert (found.count, found.total, found.points) == (30, 60, 50.0)
        assert found.sample_indices == tuple(range(1001, 1041, 2))
        assert seen(mask).sample_indices[:3] == (1, 3, 5)

    def test_nothing(self):
        assert seen(torch.zeros(0, dtype=torch.bool)) == Seen(0, 0)
        assert Seen(0, 0).points == 0.0


# name, function of the count among 1000 images, largest count without, with suspect at most
SHARES = [
    ("zero_gradient", findings.zero_gradient, 10, 100),
    ("vanishing_gradient", findings.vanishing_gradient, 100, 1000),
    ("noise_wins", findings.noise_wins, 5, 20),
    ("black_box_wins", findings.black_box_wins, 5, 20),
    ("doubts_win", findings.doubts_win, 30, 80),
    ("falls_beyond", findings.falls_beyond, 250, 500),
    ("twins", findings.twins, 10, 100),
    ("pgd_wins", findings.pgd_wins, 20, 50),
    ("single_step_wins", findings.single_step_wins, 10, 50),
    ("transfer_wins", findings.transfer_wins, 30, 100),
    ("view_wins", findings.view_wins, 30, 100),
    ("not_converged", findings.not_converged, 20, 50),
    ("control_stands", findings.control_stands, 50, 200),
    ("precision", findings.precision, 3, 30),
    ("blind_gate", model_findings.blind_gate, 10, 1000),
]


class TestShares:
    @pytest.mark.parametrize(
        ("name", "function", "fine", "suspect"), SHARES, ids=[row[0] for row in SHARES]
    )
    def test_limits(self, name, function, fine, suspect):
        assert function(of(0)) is None
        assert function(of(fine)) is None
        finding = function(of(fine + 1))
        assert (finding.name, finding.severity) == (name, "suspect")
        assert finding.measured == pytest.approx((fine + 1) / 10)
        assert finding.limit == pytest.approx(fine / 10)
        assert finding.num_images == fine + 1
        assert len(finding.sample_indices) == min(fine + 1, 20)
        assert str(fine + 1) in finding.message
        assert finding.remedy
        assert severity(function(of(suspect))) == "suspect"
        if suspect < 1000:
            found = function(of(suspect + 1))
            assert (found.severity, found.limit) == ("invalid", suspect / 10)

    @pytest.mark.parametrize("function", [findings.noise_wins, findings.view_wins])
    def test_one_or_two_images_of_few_are_an_accident(self, function):
        assert function(of(2, 20)) is None
        assert severity(function(of(3, 20))) == "invalid"

    def test_a_zero_gradient_is_no_accident(self):
        assert severity(findings.zero_gradient(of(1, 20))) == "suspect"

    def test_a_blind_gate_is_a_note_if_views_were_attacked(self):
        assert severity(model_findings.blind_gate(of(1000), views=True)) == "note"
        assert severity(model_findings.blind_gate(of(1000), cut=of(10), views=True)) == "note"
        assert severity(model_findings.blind_gate(of(1000), cut=of(11), views=True)) == "suspect"
        assert model_findings.blind_gate(of(0), views=True) is None


class TestContracts:
    def test_non_finite(self):
        assert model_findings.non_finite(of(0)) is None
        finding = model_findings.non_finite(of(1), what="gate_weights")
        assert (finding.severity, "NaN or infinite gate_weights" in finding.message) == (
            "invalid",
            True,
        )
        assert model_findings.non_finite_weights([]) is None
        assert "a, b" in model_findings.non_finite_weights(["a", "b"]).message

    def test_non_finite_under_attack(self):
        assert findings.non_finite_attacked(of(0)) is None
        assert severity(findings.non_finite_attacked(of(1, 2000))) == "note"
        assert severity(findings.non_finite_attacked(of(2))) == "invalid"

    def test_input_scale(self):
        assert model_findings.input_scale(1.0) is None
        assert model_findings.input_scale(math.nan) is None
        assert severity(model_findings.input_scale(1 / 255)) == "suspect"

    def test_not_logits(self):
        assert model_findings.not_logits(False) is None
        assert severity(model_findings.not_logits(True)) == "invalid"
        assert severity(model_findings.not_logits(True, declared=True)) == "suspect"

    def test_random(self):
        assert model_findings.random_output(1e-5) is None
        assert severity(model_findings.random_output(0.01)) == "invalid"
        assert severity(model_findings.random_output(0.01, declared=True)) == "suspect"
        enough = {"declared": True, "eot_samples": 20, "num_votes": 10}
        assert model_findings.random_output(0.01, **enough) is None
        for key, value in (("eot_samples", 19), ("num_votes", 9)):
            assert (
                severity(model_findings.random_output(0.01, **enough | {key: value})) == "suspect"
            )
        assert (
            severity(model_findings.random_output(0.01, **enough | {"declared": False}))
            == "invalid"
        )
        assert "bn1" in model_findings.random_output(0.01, training=["bn1"]).message

    def test_state_changed_names_the_buffers(self):
        assert model_findings.state_changed([]) is None
        finding = model_findings.state_changed(["a", "b", "c", "d", "e", "f"])
        assert finding.message.endswith("a, b, c, d and 2 more")

    def test_constant_output(self):
        labels = torch.arange(100) % 10
        assert model_findings.constant_output(labels, labels) is None
        constant = torch.full((100,), 3)
        assert "class 3" in model_findings.constant_output(constant, labels).message
        nearly = torch.where(torch.arange(100) < 6, labels, constant)
        assert model_findings.constant_output(nearly, labels) is None
        assert model_findings.constant_output(constant, constant) is None  # then it may be right
        assert model_findings.constant_output(constant[:0], labels[:0]) is None

    def test_dead_gate(self):
        assert model_findings.dead_gate([0.5, 0.5], [0.6, 0.7]) is None
        assert model_findings.dead_gate([1.0], [1.0]) is None
        assert "expert 1 holds" in model_findings.dead_gate([0.005, 0.995], [0.5, 1.0]).message
        assert (
            "expert 0 never" in model_findings.dead_gate([0.002, 0.5, 0.498], [0.009, 1, 1]).message
        )
        assert model_findings.dead_gate([math.nan] * 2, [math.nan] * 2) is None

    def test_a_dead_gate_that_nothing_wakes_is_a_note(self):
        """Then the number is that of the experts that count."""
        dead = [0.0, 1.0], [0.0, 1.0]
        assert model_findings.dead_gate(*dead).severity == "suspect"  # nobody looked
        assert model_findings.dead_gate(*dead, wakes=Seen(0, 64)).severity == "note"
        awake = model_findings.dead_gate(*dead, wakes=Seen(30, 64))
        assert awake.severity == "suspect"
        assert "30 of 64" in awake.message

    def test_views_that_find_no_more_leave_a_number_to_believe(self):
        """What they broke counts; whether that is all is seen when they attack again."""
        won = Seen(11, 100)
        assert findings.view_wins(won).severity == "invalid"
        settled = findings.view_wins(won, again=Seen(2, 100))
        assert (settled.severity, settled.num_images) == ("note", won.count)
        assert findings.view_wins(won, again=Seen(3, 100)).severity == "invalid"
        assert findings.view_wins(Seen(1, 100), again=Seen(0, 100)) is None
        assert findings.view_wins(won, again=Seen(2, 20)).severity == "note"  # two are an accident

    def test_few_images_of_a_black_box_are_settled_alike_and_many_are_not(self):
        few, many = Seen(3, 200), Seen(5, 200)
        assert findings.black_box_wins(few).severity == "suspect"
        assert findings.black_box_wins(few, again=Seen(2, 200)).severity == "note"
        assert findings.black_box_wins(few, again=Seen(5, 200)).severity == "suspect"
        assert findings.black_box_wins(many, again=Seen(0, 200)).severity == "invalid"

    def test_unbounded(self):
        assert findings.unbounded(of(110), num_classes=10) is None
        finding = findings.unbounded(of(111), num_classes=10)
        assert (finding.severity, finding.limit) == ("invalid", 11.0)
        assert findings.unbounded(of(510), num_classes=2) is None

    def test_epsilon_helps(self):
        radii = [0.05, 0.1, 0.2, 1.0]
        assert findings.epsilon_helps(radii, [0.9, 0.6, 0.6, 0.0], 100) is None
        assert findings.epsilon_helps(radii, [0.9, 0.6, 0.619, 0.0], 1000) is None
        # two images of 32 are an accident
        assert findings.epsilon_helps(radii, [0.9, 0.6, 0.6 + 2 / 32, 0.0], 32) is None
        finding = findings.epsilon_helps(radii, [0.9, 0.6, 0.5, 0.54], 100)
        assert (finding.severity, finding.measured) == ("suspect", pytest.approx(4.0))
        assert "at epsilon 1 than at 0.2" in finding.message
        assert severity(findings.epsilon_helps(radii, [0.2, 0.26, 0.0, 0.0], 100)) == "invalid"

    def test_budget(self):
        assert findings.budget(0) is None
        finding = findings.budget(7, of(2))
        assert (finding.severity, finding.num_images, finding.measured) == ("invalid", 2, 7.0)

    def test_how_it_was_done(self):
        assert findings.protocol("pixels") is None
        assert severity(findings.protocol("paper-compat")) == "suspect"
        assert findings.small_sample(1000) is None
        assert severity(findings.small_sample(999)) == "note"
        assert severity(findings.small_sample(100)) == "note"
        assert severity(findings.small_sample(99)) == "unproven"
        assert findings.model_note("mind this").message == "mind this"


class TestMeasures:
    def test_logit_difference_is_relative_to_the_range(self):
        logits = torch.tensor([[0.0, 10.0], [5.0, 5.0]])
        assert logit_difference(logits, logits) == 0.0
        assert logit_difference(logits, logits + 1) == pytest.approx(0.1)
        assert logit_difference(1e6 * logits, 1e6 * (logits + 1)) == pytest.approx(0.1)
        broken = logits.clone()
        broken[0] = torch.nan
        assert logit_difference(broken, broken) == 0.0
        assert logit_difference(broken, logits) == math.inf
        assert logit_difference(logits * torch.nan, logits) == math.inf

    def test_probabilities(self):
        logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        assert are_probabilities(logits.softmax(dim=1))
        assert are_probabilities(nn.functional.one_hot(torch.tensor([0, 2])).float())
        assert not are_probabilities(logits)
        assert not are_probabilities(logits.sigmoid())
        assert not are_probabilities(logits[:0])
        assert not are_probabilities(torch.ones(4, 1))
