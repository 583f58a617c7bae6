"""Write findings for other tools: SARIF for code scanning, JUnit XML for test reports.

Sources: SARIF 2.1.0 (OASIS), and the JUnit schema that CI servers read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dwf.checks import check_choice
from dwf.evaluation.record import EvaluationRecord, Finding
from dwf.files import atomic_write_bytes, make_folder
from dwf.version import __version__

_LEVELS = {"note": "note", "unproven": "warning", "suspect": "warning", "invalid": "error"}


def write_for_ci(evaluation: EvaluationRecord, kind: str, path: Path) -> None:
    """Write the findings of an evaluation as "sarif" or "junit" to a file.

    Raises:
        ConfigError: another kind.
        CheckpointError: the file cannot be written.
    """
    check_choice(kind, list(FORMATS), "kind")
    make_folder(path.parent)
    atomic_write_bytes(path, FORMATS[kind](evaluation))


def sarif(evaluation: EvaluationRecord) -> bytes:
    """One SARIF run: a rule for each kind of finding, a result for each finding."""
    findings = evaluation.findings
    rules = {finding.name: finding for finding in findings}
    run = {
        "tool": {
            "driver": {
                "name": "dwf",
                "version": __version__,
                "rules": [
                    {"id": name, "shortDescription": {"text": name.replace("_", " ")}}
                    for name in rules
                ],
            }
        },
        "results": [_result(evaluation, finding, list(rules)) for finding in findings],
        "properties": {
            "verdict": evaluation.verdict,
            "robustAccuracy": evaluation.worst_case.accuracy,
            "numImages": evaluation.num_images,
        },
    }
    text = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    return (json.dumps(text, indent=1) + "\n").encode()


def _result(evaluation: EvaluationRecord, finding: Finding, rules: list[str]) -> dict[str, Any]:
    where = f"{evaluation.run or evaluation.model}/evaluations/{evaluation.suite}.json"
    location = {"physicalLocation": {"artifactLocation": {"uri": where.replace(" ", "%20")}}}
    return {
        "ruleId": finding.name,
        "ruleIndex": rules.index(finding.name),
        "level": _LEVELS[finding.severity],
        "message": {"text": _text(finding)},
        "locations": [location],
        "properties": {
            "severity": finding.severity,
            "measured": finding.measured,
            "limit": finding.limit,
            "images": list(finding.sample_indices),
        },
    }


def junit(evaluation: EvaluationRecord) -> bytes:
    """A test suite: the verdict is one test, each finding another; all but notes fail."""
    cases = [("verdict", evaluation.verdict != "VALID", evaluation.verdict)]
    cases += [(f.name, f.severity != "note", _text(f)) for f in evaluation.findings]
    root = ElementTree.Element(
        "testsuite",
        name=f"dwf {evaluation.suite}: {evaluation.model}",
        tests=str(len(cases)),
        failures=str(sum(failed for _, failed, _ in cases)),
        time=f"{evaluation.seconds:.3f}",
    )
    for name, failed, text in cases:
        case = ElementTree.SubElement(root, "testcase", classname="dwf.evaluation", name=name)
        kind = "failure" if failed else "system-out"
        part = ElementTree.SubElement(case, kind, {"message": text} if failed else {})
        part.text = text
    found: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return found


def _text(finding: Finding) -> str:
    return f"{finding.message}; {finding.remedy}" if finding.remedy else finding.message


FORMATS: dict[str, Callable[[EvaluationRecord], bytes]] = {"sarif": sarif, "junit": junit}
