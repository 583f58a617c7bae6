"""Judging a model: the table of accuracies under a suite of attacks, and the worst case per image.

An image counts as robust only if the float32 model in eval mode gives finite logits with the right
argmax. NaN or infinite logits are broken, never class 0. Attacks share work where this is exact:
all FGSM radii follow one gradient, and PGD-10 is a prefix of PGD-50.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwf.attacks import fgsm, input_gradient, pgd, pgd_snapshots
from dwf.attacks.source import Model, undisturbed
from dwf.attacks.views import AttackSpace, attack_space
from dwf.checks import check_choice
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, evaluation_batches
from dwf.evaluation.suites import AttackSpec, paper_suite
from dwf.files import atomic_write_json
from dwf.models import Mixture

NUM_EXAMPLES = 8
SMALL_SAMPLE = 1000  # below this a 95 % interval is wider than 3 points
BUDGET_TOLERANCE = 1e-6
Progress = Callable[[str], None]


@dataclass
class Row:
    """One attack's outcome. Costs are what this row added to the rows before it."""

    spec: AttackSpec
    correct: Tensor  # [N] bool
    num_non_finite: int = 0
    seconds: float = 0.0
    num_forwards: int = 0
    num_backwards: int = 0
    same_as: str | None = None

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean()) if len(self.correct) else math.nan


@dataclass
class Evaluation:
    """A table of results. ``print(evaluation)`` shows it, ``write`` stores it."""

    rows: list[Row]
    worst_case: dict[str, Any]
    worst_case_all: dict[str, Any]
    findings: list[dict[str, str]]
    facts: dict[str, Any]
    gate: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    examples: dict[str, Any] = field(default_factory=dict)
    sample_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def clean_accuracy(self) -> float:
        return self.rows[0].accuracy

    @property
    def robust_accuracy(self) -> float:
        """Worst case per image over all attacks within epsilon; the headline."""
        return float(self.worst_case["accuracy"])

    def to_dict(self) -> dict[str, Any]:
        attacks = []
        for row in self.rows:
            num_correct = int(row.correct.sum())
            attacks.append(
                {
                    **asdict(row.spec),
                    "num_images": len(row.correct),
                    "num_correct": num_correct,
                    "accuracy": row.accuracy,
                    "interval": list(wilson_interval(num_correct, len(row.correct))),
                    "num_non_finite": row.num_non_finite,
                    "seconds": round(row.seconds, 3),
                    "num_forwards": row.num_forwards,
                    "num_backwards": row.num_backwards,
                    "same_as": row.same_as,
                }
            )
        return {
            "schema": 1,
            **self.facts,
            "attacks": attacks,
            "worst_case": self.worst_case,
            "worst_case_all": self.worst_case_all,
            "findings": self.findings,
            "gate": self.gate,
            "experts": self.experts,
        }

    def write(self, path: Path) -> None:
        """Write the table as JSON and the outcome of each image beside it as .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "correct": torch.stack([row.correct for row in self.rows]).numpy(),
            "sample_index": self.sample_index.numpy(),
            **self.examples,
        }
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path.with_suffix(".npz"))
        atomic_write_json(path, self.to_dict())

    def __str__(self) -> str:
        return format_table(self.to_dict())


def evaluate(
    model: nn.Module,
    dataset: ImageDataset,
    settings: EvaluationConfig | None = None,
    *,
    protocol: str = "pixels",
    clamp: str = "unit",
    seed: int = 0,
    device: torch.device | str | None = None,
    allow_probabilities: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack a model on a data set with the paper's suite, and judge it image by image.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K]; any module, or any callable.
        settings: radii, steps and batch size; the paper's grid at 8/255 by default.
        protocol: "pixels", or "paper-compat" for attacks on normalized images with ``clamp``
            "unit" or "none"; epsilon is then in units of the normalized image.
        device: where the model lives; by default that of its parameters.
        progress: called with a line of text now and then.

    The model, its buffers and all random states are as before. Results depend on ``seed`` and the
    images' places in the data set only.

    Raises:
        ModelOutputError, LabelError, ConfigError: before any attack runs.
    """
    settings = settings or EvaluationConfig()
    check_choice(protocol, ("pixels", "paper-compat"), "protocol")
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = parameter.device if parameter is not None else "cpu"
    device = torch.device(device)
    if settings.num_images is not None:
        dataset = dataset.subset(torch.arange(min(settings.num_images, len(dataset))))
    table = _Table(paper_suite(settings), dataset, allow_probabilities)
    space = attack_space(model, protocol, clamp, dataset.mean, dataset.std)
    started = time.perf_counter()
    with undisturbed(model, device, seed=seed), torch.no_grad():
        for number, (images, labels, index) in enumerate(
            evaluation_batches(dataset, settings.batch_size, device)
        ):
            _evaluate_batch(table, space, model, images, labels, index, seed)
            if progress is not None:
                done = min((number + 1) * settings.batch_size, len(dataset))
                elapsed = time.perf_counter() - started
                left = elapsed / done * (len(dataset) - done)
                progress(f"evaluated {done}/{len(dataset)} images, {left:.0f} s left")
    return table.finish(
        facts={
            "suite": "paper",
            "protocol": protocol,
            "clamp": clamp if protocol == "paper-compat" else "pixels",
            "data": {
                "name": dataset.name,
                "split": dataset.split,
                "num_images": len(dataset),
                "digest": dataset.digest,
                "notes": list(dataset.notes),
                "class_names": list(dataset.class_names),
            },
            "seed": seed,
            "bn_mode": "eval",
            "precision": "float32",
            "epsilon": settings.epsilon,
            "seconds": round(time.perf_counter() - started, 3),
        },
        epsilon=settings.epsilon,
    )


def clean_and_robust_accuracy(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    batch_size: int,
    device: torch.device,
    space: Callable[[Model], AttackSpace],
) -> tuple[float, float]:
    """The two numbers that training watches: plain accuracy, and accuracy under one PGD run."""
    clean = robust = 0
    with undisturbed(model, device), torch.no_grad():
        for images, labels, _ in evaluation_batches(dataset, batch_size, device):
            here = space(model)
            attacked = pgd(
                here.model,
                here.enter(images),
                labels,
                epsilon=epsilon,
                step_size=step_size,
                num_steps=num_steps,
                random_start=False,
                clamp=here.clamp,
            )
            clean += int(_judge(model(images), labels)[0].sum())
            robust += int(_judge(model(here.leave(attacked)), labels)[0].sum())
    return clean / len(dataset), robust / len(dataset)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion; (0, 1) when nothing was tried. Wilson, 1927."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def format_table(evaluation: dict[str, Any]) -> str:
    """The table as text, from an evaluation's JSON."""
    data = evaluation["data"]
    lines = [
        f"{evaluation.get('model', 'model')} on {data['name']} {data['split']}, "
        f"n = {data['num_images']}, protocol {evaluation['protocol']}, "
        f"BatchNorm {evaluation['bn_mode']}, {evaluation['precision']}, seed {evaluation['seed']}",
        "",
        f"{'attack':<26}{'epsilon':>10}{'step':>9}{'accuracy':>10}   95 % interval",
    ]
    for row in evaluation["attacks"]:
        note = f"   {row['num_non_finite']} not finite" if row["num_non_finite"] else ""
        if row["same_as"]:
            note += f"   = {row['same_as']}"
        step = "" if row["step_size"] is None else f"{row['step_size']:.4g}"
        epsilon = f"{row['epsilon']:.4g}" if row["epsilon"] else ""
        lines.append(
            f"{row['name']:<26}{epsilon:>10}{step:>9}{100 * row['accuracy']:>8.2f} %   "
            f"{_percent(row['interval'])}{note}"
        )
    for key, label in (("worst_case", "worst case per image"), ("worst_case_all", "all rows")):
        worst = evaluation[key]
        lines.append(
            f"{label:<26}{worst['epsilon']:>10.4g}{'':>9}{100 * worst['accuracy']:>8.2f} %   "
            f"{_percent(worst['interval'])}"
        )
    for finding in evaluation["findings"]:
        lines.append(f"{finding['severity']}: {finding['message']}")
    return "\n".join(lines)


def _percent(interval: list[float]) -> str:
    return f"{100 * interval[0]:6.2f} to {100 * interval[1]:6.2f}"


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(correct, finite) [B]: right argmax and finite logits; finite logits."""
    finite = logits.isfinite().all(dim=1)
    return (logits.argmax(dim=1) == labels) & finite, finite


class _Table:
    """Rows while they fill, batch by batch, and what is observed on the way."""

    def __init__(
        self, specs: list[AttackSpec], dataset: ImageDataset, allow_probabilities: bool
    ) -> None:
        n = len(dataset)
        self.rows = [Row(spec, torch.zeros(n, dtype=torch.bool)) for spec in specs]
        self.dataset = dataset
        self.allow_probabilities = allow_probabilities
        self.num_over_budget = 0
        self.num_zero_gradient = 0
        self.is_random = False
        self.examples: dict[str, Any] = {}
        self._aux: dict[str, _AuxSums] = {}
        self._expert_names: list[str] = []
        self._filled = 0
        plain = [row.spec for row in self.rows if row.spec.kind == "pgd"]
        self.shown = plain[-1].name if plain else None
        main = plain[-1].epsilon if plain else 0.0
        radii = [row.spec for row in self.rows if row.spec.kind == "fgsm"]
        nearest = min(radii, key=lambda s: abs(s.epsilon - main), default=None)
        self.watched = {"clean", self.shown, nearest.name if nearest else None}

    def of_kind(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row.spec.kind in kinds]

    def judge(
        self, row: Row, model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> None:
        """Fill one row's part for one batch."""
        started = time.perf_counter()
        if isinstance(model, Mixture) and row.spec.name in self.watched:
            output = model(adversarial, return_aux=True)
            logits = output.logits
            sums = self._aux.setdefault(
                row.spec.name, _AuxSums(model.num_experts, self.dataset.num_classes)
            )
            self._expert_names = model.expert_names
            sums.add(output.gate_weights, output.expert_logits, labels)
        else:
            logits = model(adversarial)
        correct, finite = _judge(logits, labels)
        part = slice(self._filled, self._filled + len(labels))
        row.correct[part] = correct.cpu()
        row.num_non_finite += int((~finite).sum())
        row.num_forwards += len(labels)
        row.seconds += time.perf_counter() - started
        if row.spec.name == self.shown and not self.examples:
            self.examples = _examples(model, images, adversarial, logits, labels, self.shown)

    def check_budget(self, images: Tensor, adversarial: Tensor, epsilon: float) -> None:
        outside = (adversarial - images).abs() > epsilon + BUDGET_TOLERANCE
        outside |= (adversarial < 0) | (adversarial > 1) | adversarial.isnan()
        self.num_over_budget += int(outside.sum())

    def next_batch(self, num_images: int) -> None:
        self._filled += num_images

    def finish(self, facts: dict[str, Any], epsilon: float) -> Evaluation:
        within = [row for row in self.rows if row.spec.epsilon <= epsilon + 1e-12]
        largest = max((row.spec.epsilon for row in self.rows), default=0.0)
        gate = experts = None
        if self._aux:
            gate, experts = _aux_tables(self._aux, self._expert_names)
        return Evaluation(
            self.rows,
            _worst_case(within, epsilon),
            _worst_case(self.rows, largest),
            self._findings(facts),
            facts,
            gate,
            experts,
            self.examples,
            torch.arange(len(self.dataset)),
        )

    def _findings(self, facts: dict[str, Any]) -> list[dict[str, str]]:
        n = len(self.dataset)
        broken = sum(row.num_non_finite for row in self.rows)
        candidates = [
            (
                self.rows[0].num_non_finite > 0,
                "non_finite",
                "invalid",
                f"{self.rows[0].num_non_finite} clean images give NaN or infinite logits; "
                "they count as broken",
            ),
            (
                broken > self.rows[0].num_non_finite,
                "non_finite_attacked",
                "suspect",
                f"{broken} logits under attack are NaN or infinite; they count as broken",
            ),
            (
                self.num_over_budget > 0,
                "budget",
                "invalid",
                f"{self.num_over_budget} attacked pixels are outside epsilon or [0, 1]",
            ),
            (
                self.num_zero_gradient > n // 100,
                "zero_gradient",
                "invalid" if self.num_zero_gradient > n // 10 else "suspect",
                f"the loss has a gradient of exactly zero at {self.num_zero_gradient} of {n} "
                "images, so gradient attacks prove nothing there",
            ),
            (
                self.is_random,
                "random",
                "suspect",
                "two passes over the same images differ; evaluate a random model with "
                "eot_samples of 20 or more",
            ),
            (
                facts["protocol"] == "paper-compat",
                "protocol",
                "suspect",
                "attacks acted on normalized images (protocol paper-compat): these numbers "
                "reproduce a published table and say nothing about pixels",
            ),
            (
                n < SMALL_SAMPLE,
                "small_sample",
                "note",
                f"quick: {n} images, fewer than {SMALL_SAMPLE}; the intervals are wide",
            ),
        ]
        return [
            {"name": name, "severity": severity, "message": message}
            for holds, name, severity, message in candidates
            if holds
        ]


def _worst_case(rows: list[Row], epsilon: float) -> dict[str, Any]:
    correct = torch.stack([row.correct for row in rows]).all(dim=0)
    num_correct = int(correct.sum())
    return {
        "epsilon": epsilon,
        "num_images": len(correct),
        "num_correct": num_correct,
        "accuracy": num_correct / max(len(correct), 1),
        "interval": list(wilson_interval(num_correct, len(correct))),
        "attacks": [row.spec.name for row in rows],
    }


def _evaluate_batch(
    table: _Table,
    space: AttackSpace,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    seed: int,
) -> None:
    """All rows for one batch, in the order of the table."""
    inside = space.enter(images)
    extra: dict[str, Any] = {
        "clamp": space.clamp,
        "allow_probabilities": table.allow_probabilities,
    }
    for row in table.of_kind("clean"):
        table.judge(row, model, images, images, labels)
    first = model(images)
    table.is_random |= bool((first - model(images)).abs().max() > 1e-4 * (first.abs().max() + 1e-9))

    started = time.perf_counter()
    gradient = input_gradient(space.model, inside, labels, seed=seed, **extra)
    shared = time.perf_counter() - started
    table.num_zero_gradient += int((gradient.flatten(1) == 0).all(dim=1).sum())
    attacks = (
        _fgsm_rows(table, space, inside, labels, gradient, seed, extra),
        _trajectory_rows(table, space, inside, labels, gradient, seed, extra),
        _single_rows(table, space, inside, labels, index, seed, extra),
    )
    for group in attacks:
        for row, adversarial, seconds, passes in group:
            row.seconds += seconds + shared
            row.num_forwards += passes
            row.num_backwards += passes
            shared = 0.0
            if space.clamp == "pixels":
                table.check_budget(images, adversarial, row.spec.epsilon)
            table.judge(row, model, images, space.leave(adversarial), labels)
    table.next_batch(len(labels))


Crafted = Iterator[tuple[Row, Tensor, float, int]]  # row, adversarial, seconds, image-passes


def _fgsm_rows(
    table: _Table,
    space: AttackSpace,
    inside: Tensor,
    labels: Tensor,
    gradient: Tensor,
    seed: int,
    extra: dict[str, Any],
) -> Crafted:
    passes = len(labels)  # the shared gradient, counted once
    for row in table.of_kind("fgsm"):
        started = time.perf_counter()
        adversarial = fgsm(
            space.model,
            inside,
            labels,
            epsilon=row.spec.epsilon,
            gradient=gradient,
            seed=seed,
            **extra,
        )
        yield row, adversarial, time.perf_counter() - started, passes
        passes = 0


def _trajectory_rows(
    table: _Table,
    space: AttackSpace,
    inside: Tensor,
    labels: Tensor,
    gradient: Tensor,
    seed: int,
    extra: dict[str, Any],
) -> Crafted:
    """Rows that are one PGD run, stopped at different steps."""
    rows = [row for row in table.of_kind("pgd", "adaptive") if row.spec.eot_samples == 1]
    steps = sorted({row.spec.num_steps for row in rows})
    if not steps:
        return
    spec = rows[0].spec
    assert spec.step_size is not None
    started = time.perf_counter()
    found = pgd_snapshots(
        space.model,
        inside,
        labels,
        epsilon=spec.epsilon,
        step_size=spec.step_size,
        num_steps=steps,
        gradient=gradient,
        seed=seed,
        **extra,
    )
    seconds_per_step = (time.perf_counter() - started) / steps[-1]
    done = 0
    for row in sorted(rows, key=lambda row: row.spec.num_steps):
        more = row.spec.num_steps - done
        done = row.spec.num_steps
        if row.spec.kind == "adaptive":
            row.same_as = f"PGD-{row.spec.num_steps}, as EoT of 1 on a deterministic model"
        image = found[steps.index(row.spec.num_steps)]
        yield row, image, more * seconds_per_step, more * len(labels)


def _single_rows(
    table: _Table,
    space: AttackSpace,
    inside: Tensor,
    labels: Tensor,
    index: Tensor,
    seed: int,
    extra: dict[str, Any],
) -> Crafted:
    """Rows that share nothing: random starts, and averages over a random model's passes."""
    for row in table.of_kind("multi_start", "adaptive"):
        spec = row.spec
        if spec.kind == "adaptive" and spec.eot_samples == 1:
            continue
        assert spec.step_size is not None
        started = time.perf_counter()
        adversarial = pgd(
            space.model,
            inside,
            labels,
            epsilon=spec.epsilon,
            step_size=spec.step_size,
            num_steps=spec.num_steps,
            random_start=spec.random_start,
            num_restarts=spec.num_restarts,
            eot_samples=spec.eot_samples,
            seed=seed,
            sample_index=index,
            **extra,
        )
        # an upper bound: later restarts only see the images that still stand
        passes = spec.num_steps * spec.num_restarts * spec.eot_samples * len(labels)
        yield row, adversarial, time.perf_counter() - started, passes


class _AuxSums:
    """Gate weights by class and accuracy by expert, summed over batches."""

    def __init__(self, num_experts: int, num_classes: int) -> None:
        self.weights = torch.zeros(num_classes, num_experts, dtype=torch.float64)
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.entropy = 0.0
        self.correct = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, gate_weights: Tensor, expert_logits: Tensor, labels: Tensor) -> None:
        weights = gate_weights.double().cpu()
        classes = labels.cpu()
        self.weights.index_add_(0, classes, weights)
        self.count.index_add_(0, classes, torch.ones(len(classes), dtype=torch.float64))
        self.entropy += float(torch.special.entr(weights).sum())
        self.correct += (expert_logits.argmax(dim=2) == labels).double().sum(dim=1).cpu()


def _aux_tables(
    aux: dict[str, _AuxSums], names: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    gate = {
        "attacks": list(aux),
        "experts": names,
        "mean_weights": {
            name: (sums.weights / sums.count.clamp(min=1).unsqueeze(1)).tolist()
            for name, sums in aux.items()
        },
        "entropy": {
            name: sums.entropy / max(float(sums.count.sum()), 1.0) for name, sums in aux.items()
        },
    }
    experts = {
        "names": names,
        "accuracy": {
            name: (sums.correct / sums.count.sum().clamp(min=1)).tolist()
            for name, sums in aux.items()
        },
    }
    return gate, experts


def _examples(
    model: nn.Module,
    images: Tensor,
    adversarial: Tensor,
    logits: Tensor,
    labels: Tensor,
    attack: str,
) -> dict[str, Any]:
    """The first few images of the data set, with and without the attack."""
    few = slice(0, NUM_EXAMPLES)
    return {
        "example_clean": images[few].cpu().numpy(),
        "example_adversarial": adversarial[few].float().cpu().numpy(),
        "example_labels": labels[few].cpu().numpy(),
        "example_predictions_clean": model(images[few]).argmax(dim=1).cpu().numpy(),
        "example_predictions_adversarial": logits[few].argmax(dim=1).cpu().numpy(),
        "example_attack": np.array(attack),
    }
