"""README, docs, examples: Python runs as printed, commands name what exists, pages are new."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dwf.cli import make_parser
from dwf.config import OPTIONS
from dwf.defenses import DEFENSES
from dwf.evaluation import limits
from dwf.presets import find

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
PYTHON = [
    pytest.param(block, id=f"{name}-{i}")
    for name, text in TEXTS.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
]
COMMANDS = sorted(
    {
        part.strip().removeprefix(".venv/bin/")
        for text in TEXTS.values()
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
        for part in re.split(r"&&|>", line.split("#")[0])
        if re.search(r"\bdwf \w", part)
    }
)
SHORT = ("new_attack",)  # in the default tier; the others train
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem not in SHORT else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON)
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "page", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    words = command.split()
    arguments = words[words.index("dwf") + 1 :]
    options = make_parser().parse_args(arguments)
    if arguments[0] == "train" and options.preset is not None:
        find(options.preset)


@pytest.fixture
def registries() -> Iterator[None]:
    """What an example adds to them is gone after it."""
    before = [(found, dict(found)) for found in (DEFENSES, OPTIONS)]
    yield
    for found, content in before:
        found.clear()
        found.update(content)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("path", EXAMPLES)
def test_example_runs(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert 20 <= len(path.read_text(encoding="utf-8").splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_results_page_is_made_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run `python docs/make_results.py`"
    )


def findings_of_the_code() -> set[str]:
    """First arguments of all calls that make a finding, where they are written out."""
    names = set()
    for file in (ROOT / "dwf/evaluation").glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            made_by = getattr(call.func, "id", getattr(call.func, "attr", ""))
            first = call.args[0]
            if made_by in ("Finding", "finding", "beyond") and isinstance(first, ast.Constant):
                names.add(str(first.value))
    return names


def findings_of_the_page() -> dict[str, list[str]]:
    """Cells of the tables of docs/findings.md, by the findings that a row names."""
    found = {}
    for line in TEXTS["findings.md"].splitlines():
        if line.startswith("| `"):
            names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), cells)
    return found


def test_every_finding_is_explained_and_no_other() -> None:
    code, page = findings_of_the_code(), findings_of_the_page()
    assert len(code) > 40
    # images outside of the range are refused by an error, which the page lists as well
    assert code == set(page) - {"pixel_range"}


def test_limits_on_the_page_are_those_of_the_code() -> None:
    page, compared = findings_of_the_page(), 0
    for name, limit in vars(limits).items():
        row = page.get(name.lower())
        if row is None or not isinstance(limit, limits.Limits):
            continue
        compared += 1
        numbers = {float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", row[1])}
        wanted = {x for x in limit if math.isfinite(x)}
        assert wanted <= numbers, (name, row[1])
        assert all(row[2:4]), f"{name}: where the limit comes from, or what to do, is empty"
    assert compared > 15


def test_pages_are_as_short_as_promised() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 170
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    glossary = architecture.split("## Glossary")[1]
    assert len(re.findall(r"^- \*\*", glossary, flags=re.MULTILINE)) <= 30


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_and_paths_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:dwf|moe_kernels|csrc|tests|examples|docs)/[\w/.]+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
