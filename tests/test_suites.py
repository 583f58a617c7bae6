"""The grid of the paper's tables, from settings to rows."""

import dataclasses

import pytest

from dwf.config import EvaluationConfig
from dwf.evaluation import AttackSpec, paper_suite


def test_the_papers_grid():
    rows = paper_suite(EvaluationConfig())
    assert [row.name for row in rows] == [
        "clean",
        *(f"FGSM 0.0{i}" for i in range(1, 10)),
        *(f"PGD-{steps}" for steps in (10, 20, 30, 40, 50)),
        "multi-start PGD-100 x3",
        "adaptive PGD-100",
    ]
    assert rows[0] == AttackSpec("clean", "clean", 0.0, None, 0)
    assert rows[4] == AttackSpec("FGSM 0.04", "fgsm", 0.04, 0.04, 1)
    assert rows[11] == AttackSpec("PGD-20", "pgd", 8 / 255, 2 / 255, 20)
    assert rows[15] == AttackSpec(
        "multi-start PGD-100 x3", "multi_start", 8 / 255, 2 / 255, 100, 3, random_start=True
    )
    assert rows[16] == AttackSpec("adaptive PGD-100", "adaptive", 8 / 255, 2 / 255, 100)


def test_settings_reach_the_rows():
    settings = EvaluationConfig(
        fgsm_epsilon=(0.5,),
        epsilon=0.25,
        step_size=0.125,
        num_steps=(7, 3, 7),
        multi_start_steps=9,
        num_restarts=2,
        adaptive_steps=8,
        eot_samples=20,
    )
    assert paper_suite(settings) == [
        AttackSpec("clean", "clean"),
        AttackSpec("FGSM 0.5", "fgsm", 0.5, 0.5, 1),
        AttackSpec("PGD-3", "pgd", 0.25, 0.125, 3),
        AttackSpec("PGD-7", "pgd", 0.25, 0.125, 7),
        AttackSpec("multi-start PGD-9 x2", "multi_start", 0.25, 0.125, 9, 2, random_start=True),
        AttackSpec("adaptive PGD-8", "adaptive", 0.25, 0.125, 8, eot_samples=20),
    ]


def test_rows_left_out():
    settings = EvaluationConfig((), num_steps=(), multi_start_steps=0, adaptive_steps=0)
    assert [row.kind for row in paper_suite(settings)] == ["clean"]


def test_names_are_distinct():
    settings = EvaluationConfig(fgsm_epsilon=(1 / 255, 2 / 255, 4 / 255, 8 / 255, 0.03))
    names = [row.name for row in paper_suite(settings)]
    assert len(set(names)) == len(names)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper_suite(EvaluationConfig())[0].epsilon = 1.0
