"""The stored record: reads what it wrote, and refuses what is missing, mistyped or contradictory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SmallNet, make_dataset
from test_report import make_evaluation, make_in_turn, paths

from dwf.checks import CheckpointError
from dwf.config import EvaluationConfig
from dwf.evaluation import evaluate
from dwf.evaluation.record import EvaluationRecord
from dwf.evaluation.result import Evaluation
from dwf.models import Mixture, MlpGate
from dwf.typed_json import Between, Count, Fraction, Place, from_json, to_json

FILE = Path("paper.json")
SETTINGS = EvaluationConfig(
    (0.05,), 0.1, 0.05, num_steps=(2,), multi_start_steps=0, adaptive_steps=0, diagnostic_images=4
)


@dataclass(frozen=True)
class Part:
    name: str
    shares: tuple[Fraction, Fraction]


@dataclass(frozen=True)
class Whole:
    count: Count
    part: Part
    flag: bool = False
    rows: list[list[float | None]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def check(self, place: Place) -> None:
        if self.count == 13:
            raise place.at("count").error("a lucky number", 13)


class TestTypedJson:
    GOOD = {"count": 2, "part": {"name": "a", "shares": [0, 1]}, "rows": [[1, None]]}

    def test_there_and_back(self):
        whole = from_json(Whole, self.GOOD | {"unknown": 1, "flag": None}, Place(FILE))
        assert whole == Whole(2, Part("a", (0.0, 1.0)), rows=[[1.0, None]])
        assert from_json(Whole, json.loads(json.dumps(to_json(whole))), Place(FILE)) == whole

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"count": -1}, "count: expected an integer of 0 or more, found -1"),
            ({"count": True}, "count: expected an integer of 0 or more, found True"),
            ({"count": 1.0}, "count: expected an integer of 0 or more, found 1.0"),
            ({"count": 13}, "count: expected a lucky number, found 13"),
            ({"count": None}, "count: expected an integer of 0 or more, found None"),
            ({"part": []}, r"part: expected an object, found \[\]"),
            ({"part": {"shares": [0, 1]}}, "part.name: missing, expected a string"),
            ({"part": {"name": "a", "shares": [0]}}, "part.shares: expected 2 values"),
            ({"part": {"name": "a", "shares": [0, 2]}}, r"part.shares\[1\]: expected .* in \[0, 1\]"),
            ({"rows": [[float("nan")]]}, r"rows\[0\]\[0\]: expected a finite number"),
            ({"rows": [[10**400]]}, r"rows\[0\]\[0\]: expected a finite number"),
            ({"numbers": {"a": "x"}}, "numbers.a: expected an integer, found 'x'"),
            ({"flag": 1}, "flag: expected true or false, found 1"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, message):
        with pytest.raises(CheckpointError, match=r"^paper\.json: " + message):
            from_json(Whole, self.GOOD | change, Place(FILE))

    def test_the_whole_is_no_object(self):
        with pytest.raises(CheckpointError, match="content: expected an object, found"):
            from_json(Whole, [], Place(FILE))

    def test_bounds(self):
        assert Between(0).high == float("inf")


@pytest.fixture(scope="module")
def results():
    """One evaluation by the paper's grid of a mixture, and one in turn."""
    experts = [SmallNet(seed=0), SmallNet(seed=1)]
    mixture = Mixture(experts, MlpGate((3, 8, 8), 2, hidden=4))
    grid = evaluate(mixture, make_dataset(6), SETTINGS, suite="paper")
    turns = evaluate(mixture, make_dataset(6), SETTINGS, suite="quick", epsilon=(0.01, 0.02))
    return grid, turns


class TestFiles:
    def test_reads_what_it_wrote(self, results, tmp_path):
        for number, result in enumerate(results):
            path = tmp_path / f"{number}.json"
            result.write(path)
            found = Evaluation.read(path)
            assert found == result
            assert str(found) == str(result)
            assert found.diagnostics is not None
            for row, other in zip(found.attacks, result.attacks, strict=True):
                assert torch.equal(row.correct, other.correct)
            assert found.arrays.keys() == result.arrays.keys()

    def test_shown_in_a_line_and_as_html(self, results):
        for result in results:
            assert len(repr(result)) < 200
            assert "tensor" not in repr(result)
            html = replace(result, model="<b>")._repr_html_()
            assert "<b> on" not in html
            assert html.count("<tr>") >= len(result.attacks) + 2
            assert result.verdict in html

    def test_without_arrays(self, results, tmp_path):
        results[0].write(tmp_path / "a.json")
        (tmp_path / "a.npz").unlink()
        found = Evaluation.read(tmp_path / "a.json")
        assert found == results[0]
        assert found.attacks[0].correct is None
        assert found.arrays == {}

    def test_outcomes_that_do_not_add_up(self, results, tmp_path):
        results[0].write(tmp_path / "a.json")
        arrays = results[0].arrays
        np.savez(tmp_path / "a.npz", **arrays | {"correct": ~arrays["correct"]})
        with pytest.raises(CheckpointError, match=r"a\.npz: correct: \d images for 'clean'"):
            Evaluation.read(tmp_path / "a.json")

    def test_files_of_earlier_versions(self):
        for make in (make_evaluation, make_in_turn):
            values = make()[0]
            found = EvaluationRecord.from_json(values, FILE)
            assert EvaluationRecord.from_json(found.to_json(), FILE) == found
            assert found.num_images == 500


@pytest.mark.parametrize("make", [make_evaluation, make_in_turn])
def test_every_mistyped_key_is_named(make):
    values, _ = make()
    for path in paths(values):
        if path[0] in ("environment", "run"):
            continue
        broken = json.loads(json.dumps(values))
        parent = broken
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = {"not": ["this"]}
        name = next(key for key in reversed(path) if isinstance(key, str))
        with pytest.raises(CheckpointError, match=f"^paper.json: .*{re.escape(name)}"):
            EvaluationRecord.from_json(broken, FILE)
