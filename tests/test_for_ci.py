"""Findings as SARIF and JUnit: what a CI server reads of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from dwf.checks import ConfigError
from dwf.evaluation.for_ci import write_for_ci
from dwf.evaluation.record import Finding, verdict

FINDINGS = [
    Finding("noise_wins", "suspect", "noise breaks <what> & how", "do this", 1.0, 0.5, 3, (4, 7)),
    Finding("small_sample", "note", "few", "judge more", 120.0, 1000.0),
    Finding("unbounded", "invalid", "stands", "masked", 40.0, 11.0),
]


def evaluation(findings=FINDINGS):
    return SimpleNamespace(
        findings=findings,
        verdict=verdict(findings),
        worst_case=SimpleNamespace(accuracy=0.4),
        num_images=120,
        run="run 1",
        model="a model",
        suite="quick",
        seconds=1.5,
    )


def test_sarif(tmp_path):
    write_for_ci(evaluation(), "sarif", tmp_path / "new" / "findings.sarif")
    text = json.loads((tmp_path / "new" / "findings.sarif").read_text())
    assert text["version"] == "2.1.0"
    (run,) = text["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [f.name for f in FINDINGS]
    assert [result["level"] for result in run["results"]] == ["warning", "note", "error"]
    assert all(
        run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        for result in run["results"]
    )
    assert run["results"][0]["message"]["text"] == "noise breaks <what> & how; do this"
    assert run["results"][0]["properties"]["images"] == [4, 7]
    where = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert where == "run%201/evaluations/quick.json"
    assert run["properties"]["verdict"] == "INVALID"


def test_junit(tmp_path):
    write_for_ci(evaluation(), "junit", tmp_path / "findings.xml")
    root = ElementTree.parse(tmp_path / "findings.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("4", "3")
    cases = {case.get("name"): case for case in root}
    assert cases["verdict"].find("failure").get("message") == "INVALID"
    assert cases["noise_wins"].find("failure").text == "noise breaks <what> & how; do this"
    assert cases["small_sample"].find("failure") is None


def test_a_valid_one_passes(tmp_path):
    write_for_ci(evaluation([]), "junit", tmp_path / "findings.xml")
    assert ElementTree.parse(tmp_path / "findings.xml").getroot().get("failures") == "0"


def test_another_kind(tmp_path):
    with pytest.raises(ConfigError, match="kind"):
        write_for_ci(evaluation(), "html", tmp_path / "findings.html")
