"""Load a model that was trained elsewhere by its name on the command line.

    package.module:name         a module, or a function that returns one
    file.py:name                the same, from a file
    model.pt                    TorchScript
    model.pt2                   an exported program (torch.export)

Each model maps images [B, C, H, W] in [0, 1] to logits [B, K]. If yours was trained on normalized
images, name a function that wraps it with ``dwf.as_pixel_model``. Python files run when they are
loaded; TorchScript and exported programs hold tensors and operators of torch, and nothing in them
is unpickled.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dwf.checks import CheckpointError, ConfigError
from dwf.exported import load_program


def load_foreign(spec: str) -> nn.Module:
    """Load the model that ``spec`` names, in eval mode.

    Args:
        spec: one of the four forms at the top of this module.
    Raises:
        ConfigError: ``spec`` has another form, or names something that is not there, is no module
            and returns none.
        CheckpointError: the file is missing or holds no model.
    """
    where, colon, name = spec.rpartition(":")
    if colon and _is_dotted(name) and (where.endswith(".py") or _is_dotted(where)):
        model = _from_python(where, name)
    elif Path(spec).suffix in (".pt", ".pth", ".ts"):
        model = _from_torchscript(Path(spec))
    elif Path(spec).suffix == ".pt2":
        model = _from_export(Path(spec))
    else:
        raise ConfigError(
            f"model {spec!r}: expected package.module:name, file.py:name, a TorchScript file (.pt) "
            "or an exported program (.pt2)"
        )
    return model.eval()


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _from_python(where: str, name: str) -> nn.Module:
    try:
        value: Any = _module_of_file(Path(where)) if where.endswith(".py") else _imported(where)
    except ImportError as error:
        raise ConfigError(f"model {where}:{name}: {error}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"model {where}:{name}: there is no {part!r}")
        value = getattr(value, part)
    model = value() if callable(value) and not isinstance(value, nn.Module) else value
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {where}:{name}: expected a torch.nn.Module or a function that returns one, "
            f"found {type(model).__name__}"
        )
    return model


def _imported(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"{path} not found")
    name = f"_dwf_foreign_{path.stem}"  # a json.py must not stand in for json
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _from_torchscript(path: Path) -> nn.Module:
    _require(path)
    try:
        model: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a TorchScript file, {first}") from error
    return model


def _from_export(path: Path) -> nn.Module:
    _require(path)
    return ProgramModule(load_program(path).module())


class ProgramModule(nn.Module):
    """An exported program as a module; it keeps the mode that it was exported in."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> ProgramModule:
        return self  # the graph has no mode, and raises if asked to change it

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.program(images)
        return logits


def _require(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: not found")
