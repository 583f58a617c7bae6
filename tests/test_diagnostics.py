"""Experts and gate under attack: worked by hand, and against slow loops over single images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import (
    NUM_CLASSES,
    SHAPE,
    Linear,
    Noisy,
    SmallNet,
    disordered,
    everything,
    make_dataset,
)
from torch import nn

from dwf.attacks import input_gradient, pgd
from dwf.attacks.space import attack_space
from dwf.checks import ConfigError, ModelOutputError
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset
from dwf.evaluation import evaluate, format_table
from dwf.evaluation.cost import Cost, inference_cost
from dwf.evaluation.diagnostics import (
    diagnose,
    gate_load,
    pairwise_cosine,
    routing_flips,
)
from dwf.evaluation.mixture_record import Diagnostics
from dwf.evaluation.table import format_diagnostics, mean_cosine
from dwf.models import ExpertModel, Mixture, MlpGate
from dwf.typed_json import Place, from_json, to_json

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = EvaluationConfig(
    fgsm_epsilon=(0.1,),
    epsilon=0.2,
    step_size=0.1,
    num_steps=(3,),
    multi_start_steps=0,
    adaptive_steps=0,
    diagnostic_steps=3,
)


def by_grid(*args, **options):
    """The paper's grid."""
    return evaluate(*args, suite="paper", **options)


def table_of(*args, **options):
    """What `diagnose` stores, as JSON."""
    return to_json(diagnose(*args, **options)[0])


def from_table(table):
    """The record that JSON stands for."""
    return from_json(Diagnostics, table, Place(Path("paper.json")))


class Pixels(nn.Module):
    """Two classes: the second if ``sum_i weight_i (x_i - 0.5)`` is positive."""

    def __init__(self, *weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        score = ((images.flatten(1) - 0.5) * self.weight).sum(dim=1)
        return torch.stack([-score, score], dim=1)


class Routed(ExpertModel):
    """Experts with a gate of any kind; hard routing runs the chosen expert alone."""

    def __init__(self, experts, gate, *, hard=False):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.hard = hard
        self.expert_names = [f"e{e}" for e in range(len(experts))]

    def expert(self, index):
        return nn.Sequential(self.experts[index])

    def gate_weights(self, images):
        weights = self.gate(images).softmax(dim=1)
        if not self.hard:
            return weights
        return nn.functional.one_hot(weights.argmax(dim=1), self.num_experts).float()

    def forward(self, images):
        weights = self.gate_weights(images)
        if not self.hard:
            outputs = torch.stack([expert(images) for expert in self.experts])
            return torch.einsum("be,ebk->bk", weights, outputs)
        chosen = weights.argmax(dim=1)
        parts, rows = [], []
        for e, expert in enumerate(self.experts):
            rows.append((chosen == e).nonzero().flatten())
            if len(rows[-1]):
                parts.append(expert(images[rows[-1]]))
        return torch.cat(parts)[torch.cat(rows).argsort()]


class Constant(nn.Module):
    """A gate that always says the same: the logarithms of these weights."""

    def __init__(self, *weights):
        super().__init__()
        self.register_buffer("logits", torch.tensor(weights).log())

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def pixel_data(*images, label=1):
    """Images [1, 1, W] of these values, all of one class."""
    values = (torch.tensor(images) * 255).round().to(torch.uint8)
    return ImageDataset(
        name="pixels",
        images=values[:, None, None, :],
        labels=torch.full((len(images),), label),
        num_classes=2,
        class_names=("low", "high"),
        mean=(0.5,),
        std=(0.25,),
        digest="none",
        split="test",
    )


def random_mixture(hard=False, noisy=False, num_experts=3):
    """Linear experts, which compute an image to equal bits in every batch."""
    wrap = (lambda x: Noisy(x, 0.3)) if noisy else (lambda x: x)
    experts = [wrap(Linear(seed=e)) for e in range(num_experts)]
    gate = wrap(Linear(num_classes=num_experts, seed=99))
    return Routed(experts, gate, hard=hard)


class TestByHand:
    """Expert 0 looks at pixel 0, expert 1 at pixel 1; the gate trusts them 3 : 1.

    All images are of class 1. An attack of 0.2 on a pixel breaks 0.6 and leaves 0.75 and 0.8.
    """

    DATA = pixel_data((0.6, 0.6), (0.6, 0.75), (0.8, 0.6), (0.8, 0.75))

    @pytest.fixture(scope="class")
    @staticmethod
    def found():
        model = Routed([Pixels(4.0, 0.0), Pixels(0.0, 4.0)], Constant(0.75, 0.25))
        record, arrays = diagnose(model, TestByHand.DATA, SETTINGS)
        return to_json(record), arrays

    def test_accuracy(self, found):
        table, _ = found
        assert table["names"] == ["e0", "e1", "mixture"]
        assert table["num_images"] == 4
        assert table["transfer"] == [
            [0.5, 1.0, 0.5],  # crafted on expert 0: pixel 1 does not move
            [1.0, 0.5, 1.0],  # a quarter of the weight decides nothing
            [0.5, 0.5, 0.5],
        ]
        assert table["accuracy"] == {
            "clean": [1.0, 1.0, 1.0],
            "mixture_attacked": [0.5, 0.5, 0.5],
            "self_attacked": [0.5, 0.5, 0.5],
        }
        assert table["worst_case"] == 0.5

    def test_outcomes(self, found):
        _, arrays = found
        correct = arrays["diagnostic_correct"]
        assert correct.shape == (4, 3, 4)
        assert correct.dtype == bool
        assert correct[0].all()
        assert correct[1].tolist() == [
            [False, False, True, True],
            [True, True, True, True],
            [False, False, True, True],
        ]
        assert correct[2, 1].tolist() == [False, True, False, True]
        assert arrays["diagnostic_sample_index"].tolist() == [0, 1, 2, 3]

    def test_gate(self, found):
        table, _ = found
        entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
        for when in ("clean", "attacked"):
            gate = table["gate"][when]
            assert gate["entropy"] == pytest.approx(entropy, abs=1e-6)
            assert gate["mean_weight"] == pytest.approx([0.75, 0.25], abs=1e-6)
            assert gate["top_share"] == [1.0, 0.0]
            assert gate["dead"] == []
        assert table["routing_flips"] == {"attacked": 0.0, "again": 0.0}

    def test_budget_is_recorded(self, found):
        table, _ = found
        keys = ("epsilon", "step_size", "num_steps", "eot_samples", "protocol", "clamp", "seed")
        assert [table[key] for key in keys] == [0.2, 0.1, 3, 1, "pixels", "pixels", 0]

    def test_an_attack_on_an_expert_reroutes(self):
        """A hard gate hides pixel 0 from the attack through the mixture, not from expert 0's.

        Expert 1 decides while pixel 0 is above 0.55; lowering pixel 0 hands over to expert 0, whom
        that breaks.
        """
        gate = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        gate[1].weight = nn.Parameter(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
        gate[1].bias = nn.Parameter(torch.tensor([0.0, -5.5]))
        model = Routed([Pixels(4.0, 0.0), Pixels(0.0, 4.0)], gate, hard=True)
        found = table_of(model, pixel_data((0.6, 0.9), (0.9, 0.9)), SETTINGS)
        assert found["transfer"] == [[0.5, 1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        assert found["accuracy"]["self_attacked"] == [0.5, 1.0, 1.0]
        assert found["worst_case"] == 0.5
        assert found["routing_flips"]["attacked"] == 0.0

    def test_flips(self):
        """The attack takes 0.2 from pixel 0; the gate changes its mind below 0.5."""
        gate = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        gate[1].weight = nn.Parameter(torch.tensor([[10.0], [0.0]]))
        gate[1].bias = nn.Parameter(torch.tensor([-5.0, 0.0]))
        model = Routed([Pixels(4.0), Pixels(4.0)], gate)
        values = (0.6, 0.65, 0.8, 0.9, 0.4)
        found = table_of(model, pixel_data(*[(v,) for v in values]), SETTINGS)
        assert found["routing_flips"] == {"attacked": 0.4, "again": 0.0}
        rounded = [round(v * 255) / 255 for v in values]
        weight = [1 / (1 + math.exp(-10 * (v - 0.5))) for v in rounded]
        moved = [1 / (1 + math.exp(-10 * (v - 0.2 - 0.5))) for v in rounded]
        for when, weights in (("clean", weight), ("attacked", moved)):
            mean = sum(weights) / 5
            assert found["gate"][when]["mean_weight"] == pytest.approx([mean, 1 - mean], abs=1e-5)
            entropy = [-w * math.log(w) - (1 - w) * math.log(1 - w) for w in weights]
            assert found["gate"][when]["entropy"] == pytest.approx(sum(entropy) / 5, abs=1e-5)
        assert found["gate"]["clean"]["top_share"] == [0.8, 0.2]
        assert found["gate"]["attacked"]["top_share"] == pytest.approx([0.4, 0.6])

    def test_cosines(self):
        """Gradients along (1, 0), (0, 1), (1, 1) and (-1, 0), whatever their lengths."""
        experts = [Pixels(4.0, 0.0), Pixels(0.0, 1.0), Pixels(2.0, 2.0), Pixels(-3.0, 0.0)]
        model = Routed(experts, Constant(0.25, 0.25, 0.25, 0.25))
        half = math.sqrt(0.5)
        found = table_of(model, TestByHand.DATA, SETTINGS)["gradient_cosine"]
        expected = [
            [1.0, 0.0, half, -1.0],
            [0.0, 1.0, half, 0.0],
            [half, half, 1.0, -half],
            [-1.0, 0.0, -half, 1.0],
        ]
        for row, other in zip(found, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-6)
        assert mean_cosine(found) == pytest.approx((half - 1 + half - half) / 6, abs=1e-6)

    def test_experts_without_gradient_have_no_cosine(self):
        model = Routed([Pixels(4.0, 0.0), Pixels(0.0, 0.0)], Constant(0.5, 0.5))
        table = table_of(model, TestByHand.DATA, SETTINGS)
        assert table["gradient_cosine"][0] == [pytest.approx(1.0), None]
        assert table["gradient_cosine"][1] == [None, None]
        assert mean_cosine(table["gradient_cosine"]) is None
        assert "cosine" not in format_diagnostics(from_table(table))

    def test_a_broken_expert_is_never_right(self):
        model = Routed([Pixels(4.0, 0.0), Pixels(math.nan, 0.0)], Constant(1.0, 1e-9))
        table = table_of(model, TestByHand.DATA, SETTINGS)
        assert table["accuracy"]["clean"] == [1.0, 0.0, 0.0]
        json.dumps(table, allow_nan=False)


class TestGate:
    def test_load_by_hand(self):
        weights = torch.tensor([[0.7, 0.295, 0.005], [0.2, 0.795, 0.005], [0.6, 0.394, 0.006]])
        found = gate_load(weights, ["a", "b", "c"])
        assert found.mean_weight == pytest.approx([0.5, 1.484 / 3, 0.016 / 3], abs=1e-6)
        assert found.top_share == pytest.approx([2 / 3, 1 / 3, 0])
        assert found.dead == ["c"]
        expected = -sum(w * math.log(w) for row in weights.tolist() for w in row) / 3
        assert found.entropy == pytest.approx(expected)

    def test_weight_without_preference_is_alive(self):
        weights = torch.tensor([[0.6, 0.4]]).repeat(200, 1)
        assert gate_load(weights, ["a", "b"]).dead == []

    def test_preference_without_weight_is_alive(self):
        """Rare, but what it says decides: preferred for 3 of 200 images, with a weight of 0.006."""
        weights = torch.tensor([[0.6, 0.0, 0.4]]).repeat(200, 1)
        weights[:3] = torch.tensor([0.3, 0.4, 0.3])
        assert gate_load(weights, ["a", "b", "c"]).dead == []
        weights[1:3] = torch.tensor([0.6, 0.0, 0.4])
        assert gate_load(weights, ["a", "b", "c"]).dead == ["b"]

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    def test_a_failed_gate_trusts_nobody(self, broken):
        weights = torch.tensor([[1.0, 0.0], [broken, 0.0]])
        found = gate_load(weights, ["a", "b"])
        assert found.top_share == [0.5, 0.0]
        assert found.mean_weight == [0.5, 0.0]
        assert routing_flips(weights[:1], weights[1:]) == 1.0
        assert routing_flips(weights, weights) == 0.0

    def test_flips_by_hand(self):
        before = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.5, 0.4]])
        after = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.3, 0.7], [0.1, 0.2]])
        assert routing_flips(before, after) == 0.5


class TestCosine:
    def test_slow_loop(self):
        gradients = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
        gradients[1, 2] *= 1e-30  # whose square underflows
        gradients[2, 3] = 0
        found = pairwise_cosine(gradients)
        for b in range(4):
            for i in range(3):
                for j in range(3):
                    u, v = (gradients[e, b].double().flatten() for e in (i, j))
                    expected = float(u @ v / u.norm() / v.norm())
                    if b == 3 and 2 in (i, j):
                        assert math.isnan(expected)
                        assert math.isnan(float(found[b, i, j]))
                    else:
                        assert float(found[b, i, j]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("protocol", ["pixels", "paper-compat"])
def test_slow_loop(hard, protocol):
    """One image, one expert, one judge at a time."""
    model = random_mixture(hard).eval()
    dataset = make_dataset(12)
    settings = EvaluationConfig(
        epsilon=0.06, step_size=0.02, diagnostic_steps=4, diagnostic_images=12, batch_size=5
    )
    record, arrays = diagnose(model, dataset, settings, protocol=protocol)
    models = [*(model.expert(e) for e in range(3)), model]
    images, labels = dataset.images.float() / 255, dataset.labels
    budget = {"epsilon": 0.06, "step_size": 0.02, "num_steps": 4, "random_start": False}
    transfer = np.zeros((4, 4))
    cosines = torch.zeros(3, 3, dtype=torch.float64)
    flips = 0
    for n in range(12):
        image, label = images[n : n + 1], labels[n : n + 1]
        gradients = []
        for i, source in enumerate(models):
            space = attack_space(source, protocol, "unit", dataset.mean, dataset.std)
            crafted = space.leave(pgd(space, space.enter(image), label, **budget))
            for j, judged in enumerate(models):
                with torch.no_grad():
                    transfer[i, j] += int(judged(crafted).argmax() == label) / 12
            gradient = input_gradient(space, space.enter(image), label)
            gradients.append(gradient.double().flatten())
        with torch.no_grad():
            before, after = model.gate_weights(image), model.gate_weights(crafted)
        flips += int(before.argmax() != after.argmax())
        for i in range(3):
            for j in range(3):
                u, v = gradients[i], gradients[j]
                cosines[i, j] += u @ v / (u.norm() * v.norm()) / 12
    assert np.array(record.transfer) == pytest.approx(transfer)
    assert 0 < transfer[:3, :3].diagonal().mean() < 1 or transfer[3].min() < transfer[3].max()
    assert torch.tensor(record.gradient_cosine) == pytest.approx(cosines, abs=1e-5)
    assert to_json(record.routing_flips) == {
        "attacked": pytest.approx(flips / 12),
        "again": 0.0,
    }
    with torch.no_grad():
        clean = [float((x(images).argmax(dim=1) == labels).float().mean()) for x in models]
    assert record.accuracy.clean == pytest.approx(clean)
    assert record.gate_draws == 1
    weights = arrays["diagnostic_gate_weights"][0, 0]
    assert np.allclose(weights, model.gate_weights(images).detach(), atol=1e-6)


class TestRandomModels:
    def test_repeats_and_says_that_it_is_random(self):
        model = random_mixture(noisy=True)
        found = []
        for start in (1, 2):
            torch.manual_seed(start)
            table = table_of(model, make_dataset(40), SETTINGS, seed=5)
            found.append({k: v for k, v in table.items() if k != "seconds"})
        assert found[0] == found[1]
        assert found[0]["routing_flips"]["again"] > 0
        assert found[0]["gate_draws"] == 20
        assert " % without one)" in format_diagnostics(from_table(found[0]))
        other = table_of(model, make_dataset(40), SETTINGS, seed=6)
        assert other["gate"] != found[0]["gate"]

    def test_a_gate_that_draws_once_for_a_batch(self):
        """Its load is a mean over draws: one draw gives everything to one expert."""

        class Coin(Routed):
            def gate_weights(self, images):
                weights = torch.zeros(len(images), 2)
                weights[:, int(torch.rand(()) < 0.5)] = 1.0
                return weights

        model = Coin([Pixels(4.0, 0.0), Pixels(0.0, 4.0)], nn.Identity())
        record, arrays = diagnose(model, TestByHand.DATA, SETTINGS, seed=1)
        table = to_json(record)
        draws = arrays["diagnostic_gate_weights"]  # [2, 20, N, E]
        assert draws.shape == (2, 20, 4, 2)
        for when, weights in zip(("clean", "attacked"), draws, strict=True):
            gate = table["gate"][when]
            heads = float(weights[:, 0, 1].mean())
            assert 0.2 < heads < 0.8
            assert gate["mean_weight"] == gate["top_share"] == pytest.approx([1 - heads, heads])
            assert (gate["entropy"], gate["dead"]) == (0.0, [])
        chosen = draws[:, :, 0].argmax(axis=2)  # [2, 20]
        expected = {
            "attacked": pytest.approx((chosen[0] != chosen[1]).mean()),
            "again": pytest.approx((chosen[0] != np.roll(chosen[0], 1)).mean()),
        }
        assert table["routing_flips"] == expected


class TestNothingChanges:
    @pytest.mark.parametrize("hard", [False, True])
    def test_state(self, hard):
        gate = MlpGate(SHAPE, 2, hidden=4)
        model = disordered(Routed([SmallNet(seed=0), SmallNet(seed=1)], gate, hard=hard))
        before = everything(model)
        diagnose(model, make_dataset(10), SETTINGS)
        inference_cost(model, torch.ones(3, *SHAPE))
        assert everything(model) == before

    def test_images_are_spread_over_the_data_set(self):
        settings = EvaluationConfig(**{**vars(SETTINGS), "diagnostic_images": 4})
        _, arrays = diagnose(random_mixture(), make_dataset(10), settings)
        assert arrays["diagnostic_sample_index"].tolist() == [0, 2, 5, 7]

    def test_batches_change_nothing(self):
        settings = EvaluationConfig(**{**vars(SETTINGS), "batch_size": 3})
        whole, parts = (
            table_of(random_mixture(), make_dataset(10), s) for s in (SETTINGS, settings)
        )
        for key in ("accuracy", "transfer", "worst_case", "routing_flips"):
            assert whole[key] == parts[key]


class TestInEvaluations:
    @pytest.fixture(scope="class")
    @staticmethod
    def result():
        return by_grid(random_mixture(), make_dataset(20), SETTINGS, seed=3)

    def test_json_and_arrays(self, result, tmp_path):
        result.write(tmp_path / "paper.json")
        table = json.loads((tmp_path / "paper.json").read_text())
        assert table["diagnostics"] == json.loads(json.dumps(to_json(result.diagnostics)))
        assert table["diagnostics"]["seed"] == 3
        with np.load(tmp_path / "paper.npz", allow_pickle=False) as arrays:
            assert arrays["diagnostic_correct"].shape == (5, 4, 20)
            assert arrays["diagnostic_gate_weights"].shape == (2, 1, 20, 3)

    def test_the_mixtures_row_agrees_with_the_table(self, result):
        """PGD-3 of the evaluation is the attack through the mixture of the diagnostics."""
        accuracy = result.diagnostics.accuracy
        assert accuracy.clean[-1] == pytest.approx(result.attacks[0].accuracy)
        assert accuracy.mixture_attacked[-1] == pytest.approx(result.attacks[-1].accuracy)

    def test_every_expert_model_has_gate_and_expert_tables(self, result):
        model = random_mixture().eval()
        images, labels = make_dataset(20).images.float() / 255, make_dataset(20).labels
        attacked = pgd(
            model, images, labels, epsilon=0.2, step_size=0.1, num_steps=3, random_start=False
        )
        assert result.gate.experts == ["e0", "e1", "e2"]
        for name, seen in (("clean", images), ("PGD-3", attacked)):
            with torch.no_grad():
                right = [(x(seen).argmax(dim=1) == labels).float().mean() for x in model.experts]
                weights = model.gate_weights(seen).double()
            assert result.experts.accuracy[name] == pytest.approx([float(x) for x in right])
            entropy = float(-(weights * weights.log()).sum(dim=1).mean())
            assert result.gate.entropy[name] == pytest.approx(entropy, abs=1e-5)

    def test_printed(self, result):
        text = format_table(result)
        assert text.endswith(format_diagnostics(result.diagnostics))
        table = to_json(result.diagnostics)
        (line,) = (x for x in text.splitlines() if x.startswith("e1 "))
        cells = [
            *(table["accuracy"][key][1] for key in ("clean", "mixture_attacked", "self_attacked")),
            table["transfer"][1][3],
            *(table["gate"][when]["mean_weight"][1] for when in ("clean", "attacked")),
            *(table["gate"][when]["top_share"][1] for when in ("clean", "attacked")),
        ]
        assert line.split()[1:9] == [f"{100 * value:.1f}" for value in cells]
        assert "PGD-3, epsilon 0.2, step 0.1" in text
        _, rows = text.split("\nexperts under attack")
        assert max(map(len, rows.splitlines()[:7])) <= 80

    def test_dead_experts_are_named(self):
        model = Routed([Pixels(4.0), Pixels(4.0)], Constant(1.0, 1e-4), hard=True)
        found = table_of(model, pixel_data((0.6,), (0.9,)), SETTINGS)
        assert found["gate"]["clean"]["dead"] == ["e1"]
        assert "dead (clean)  dead (attacked)" in format_diagnostics(from_table(found))

    def test_a_mixture_in_one_pass_or_by_parts(self):
        """A Mixture has a shortcut to what every other model of experts is asked for."""
        gate = MlpGate(SHAPE, 2, hidden=4)
        nn.init.normal_(gate.layers[3].weight)
        experts = [SmallNet(seed=0), SmallNet(seed=1)]
        first = by_grid(Mixture(experts, gate), make_dataset(10), SETTINGS).to_json()
        second = by_grid(Routed(experts, gate), make_dataset(10), SETTINGS).to_json()
        assert first["experts"]["accuracy"]["clean"] == second["experts"]["accuracy"]["clean"]
        expected = first["gate"]["mean_weights"]["clean"]
        assert np.allclose(second["gate"]["mean_weights"]["clean"], expected, atol=1e-5)

    def test_off_and_not_for_single_networks(self):
        settings = EvaluationConfig(**{**vars(SETTINGS), "diagnostic_images": 0})
        result = by_grid(random_mixture(), make_dataset(5), settings)
        assert result.diagnostics is None
        assert result.to_json()["diagnostics"] is None
        assert by_grid(Linear(), make_dataset(5), SETTINGS).diagnostics is None

    def test_progress_is_told(self):
        lines = []
        diagnose(random_mixture(), make_dataset(5), SETTINGS, progress=lines.append)
        assert lines == ["attacking each expert: 0/5 images"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("diagnostic_images", -1), ("diagnostic_images", 0.5), ("diagnostic_steps", 0)],
    )
    def test_settings(self, name, value):
        with pytest.raises(ConfigError, match=f"evaluation.{name}: {value} is not possible"):
            EvaluationConfig(**{name: value})

    def test_no_images_wanted(self):
        with pytest.raises(ConfigError, match="diagnostic_images: 0 images"):
            diagnose(random_mixture(), make_dataset(5), EvaluationConfig(diagnostic_images=0))

    def test_gate_of_another_shape(self):
        model = random_mixture(hard=True)
        model.gate_weights = lambda images: torch.ones(len(images), 7)
        with pytest.raises(ModelOutputError, match=r"expected \[B, E\] = \[5, 3\], found \[5, 7\]"):
            diagnose(model, make_dataset(5), SETTINGS)


class TestCost:
    def test_by_hand(self):
        """A 3x3 convolution of 3 to 4 channels on 8x8 pixels, then 256 to 5 numbers."""
        flop = 2 * (3 * 9 * 4 * 64 + 256 * NUM_CLASSES)
        cost = inference_cost(SmallNet(), torch.rand(7, *SHAPE))
        parameters = (3 * 9 * 4 + 4) + 2 * 4 + (256 * NUM_CLASSES + NUM_CLASSES)
        assert cost == Cost(num_parameters=parameters, flop_per_image=flop)

    def test_routing_pays_for_what_it_runs(self):
        """Of ten images six take an expert of 4 channels and four one of 8."""
        images = torch.zeros(10, *SHAPE)
        images[:6] = 1.0
        gate = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        nn.init.constant_(gate[1].weight, 0.0)
        gate[1].weight.data[0] = 1.0
        gate[1].bias.data = torch.tensor([-0.5, 0.0])
        model = Routed([SmallNet(channels=4), SmallNet(channels=8)], gate, hard=True)
        small, large = (2 * (27 * c * 64 + c * 64 * NUM_CLASSES) for c in (4, 8))
        expected = 2 * 192 * 2 + (6 * small + 4 * large) / 10
        assert inference_cost(model, images).flop_per_image == round(expected)
        model.hard = False
        dense = inference_cost(model, images).flop_per_image
        assert dense > small + large + 2 * 192 * 2 - 1

    def test_a_callable_has_no_parameters(self):
        cost = inference_cost(lambda x: x.flatten(1) @ torch.ones(192, 5), torch.rand(2, *SHAPE))
        assert cost == Cost(num_parameters=None, flop_per_image=2 * 192 * 5)

    def test_in_every_evaluation(self):
        result = by_grid(SmallNet(), make_dataset(5), SETTINGS)
        expected = inference_cost(SmallNet(), torch.rand(2, *SHAPE))
        assert Cost(result.num_parameters, result.flop_per_image) == expected
