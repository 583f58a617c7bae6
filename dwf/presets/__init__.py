"""Presets: functions that return a whole configuration, named ``<defense>_<data>``.

    dwf train digits                     # short for dwf_digits
    dwf train cifar10 seed=1 joint.num_epochs=50

One file for each paper; a file's MAKERS are what users can name.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from dwf.checks import ConfigError
from dwf.config import Config
from dwf.presets import (
    advmoe,
    baselines,
    divided_we_fall,
    further_mixtures,
    immunity,
    robust_experts,
    soe,
)
from dwf.presets.divided_we_fall import (
    dwf_cifar10,
    dwf_cifar10_small,
    dwf_cifar100,
    dwf_digits,
    dwf_svhn,
    paper_compat,
    single,
    smoke,
)

__all__ = [
    "dwf_cifar10",
    "dwf_cifar10_small",
    "dwf_cifar100",
    "dwf_digits",
    "dwf_svhn",
    "find",
    "paper_compat",
    "single",
    "smoke",
    "table",
]

FILES = [advmoe, baselines, divided_we_fall, further_mixtures, immunity, robust_experts, soe]


def table() -> dict[str, Callable[[], Config]]:
    """Every preset by name."""
    return {make().preset: make for file in FILES for make in file.MAKERS}


def find(name: str) -> Config:
    """A preset by name; ``digits`` is short for ``dwf_digits``, hyphens are underscores.

    Raises:
        ConfigError: with the nearest names.
    """
    presets = table()
    key = name.replace("-", "_")
    for candidate in (key, f"dwf_{key}"):
        if candidate in presets:
            return presets[candidate]()
    near = get_close_matches(key, presets, n=3) or list(presets)
    raise ConfigError(f"preset {name!r} is unknown; did you mean one of {near}?")
