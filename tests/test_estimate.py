"""Training says how long a phase will take, by its own first steps."""

import re

import pytest
from small_runs import small_config

import dwf
from dwf.training import recorder, train


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if " steps, at " in line]


@pytest.mark.slow
def test_a_line_for_each_phase_that_is_long_enough(tmp_path, capsys, monkeypatch):
    """Phases of 16 steps and a joint one of 12: measured by 4, after the first."""
    monkeypatch.setattr(recorder, "MEASURED", 4)
    train(small_config(), tmp_path)
    found = lines(capsys)
    assert [line.split(":")[0] for line in found] == [
        "expert-0-benign",
        "expert-1-fgsm",
        "expert-2-pgd",
        "joint",
    ]
    for line, steps, later in zip(found, (11, 11, 11, 7), (3, 2, 1, 0), strict=True):
        assert f" for its last {steps} steps, at " in line
        seconds = float(re.search(r"at ([0-9.e-]+) s a step", line)[1])
        minutes, rest = re.search(r"about (\d+):(\d\d) for", line).groups()
        assert abs(60 * int(minutes) + int(rest) - seconds * steps) <= 0.6
        assert ("more phase" in line) == bool(later)
        assert not later or f"{later} more phase{'s' * (later > 1)} after that" in line


def test_no_line_for_a_short_phase(tmp_path, capsys):
    train(dwf.presets.single(small_config(), "plain"), tmp_path)
    assert lines(capsys) == []
