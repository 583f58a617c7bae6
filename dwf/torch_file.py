"""Read the tensors of a file that torch.save wrote, without unpickling it.

Such a file is a zip archive: a pickle, which says how tensors lie in storages, and the bytes of
each storage. The pickle's instructions are followed here only as far as dicts, lists, numbers,
texts and tensors need; every class or function that it names beside those of tensors stays a name,
and nothing of it is imported or called. So a file from anywhere is data and no more.
"""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwf.checks import CheckpointError, DwfError
from dwf.files import open_regular

# Instructions of a pickle that are read: those of a large model, and no bomb.
MOST_BYTES = 1 << 26
MOST_STEPS = 10**6
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "ema")
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MARK = object()


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names, or an object that it would make by calling one."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Bytes of the archive: ``numel`` numbers of a type."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor: how it lies in a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU.

    The file holds the state dict itself, or a dict with it under one of STATE_DICTS.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict.
    """
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            return _read(path, archive)
    except DwfError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: no zip archive; torch.save of version 1.6 and later writes one"
        ) from error
    except Exception as error:  # which ones parsers raise on random bytes has no list
        raise CheckpointError(f"{path}: not readable, {type(error).__name__}: {error}") from error


def _read(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: an archive without data.pkl, not a file of torch.save")
    if archive.getinfo(pickles[0]).file_size > MOST_BYTES:
        raise CheckpointError(f"{path}: a pickle of more than {MOST_BYTES:,} bytes")
    prefix = pickles[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine")
    views = _state_dict(path, followed(archive.read(pickles[0])))
    storages: dict[str, Tensor] = {}
    found = {}
    for name, view in views.items():
        storage = view.storage
        if storage.key not in storages:
            storages[storage.key] = _storage(path, archive, prefix, storage)
        last = view.offset + sum((n - 1) * s for n, s in zip(view.size, view.stride, strict=True))
        sane = min(view.size, default=1) >= 0 and min(view.stride, default=0) >= 0
        if not sane or view.offset < 0 or (0 not in view.size and last >= storage.numel):
            raise CheckpointError(f"{path}: {name} lies outside of its storage")
        flat = storages[storage.key]
        found[name] = torch.as_strided(flat, view.size, view.stride, view.offset).clone()
    return found


def _storage(path: Path, archive: zipfile.ZipFile, prefix: str, storage: Storage) -> Tensor:
    entry = archive.getinfo(f"{prefix}data/{storage.key}")
    wanted = storage.numel * torch.empty(0, dtype=storage.dtype).element_size()
    if entry.file_size != wanted or entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            f"{path}: {entry.filename} holds {entry.file_size:,} bytes, its tensors need {wanted:,}"
        )
    if not wanted:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(archive.read(entry)), dtype=storage.dtype)


def _state_dict(path: Path, root: Any) -> dict[str, View]:
    candidates = [root]
    if isinstance(root, dict):
        candidates += [root[key] for key in STATE_DICTS if key in root]
    for value in candidates:
        if isinstance(value, dict) and value:
            views = {k: v for k, v in value.items() if isinstance(v, View) and isinstance(k, str)}
            if len(views) == len(value):
                return views
    found = sorted(map(str, root)) if isinstance(root, dict) else type(root).__name__
    raise CheckpointError(
        f"{path}: holds {found!s:.200}, expected a state dict, or one under {list(STATE_DICTS)}"
    )


def followed(data: bytes) -> Any:
    """What a pickle describes: dicts, lists, tuples, plain values, `View`s, and `Name`s.

    Raises:
        ValueError, LookupError: an instruction that is not known here, or a damaged pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if count > MOST_STEPS:
            raise ValueError(f"more than {MOST_STEPS:,} instructions")
        if name == "STOP":
            return stack.pop()
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(str(argument))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(str(argument))])
        elif name in _VALUES:
            stack.append(_VALUES[name](argument))
        elif name in _CHANGES:
            _CHANGES[name](stack)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"a pickle with the instruction {name}")
    raise ValueError("a pickle without an end")


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take everything above the last mark off the stack, and the mark."""
    taken: list[Any] = []
    while (top := stack.pop()) is not _MARK:
        taken.append(top)
    return taken[::-1]


def _tuple(stack: list[Any], count: int) -> None:
    stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]


def _set_items(stack: list[Any], items: list[Any]) -> None:
    if isinstance(stack[-1], dict):
        stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _set_items(stack, [key, value])


def _append(stack: list[Any]) -> None:
    value = stack.pop()
    if isinstance(stack[-1], list):
        stack[-1].append(value)


def _appends(stack: list[Any]) -> None:
    values = _to_mark(stack)
    if isinstance(stack[-1], list):
        stack[-1].extend(values)


def _stack_global(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(Name(f"{module}.{name}"))


def _persistent(stack: list[Any]) -> None:
    kind, storage, key, _, numel = stack.pop()
    if kind != "storage" or not isinstance(storage, Name):
        raise ValueError("a persistent object that is no storage")
    dtype = DTYPES[storage.text.rpartition(".")[2]]
    stack.append(Storage(dtype, str(key), int(numel)))


def _reduce(stack: list[Any]) -> None:
    """What a call would make: a tensor, an ordered dict, or a name for anything else."""
    arguments, function = stack.pop(), stack.pop()
    text = function.text if isinstance(function, Name) else "?"
    if text == "torch._utils._rebuild_tensor_v2" and isinstance(arguments[0], Storage):
        storage, offset, size, stride = arguments[:4]
        stack.append(View(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride))))
    elif text == "torch._utils._rebuild_parameter" and isinstance(arguments[0], View):
        stack.append(arguments[0])
    elif text == "collections.OrderedDict" and not arguments:
        stack.append({})
    else:
        stack.append(Name(text))


def _build(stack: list[Any]) -> None:
    stack.pop()  # attributes, such as a state dict's metadata


def _collected(make: Any) -> Any:
    def change(stack: list[Any]) -> None:
        stack.append(make(_to_mark(stack)))

    return change


def _as_dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


_VALUES: dict[str, Any] = {
    "MARK": lambda _: _MARK,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "GLOBAL": lambda text: Name(str(text).replace(" ", ".")),
    **{
        name: lambda value: value
        for name in (
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
            *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
        )
    },
}
_CHANGES: dict[str, Any] = {
    "TUPLE": _collected(tuple),
    "LIST": _collected(list),
    "DICT": _collected(_as_dict),
    "TUPLE1": lambda stack: _tuple(stack, 1),
    "TUPLE2": lambda stack: _tuple(stack, 2),
    "TUPLE3": lambda stack: _tuple(stack, 3),
    "SETITEM": _set_item,
    "SETITEMS": lambda stack: _set_items(stack, _to_mark(stack)),
    "APPEND": _append,
    "APPENDS": _appends,
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": _persistent,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "POP": lambda stack: stack.pop(),
}
