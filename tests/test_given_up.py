"""Images that an attack gives up: controls tell where that is wrong, and questions end it."""

import dataclasses
import functools

import pytest
import torch
from small_models import Curved, Injected, Noisy, labeled_by
from torch import nn

from dwf.attacks.outcomes import FEWEST_CONTROLS, GIVEN_UP, Outcomes
from dwf.attacks.target import attack_target
from dwf.config import EvaluationConfig
from dwf.evaluation import evaluate, questions
from dwf.evaluation.in_turn import attack_in_turn
from dwf.evaluation.suites import AttackSpec, suite_in_turn

pytestmark = pytest.mark.usefixtures("one_thread", "brief_suites")

SETTINGS = EvaluationConfig(epsilon=0.015, step_size=0.005, batch_size=16, diagnostic_images=0)
QUERIES, NUM_IMAGES = 1500, 48


class Floor(nn.Module):
    """A network whose margin falls, but never below one until the class changes.

    Progress tells nothing here: an image that is about to fall looks as far away as all others.
    """

    def __init__(self):
        super().__init__()
        self.network = Curved()

    def forward(self, images):
        logits = self.network(images)
        best = logits.topk(2, dim=1)
        margin = best.values[:, :1] - best.values[:, 1:]
        return torch.zeros_like(logits).scatter(1, best.indices[:, :1], 1 + margin)


# Of Square, by model: where the floor hides falls, and where many stand.
RADIUS = {Floor: 0.012, Curved: 0.006}


def attacked(model, *, gives_up=True, batch_size=NUM_IMAGES, outcomes=None, **options):
    """Square alone on a model: its row, and the outcomes."""
    dataset = labeled_by(model, NUM_IMAGES, wrong=2)
    specs = [AttackSpec("clean", "clean")]
    specs.append(
        AttackSpec("Square", "square", RADIUS[type(model)], num_steps=QUERIES, gives_up=gives_up)
    )
    outcomes = outcomes or Outcomes(None, "", torch.zeros(0, 0), len(specs), NUM_IMAGES)
    rows = attack_in_turn(
        attack_target(model.eval(), dataset.images[:1].float() / 255),
        dataset,
        specs,
        outcomes,
        seed=0,
        batch_size=batch_size,
        device=torch.device("cpu"),
        **options,
    )
    return rows[1], outcomes


@functools.cache
def row_of(make, gives_up=True):
    """The row of Square on a model, made once."""
    return attacked(make(), gives_up=gives_up)[0]


def test_controls_find_that_the_rule_is_wrong(monkeypatch):
    floored, patient = row_of(Floor), row_of(Floor, gives_up=False)
    assert patient.given_up is None
    assert floored.given_up.num_fallen > 0 == floored.given_up.num_left
    assert torch.equal(floored.correct, patient.correct)
    # without them images are lost
    monkeypatch.setattr(Outcomes, "controls", lambda *_: torch.zeros(0, dtype=torch.int64).numpy())
    blind = attacked(Floor())[0]
    assert int(blind.correct.sum()) > int(patient.correct.sum()) + 2


def test_an_honest_model_loses_no_image_and_saves_time():
    hasty, patient = row_of(Curved), row_of(Curved, gives_up=False)
    its = hasty.given_up
    assert torch.equal(hasty.correct, patient.correct)
    assert its.num_fallen == 0
    assert its.num_controls == max(-(-its.num_images // 8), FEWEST_CONTROLS)
    assert its.num_left == its.num_images - its.num_controls > 10
    assert hasty.num_forwards < 0.7 * patient.num_forwards


@pytest.mark.parametrize("make", [Floor, Curved])
def test_batches_change_nothing(make):
    whole, parts = row_of(make), attacked(make(), batch_size=17)[0]
    assert torch.equal(whole.correct, parts.correct)
    assert whole.given_up == parts.given_up


@pytest.mark.parametrize("make", [Floor, Curved])
def test_killed_anywhere_it_continues_to_the_same_row(make, tmp_path, monkeypatch):
    expected, _ = attacked(make(), batch_size=20)
    original, stops = Outcomes.write, []

    def killed(self):
        original(self)
        stops.append(None)
        if len(stops) % 2:
            raise Injected(len(stops))

    monkeypatch.setattr(Outcomes, "write", killed)
    for _ in range(100):
        kept = Outcomes(tmp_path / "partial", "", torch.zeros(0, 0), 2, NUM_IMAGES)
        try:
            found, _ = attacked(make(), batch_size=20, outcomes=kept)
            break
        except Injected:
            continue
    assert len(stops) > 6
    assert torch.equal(found.correct, expected.correct)
    assert found.given_up == expected.given_up
    assert found.num_forwards == expected.num_forwards


def test_controls_are_drawn_by_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        outcomes = Outcomes(None, "", torch.zeros(0, 0), 2, 200, seed=seed)
        outcomes.left_early[1, 50:] = True
        drawn.append(outcomes.controls(1).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 19
    assert min(drawn[0]) >= 50


def test_to_the_end_leaves_nobody():
    _, outcomes = attacked(Curved())
    assert (outcomes.table == GIVEN_UP).any()
    row, _ = attacked(Curved(), outcomes=outcomes, to_the_end=True)
    assert row.given_up.num_left == 0 < row.given_up.num_images
    assert torch.equal(row.correct, row_of(Curved, gives_up=False).correct)


def given_up(result):
    return [row.given_up for row in result.attacks if row.given_up is not None]


def test_questions_end_it(monkeypatch):
    model = Curved()
    dataset = labeled_by(model, 60)
    plain = evaluate(model, dataset, SETTINGS)
    assert sum(its.num_left for its in given_up(plain)) > 0
    monkeypatch.setattr(questions, "is_needed", lambda findings: True)
    doubted = evaluate(model, dataset, SETTINGS)
    assert sum(its.num_images for its in given_up(doubted)) > 0
    assert sum(its.num_left for its in given_up(doubted)) == 0
    for before, row in zip(doubted.attacks, doubted.attacks[1:], strict=False):
        assert not (row.correct & ~before.correct).any()


def test_a_random_model_is_never_given_up():
    model = Noisy(Curved(), std=0.1)
    result = evaluate(model, labeled_by(Curved(), 30), SETTINGS, suite="quick")
    assert result.finding("random") is not None
    assert given_up(result) == []


def test_which_suites_give_up():
    for suite, expected in (("quick", True), ("standard", True), ("full", False)):
        specs = suite_in_turn(suite, SETTINGS, [0.1], gives_up=True)
        assert any(spec.gives_up for spec in specs) == expected
        assert not any(spec.gives_up for spec in suite_in_turn(suite, SETTINGS, [0.1]))


def test_the_record_says_so(tmp_path):
    result = evaluate(Curved(), labeled_by(Curved(), 40), SETTINGS)
    path = tmp_path / "evaluation.json"
    result.write(path)
    again = type(result).read(path)
    assert given_up(again) == given_up(result) != []
    assert "gave up" in str(again)
    assert dataclasses.asdict(given_up(again)[0]).keys() == {
        "num_images",
        "num_controls",
        "num_fallen",
        "num_left",
    }
