"""Rows of benchmarks/study_options.py: one change each, and every option that the page names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study import Study
from study_options import (
    EXTRA,
    HALF,
    METHODS,
    OPTIONS,
    changed,
    on_options,
    write_other_half,
)

import dwf
from dwf.data import split_validation
from dwf.defenses.multi_norm import MultiNormOptions
from dwf.presets import find

ROOT = Path(__file__).parents[1]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_changes_what_its_settings_name_and_nothing_else(key: str) -> None:
    option = OPTIONS[key]
    base = on_options().trained[option.base].config
    before, after = (
        flat(config.to_dict()) for config in (base, changed(option, base, Path("images.npz")))
    )
    different = {name for name in before if before[name] != after[name]}
    assert different == {text.partition("=")[0] for text in option.settings}


def test_keys_are_no_methods() -> None:
    assert not set(OPTIONS) & set(on_options().trained)
    assert {option.base for option in OPTIONS.values()} <= set(on_options().trained)


def test_every_setting_of_the_page_has_a_row() -> None:
    """All `key=value` in the first table of docs/training.md, its alternatives, and its presets."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table, single_steps = page.split("## Single steps")[0], page.split("## Single steps")[1]
    named = set(re.findall(r"`([\w.]+)=", table)) | set(re.findall(r"`(data\.\w+)`", table))
    named |= {"ema_decay", "average_from"}
    assert {"pretrain.optimizer", "data.flip", "patience", "attack.norm"} <= named
    settings = {text for option in OPTIONS.values() for text in option.settings}
    assert named <= {text.partition("=")[0] for text in settings}
    assert {
        "average=swa",
        *(f"weights={name}" for name in ("best", "ema", "best-ema")),
        *(f"pretrain.optimizer={name}" for name in ("adam", "muon")),
        *(f"pretrain.schedule={x}" for x in ("polynomial", "steps", "linear", "one-cycle")),
        *(f"data.augment={name}" for name in ("autoaugment", "idbh", "trivial")),
    } <= settings
    methods = set(re.findall(r"`(\w+)_\*`", single_steps.split("## Mixtures")[0]))
    assert methods == {"n_fgsm", "fgsm_pgi", "liet", "fast_at", "free_at"}
    assert {f"{name}_digits" for name in methods} <= {preset for _, preset in METHODS.values()}


def test_the_other_half_is_of_nobody_else(tmp_path: Path) -> None:
    """Extra images are training images that the half leaves out, and none of validation or test."""
    study = Study(on_options(), tmp_path, 300)
    path = tmp_path / "runs" / EXTRA
    write_other_half(study, path, 3)
    extra = dwf.data.load(str(path))
    rest, validation = split_validation(dwf.data.load("digits"), 200, 3)
    assert torch.equal(extra.images, rest.images[HALF:])
    assert torch.equal(extra.labels, rest.labels[HALF:])
    assert len(rest) == 2 * HALF + 1
    assert len(rest) + len(validation) == len(dwf.data.load("digits"))
    with np.load(path) as archive:
        assert set(archive.files) == {"x_train", "y_train"}


def test_the_radius_in_l2_is_that_of_the_preset() -> None:
    assert find("multi_norm_digits").options == MultiNormOptions(l2_epsilon=0.6)
