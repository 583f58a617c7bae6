"""The zoo: enough models of different mechanisms; a reduced run finds or flags every one."""

from __future__ import annotations

import pytest
import torch

from dwf import data
from dwf.evaluation.zoo import BROKEN_ZOO, EPSILON, HONEST_ZOO, Parts
from dwf.evaluation.zoo.trial import (
    as_json,
    judge_honest,
    judge_specimen,
    run_zoo,
    summary,
    true_robustness,
)

pytestmark = pytest.mark.usefixtures("one_thread")
# of the nine in the list that this zoo began with, the quickest are in the default tier
QUICK_BROKEN = ["grid_gate"]
# the last two route hard: soft views find more than attacks on the whole, and a gate may die
QUICK_HONEST = ["plain, GELU", "adversarial, GroupNorm", "linear", "sparse blocks", "pathways"]
# each by another finding
REDUCED = ["memory", "gradient_switch", "poisoned_gradient", "anti_adversary", "margin_reversed"]


@pytest.fixture(scope="module")
def parts(one_thread) -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="test").subset(torch.arange(100))


def test_there_are_enough_and_each_names_its_source():
    assert len(BROKEN_ZOO) >= 40
    assert len(HONEST_ZOO) >= 40
    for name, specimen in BROKEN_ZOO.items():
        assert specimen.description, name
        assert "arXiv" in specimen.source or "(" in specimen.source, name
    named = {specimen.source.split(";")[0].strip() for specimen in BROKEN_ZOO.values()}
    assert {f"V{i}" for i in range(1, 10)} <= named


@pytest.mark.slow
def test_an_adaptive_attack_knows_better_than_the_model_looks(parts, digits):
    """The truth of a masked network is that of the network inside."""
    images, labels = digits.images[:30].float() / 255, digits.labels[:30]
    specimen = BROKEN_ZOO["bit_depth"]
    model = specimen.make(parts)
    with torch.no_grad():
        assert (model(images).argmax(dim=1) == labels).float().mean() > 0.9
    assert true_robustness(specimen, parts, model, images, labels) < 0.5


def test_the_table():
    row = {
        "name": "a",
        "kind": "broken",
        "outcome": "fooled",
        "verdict": "VALID",
        "robust": 80.0,
        "truth": None,
        "findings": ["jumps"],
    }
    text = summary([row, {**row, "outcome": "found", "truth": 12.3}])
    assert "1 found, 0 flagged, 1 fooled" in text
    assert "12.3" in text
    assert "jumps" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_BROKEN + REDUCED)
def test_is_found_or_flagged(name, parts, digits):
    row = judge_specimen(name, BROKEN_ZOO[name], parts, digits)
    assert row.outcome in ("found", "flagged"), as_json(row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain, GELU", "adversarial, GroupNorm", "linear", "sparse blocks", "pathways"]
)
def test_is_no_false_alarm(name, digits):
    honest = HONEST_ZOO[name]
    row = judge_honest(name, honest.make(), honest.epsilon, digits)
    assert row.outcome == "right", as_json(row)


@pytest.mark.slow
def test_runs_by_name(digits):
    (row,) = run_zoo(names=["tanh perceptron"], num_images=100)
    assert (row.kind, row.right, row.verdict) == ("honest", True, "VALID")
    assert EPSILON == 0.15
