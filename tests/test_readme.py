"""The README's Python code runs as printed, and its commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dwf.cli import make_parser
from dwf.presets import find

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "command",
    [part for line in COMMANDS for part in re.split(r"&&|>", line) if re.search(r"\bdwf \w", part)],
)
def test_commands_parse(command: str) -> None:
    words = command.strip().removeprefix(".venv/bin/").split()
    arguments = words[words.index("dwf") + 1 :]
    options = make_parser().parse_args(arguments)
    if arguments[0] == "train" and options.preset is not None:
        find(options.preset)
