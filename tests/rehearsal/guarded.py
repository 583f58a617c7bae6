"""Report which lines that only a GPU's code path reaches were executed.

Such lines are the statements under an `if` that asks for CUDA, those of functions that are made for
it, and every statement that calls torch.cuda. Read from the source; docstrings do not count.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_ASKS = re.compile(r"\bis_cuda\b|on_cuda|on_gpu|[\"']cuda[\"':]|torch\.cuda|_capturing\(")
_FOR_CPU = re.compile(
    r"(!=|is not) [\"']cuda[\"']|\bnot .*(is_cuda|on_cuda|on_gpu|_capturing\(|cuda\.is_available)"
)


def guarded_lines(source: str) -> set[int]:
    """First lines of the statements that only a GPU's path reaches."""
    return {line for line in _lines(ast.parse(source).body, inside=False)}


def _lines(body: list[ast.stmt], inside: bool) -> Iterator[int]:
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            made_for_it = any("'cuda'" in ast.unparse(x) for x in statement.decorator_list)
            yield from _lines(statement.body, inside or made_for_it)
            continue
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        head = _head(statement)
        if not docstring and (inside or ("torch.cuda." in head and not _declares(statement))):
            yield statement.lineno
        asks = isinstance(statement, ast.If) and _ASKS.search(head) is not None
        denies = asks and _FOR_CPU.search(head) is not None
        for name in ("body", "orelse", "finalbody"):
            under = asks and denies == (name == "orelse")
            yield from _lines(getattr(statement, name, []), inside or under)
        for handler in getattr(statement, "handlers", []):
            yield from _lines(handler.body, inside)
        # What follows `if device.type != "cuda": return` is for CUDA.
        if denies and isinstance(statement.body[-1], (ast.Return, ast.Raise)):  # type: ignore[attr-defined]
            inside = True


def _head(statement: ast.stmt) -> str:
    """The statement without the statements in it."""
    parts = [x for x in ast.iter_child_nodes(statement) if not isinstance(x, ast.stmt)]
    return " ".join(ast.unparse(x) for x in parts if not isinstance(x, ast.ExceptHandler))


def _declares(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.ClassDef, ast.AnnAssign))


class Watch:
    """Notes which guarded lines of the two packages run, in this process."""

    def __init__(self, root: Path = ROOT) -> None:
        self.lines = {
            str(path): found
            for package in ("dwf", "moe_kernels")
            for path in sorted((root / package).rglob("*.py"))
            if (found := guarded_lines(path.read_text(encoding="utf-8")))
        }
        self.ran: set[tuple[str, int]] = set()
        self._codes: dict[CodeType, bool] = {}

    def start(self) -> None:
        """From now on; a debugger cannot be used with it."""
        threading.settrace(self._called)
        sys.settrace(self._called)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        wanted = self._codes.get(code)
        if wanted is None:
            ours = self.lines.get(code.co_filename, set())
            wanted = any(line in ours for _, _, line in code.co_lines())
            self._codes[code] = wanted
        return self._at_line if wanted else None

    def _at_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.ran.add((frame.f_code.co_filename, frame.f_lineno))
        return self._at_line

    def write(self, folder: Path) -> None:
        """Keep what ran in a file of this process."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{os.getpid()}.json").write_text(json.dumps(sorted(self.ran)))

    def summary(self, folder: Path) -> list[str]:
        """The share of lines that ran in any process that wrote to the folder, and the others."""
        ran = {
            (str(file), int(line))
            for path in folder.glob("*.json")
            for file, line in json.loads(path.read_text())
        }
        every = {(file, line) for file, lines in self.lines.items() for line in lines}
        left: dict[str, list[int]] = {}
        for file, line in sorted(every - ran):
            left.setdefault(str(Path(file).relative_to(ROOT)), []).append(line)
        share = 1 - len(every - ran) / max(len(every), 1)
        return [
            f"{100 * share:.1f} % of {len(every)} lines of the GPU's path were executed",
            *(f"  not: {file}:{','.join(map(str, lines))}" for file, lines in left.items()),
        ]
