"""The stored record reads what it wrote, and refuses what is missing, mistyped or impossible."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SmallNet, make_dataset
from stored_runs import WATCHED, make_diagnostics, make_evaluation, make_in_turn, paths, score

from dwf.checks import CheckpointError
from dwf.config import EvaluationConfig
from dwf.evaluation import Budget, evaluate
from dwf.evaluation.record import EvaluationRecord, Finding, verdict
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


GOOD = {"count": 2, "part": {"name": "a", "shares": [0, 1]}, "rows": [[1, None]]}


class TestTypedJson:
    def test_there_and_back(self):
        whole = from_json(Whole, GOOD | {"unknown": 1, "flag": None}, Place(FILE))
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
            (
                {"part": {"name": "a", "shares": [0, 2]}},
                r"part.shares\[1\]: expected .* in \[0, 1\]",
            ),
            ({"rows": [[float("nan")]]}, r"rows\[0\]\[0\]: expected a finite number"),
            ({"rows": [[10**400]]}, r"rows\[0\]\[0\]: expected a finite number"),
            ({"numbers": {"a": "x"}}, "numbers.a: expected an integer, found 'x'"),
            ({"flag": 1}, "flag: expected true or false, found 1"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, message):
        with pytest.raises(CheckpointError, match=r"^paper\.json: " + message):
            from_json(Whole, GOOD | change, Place(FILE))

    def test_the_whole_is_no_object(self):
        with pytest.raises(CheckpointError, match="content: expected an object, found"):
            from_json(Whole, [], Place(FILE))

    def test_a_whole_number_is_read_as_a_float_where_one_is_due(self):
        found = from_json(Whole, GOOD, Place(FILE))
        assert [type(share) for share in found.part.shares] == [float, float]

    def test_bounds(self):
        assert Between(0).high == float("inf")


@pytest.fixture(scope="module")
def results():
    """One evaluation by the paper's grid of a mixture, and one in turn."""
    experts = [SmallNet(seed=0), SmallNet(seed=1)]
    mixture = Mixture(experts, MlpGate((3, 8, 8), 2, hidden=4))
    grid = evaluate(mixture, make_dataset(6), SETTINGS, suite="paper")
    turns = evaluate(
        mixture,
        make_dataset(6),
        SETTINGS,
        suite="quick",
        epsilon=(0.01, 0.02),
        budget=Budget(num_steps=2, num_queries=5),
    )
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

    @pytest.mark.parametrize("kind", ["table", "environment", "arrays", "hash"])
    def test_changed_by_hand(self, kind, results, tmp_path):
        path = tmp_path / "a.json"
        results[0].write(path)
        value = json.loads(path.read_text())
        if kind == "table":
            value["findings"] = []
            value["verdict"] = "VALID"
        if kind == "environment":
            value["environment"]["argv"] = ["dwf", "eval"]
        if kind == "hash":
            value["sha256"] = 3
        path.write_text(json.dumps(value))
        assert kind != "arrays" or Evaluation.read(path) == results[0]  # indentation is no change
        if kind == "arrays":
            arrays = results[0].arrays
            np.savez(tmp_path / "a.npz", **arrays | {"sample_index": arrays["sample_index"] + 1})
        with pytest.raises(CheckpointError, match=r"a\.(json|npz): changed since it was written"):
            Evaluation.read(path)

    def test_one_flipped_bit_in_the_arrays(self, results, tmp_path):
        """Every one is found; none is a traceback, also in files that have no hash."""
        path = tmp_path / "a.json"
        results[0].write(path)
        good, table = path.with_suffix(".npz").read_bytes(), json.loads(path.read_text())
        for hashed in (True, False):
            if not hashed:
                path.write_text(json.dumps({k: v for k, v in table.items() if k != "sha256"}))
            for place in range(0, len(good), len(good) // 40):
                data = bytearray(good)
                data[place] ^= 1 << place % 8
                path.with_suffix(".npz").write_bytes(data)
                try:
                    Evaluation.read(path)
                    assert not hashed
                except CheckpointError:
                    pass

    def test_without_hashes_it_is_said(self, results, tmp_path, caplog):
        path = tmp_path / "a.json"
        results[0].write(path)
        Evaluation.read(path)
        assert not caplog.records
        value = json.loads(path.read_text())
        del value["sha256"]
        path.write_text(json.dumps(value))
        Evaluation.read(path)
        assert "holds no sha256" in caplog.text

    def test_outcomes_that_do_not_add_up(self, results, tmp_path):
        results[0].write(tmp_path / "a.json")
        table = json.loads((tmp_path / "a.json").read_text())
        del table["sha256"]  # of an earlier version
        (tmp_path / "a.json").write_text(json.dumps(table))
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


class TestWhatItSays:
    def test_the_worst_finding_is_the_verdict(self):
        found = [Finding("a", severity, "...") for severity in ("invalid", "suspect", "note")]
        for order in permutations(found):
            assert verdict(order) == "INVALID"
        assert verdict(found[1:]) == verdict(found[:0:-1]) == "SUSPECT"
        assert verdict(found[2:]) == verdict([]) == "VALID"

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_no_finding_has_a_number_that_json_has_not(self, value):
        finding = Finding("a", "note", "...", measured=value, limit=value)
        assert (finding.measured, finding.limit) == (None, None)

    def test_class_names_are_those_of_the_classes_alone(self):
        record = EvaluationRecord.from_json(make_evaluation()[0], FILE)
        record = replace(record, data=replace(record.data, class_names=["cat", "dog"]))
        assert [record.class_name(k) for k in (-1, 0, 1, 2)] == ["-1", "cat", "dog", "2"]

    def test_radii_are_brightness_for_pixels_in_linf_alone(self):
        record = EvaluationRecord.from_json(make_evaluation()[0], FILE)
        assert record.of_255
        assert not replace(record, norm="l2").of_255
        assert not replace(record, protocol="paper-compat").of_255


def with_diagnostics():
    table, arrays = make_evaluation()
    return table | {"diagnostics": make_diagnostics()}, arrays


# may be missing: the file is older, or the number was not known
OPTIONAL = {
    ("gate",),
    ("experts",),
    ("diagnostics",),
    *(("experts", "accuracy", name) for name in WATCHED),
    ("worst_case", "epsilon"),
    ("worst_case_all", "epsilon"),
    *(("attacks", 0, key) for key in ("epsilon", "step_size", "same_as")),
    ("num_parameters",),
    ("run",),
    ("environment",),
    ("environment", "argv"),
    ("environment", "python"),
}


def edited(values, path, change):
    """A copy whose value at ``path`` is missing, or an object that stands for nothing."""
    broken = json.loads(json.dumps(values))
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    if change == "missing":
        del parent[path[-1]]
    else:
        parent[path[-1]] = {"not": ["this"]}
    return broken


@pytest.mark.parametrize("make", [with_diagnostics, make_in_turn])
def test_every_mistyped_key_is_named(make):
    values, _ = make()
    found = [path for path in paths(values) if path[0] != "environment"]
    assert len(found) > 90
    for path in found:
        name = next(key for key in reversed(path) if isinstance(key, str))
        with pytest.raises(CheckpointError, match=f"^paper.json: .*{re.escape(name)}"):
            EvaluationRecord.from_json(edited(values, path, "mistyped"), FILE)


def test_every_missing_key_is_named_or_optional():
    values, _ = with_diagnostics()
    for path in paths(values):
        if isinstance(path[-1], int):
            continue
        broken = edited(values, path, "missing")
        if path in OPTIONAL:
            EvaluationRecord.from_json(broken, FILE)
            continue
        with pytest.raises(CheckpointError, match=f"^paper.json: .*{re.escape(path[-1])}"):
            EvaluationRecord.from_json(broken, FILE)


def refuse(make, edit, message):
    values = json.loads(json.dumps(make()[0]))
    EvaluationRecord.from_json(values, FILE)
    edit(values)
    with pytest.raises(CheckpointError, match=rf"^paper\.json: .*{message}"):
        EvaluationRecord.from_json(values, FILE)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(schema=2), "schema: expected 1, which this version reads, found 2"),
        (lambda e: e.update(attacks=[]), "attacks: expected at least one row"),
        (lambda e: e["attacks"][1].update(accuracy=0.99), r"\[1\].accuracy: expected 480/500 ="),
        (lambda e: e["attacks"][1].update(num_correct=501), "num_correct: expected at most 500"),
        (lambda e: e["attacks"][1].update(interval=[0.1, 0.2]), "interval: expected two numbers"),
        (lambda e: e["attacks"][1].update(accuracy=float("nan")), "accuracy: expected a finite"),
        (lambda e: e["attacks"][1].update(seconds=10**400), "seconds: expected a finite"),
        (lambda e: e["worst_case"].update(score(481)), "expected at most the 480 of 'FGSM 0.02'"),
        (lambda e: e["worst_case"].update(attacks=["x"]), r"worst_case.attacks\[0\]: expected one"),
    ],
)
def test_contradictions_are_refused(edit, message):
    refuse(make_evaluation, edit, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(verdict="VALID"), "verdict: expected SUSPECT, as its findings say"),
        (lambda e: e.update(norm="l1"), r"norm: expected one of \['linf', 'l2'\]"),
        (lambda e: e["findings"][0].update(severity="x"), "severity: expected one of"),
        (lambda e: e["findings"][0].update(measured="x"), "measured: expected a finite number"),
        (lambda e: e["findings"][0].update(sample_indices=[-1]), r"sample_indices\[0\]: expected"),
        (lambda e: e["attacks"][3].update(broken_by={"a": -1}), "broken_by.a: expected an integer"),
        (lambda e: e["attacks"][3].update(num_attacked=0.5), "num_attacked: expected an integer"),
        (lambda e: e["curve"].reverse(), r"curve\[1\].epsilon: expected a radius above 0.03"),
        (lambda e: e["curve"][1].update(epsilon=4 / 255), r"curve\[1\].epsilon: expected a radius"),
        (lambda e: e["curve"][0].update(score(481)), r"curve\[0\].num_correct: expected at most"),
        (lambda e: e["curve"][1].update(score(100)), "curve: expected the 265 of worst_case"),
        (lambda e: e["curve"][0].update(score(264)), r"curve\[1\].num_correct: expected at most"),
        (lambda e: e["traces"]["accuracy"].pop(), "accuracy: expected 2 rows"),
        (lambda e: e["traces"]["loss"]["low"].pop(), "low: expected 3 values"),
    ],
)
def test_contradictions_in_turn_are_refused(edit, message):
    refuse(make_in_turn, edit, message)


@pytest.mark.parametrize(
    "edit",
    [
        lambda e: e["attacks"][0].update(score(500)),
        lambda e: e["attacks"][1].update(num_images=100, num_correct=96),
        lambda e: e["attacks"][1].update(interval=[0.9, 0.96 - 1e-7]),
        lambda e: e["attacks"][0].update(correct="not in JSON"),
    ],
    ids=["a perfect score", "an attack of fewer images", "rounding", "an array's key"],
)
def test_what_only_looks_like_a_contradiction_is_read(edit):
    values = json.loads(json.dumps(make_evaluation()[0]))
    edit(values)
    EvaluationRecord.from_json(values, FILE)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(names=[]), "diagnostics.names: expected at least one"),
        (lambda d: d["transfer"].pop(), "diagnostics.transfer: expected 4 rows, found '3 rows'"),
        (lambda d: d["transfer"][1].pop(), r"diagnostics.transfer\[1\]: expected 4 values"),
        (lambda d: d["transfer"][1].__setitem__(0, 1.5), r"transfer\[1\]\[0\]: expected a finite"),
        (lambda d: d["accuracy"].pop("clean"), "diagnostics.accuracy.clean: missing"),
        (lambda d: d["gate"].pop("attacked"), "diagnostics.gate.attacked: missing"),
        (lambda d: d["gate"]["clean"].pop("dead"), "diagnostics.gate.clean.dead: missing"),
        (lambda d: d["routing_flips"].pop("again"), "routing_flips.again: missing"),
        (lambda d: d["gradient_cosine"][0].__setitem__(1, -2.0), r"\[0\]\[1\]: expected"),
        (lambda d: d["gradient_cosine"][0].__setitem__(1, "x"), r"\[0\]\[1\]: expected"),
    ],
)
def test_damaged_diagnostics_are_refused(edit, message):
    refuse(with_diagnostics, lambda e: edit(e["diagnostics"]), message)
