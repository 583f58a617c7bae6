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
        "changed": [],
    }
    line = make_recipes().recipe_row(PUBLISHED[0], row)
    assert line[2] == "81.0 / 47.6 (44.5 to 50.7; `standard`, n = 1000, VALID)"
    assert line[3:5] == ["two cores", "5.2"]
    changed = row | {"changed": ["model.width=16"]}
    assert make_recipes().recipe_row(PUBLISHED[0], changed)[2] == f"{line[2]} with `model.width=16`"


ROW = {
    "row": "single-9x",
    "title": "one network",
    "seed": 0,
    "learning_rate": 0.3,
    "clean": 0.99,
    "under_gradients": 0.9,
    "worst_case": 0.88,
    "interval": [0.84, 0.92],
    "verdict": "VALID",
    "parameters": 1000,
    "flop_per_image": 2e6,
    "cpu_seconds": 10.0,
}


def test_rows_of_the_study() -> None:
    """Means over seeds, the interval of seed 0, and "not run" where there is no row."""
    module = make_recipes()
    rows = [ROW | {"seed": 1, "worst_case": 0.9, "interval": [0.8, 1.0]}, ROW]
    lines = {line[0]: line for line in module.study_rows(rows)}
    assert lines["one network of 9 x the parameters, TRADES"][1:] == [
        "2",
        "0.3",
        "99.0 (99.0 to 99.0)",
        "90.0 (90.0 to 90.0)",
        "89.0 (88.0 to 90.0)",
        "84.0 to 92.0",
        "VALID",
        "1,000",
        "2.0",
        "10",
    ]
    assert lines["DWF as published"][1] == "not run"
    assert {len(line) for line in lines.values()} == {len(module.COLUMNS)}


def test_curves_are_of_the_lowest_seed_that_was_watched() -> None:
    module = make_recipes()
    rows = [ROW | {"seed": seed, "curve": [[2.4, 0.5], [4.9, 0.7 + 0.1 * seed]]} for seed in (2, 1)]
    assert module.curve_rows([ROW, *rows]) == [
        ["one network of 9 x the parameters, TRADES", "2 s: 50.0; 5 s: 80.0"]
    ]


def test_ideas_are_ranked_after_what_they_are_compared_with() -> None:
    module = make_recipes()
    rows = [
        ROW | {"row": f"idea: {name}", "title": name, "under_gradients": found}
        for name, found in (("worse", 0.5), ("better", 0.95))
    ]
    names = [line[0] for line in module.idea_rows([*rows, ROW | {"row": "dwf-modern"}, ROW])]
    assert names == [module.TITLES["single-9x"], module.TITLES["dwf-modern"], "better", "worse"]


def test_the_answer_compares_the_best_mixture_with_the_network_of_equal_cost() -> None:
    module = make_recipes()
    rows = [ROW, ROW | {"row": "dwf-modern", "worst_case": 0.86}]
    assert module.answer(rows).endswith(
        "86.0, 2.0 points behind the single network of 9 x the parameters (88.0).\n"
    )
    better = ROW | {"row": "ensemble", "worst_case": 0.9}
    assert "90.0, 2.0 points ahead of" in module.answer([*rows, better])
    equal = ROW | {"row": "ensemble", "worst_case": 0.88}
    assert "88.0, level with the single" in module.answer([*rows, equal])
    assert module.answer([ROW]) == ""


OPTION = ROW | {
    "row": "trades",
    "title": "TRADES",
    "base": "trades",
    "settings": [],
    "under_gradients_l2": 0.7,
    "epochs": 20,
    "warnings": [],
}


def test_options_are_compared_with_their_method_on_the_same_seeds() -> None:
    module = make_recipes()
    method = {"row": "mart", "title": "MART", "under_gradients": 0.88}
    change = {"row": "x", "title": "swap", "settings": ["a=1", "b=2"]}
    rows = [
        OPTION,
        OPTION | {"seed": 1, "under_gradients": 0.8},
        OPTION | method,
        OPTION | change | {"seed": 1, "under_gradients": 0.83},
        OPTION | change | {"row": "y", "base": "mart", "under_gradients": 0.86},
    ]
    lines = {line[0]: line[1:] for line in module.option_rows(rows, methods=True)}
    assert lines["TRADES"][4:6] == ["85.0 (80.0 to 90.0)", ""]
    assert lines["MART"][4:6] == ["88.0", "-2.0"]
    lines = {line[0]: line[1:] for line in module.option_rows(rows, methods=False)}
    assert lines["swap"] == ["`a=1` `b=2`", "1", "0.3", "99.0", "83.0", "+3.0", "70.0", "10"]
    assert lines["swap (MART)"][4:6] == ["86.0", "-2.0"]


def test_an_early_end_and_a_collapse_are_told() -> None:
    module = make_recipes()
    stopped = OPTION | {"settings": ["a=1"], "epochs": 7, "warnings": ["collapse"]}
    assert module.remarks([stopped], OPTION) == "; ended after epoch 7; collapse"
    both = [OPTION | {"settings": ["a=1"]}, stopped | {"seed": 2}]
    assert module.remarks(both, OPTION) == "; seed 2: ended after epoch 7; seed 2: collapse"
    assert module.remarks([OPTION | {"epochs": 7}], OPTION) == ""
    assert module.remarks([stopped], stopped) == ""  # its method says so already
