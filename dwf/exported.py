"""Load an exported program (.pt2 of torch.export) without unpickling and without running Python.

torch.export.load runs code that a file brings along, in more places than its pickles: it falls back
from one reader to the next until one unpickles, calls any function below ``torch`` that a node
names, and evaluates texts as Python (sizes, guards, names of inputs). So torch gets a new archive
in memory, made only of what was found harmless here:

- stored files under the names that torch.export.save writes; sample inputs, a pickle, are emptied
- weights and constants as raw bytes; each file is checked by its CRC
- nodes that call operators of torch or plain arithmetic
- names without anything that could be code; guards and stack traces are dropped

Everything else is refused. What a program computes is not judged.
"""

from __future__ import annotations

import ast
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwf.checks import CheckpointError

ADVICE = "save it with torch.export.save of torch 2.10 or later, as plain tensors"

WEIGHTS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+")
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
PROGRAM, SAMPLE_INPUTS = "models/model.json", "data/sample_inputs/model.pt"
HEADER = ("archive_format", "archive_version", "byteorder", ".data/version")
LEFT_OUT = re.compile(r"\.data/serialization_id|\.format_version|\.storage_alignment|extra/.*")

# Arithmetic of sizes, and operators that the dispatcher knows.
OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_"
    r"|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt|log|exp)"
    r"|torch\._?sym_[a-z_0-9]+"
    r"|torch\.ops\.(aten|prims?|quantized_decomposed|torchvision|moe_kernels)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|wrap_with_(set_grad_enabled|autocast))"
)
# `__and__` and its like are operators; `__init__` and its like lead out of them.
DUNDER = re.compile(r"\.__(?!i?(and|or|xor|lshift|rshift)__\.)|\.\w+\.__")
# Operators that write or map files.
OF_FILES = re.compile(r"torch\.ops\.\w+\.(from_file|save|load)\b.*")
PLAIN = re.compile(r"[\w.+:<=-]*")
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
OF_SIZES = {"Symbol", "Integer", "Float", "Rational", "Max", "Min", "Abs", "Add", "Mul", "Pow"} | {
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan"),
    *("StrictGreaterThan", "GreaterThan", "Not", "And", "Or", "FloorDiv", "ModularIndexing"),
    *("Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift"),
    *("RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat"),
    *("TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
}
# What reading a damaged archive may raise, in zipfile and here.
DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
SIZE_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Load),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword),
)


def load_program(path: Path) -> nn.Module:
    """Read an exported program as a module that computes it.

    Raises:
        CheckpointError: the file is missing, damaged, none that torch.export.save wrote, or holds
            something that could run code: a pickle, a compiled library, a call of Python.
    """
    try:
        archive = _harmless(path)
    except DAMAGE as error:
        raise CheckpointError(f"{path}: not an exported program, {error}") from error
    try:
        program: nn.Module = torch.export.load(archive).module()
        return program
    except Exception as error:  # whatever torch's readers raise
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"{path}: not an exported program, {reason[0]}") from error


def _harmless(path: Path) -> io.BytesIO:
    """A new archive of what is harmless in the one at ``path``; ValueError for what is not."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        entries = old.infolist()
        names = [entry.filename for entry in entries]
        folder = names[0].partition("/")[0] if names else ""
        if len(set(names)) < len(names):
            raise ValueError("holds two files of one name")
        for entry in entries:
            top, _, name = entry.filename.partition("/")
            if top != folder or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename!r} is not as torch.export.save writes it")
            if LEFT_OUT.fullmatch(name):
                continue
            if name == SAMPLE_INPUTS:
                new.writestr(f"model/{name}", b"")
            elif WEIGHTS.fullmatch(name) or name in HEADER:
                new.writestr(f"model/{name}", old.read(entry))
            elif name in CONFIGS:
                new.writestr(f"model/{name}", json.dumps(_raw_only(json.loads(old.read(entry)))))
            elif name == PROGRAM:
                program = _without_code(json.loads(old.read(entry)))
                new.writestr(f"model/{name}", json.dumps(program))
            else:
                raise ValueError(f"holds {entry.filename!r}, which may be code; {ADVICE}")
    made.seek(0)
    return made


def _raw_only(config: Any) -> Any:
    """The list of weights or constants, if each is raw bytes in a file of its kind."""
    for key, payload in config["config"].items():
        if payload["use_pickle"] is not False:
            raise ValueError(f"{key!r} is a pickle, which may run code; {ADVICE}")
        if not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise ValueError(f"{key!r} is in {payload['path_name']!r}; {ADVICE}")
    return config


def _without_code(value: Any, key: str = "") -> Any:
    """A part of the program, without guards and stack traces; ValueError for what may be code."""
    if key == "metadata":
        return {}
    if key == "guards_code":
        return []
    if isinstance(value, list):
        return [_without_code(part, key) for part in value]
    if isinstance(value, dict):
        for name in value:
            _require(PLAIN.fullmatch(name), name)
        return {name: _without_code(part, name) for name, part in value.items()}
    if isinstance(value, str):
        _check_text(key, value)
    return value


def _check_text(key: str, text: str) -> None:
    """Raise ValueError if a text under this key of the program may become code."""
    if key in ("target", "as_operator"):
        harmless = OPERATORS.fullmatch(text) and not DUNDER.search(text)
        _require(harmless and not OF_FILES.fullmatch(text), text)
    elif key == "expr_str":
        _require(len(text) <= 10_000 and all(map(_is_of_sizes, ast.walk(_parsed(text)))), text)
    elif key in ("in_spec", "out_spec"):
        _require(all(map(_is_plain_container, _specs(json.loads(text)[1]))), text)
    elif key == "name":
        _require(text.isidentifier() or not text, text)
    elif key in ("as_string", "as_strings"):  # torch puts quotes around them
        _require(text.isprintable() and not set("'\"\\") & set(text), text)
    else:
        _require(PLAIN.fullmatch(text), text)


def _require(harmless: object, text: str) -> None:
    if not harmless:
        raise ValueError(f"{text!r:.80} may run code; {ADVICE}")


def _parsed(text: str) -> ast.AST:
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"{text!r:.80} is no size") from error


def _is_of_sizes(node: ast.AST) -> bool:
    """Whether a part of an expression is arithmetic of sizes."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in OF_SIZES
    if isinstance(node, ast.Constant):
        text = node.value if isinstance(node.value, str) else ""
        return PLAIN.fullmatch(text) is not None
    return isinstance(node, SIZE_NODES)


def _specs(spec: Any) -> Iterator[Any]:
    """A container of inputs or outputs, and all in it."""
    yield spec
    for part in spec["children_spec"]:
        yield from _specs(part)


def _is_plain_container(spec: Any) -> bool:
    """Whether it is a tuple, a list, or a dictionary whose keys are names."""
    context = json.loads(spec["context"] or "null")
    keys = context if isinstance(context, list) else []
    plain = all(isinstance(key, str) and key.isidentifier() for key in keys)
    return spec["type"] in CONTAINERS and plain and (context is None or isinstance(context, list))
