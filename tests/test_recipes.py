"""The page of recipes is made of presets and committed rows, and published recipes exist."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from dwf.presets import find
from dwf.presets.recipes import PUBLISHED

ROOT = Path(__file__).parents[1]


def make_recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "docs/make_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_new() -> None:
    module = make_recipes()
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run `python docs/make_recipes.py`"
    )


def test_recipes_that_nobody_ran_say_so() -> None:
    module = make_recipes()
    lines = {published.preset: module.recipe_row(published, None) for published in PUBLISHED}
    for preset, line in lines.items():
        assert find(preset).data.name == "cifar10"
        assert line[2:5] == ["not run"] * 3
        assert line[5] == f"`dwf train {preset}`"


def test_a_recipe_that_ran() -> None:
    row = {
        "clean": 0.81,
        "worst_case": 0.476,
        "interval": [0.445, 0.507],
        "suite": "standard",
        "num_images": 1000,
        "verdict": "VALID",
        "device": "two cores",
        "hours": 5.25,
    }
    line = make_recipes().recipe_row(PUBLISHED[0], row)
    assert line[2] == "81.0 / 47.6 (44.5 to 50.7; `standard`, n = 1000, VALID)"
    assert line[3:5] == ["two cores", "5.2"]
