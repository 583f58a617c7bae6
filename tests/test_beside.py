"""The headline knows what diagnostics and traces broke; a gate that does not gate is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SHAPE, SmallNet, make_dataset
from stored_runs import make_diagnostics as stored_diagnostics

import dwf
from dwf.checks import ConfigError
from dwf.config import EvaluationConfig
from dwf.evaluation import Budget
from dwf.evaluation.beside import counted, gate_findings
from dwf.evaluation.job import Judged
from dwf.evaluation.mixture_record import Diagnostics
from dwf.evaluation.result import Row, worst_case
from dwf.evaluation.suites import AttackSpec
from dwf.models import Mixture, MlpGate
from dwf.typed_json import Place, from_json


def make_diagnostics():
    return from_json(Diagnostics, stored_diagnostics(), Place(Path("x.json")))


pytestmark = pytest.mark.usefixtures("brief_suites")
SETTINGS = EvaluationConfig(diagnostic_images=6, diagnostic_steps=5)
SHORT = {"suite": "quick", "budget": Budget(num_steps=5, num_queries=20)}


def judged(correct, findings=()):
    rows = [Row(AttackSpec("clean", "clean"), torch.ones(10, dtype=torch.bool))]
    rows.append(Row(AttackSpec("noise", "noise", 0.1), torch.tensor(correct)))
    worst = worst_case(rows, 0.1)
    return Judged(
        rows=rows,
        worst_case=worst,
        worst_case_all=worst,
        curve=[worst_case(rows[:1], 0.0), worst],
        findings=list(findings),
        attack_path="",
    )


def test_what_diagnostics_break_does_not_stand():
    """[attacks, members, images]: the last member is the mixture, and any attack counts."""
    outcome = np.ones((3, 3, 4), dtype=bool)
    outcome[1, 2, 1] = outcome[2, 2, 3] = False
    outcome[0, 0, 0] = False  # an expert errs, the mixture does not
    arrays = {"diagnostic_correct": outcome, "diagnostic_sample_index": np.array([0, 3, 6, 9])}
    diagnostics = make_diagnostics()
    found = counted(judged([True] * 9 + [False]), diagnostics, None, arrays)
    assert found.rows[-1].spec.kind == "experts"
    assert found.rows[-1].num_attacked == 3
    assert found.rows[-1].correct.tolist() == [i not in (3, 9) for i in range(10)]
    assert found.worst_case.num_correct == found.curve[-1].num_correct == 8
    assert found.curve[0].num_correct == 10
    assert found.worst_case.attacks[-1] == found.rows[-1].spec.name


def test_an_evaluation_holds_the_minimum_of_all_it_knows():
    model = Mixture([SmallNet(seed=e) for e in range(3)], MlpGate(SHAPE, 3)).eval()
    found = dwf.evaluate(model, make_dataset(8), SETTINGS, epsilon=0.02, **SHORT)
    assert [row.kind for row in found.attacks[-2:]] == ["experts", "traces"]
    stands = torch.from_numpy(found.arrays["correct"]).all(dim=0)
    assert found.worst_case.num_correct == int(stands.sum())
    for places, broken in (
        ("diagnostic_sample_index", ~found.arrays["diagnostic_correct"][:, -1].all(axis=0)),
        ("trace_sample_index", ~found.arrays["trace_correct"].all(axis=(0, 1))),
    ):
        assert not stands[torch.from_numpy(found.arrays[places][broken])].any()


@pytest.mark.parametrize(("share", "named"), [(0.5, False), (0.97, False), (0.996, True)])
def test_a_gate_that_does_not_gate_is_named(share, named):
    diagnostics = make_diagnostics()
    entropy = share * float(np.log(len(diagnostics.names) - 1))
    clean = replace(diagnostics.gate.clean, entropy=entropy)
    changed = replace(diagnostics, gate=replace(diagnostics.gate, clean=clean))
    found = gate_findings(changed)
    assert [finding.name for finding in found] == ["uniform_gate"] * named
    assert all(finding.severity == "note" for finding in found)


class TestExpectedCleanAccuracy:
    DATASET = make_dataset(40)

    def run(self, model, expected):
        settings = EvaluationConfig(diagnostic_images=0)
        options = {**SHORT, "epsilon": 0.01, "expected_clean": expected}
        return dwf.evaluate(model, self.DATASET, settings, **options)

    def test_far_less_is_a_finding(self):
        wrong = SmallNet().eval()
        found = self.run(wrong, 0.95).finding("clean_below")
        assert found is not None
        assert found.severity == "invalid"
        assert "95.0 % expected" in found.message

    def test_what_is_as_expected_is_none(self):
        model = SmallNet().eval()
        clean = self.run(model, None).clean_accuracy
        assert self.run(model, max(clean, 0.01)).finding("clean_below") is None

    @pytest.mark.parametrize("share", [94.0, 0, -0.5, float("nan")])
    def test_bad_shares(self, share):
        with pytest.raises(ConfigError, match="expected_clean"):
            self.run(SmallNet(), share)
