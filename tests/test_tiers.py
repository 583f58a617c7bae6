"""Run pytest on a small folder with tests/conftest.py: tiers, workers, no workers of workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SETTINGS = """
[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["gpu: on a GPU", "slow: takes long"]
"""
TESTS = """
import os
import pytest

def test_worker():
    assert os.environ.get("PYTEST_XDIST_WORKER", "none") in {workers}

@pytest.mark.slow
def test_slow():
    pass
"""


def run(folder: Path, workers: set[str], *arguments: str) -> str:
    """The end of pytest's output; all tests have to run in one of the workers."""
    (folder / "tests").mkdir()
    (folder / "pyproject.toml").write_text(SETTINGS)
    (folder / "tests" / "test_it.py").write_text(TESTS.format(workers=workers))
    shutil.copy(Path(__file__).with_name("conftest.py"), folder / "tests")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not shared by workers")
@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_default_tier_on_two_workers(tmp_path: Path) -> None:
    assert run(tmp_path, {"gw0", "gw1"}).startswith("1 passed, 1 skipped")


@pytest.mark.slow
def test_everything_without_workers(tmp_path: Path) -> None:
    assert run(tmp_path, {"none"}, "-p", "no:xdist", "--slow").startswith("2 passed")
