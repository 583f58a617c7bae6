"""A few cases of campaign.py: kills, full disks and signals lose nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NUMBERS = {"kills": 8, "full-disks": 4, "signals": 4}


def can_mount() -> bool:
    """Whether this process may mount a small disk, in a name space of its own."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_nothing_is_lost() -> None:
    numbers = {k: n for k, n in NUMBERS.items() if k != "full-disks" or can_mount()}
    arguments = [word for kind, n in numbers.items() for word in (f"--{kind}", str(n))]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("campaign.py")), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for kind, number in numbers.items():
        assert re.search(rf"^ *{number} {kind}$", done.stdout, re.MULTILINE)
