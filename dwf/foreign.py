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

import contextlib
import importlib
import importlib.util
import pickletools
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dwf.checks import CheckpointError, ConfigError
from dwf.exported import load_program
from moe_kernels.errors import in_one_line

_FORMS = (
    "expected package.module:name, file.py:name, a TorchScript file (.pt) or an exported program "
    "(.pt2)"
)
_ADVICE = (
    "write a file.py with a function that builds the network, loads these weights and returns it, "
    "and give file.py:function"
)
# Instructions of a pickle that are read: those of a large model, and no bomb.
_MOST_BYTES = 1 << 26
# What the pickle of a state dict names, and what checkpoints of training programs hold.
_OF_WEIGHTS = re.compile(
    r"collections\.OrderedDict|torch\._\w+\..*|torch\.\w+|torch\.(storage|serialization)\..*"
    r"|numpy\..*|_codecs\..*|builtins\..*|argparse\.Namespace|pathlib\..*"
)
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "epoch", "optimizer", "best_acc")
# Folders whose files were loaded, in this process.
_used_folders: set[str] = set()


def load_foreign(spec: str) -> nn.Module:
    """Load the model that ``spec`` names, in eval mode.

    A file.py may import its neighbours, as when Python runs it.

    Args:
        spec: one of the four forms at the top of this module.
    Raises:
        ConfigError: ``spec`` has another form, or names something that is not there, fails, is no
            module and returns none.
        CheckpointError: the file is missing or holds no model; the message says what it holds.
    """
    where, colon, name = spec.rpartition(":")
    path = Path(spec)
    if colon and _is_dotted(name) and (where.endswith(".py") or _is_dotted(where)):
        model = _from_python(where, name)
    elif path.suffix in (".pt", ".pth", ".ts"):
        model = _from_torchscript(path)
    elif path.suffix == ".pt2":
        model = _from_export(path)
    else:
        raise ConfigError(f"model {spec!r}: {_what_else(spec, path)}")
    return model.eval()


def _what_else(spec: str, path: Path) -> str:
    """Why a text is none of the forms, and what to write."""
    if path.suffix == ".py":
        return f"name what to take from the file, as in {spec}:net"
    if path.is_dir():
        if (path / "config.json").is_file():
            return f"is a run folder; give it without --model, as in `dwf eval {spec}`"
        return f"is a folder; {_FORMS}"
    if path.is_file():
        return f"holds {what_it_holds(path) or 'no model that is known here'}; {_ADVICE}"
    if spec.isidentifier():
        return f"{_FORMS}; did you mean torchvision.models:{spec}, or the name of a run folder?"
    return _FORMS


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _from_python(where: str, name: str) -> nn.Module:
    in_file = where.endswith(".py")
    folder = Path(where).parent.resolve() if in_file else Path.cwd()
    with _neighbours(folder):
        try:
            value: Any = _module_of_file(Path(where)) if in_file else importlib.import_module(where)
        except ImportError as error:
            hint = ""
            if "relative import" in str(error):
                hint = (
                    f"; name it as a part of its package, as in package.{Path(where).stem}:{name}"
                )
            raise ConfigError(f"model {where}:{name}: {error}{hint}") from error
        except (Exception, SystemExit) as error:  # their code may raise anything
            raise ConfigError(
                f"model {where}:{name}: importing it fails, {in_one_line(error)}"
            ) from error
        for part in name.split("."):
            if not hasattr(value, part):
                known = [key for key in vars(value) if not key.startswith("_")]
                near = get_close_matches(part, known, n=1) if hasattr(value, "__dict__") else []
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"model {where}:{name}: there is no {part!r}{hint}")
            value = getattr(value, part)
        if isinstance(value, nn.Module) or not callable(value):
            return _checked(value, where, name)
        try:
            model = value()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"model {where}:{name}: {name}() fails, {in_one_line(error)}; name a module, or a "
                "function without arguments that returns one"
            ) from error
        return _checked(model, where, name)


def _checked(model: object, where: str, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {where}:{name}: expected a torch.nn.Module or a function that returns one, "
            f"found {type(model).__name__}"
        )
    return model


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Let code import what lies beside it: first of all now, last of all later.

    Later, because a forward may import as well; last, because a file of theirs must not stand in
    for a package that is needed here. What another folder's file imported under the same names is
    forgotten.
    """
    path = str(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or not _used_folders.intersection(map(str, Path(file).parents)):
            continue
        top = name.partition(".")[0]
        if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
            if folder not in Path(file).parents:
                del sys.modules[name]
    _used_folders.add(path)
    known = path in sys.path
    sys.path.insert(0, path)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # their code may have removed it
            sys.path.remove(path)
        if not known:
            sys.path.append(path)


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
    held = what_it_holds(path)
    if held is not None:
        raise CheckpointError(f"{path}: not a TorchScript file: it holds {held}; {_ADVICE}")
    try:
        model: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a TorchScript file, {first}") from error
    return model


def what_it_holds(path: Path) -> str | None:
    """What a file is that people take for a model; None if it may be TorchScript, or is unknown.

    Nothing is unpickled: the instructions of a pickle are read as text.
    """
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        return "nothing: the file is empty"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in place of the file: download it again by its direct link"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file: run `git lfs pull`"
    if (head[8:9] == b"{" and b'"dtype"' in head) or path.suffix == ".safetensors":
        return "weights alone (safetensors)"
    if path.suffix == ".onnx":
        return "an ONNX graph, which torch cannot run"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, of Keras perhaps"
    if head.startswith(b"\x80"):
        return "a pickle, or weights in torch's format before 1.6"
    if zipfile.is_zipfile(path):
        return _saved_by_torch(path)
    return None


def _saved_by_torch(path: Path) -> str | None:
    """What torch.save put into a zip archive; None for an archive of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
            if any(name.endswith("models/model.json") for name in names):
                return "an exported program: name the file *.pt2"
            if any(name.endswith("constants.pkl") for name in names) or not pickles:
                return None
            with archive.open(pickles[0]) as stream:
                data = stream.read(_MOST_BYTES)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    classes, words = _named_in(data)
    of_a_class = [name for name in classes if not _OF_WEIGHTS.fullmatch(name)]
    if of_a_class:
        return f"a pickled object of class {of_a_class[0]}, whose code is elsewhere"
    entries = [word for word in words if word in _ENTRIES]
    if entries:
        return f"a checkpoint with the entries {', '.join(entries)}, weights without a network"
    return "a state dict, weights without a network"


def _named_in(data: bytes) -> tuple[list[str], list[str]]:
    """The classes and functions that a pickle names, and its other texts, in their order."""
    classes: list[str] = []
    words: list[str] = []
    with contextlib.suppress(ValueError):  # cut off or damaged: what was read so far
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "GLOBAL":
                classes.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                classes.append(".".join(words[-2:]))
            elif isinstance(argument, str):
                words.append(argument)
    return list(dict.fromkeys(classes)), list(dict.fromkeys(words))


def _from_export(path: Path) -> nn.Module:
    _require(path)
    return ProgramModule(load_program(path))


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
