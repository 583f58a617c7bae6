"""Attacks in turn: the same outcomes however they are cut, killed and continued."""

import json
from itertools import pairwise

import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import save_file
from small_models import (
    FailsAt,
    Injected,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    everything,
    make_dataset,
)
from torch import nn

from dwf.attacks.autograd import Autograd
from dwf.attacks.door import undisturbed
from dwf.attacks.ensemble import Turn
from dwf.attacks.outcomes import Outcomes
from dwf.attacks.table import ATTACKS, AttackEntry
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import CheckpointError, ConfigError, LabelError, ModelOutputError
from dwf.config import EvaluationConfig
from dwf.evaluation import evaluate, in_turn, suites
from dwf.evaluation.suites import suite_in_turn
from dwf.evaluation.view_attacks import attack_through_views
from dwf.models import Mixture, MlpGate
from dwf.models.views import View

SETTINGS = EvaluationConfig(epsilon=0.06, step_size=0.02, batch_size=16, diagnostic_images=0)
KINDS = ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]


pytestmark = pytest.mark.usefixtures("one_thread", "brief_suites")


def labeled_by(model, num_images=20, wrong=2):
    return small_models.labeled_by(model, num_images, wrong)


def standing(result):
    return {row.name: row.correct for row in result.attacks}


class TestSuites:
    def test_standard_is_autoattack_in_its_order(self):
        specs = suite_in_turn("standard", SETTINGS, [0.1])
        assert [spec.kind for spec in specs] == KINDS
        assert [spec.num_steps for spec in specs] == [0, 100, 100, 100, 5000]
        assert {spec.epsilon for spec in specs[1:]} == {0.1}

    def test_quick_full_and_views(self):
        kinds = [s.kind for s in suite_in_turn("quick", SETTINGS, [0.1], has_views=True)]
        assert kinds == ["clean", "apgd-ce", "apgd-t", "views", "square"]
        full = suite_in_turn("full", SETTINGS, [0.1], has_views=True)
        assert [s.kind for s in full] == [*KINDS[:-1], "views", "square", "apgd-ce", "apgd-t"]
        assert [s.stream for s in full[-2:]] == [1, 1]
        assert full[-1].num_steps == 2 * full[2].num_steps

    def test_cost_is_what_an_attack_that_breaks_nothing_takes(self):
        """From the table: no more than said, and not much less."""
        model = Mapped(Linear(), lambda z: z - 1e3 * torch.eye(5)[0].neg())
        images, labels = small_models.make_images(6), torch.zeros(6, dtype=torch.int64)
        for attack in ATTACKS.values():
            report = AttackReport()
            attack(model, images, labels, epsilon=0.01, report=report, **{attack.length: 12})
            expected = attack.passes(5, **{attack.length: 12})
            for counted, said in zip(
                (report.num_forwards, report.num_backwards), expected, strict=True
            ):
                assert counted <= 6 * (said + 2), attack.key
                # a search that finds nowhere to start from ends
                if attack.key != "hop-skip-jump":
                    assert 0.6 * 6 * said - 6 * 3 <= counted, attack.key

    def test_cost_of_a_suite(self):
        specs = suite_in_turn("standard", SETTINGS, [0.1])
        cost = suites.passes_of(specs, num_classes=10)
        assert cost.num_backwards == 101 + 9 * 101 + 9 * 100
        # a verdict on each row, then as each attack says
        assert cost.num_forwards == 5 + 103 + 919 + 1801 + 5001
        grid = suites.passes_of(suites.paper_suite(EvaluationConfig()), 10)
        assert grid.num_backwards == 100 + 3 * 100  # PGD-100 holds the shorter ones

    def test_radii_ascend_and_names_differ(self):
        specs = suite_in_turn("standard", SETTINGS, [0.2, 0.1, 0.2])
        assert [spec.epsilon for spec in specs] == [0.0] + 4 * [0.1] + 4 * [0.2]
        assert len({spec.name for spec in specs}) == len(specs)


class TestOutcomes:
    def test_nothing_rises(self):
        model = SmallNet()
        dataset = labeled_by(model)
        result = evaluate(model, dataset, SETTINGS, suite="standard", epsilon=[0.02, 0.08, 0.3])
        for before, after in pairwise(result.attacks):
            assert not (after.correct & ~before.correct).any()
        assert [worst.epsilon for worst in result.curve] == [0.02, 0.08, 0.3]
        accuracy = [worst.accuracy for worst in result.curve]
        assert accuracy == sorted(accuracy, reverse=True)
        assert len(set(accuracy)) == 3
        assert result.robust_accuracy == accuracy[-1] == result.worst_case_all.accuracy
        assert result.clean_accuracy == 0.9
        assert result.epsilon == 0.3

    @pytest.mark.parametrize("number", [np.float32(0.0625), np.float64(0.0625), 1])
    def test_one_radius_is_any_number(self, number):
        result = evaluate(Linear(), make_dataset(4), SETTINGS, suite="quick", epsilon=number)
        assert result.epsilon == float(number)

    def test_only_what_stands_is_attacked(self):
        model = SmallNet()
        result = evaluate(model, labeled_by(model), SETTINGS, suite="standard")
        for before, row in zip(result.attacks[:5], result.attacks[1:5], strict=False):
            assert row.num_attacked == int(before.correct.sum())

    @pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
    def test_linear_model_has_its_known_value(self, norm):
        """min over k of margin / dual norm of the difference of weights, where no pixel clips."""
        model = Linear()
        dataset = make_dataset(60)
        dataset.images.clamp_(100, 155)  # 0.39 to 0.61: far from the box
        with torch.no_grad():
            images = dataset.images.float() / 255
            logits = model(images)
        labels = logits.argmax(dim=1)
        dataset = type(dataset)(**{**vars(dataset), "labels": labels})
        weight = model.weight.detach().flatten(1)
        dual = 1 if norm == "linf" else 2
        difference = (weight[labels].unsqueeze(1) - weight.unsqueeze(0)).norm(p=dual, dim=2)
        margin = logits.gather(1, labels[:, None]) - logits
        distance = (margin / difference).masked_fill(difference == 0, torch.inf).amin(dim=1)
        radius = float(distance.median()) * 1.0001
        result = evaluate(model, dataset, SETTINGS, suite="quick", epsilon=radius, norm=norm)
        sure = (distance / radius - 1).abs() > 1e-3
        assert torch.equal(result.attacks[-1].correct[sure], (distance > radius)[sure])
        assert 0.4 < result.robust_accuracy < 0.6

    @pytest.mark.parametrize("batch_size", [1, 7, 1000])
    def test_batch_size_changes_nothing(self, batch_size):
        model = Linear()
        dataset = labeled_by(model, 24)
        expected = standing(evaluate(model, dataset, SETTINGS, suite="standard"))
        settings = EvaluationConfig(**{**vars(SETTINGS), "batch_size": batch_size})
        found = standing(evaluate(model, dataset, settings, suite="standard"))
        assert found.keys() == expected.keys()
        for name, correct in expected.items():
            assert torch.equal(found[name], correct), name

    def test_nothing_of_the_callers_changes(self):
        model = SmallNet().train()
        dataset = labeled_by(SmallNet())
        before = everything(model)
        evaluate(model, dataset, SETTINGS, suite="standard")
        assert everything(model) == before
        for call in (3, 40, 100):
            failing = FailsAt(model, call)
            with pytest.raises(Injected):
                evaluate(failing, dataset, SETTINGS, suite="standard")
            assert everything(model) == before

    def test_mixture_is_attacked_through_its_views(self):
        gate = MlpGate((3, 8, 8), 3, hidden=8)
        mixture = Mixture([SmallNet(seed=e) for e in range(3)], gate)
        plain = evaluate(
            Mapped(mixture, lambda logits: logits), labeled_by(mixture), SETTINGS, suite="quick"
        )
        result = evaluate(mixture, labeled_by(mixture), SETTINGS, suite="quick")
        row = next(row for row in result.attacks if row.kind == "views")
        before = result.attacks[result.attacks.index(row) - 1]
        found = int((before.correct & ~row.correct).sum())
        assert sum(row.broken_by.values()) == found
        assert not (row.correct & ~plain.attacks[2].correct).any()

    def test_so_is_a_mixture_inside_a_model_and_the_result_says_so(self):
        mixture = Mixture([SmallNet(seed=e) for e in range(2)], MlpGate((3, 8, 8), 2, hidden=8))
        model = Mapped(mixture, lambda logits: 2 * logits)
        result = evaluate(model, labeled_by(mixture, 20), SETTINGS, suite="quick")
        assert "views" in {row.kind for row in result.attacks}
        finding = next(f for f in result.findings if f.name == "mixture_inside")
        assert finding.message.startswith("network, a mixture")
        assert finding.severity == "note"

    def test_views_of_a_random_model_are_judged_by_votes(self):
        """Else an image that one unlucky pass gets wrong is attacked no further, and stands."""
        network, decoy = Linear(), Linear(seed=5)
        model = AttackTarget(Noisy(network, std=8.0), reason="random")
        dataset = labeled_by(network, 100, wrong=0)
        images = dataset.images.float() / 255
        views = [*3 * [View("decoy", lambda x: decoy)], View("network", lambda x: network)]
        standing = {}
        for num_votes in (1, 50):
            with undisturbed(model.model, images.device), torch.no_grad():
                found, _ = attack_through_views(
                    model,
                    images,
                    dataset.labels,
                    views=views,
                    sample_index=torch.arange(100),
                    report=AttackReport(),
                    num_votes=num_votes,
                    epsilon=0.1,
                    step_size=0.025,
                    num_steps=10,
                )
            standing[num_votes] = int((network(found).argmax(dim=1) == dataset.labels).sum())
        assert standing[50] + 30 < standing[1]

    def test_a_random_plan_need_not_agree_with_a_vote(self):
        model = Noisy(Linear(), std=8.0)
        dataset = labeled_by(Linear(), 30)
        disagree = []
        for plan, deterministic in ((Autograd(model), False), (Autograd(Linear(seed=5)), True)):
            plan.deterministic = deterministic
            specs = [suites.AttackSpec("clean", "clean")]
            rows = in_turn.attack_in_turn(
                AttackTarget(model, plan),
                dataset,
                specs,
                Outcomes(None, "", torch.zeros(0), len(specs), len(dataset)),
                seed=0,
                batch_size=30,
                device=torch.device("cpu"),
                num_votes=3,
            )
            disagree.append(rows[0].num_disagree)
        assert disagree[0] == 0 < disagree[1]

    def test_a_target_is_judged_in_eval_mode(self):
        model = SmallNet()
        dataset = labeled_by(model, 20)
        expected = evaluate(model, dataset, SETTINGS, suite="quick")
        target = AttackTarget(model.train(), reason="made elsewhere")
        before = everything(model)
        found = evaluate(target, dataset, SETTINGS, suite="quick")
        assert found.worst_case == expected.worst_case
        assert found.verdict == expected.verdict
        assert everything(model) == before

    def test_random_model_is_invalid_unless_declared(self):
        model = Noisy(Linear())
        dataset = labeled_by(Linear(), 20)
        assert evaluate(model, dataset, SETTINGS, suite="quick").verdict == "INVALID"

    def test_what_its_own_doubts_break_is_broken(self, monkeypatch):
        """No row may call an image robust that a PGD within epsilon has broken."""
        monkeypatch.setattr(AttackEntry, "__call__", _nothing)
        result = evaluate(Linear(), labeled_by(Linear()), SETTINGS, suite="quick")
        row = next(row for row in result.attacks if row.kind == "pgd-again")
        assert int(row.correct.sum()) < result.clean_accuracy * len(row.correct)
        assert result.robust_accuracy <= float(row.correct.double().mean())
        assert "pgd_wins" in {finding.name for finding in result.findings}

    def test_verdict_of_an_honest_model(self):
        model = Linear()
        result = evaluate(model, labeled_by(model), SETTINGS, suite="full")
        assert [f.name for f in result.findings] == ["small_sample"]
        assert result.verdict == result.to_json()["verdict"] == "UNPROVEN"  # 60 images are few


def _nothing(self, target, images, labels, **options):
    return images


class TestBudget:
    def test_an_attack_that_leaves_the_ball_is_found(self, monkeypatch):
        def craft(turn, target, batch, places, counts):
            return (batch[0] + 0.5 if turn.attack else batch[0]), None, None

        monkeypatch.setattr(Turn, "craft", craft)
        model = Linear()
        result = evaluate(model, labeled_by(model), SETTINGS, suite="quick")
        assert result.finding("budget").severity == "invalid"


class TestDraws:
    def test_each_batch_of_each_attack_has_its_own(self, monkeypatch):
        """A random model's draws come from the seed, the attack and the batch's first image."""
        asked = []

        def seed_of(*numbers):
            asked.append(numbers)
            return 0

        monkeypatch.setattr(in_turn, "seed_of", seed_of)
        model = Linear()
        evaluate(model, labeled_by(model, 20, wrong=0), SETTINGS, suite="quick", seed=3)
        assert asked[:3] == [(3, 0, 0), (3, 0, 16), (3, 1, 0)]
        assert len(set(asked)) == len(asked)


class TestResume:
    def test_not_from_another_version(self, tmp_path, monkeypatch, caplog):
        model, partial = Linear(), tmp_path / "partial.safetensors"
        evaluate(model, labeled_by(model, 8), SETTINGS, suite="quick", partial=partial)
        monkeypatch.setattr(in_turn, "__version__", "0.0.0")
        evaluate(model, labeled_by(model, 8), SETTINGS, suite="quick", partial=partial)
        assert "the evaluation begins anew" in caplog.text

    @pytest.mark.slow
    def test_killed_anywhere_it_continues_to_the_same_table(self, tmp_path, monkeypatch):
        model = SmallNet()
        dataset = labeled_by(model, 20)
        expected = evaluate(model, dataset, SETTINGS, suite="standard")
        batches = []
        original = Outcomes.write

        def killed(self):
            original(self)
            batches.append(None)
            if len(batches) in stops:
                raise Injected(len(batches))

        monkeypatch.setattr(Outcomes, "write", killed)
        stops = range(1, 100, 2)
        partial = tmp_path / "standard.partial.safetensors"
        for _ in range(100):
            try:
                found = evaluate(model, dataset, SETTINGS, suite="standard", partial=partial)
                break
            except Injected:
                assert partial.exists()
        assert len(batches) > 4
        for row, other in zip(found.attacks, expected.attacks, strict=True):
            assert torch.equal(row.correct, other.correct)
            assert (row.num_attacked, row.num_backwards) == (
                other.num_attacked,
                other.num_backwards,
            )

    def test_done_attacks_do_not_run_again(self, tmp_path, monkeypatch):
        model = SmallNet()
        dataset = labeled_by(model, 20)
        partial = tmp_path / "partial.safetensors"
        expected = evaluate(model, dataset, SETTINGS, suite="standard", partial=partial)
        monkeypatch.setattr(Turn, "craft", None)  # nothing is left to craft
        found = evaluate(model, dataset, SETTINGS, suite="standard", partial=partial)
        assert standing(found).keys() == standing(expected).keys()
        assert found.worst_case == expected.worst_case

    @pytest.mark.parametrize(
        "change",
        [
            "weights",
            *(pytest.param(x, marks=pytest.mark.slow) for x in ("seed", "data", "suite", "damage")),
        ],
    )
    def test_a_file_of_something_else_is_left_behind(self, tmp_path, change, caplog):
        model = SmallNet()
        dataset = labeled_by(model, 8)
        partial = tmp_path / "partial.safetensors"
        evaluate(model, dataset, SETTINGS, suite="quick", partial=partial)
        seed, suite = 0, "quick"
        if change == "weights":
            nn.init.zeros_(model.linear.bias)
        elif change == "seed":
            seed = 1
        elif change == "data":
            dataset = type(dataset)(**{**vars(dataset), "digest": "another"})
        elif change == "suite":
            suite = "full"
        else:
            partial.write_bytes(partial.read_bytes()[:-30])
        found = evaluate(model, dataset, SETTINGS, suite=suite, seed=seed, partial=partial)
        assert "begins anew" in caplog.text
        expected = evaluate(model, dataset, SETTINGS, suite=suite, seed=seed)
        assert found.worst_case == expected.worst_case

    def test_code_that_is_no_weight(self, tmp_path, caplog):
        """The weights are the same, what is made of them is not."""
        network = SmallNet()
        dataset = labeled_by(network, 20)
        partial = tmp_path / "partial.safetensors"
        first = Mapped(network, lambda logits: logits)
        evaluate(first, dataset, SETTINGS, suite="quick", partial=partial)
        edited = Mapped(network, lambda logits: logits.flip(1))
        found = evaluate(edited, dataset, SETTINGS, suite="quick", partial=partial)
        assert "begins anew" in caplog.text
        assert found.clean_accuracy == evaluate(edited, dataset, SETTINGS).clean_accuracy

    def test_numbers_that_are_no_weight(self, tmp_path, caplog):
        """The same classes from the same weights, at another temperature."""
        network = Linear()
        dataset, partial = labeled_by(network, 8), tmp_path / "partial.safetensors"
        for factor, anew in ((1, False), (1, False), (100, True)):
            model = Mapped(network, lambda logits, factor=factor: factor * logits)
            evaluate(model, dataset, SETTINGS, suite="quick", partial=partial)
            assert ("begins anew" in caplog.text) == anew

    def test_random_model_continues_to_the_same_table(self, tmp_path, monkeypatch):
        model, dataset = Noisy(Linear(), std=4.0), labeled_by(Linear(), 60)
        settings = EvaluationConfig(**{**vars(SETTINGS), "eot_samples": 3})
        expected = evaluate(model, dataset, settings, suite="quick")
        written, original = [], Outcomes.write

        def killed(self):
            original(self)
            written.append(None)
            if len(written) in (2, 6):
                raise KeyboardInterrupt

        monkeypatch.setattr(Outcomes, "write", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, dataset, settings, suite="quick", partial=tmp_path / "p.npz")
        found = evaluate(model, dataset, settings, suite="quick", partial=tmp_path / "p.npz")
        assert len(written) > 6
        for name, correct in standing(expected).items():
            assert torch.equal(standing(found)[name], correct), name

    def test_one_flipped_bit(self, tmp_path, caplog):
        path = tmp_path / "partial.safetensors"
        Outcomes(path, "k", torch.zeros(4, 2), 1, 4).write()
        Outcomes(path, "k", torch.zeros(4, 2), 1, 4, strict=True)
        data = bytearray(path.read_bytes())
        data[-1] ^= 2  # the last image was broken, it says now
        path.write_bytes(data)
        assert not Outcomes(path, "k", torch.zeros(4, 2), 1, 4).table.any()
        assert "sha256" in caplog.text

    @pytest.mark.parametrize("counts", ['[{"minutes": 1}]', "null", "{"])
    def test_a_file_of_another_version(self, tmp_path, counts, caplog):
        path = tmp_path / "partial.safetensors"
        tensors = {"outcome": torch.ones(1, 4, dtype=torch.uint8), "logits": torch.zeros(4, 2)}
        save_file(tensors, path, {"key": "k", "counts": counts})
        outcomes = Outcomes(path, "k", torch.zeros(4, 2), 1, 4)
        assert "begins anew" in caplog.text
        assert not outcomes.table.any()
        with pytest.raises(CheckpointError, match="not readable"):
            Outcomes(path, "k", torch.zeros(4, 2), 1, 4, strict=True)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"suite": "standrad"}, "did you mean 'standard'"),
            ({"suite": "standard", "norm": "l1"}, "norm"),
            ({"suite": "standard", "epsilon": []}, "empty list"),
            ({"suite": "standard", "epsilon": [0.1, -1.0]}, "epsilon"),
            ({"suite": "standard", "epsilon": 8}, "8/255"),
            ({"suite": "standard", "norm": "l2"}, "name one for norm 'l2'"),
            ({"suite": "paper", "epsilon": [0.1, 0.2]}, "attacks in turn"),
            ({"suite": "paper", "norm": "l2"}, "attacks in turn"),
            ({"suite": "quick", "protocol": "paper-compat"}, "belongs to suite 'paper'"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ConfigError, match=message):
            evaluate(Linear(), make_dataset(4), SETTINGS, **options)

    def test_probabilities_and_labels(self):
        softmax = Mapped(Linear(), lambda logits: logits.softmax(dim=1))
        with pytest.raises(ModelOutputError, match="probabilities"):
            evaluate(softmax, make_dataset(4), SETTINGS, suite="standard")
        allowed = evaluate(
            softmax, make_dataset(4), SETTINGS, suite="quick", allow_probabilities=True
        )
        assert "not_logits" in {finding.name for finding in allowed.findings}
        with pytest.raises(LabelError):
            evaluate(Linear(num_classes=3), make_dataset(20), SETTINGS, suite="standard")

    def test_nan_logits_are_broken(self):
        result = evaluate(
            Mapped(Linear(), lambda logits: logits * torch.nan),
            make_dataset(8, labels=torch.zeros(8, dtype=torch.int64)),
            SETTINGS,
            suite="standard",
        )
        assert result.clean_accuracy == result.robust_accuracy == 0.0
        assert result.verdict == "INVALID"


def test_written_table(tmp_path):
    model = SmallNet()
    result = evaluate(model, labeled_by(model), SETTINGS, suite="standard", epsilon=[0.01, 0.05])
    result.write(tmp_path / "standard.json")
    table = json.loads((tmp_path / "standard.json").read_text())
    assert (table["suite"], table["norm"], table["verdict"]) == ("standard", "linf", "UNPROVEN")
    assert len(table["curve"]) == 2
    arrays = np.load(tmp_path / "standard.npz")
    assert arrays["correct"].shape == (len(table["attacks"]), 20)
    assert arrays["example_adversarial"].shape == (8, 3, 8, 8)
    text = str(result)
    assert "worst case at 0.05" in text
    assert "verdict: UNPROVEN" in text
