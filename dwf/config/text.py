"""Read settings from text and JSON, by the annotations of their dataclasses.

Unknown keys, wrong types and impossible values are ConfigErrors that suggest the nearest key.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_type_hints

from dwf.checks import ConfigError, check_choice
from dwf.config.settings import OPTIONS, Config, Options

T = TypeVar("T")


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Change settings by name: ``["joint.num_epochs=30", "attack.epsilon=4/255"]``.

    Numbers may be fractions, lists are comma-separated, "none" is None. Settings that need each
    other, such as a schedule and its factors, are checked together, in whatever order they come.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, impossible value.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"{override!r}: expected key=value, for example seed=1")
        _add_change(changes, config, key.strip().split("."), text.strip(), key.strip())
    return _replaced(config, changes)


def from_dict(values: dict[str, Any]) -> Config:
    """Read what :meth:`Config.to_dict` wrote; unknown keys and wrong types are ConfigErrors."""
    return _build(Config, values, "")


def _add_change(changes: dict[str, Any], node: Any, path: list[str], text: str, key: str) -> None:
    """Put a setting of the node into ``changes``; those of a group are a dict."""
    name, rest = path[0], path[1:]
    hints = get_type_hints(type(node))
    if name not in hints:
        raise ConfigError(f"{key}: unknown key{_suggest(key, len(path), node)}")
    if not rest:
        changes[name] = parse_setting(text, hints[name], key)
        return
    child = changes.get(name, ...)
    if child is not None:  # an override before this one may have said "none"
        child = getattr(node, name)
    if not dataclasses.is_dataclass(child):
        reason = "this preset has no such phase" if child is None else f"{name} has no parts"
        raise ConfigError(f"{key}: {reason}")
    _add_change(changes.setdefault(name, {}), child, rest, text, key)


def _replaced(node: T, changes: dict[str, Any]) -> T:
    values = {
        name: _replaced(getattr(node, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(node, **values)  # type: ignore[type-var]


def _suggest(key: str, depth: int, node: Any) -> str:
    """The key with its ``depth``-th part from the end corrected, or all names that could be."""
    parts, names = key.split("."), [f.name for f in fields(node)]
    if depth == len(parts) == 1:
        inside = _places_of(key, node)
        if inside:
            return f"; did you mean {' or '.join(inside)}?"
    near = get_close_matches(parts[-depth], names, n=1)
    if not near:
        return f", expected one of {names}"
    parts[-depth] = near[0]
    return f"; did you mean {'.'.join(parts)}?"


def _places_of(name: str, node: Any, prefix: str = "") -> list[str]:
    """The keys of settings of this name in the groups of a configuration."""
    found = []
    for field in fields(node):
        child = getattr(node, field.name)
        if dataclasses.is_dataclass(child):
            key = f"{prefix}{field.name}."
            found += [key + name] if name in {f.name for f in fields(child)} else []
            found += _places_of(name, child, key)
    return found


def parse_setting(text: str, hint: Any, key: str) -> Any:
    """A setting from text.

    Args:
        text: a number or fraction, true or false, a word; several separated by commas; "none".
        hint: the annotation of the setting.
        key: its name, for messages.
    Raises:
        ConfigError: the text is not of this type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    try:
        if origin in (typing.Union, types.UnionType):
            if text.lower() == "none":
                return None
            return _parse_one_of(text, [a for a in args if a is not type(None)], key)
        if origin is Literal:
            check_choice(text, args, key)
            return text
        if origin is tuple:
            return tuple(
                parse_setting(part.strip(), args[0], key) for part in text.split(",") if part
            )
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if hint is float:
            top, slash, bottom = text.partition("/")
            return float(top) / float(bottom) if slash else float(text)
        if hint in (int, str):
            return hint(text)
    except (ValueError, KeyError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {text!r} is not a {_type_name(hint)}") from error
    raise ConfigError(f"{key}: names a group of settings; name one of them, as in {key}.KEY=VALUE")


def _parse_one_of(text: str, hints: Sequence[Any], key: str) -> Any:
    """The text by the first annotation that it suits."""
    faults = []
    for hint in hints:
        try:
            return parse_setting(text, hint, key)
        except ConfigError as fault:
            faults.append(fault)
    raise faults[0]


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _build(cls: type[T], values: Any, path: str) -> T:
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'config'}: expected a group of settings, found {values!r:.80}")
    hints = get_type_hints(cls)
    if "options" in hints:  # whose type is the defense's choice
        defense = values.get("defense")
        kind = OPTIONS.get(defense, Options) if isinstance(defense, str) else Options
        hints = {**hints, "options": kind | None}
    made = {}
    for name, value in values.items():
        key = f"{path}{name}"
        if name not in hints:
            near = get_close_matches(name, hints, n=1)
            raise ConfigError(
                f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
            )
        made[name] = _convert(value, hints[name], key)
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in made
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path or 'config'}: {missing} missing")
    return cls(**made)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A JSON value to a value of the hinted type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), key)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(part, args[0], key) for part in value)
    if origin is Literal and isinstance(value, str):
        check_choice(value, args, key)
        return value
    if hint is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{key}: an integer of {len(str(value))} digits is too large") from (
                None
            )
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{key}: expected {_type_name(hint)}, found {value!r:.80}")
