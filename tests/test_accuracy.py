"""Evaluation: numbers against brute force, broken models never robust, nothing changed."""

import json

import numpy as np
import pytest
import torch
from small_models import (
    NUM_CLASSES,
    SHAPE,
    FailsAt,
    Injected,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    disordered,
    everything,
    labeled_by,
    make_dataset,
)
from torch import nn

from dwf.attacks import fgsm, pgd
from dwf.attacks.space import attack_space
from dwf.checks import ConfigError, LabelError, ModelOutputError
from dwf.config import EvaluationConfig
from dwf.evaluation import (
    clean_and_robust_accuracy,
    evaluate,
    format_table,
    paper,
    wilson_interval,
)
from dwf.models import Mixture, MlpGate

SETTINGS = EvaluationConfig(
    fgsm_epsilon=(0.02, 0.05, 0.2),
    epsilon=0.1,
    step_size=0.02,
    num_steps=(2, 5),
    multi_start_steps=4,
    num_restarts=2,
    adaptive_steps=7,
)
CPU = torch.device("cpu")


def by_grid(*args, **options):
    """The paper's grid."""
    return evaluate(*args, suite="paper", **options)


def sharp(network):
    """A network that uses all classes and whose predictions the attacks can move."""
    with torch.no_grad():
        network.linear.weight.mul_(20)
    return network


@pytest.fixture(scope="module")
def judged():
    """A model, its data, and its evaluation."""
    model = sharp(SmallNet())
    dataset = labeled_by(model)
    return model, dataset, by_grid(model, dataset, SETTINGS, seed=3)


class TestNumbers:
    def test_every_row_by_brute_force(self, judged):
        model, dataset, result = judged
        images, labels = dataset.images.float() / 255, dataset.labels
        options = {"epsilon": 0.1, "step_size": 0.02, "seed": 3}
        expected = {
            "clean": images,
            **{f"FGSM {e}": fgsm(model, images, labels, epsilon=e) for e in (0.02, 0.05, 0.2)},
            **{
                f"PGD-{n}": pgd(model, images, labels, num_steps=n, random_start=False, **options)
                for n in (2, 5)
            },
            "multi-start PGD-4 x2": pgd(
                model,
                images,
                labels,
                num_steps=4,
                random_start=True,
                num_restarts=2,
                sample_index=torch.arange(60),
                **options,
            ),
            "adaptive PGD-7": pgd(
                model, images, labels, num_steps=7, random_start=False, **options
            ),
        }
        assert [row.name for row in result.attacks] == list(expected)
        for row in result.attacks:
            correct = model.eval()(expected[row.name]).argmax(dim=1) == labels
            assert torch.equal(row.correct, correct), row.name
            assert row.accuracy == float(correct.float().mean(dtype=torch.float64))
        accuracies = [row.accuracy for row in result.attacks]
        assert len(set(accuracies)) > 4  # not a test of constants
        assert result.clean_accuracy == 0.9

    def test_worst_case_is_and_over_rows(self, judged):
        _, _, result = judged
        correct = {row.name: row.correct for row in result.attacks}
        worst = torch.ones(60, dtype=torch.bool)
        for name in ("clean", "FGSM 0.02", "FGSM 0.05", "PGD-2", "PGD-5", "adaptive PGD-7"):
            worst &= correct[name]
        worst &= correct["multi-start PGD-4 x2"]
        assert result.worst_case.num_correct == int(worst.sum())
        assert result.robust_accuracy == int(worst.sum()) / 60
        assert result.worst_case.epsilon == 0.1
        assert "FGSM 0.2" not in result.worst_case.attacks
        assert len(result.worst_case.attacks) == 7
        worst &= correct["FGSM 0.2"]
        assert result.worst_case_all.num_correct == int(worst.sum())
        assert result.worst_case_all.epsilon == 0.2
        assert len(result.worst_case_all.attacks) == 8
        assert result.robust_accuracy <= min(row.accuracy for row in result.attacks[:3])

    @pytest.mark.parametrize("batch_size", [1, 7, 60, 1000])
    def test_batch_size_changes_nothing(self, batch_size):
        model = Linear()
        dataset = labeled_by(model, 30)
        expected = by_grid(model, dataset, SETTINGS)
        settings = EvaluationConfig(**{**vars(SETTINGS), "batch_size": batch_size})
        found = by_grid(model, dataset, settings)
        for row, other in zip(found.attacks, expected.attacks, strict=True):
            assert torch.equal(row.correct, other.correct)
            assert row.num_backwards == other.num_backwards

    def test_start_noise_belongs_to_the_image_and_the_seed(self):
        """Attacks that hardly leave their random start, so that only the start decides."""
        model = Linear()
        dataset = labeled_by(model, 150, wrong=0)
        settings = {"epsilon": 0.3, "step_size": 1e-4, "multi_start_steps": 1, "num_restarts": 1}
        correct = {
            (batch_size, seed): by_grid(
                model,
                dataset,
                EvaluationConfig((), num_steps=(), batch_size=batch_size, **settings),
                seed=seed,
            )
            .attacks[1]
            .correct
            for batch_size, seed in ((150, 0), (13, 0), (150, 1))
        }
        assert torch.equal(correct[150, 0], correct[13, 0])
        assert not torch.equal(correct[150, 0], correct[150, 1])

    def test_first_images_only(self, judged):
        model, dataset, whole = judged
        settings = EvaluationConfig(**{**vars(SETTINGS), "num_images": 20})
        part = by_grid(model, dataset, settings, seed=3)
        assert part.to_json()["data"]["num_images"] == 20
        for row, other in zip(part.attacks, whole.attacks, strict=True):
            assert torch.equal(row.correct, other.correct[:20])
        settings = EvaluationConfig(**{**vars(SETTINGS), "num_images": 1000})
        assert by_grid(model, dataset, settings).to_json()["data"]["num_images"] == 60

    def test_adaptive_row_says_that_it_is_plain_pgd(self, judged):
        model, dataset, result = judged
        assert result.attacks[-1].same_as.startswith("PGD-7, as EoT of 1")
        assert all(row.same_as is None for row in result.attacks[:-1])
        settings = EvaluationConfig(**{**vars(SETTINGS), "adaptive_steps": 5})
        same = by_grid(model, dataset, settings)
        assert torch.equal(same.attacks[-1].correct, same.attacks[5].correct)

    def test_costs_count_shared_work_once(self, judged):
        """One gradient for all radii, one run of 7 steps for 2, 5 and 7, two runs of 4."""
        _, _, result = judged
        backwards = [row.num_backwards // 60 for row in result.attacks]
        assert backwards == [0, 1, 0, 0, 2, 3, 8, 2]
        forwards = [row.num_forwards // 60 for row in result.attacks]
        assert forwards == [n + 1 for n in backwards]  # and the verdict
        assert all(row.seconds >= 0 for row in result.attacks)

    def test_any_callable(self, judged):
        model, dataset, result = judged
        found = by_grid(lambda images: model.eval()(images), dataset, SETTINGS, seed=3)
        assert [row.accuracy for row in found.attacks] == [row.accuracy for row in result.attacks]

    def test_the_whole_pixel_range_leaves_nothing(self):
        """Two classes, so that all white or black pixels suffice to flip any image."""
        model = Linear(num_classes=2)
        dataset = labeled_by(model, 50, wrong=0)
        settings = EvaluationConfig((1.0,), 1.0, 0.25, (10,), 10, 2, 0)
        result = by_grid(model, dataset, settings)
        assert result.clean_accuracy == 1.0
        assert [row.accuracy for row in result.attacks[1:]] == [0.0, 0.0, 0.0]

    def test_bf16_around_it_does_not_reach_it(self, judged):
        model, dataset, result = judged
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = by_grid(model, dataset, SETTINGS, seed=3)
        for row, other in zip(found.attacks, result.attacks, strict=True):
            assert torch.equal(row.correct, other.correct)

    def test_tf32_is_off_inside_and_as_before_outside(self, judged):
        model, dataset, _ = judged
        seen = []

        def watched(images):
            conv = torch.backends.cudnn.allow_tf32
            seen.append((conv, torch.get_float32_matmul_precision()))
            return model(images)

        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        by_grid(watched, dataset, SETTINGS)
        assert set(seen) == {(False, "highest")}
        after = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        assert after == before

    def test_clean_and_robust_accuracy(self, judged):
        model, dataset, result = judged
        before = everything(model)
        for batch_size in (60, 25):
            clean, robust = clean_and_robust_accuracy(
                model,
                dataset,
                epsilon=0.1,
                step_size=0.02,
                num_steps=5,
                batch_size=batch_size,
                device=CPU,
                space=lambda model: attack_space(model, "pixels", "unit", (), ()),
            )
            assert (clean, robust) == (result.attacks[0].accuracy, result.attacks[5].accuracy)
        assert everything(model) == before


class TestBrokenModels:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("label", ["zeros", "any"])
    def test_not_finite_is_broken(self, value, label):
        """The argmax of NaN is class 0; a table that believes it shows 100 % on such labels."""
        labels = torch.zeros(20, dtype=torch.int64) if label == "zeros" else None
        dataset = make_dataset(20, labels=labels)
        result = by_grid(Mapped(Linear(), lambda logits: logits + value), dataset, SETTINGS)
        for row in result.attacks:
            assert row.accuracy == 0.0
            assert row.num_non_finite == 20
        assert result.robust_accuracy == 0.0
        found = {f.name: f for f in result.findings}
        assert found["non_finite"].severity == "invalid"
        assert "20 clean images" in found["non_finite"].message

    def test_one_class_that_is_infinite(self):
        def first_class_wins(logits):
            return logits + torch.tensor([torch.inf, 0, 0, 0, 0])

        dataset = make_dataset(20, labels=torch.zeros(20, dtype=torch.int64))
        assert by_grid(Mapped(Linear(), first_class_wins), dataset, SETTINGS).clean_accuracy == 0

    def test_nan_under_attack_alone(self):
        """Sound on 8-bit pixels, NaN on all others: clean accuracy stands, robustness does not."""

        class Brittle(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = Linear()

            def forward(self, images):
                scaled = images.detach() * 255
                off_grid = ((scaled - scaled.round()).abs() > 1e-3).flatten(1).any(dim=1)
                return torch.where(off_grid[:, None], torch.nan, self.network(images))

        model = Brittle()
        dataset = labeled_by(model, 20, wrong=0)
        result = by_grid(model, dataset, SETTINGS)
        assert result.clean_accuracy == 1.0
        assert result.robust_accuracy == 0.0
        names = [f.name for f in result.findings]
        assert "non_finite" not in names
        assert "non_finite_attacked" in names

    def test_nan_mixture_is_written_as_json(self, tmp_path):
        """A gate of NaN trusts nobody; a NaN expert is never right, whatever the label."""
        gate = MlpGate(SHAPE, 2)
        mixture = Mixture([Linear(), Mapped(Linear(), lambda z: z * torch.nan)], gate)
        dataset = make_dataset(20, labels=torch.zeros(20, dtype=torch.int64))
        result = by_grid(mixture, dataset, SETTINGS)
        assert result.experts.accuracy["clean"][1] == 0.0
        with torch.no_grad():
            gate.layers[3].bias.fill_(torch.nan)
        result = by_grid(mixture, dataset, SETTINGS)
        result.write(tmp_path / "paper.json")
        gate_table = json.loads((tmp_path / "paper.json").read_text())["gate"]
        assert gate_table["mean_weights"]["clean"] == [[0.0, 0.0]] * NUM_CLASSES
        assert gate_table["entropy"]["clean"] == 0.0

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda logits: (logits, logits), "found tuple"),
            (lambda logits: logits[:, 0], r"expected logits \[20, K\], found \[20\]"),
            (lambda logits: logits[:1], r"found \[1, 5\]"),
            (lambda logits: logits.softmax(dim=1), "probabilities"),
            (lambda logits: logits.argmax(dim=1, keepdim=True), "expected float logits"),
        ],
    )
    def test_what_is_not_logits_is_refused_before_any_attack(self, function, message):
        with pytest.raises(ModelOutputError, match=message):
            by_grid(Mapped(Linear(), function), make_dataset(20), SETTINGS)

    def test_labels_that_the_model_does_not_know(self):
        dataset = make_dataset(20, num_classes=9)
        with pytest.raises(LabelError, match="expected 0 to 4"):
            by_grid(Linear(), dataset, SETTINGS)

    def test_probabilities_by_consent(self):
        model = Mapped(Linear(), lambda logits: logits.softmax(dim=1))
        result = by_grid(model, labeled_by(model, 20, 0), SETTINGS, allow_probabilities=True)
        assert result.clean_accuracy == 1.0

    def test_impossible_settings(self):
        with pytest.raises(ConfigError, match=r"protocol: 'pixel' is unknown.*'pixels'"):
            by_grid(Linear(), make_dataset(4), SETTINGS, protocol="pixel")
        with pytest.raises(ConfigError, match="clamp: 'pixels' is unknown"):
            by_grid(Linear(), make_dataset(4), SETTINGS, clamp="pixels")


class TestFindings:
    def test_none_but_notes(self, judged):
        _, _, result = judged
        assert [f.name for f in result.findings] == ["small_sample", "only_a_grid"]
        assert {f.severity for f in result.findings} == {"unproven"}
        assert "60 images" in result.findings[0].message

    def test_a_thousand_images_are_enough(self):
        settings = EvaluationConfig((), 0.1, 0.1, (1,), 0, 1, 0)
        found = by_grid(Linear(), make_dataset(1000, num_classes=5), settings).findings
        assert [f.name for f in found] == ["only_a_grid"]

    def test_zero_gradient(self):
        class Killer(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = Linear()

            def forward(self, images):
                quantized = (images * 4).round() / 4  # a derivative of zero, everywhere
                return self.network(quantized)

        model = Killer()
        result = by_grid(model, labeled_by(model, 20, 0), SETTINGS)
        assert result.robust_accuracy > 0.2  # and this is not to be believed
        finding = result.findings[0]
        assert (finding.name, finding.severity) == ("zero_gradient", "invalid")
        assert "at 20 of 20 images" in finding.message

    def test_no_gradient_at_all(self):
        model = torch.no_grad()(Linear())
        with pytest.warns(UserWarning, match="does not depend on its input"):
            result = by_grid(model, make_dataset(20), SETTINGS)
        assert result.findings[0].name == "zero_gradient"

    @pytest.mark.parametrize("excess", [1e-4, -0.2])
    def test_budget(self, monkeypatch, excess):
        """An attack that leaves its ball, or [0, 1], is found by the table itself."""

        ascend = paper.ascend

        def too_far(setup, how):
            if how.num_steps > 1:
                return ascend(setup, how)
            found = setup.images.clone()
            found[:, :, 0, 0] = found[:, :, 0, 0] + setup.epsilon + excess if excess > 0 else -0.01
            return found

        monkeypatch.setattr(paper, "ascend", too_far)
        result = by_grid(Linear(), make_dataset(20), SETTINGS)
        finding = result.findings[0]
        assert (finding.name, finding.severity) == ("budget", "invalid")
        assert f"{20 * 3 * 3} attacked pixels" in finding.message

    def test_random_model(self):
        model = Noisy(Linear(), std=0.1)
        result = by_grid(model, make_dataset(20), SETTINGS)
        finding = result.findings[0]
        assert (finding.name, finding.severity) == ("random", "invalid")
        declared = EvaluationConfig(**{**vars(SETTINGS), "eot_samples": 2})
        finding = by_grid(model, make_dataset(20), declared).findings[0]
        assert (finding.name, finding.severity) == ("random", "suspect")


class TestRandomModels:
    def test_eot_is_a_row_of_its_own(self):
        model = Noisy(Linear(), std=2.0)
        dataset = labeled_by(Linear(), 40, wrong=0)
        settings = EvaluationConfig(**{**vars(SETTINGS), "eot_samples": 6})
        result = by_grid(model, dataset, settings)
        row = result.attacks[-1]
        assert (row.kind, row.eot_samples, row.same_as) == ("adaptive", 6, None)
        assert row.num_backwards == 7 * 6 * 40

    def test_repeats(self):
        model = Noisy(Linear())
        dataset = make_dataset(30)
        torch.manual_seed(1)
        first = by_grid(model, dataset, SETTINGS, seed=4)
        torch.manual_seed(2)
        second = by_grid(model, dataset, SETTINGS, seed=4)
        for row, other in zip(first.attacks, second.attacks, strict=True):
            assert torch.equal(row.correct, other.correct)


class TestMixtureTables:
    @pytest.fixture(scope="class")
    @staticmethod
    def mixture():
        gate = MlpGate(SHAPE, 3, hidden=8)
        nn.init.normal_(gate.layers[3].weight)
        names = ["benign", "fgsm-0", "pgd-0"]
        return Mixture([sharp(SmallNet(seed=e)) for e in range(3)], gate, expert_names=names)

    def test_by_hand(self, mixture):
        dataset = labeled_by(mixture, 40)
        images, labels = dataset.images.float() / 255, dataset.labels
        settings = EvaluationConfig(**{**vars(SETTINGS), "batch_size": 40})
        result = by_grid(mixture, dataset, settings)
        assert result.gate.attacks == ["clean", "FGSM 0.05", "PGD-5"]  # 0.05: next to 0.1
        assert result.gate.experts == result.experts.names == mixture.expert_names
        mixture.eval()
        watched = {
            "clean": images,
            "FGSM 0.05": fgsm(mixture, images, labels, epsilon=0.05),
            "PGD-5": pgd(
                mixture,
                images,
                labels,
                epsilon=0.1,
                step_size=0.02,
                num_steps=5,
                random_start=False,
            ),
        }
        for name, attacked in watched.items():
            with torch.no_grad():
                output = mixture(attacked, return_aux=True)
            weights = output.gate_weights.double()
            for k in range(NUM_CLASSES):
                of_class = weights[labels == k]
                expected = of_class.mean(dim=0) if len(of_class) else torch.zeros(3)
                found = torch.tensor(result.gate.mean_weights[name][k])
                torch.testing.assert_close(found, expected, check_dtype=False)
            entropy = -(weights * weights.log()).sum(dim=1).mean()
            assert result.gate.entropy[name] == pytest.approx(float(entropy))
            expected = (output.expert_logits.argmax(dim=2) == labels).double().mean(dim=1)
            assert result.experts.accuracy[name] == pytest.approx(expected.tolist())

    @pytest.mark.slow
    def test_batches_add_up(self, mixture):
        dataset = labeled_by(mixture, 40)
        whole = by_grid(mixture, dataset, SETTINGS)
        settings = EvaluationConfig(**{**vars(SETTINGS), "batch_size": 9})
        parts = by_grid(mixture, dataset, settings)
        assert parts.gate.entropy == pytest.approx(whole.gate.entropy, abs=1e-3)
        assert parts.experts.accuracy["clean"] == whole.experts.accuracy["clean"]

    def test_other_models_have_none(self, judged):
        _, _, result = judged
        assert result.gate is None
        assert result.experts is None


class TestNothingChanges:
    def test_after_success(self):
        model = disordered(SmallNet())
        before = everything(model)
        by_grid(model, make_dataset(20), SETTINGS)
        assert everything(model) == before

    @pytest.mark.parametrize("call", [1, 2, 3, 4, 9, 15])
    def test_after_an_exception(self, call):
        model = disordered(FailsAt(SmallNet(), call))
        before = everything(model)
        with pytest.raises(Injected):
            by_grid(model, make_dataset(20), SETTINGS)
        assert everything(model) == before

    def test_progress_is_told(self):
        lines = []
        settings = EvaluationConfig(**{**vars(SETTINGS), "batch_size": 8})
        by_grid(Linear(), make_dataset(20), settings, progress=lines.append)
        assert [line.split(",")[0] for line in lines] == [
            "evaluated 8/20 images",
            "evaluated 16/20 images",
            "evaluated 20/20 images",
        ]


class TestFiles:
    ROW = (
        "name kind epsilon step_size num_steps num_restarts random_start eot_samples num_images "
        "num_correct accuracy interval num_non_finite seconds num_forwards num_backwards same_as "
        "norm stream given_up num_attacked broken_by"
    )
    TABLE = (
        "schema suite protocol data seed bn_mode precision epsilon attacks worst_case "
        "worst_case_all findings gate experts seconds"
    )

    def test_json(self, judged, tmp_path):
        _, dataset, result = judged
        result.write(tmp_path / "evaluations" / "paper.json")
        table = json.loads((tmp_path / "evaluations" / "paper.json").read_text())
        assert set(table.pop("sha256")) == {"arrays", "table"}
        assert table == json.loads(json.dumps(result.to_json()))
        assert set(self.TABLE.split()) <= set(table)
        assert (table["schema"], table["suite"], table["protocol"]) == (1, "paper", "pixels")
        assert (table["bn_mode"], table["precision"], table["seed"]) == ("eval", "float32", 3)
        assert table["epsilon"] == 0.1
        data = table["data"]
        assert (data["name"], data["split"], data["num_images"]) == ("random", "test", 60)
        assert data["digest"] == dataset.digest
        for row, attack in zip(result.attacks, table["attacks"], strict=True):
            assert set(attack) == set(self.ROW.split())
            assert attack["num_images"] == 60
            assert attack["num_correct"] == int(row.correct.sum())
            assert attack["accuracy"] == attack["num_correct"] / 60
            low, high = attack["interval"]
            assert 0 <= low < attack["accuracy"] + 1e-12
            assert attack["accuracy"] - 1e-12 < high <= 1
        for name in ("worst_case", "worst_case_all"):
            keys = {"epsilon", "num_correct", "accuracy", "interval", "num_images", "attacks"}
            assert set(table[name]) == keys
        assert not list(tmp_path.rglob("*.tmp*"))

    def test_arrays(self, judged, tmp_path):
        model, dataset, result = judged
        result.write(tmp_path / "paper.json")
        with np.load(tmp_path / "paper.npz", allow_pickle=False) as file:
            arrays = dict(file)
        expected = np.stack([row.correct.numpy() for row in result.attacks])
        assert arrays["correct"].dtype == bool
        assert np.array_equal(arrays["correct"], expected)
        assert arrays["sample_index"].tolist() == list(range(60))
        assert arrays["example_clean"].shape == arrays["example_adversarial"].shape == (8, *SHAPE)
        assert arrays["example_clean"].dtype == arrays["example_adversarial"].dtype == np.float32
        images = dataset.images[:8].float() / 255
        assert np.array_equal(arrays["example_clean"], images.numpy())
        difference = np.abs(arrays["example_adversarial"] - arrays["example_clean"])
        assert 0.05 < difference.max() <= 0.1 + 1e-6
        assert arrays["example_labels"].tolist() == dataset.labels[:8].tolist()
        assert str(arrays["example_attack"]) == "PGD-5"
        for name in ("clean", "adversarial"):
            logits = model.eval()(torch.from_numpy(arrays[f"example_{name}"]))
            predictions = arrays[f"example_predictions_{name}"].tolist()
            assert predictions == logits.argmax(dim=1).tolist()

    def test_text(self, judged):
        _, _, result = judged
        text = str(result)
        assert text == format_table(result)
        assert "n = 60, protocol pixels, BatchNorm eval, float32, seed 3" in text
        clean = next(line for line in text.splitlines() if line.startswith("clean"))
        assert clean.split() == ["clean", "90.00", "%", "79.85", "to", "95.34"]
        for row in result.attacks:
            assert f"{100 * row.accuracy:.2f} %" in text
        assert "worst case per image" in text
        assert "unproven: 60 images, too few" in text


class TestIntervals:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ],
    )
    def test_published_values(self, successes, trials, low, high):
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)

    def test_half_widths(self):
        """Half of 10,000, 1,000 and 500 images: +-1.0, 3.1 and 4.4 points."""
        for trials, points in ((10_000, 1.0), (1000, 3.1), (500, 4.4)):
            low, high = wilson_interval(trials // 2, trials)
            assert 50 * (high - low) == pytest.approx(points, abs=0.05)

    def test_ends(self):
        assert wilson_interval(0, 0) == (0.0, 1.0)
        for trials in (1, 5, 100):
            assert wilson_interval(0, trials)[0] == pytest.approx(0, abs=1e-12)
            assert wilson_interval(trials, trials)[1] == pytest.approx(1, abs=1e-12)
            assert wilson_interval(trials, trials)[0] > 0.2
