"""Read JSON into frozen dataclasses and check every value; write them back.

The annotations of a dataclass say what a file must hold: ``str``, ``bool``, ``Count``,
``Fraction``, ``list[...]``, ``dict[str, ...]``, another dataclass, ``... | None``. A field with a
default may be missing or null in the file. A method ``check(place)`` compares fields with each
other. Unknown keys are ignored. A wrong value becomes a CheckpointError with its file and key.

    @dataclass(frozen=True)
    class Score:
        num_correct: Count
        accuracy: Fraction

    score = from_json(Score, read_json(path), Place(path))
    to_json(score)  # {"num_correct": 3, "accuracy": 0.5}
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dwf.checks import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both allowed."""

    low: float = -math.inf
    high: float = math.inf


Count = Annotated[int, Between(0)]
NonNegative = Annotated[float, Between(0)]
Fraction = Annotated[float, Between(0, 1)]

# Marks a field that JSON does not hold.
NOT_IN_JSON = {"json": False}


@dataclass(frozen=True)
class Place:
    """A position in a file, for messages: ``attacks[3].epsilon``; an empty key is the whole."""

    file: Path
    key: str = ""

    def at(self, key: str | int) -> Place:
        """The position of a key of this object, or of an item of this list."""
        if isinstance(key, int):
            return Place(self.file, f"{self.key}[{key}]")
        return Place(self.file, f"{self.key}.{key}" if self.key else key)

    def error(self, expected: str, found: object) -> CheckpointError:
        """The error for a value at this position."""
        return CheckpointError(
            f"{self.file}: {self.key or 'content'}: expected {expected}, found {found!r:.60}"
        )

    def require_length(self, values: Sequence[object], length: int, what: str = "values") -> None:
        """Raise unless the list at this position has this many items."""
        if len(values) != length:
            raise self.error(f"{length} {what}", f"{len(values)} {what}")


def from_json(kind: type[T], value: object, place: Place) -> T:
    """An instance of the dataclass ``kind`` from a JSON object.

    Raises:
        CheckpointError: a value is missing, of the wrong type, impossible, or contradicts another.
    """
    found: T = _read_object(kind, value, place)
    return found


def to_json(value: Any) -> Any:
    """JSON values of a dataclass and all it holds."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.metadata.get("json", True)
        }
    if isinstance(value, dict):
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    return value


def require_object(value: object, place: Place) -> dict[str, Any]:
    """A JSON object, whatever its keys."""
    if not isinstance(value, dict):
        raise place.error("an object", value)
    return value


@functools.cache
def _fields(kind: type[Any]) -> tuple[tuple[str, Any, bool], ...]:
    """Name, annotation and whether it may be missing, of each field that JSON holds."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (field.name, hints[field.name], (field.default, field.default_factory) != (MISSING,) * 2)
        for field in dataclasses.fields(kind)
        if field.metadata.get("json", True)
    )


def _read_object(kind: Any, value: object, place: Place) -> Any:
    values = require_object(value, place)
    read: dict[str, Any] = {}
    for name, hint, optional in _fields(kind):
        here = place.at(name)
        if optional and values.get(name) is None:
            continue
        if name not in values:
            raise CheckpointError(f"{here.file}: {here.key}: missing, expected {_describe(hint)}")
        read[name] = _read(hint, values[name], here)
    found = kind(**read)
    if hasattr(found, "check"):
        found.check(place)
    return found


def _read(hint: Any, value: object, place: Place) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _read_object(hint, value, place)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # of something and None
        inner = next(part for part in arguments if part is not type(None))
        return None if value is None else _read(inner, value, place)
    if origin is dict:
        values = require_object(value, place)
        return {key: _read(arguments[1], part, place.at(key)) for key, part in values.items()}
    if origin in (list, tuple):
        return _read_list(origin, arguments, value, place)
    if origin is Annotated:
        return _read_number(arguments[0], arguments[1], value, place)
    if origin is Literal:
        text = _read(str, value, place)
        if text not in arguments:
            raise place.error(_describe(hint), value)
        return text
    if hint in (int, float):
        return _read_number(hint, Between(), value, place)
    if not isinstance(value, hint):
        raise place.error(_describe(hint), value)
    return value


def _read_list(origin: Any, arguments: tuple[Any, ...], value: object, place: Place) -> Any:
    if not isinstance(value, list):
        raise place.error("a list", value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        place.require_length(value, len(arguments))
    return origin(_read(arguments[0], part, place.at(i)) for i, part in enumerate(value))


def _read_number(kind: type[Any], bounds: Between, value: object, place: Place) -> Any:
    expected = _describe(Annotated[kind, bounds])
    whole = kind is int
    # an integer too long for a float is as impossible as NaN
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise place.error(expected, value)
    if (whole and not isinstance(value, int)) or not math.isfinite(value):
        raise place.error(expected, value)
    if not bounds.low <= value <= bounds.high:
        raise place.error(expected, value)
    return kind(value)


def _describe(hint: Any) -> str:
    """What a value of this annotation is called in a message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _describe(next(part for part in arguments if part is not type(None)))
    if origin is Literal:
        return f"one of {list(arguments)}"
    if origin is Annotated:
        kind, bounds = arguments
        name = "an integer" if kind is int else "a finite number"
        if math.isinf(bounds.low):
            return name
        if math.isinf(bounds.high):
            return f"{name} of {bounds.low:g} or more"
        return f"{name} in [{bounds.low:g}, {bounds.high:g}]"
    if origin in (list, tuple):
        return "a list"
    names = {str: "a string", bool: "true or false", int: "an integer", float: "a finite number"}
    return names.get(hint, "an object")
