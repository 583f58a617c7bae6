"""Presets: functions that return a whole configuration, named ``<defense>_<data>``.

    dwf train digits                     # short for dwf_digits
    dwf train cifar10 seed=1 joint.num_epochs=50

One file for each paper; a file's MAKERS are what users can name.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import cache

from dwf.checks import ConfigError
from dwf.config import Config
from dwf.presets import (
    advmoe,
    baselines,
    divided_we_fall,
    further_mixtures,
    immunity,
    modern,
    recipes,
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
    "SIZES",
    "dwf_cifar10",
    "dwf_cifar10_small",
    "dwf_cifar100",
    "dwf_digits",
    "dwf_svhn",
    "find",
    "groups",
    "paper_compat",
    "single",
    "smoke",
    "table",
]

# How long training and its two tables take, by what a preset's data are called.
SIZES = {
    "digits": "minutes on two CPU cores; nothing to download",
    "cifar10_small": "about half an hour on two CPU cores",
    "cifar10": "hours on a GPU",
    "cifar100": "hours on a GPU",
    "svhn": "hours on a GPU",
    "paper_compat": "hours on a GPU; normalized images, as in the published tables",
}
FILES = [
    advmoe,
    baselines,
    divided_we_fall,
    further_mixtures,
    immunity,
    modern,
    recipes,
    robust_experts,
    soe,
]


@cache  # all configurations are made once to know their names
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
    names = sorted({*presets, *(long.removeprefix("dwf_") for long in presets)})
    near = get_close_matches(key, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`dwf presets` lists all"
    raise ConfigError(f"preset {name!r} is unknown; {hint}")


def groups() -> dict[str, list[Config]]:
    """All presets by the keys of `SIZES`: Divided We Fall first, then by defense."""
    found: dict[str, list[Config]] = {size: [] for size in SIZES}
    for name, make in table().items():
        config = make()
        size = next((size for size in ("paper_compat", "cifar10_small") if size in name), None)
        found[size or config.data.name].append(config)
    for configs in found.values():
        configs.sort(key=lambda c: (c.defense != "dwf", c.preset != "smoke", c.defense, c.preset))
    return found
