"""Judging a model: the table of accuracies under a suite of attacks, and the worst case per image.

An image counts as robust only if the float32 model in eval mode gives finite logits with the right
argmax. NaN or infinite logits are broken, never class 0. Attacks may search by a faster plan of the
model, which never decides. They share work where this is exact: all FGSM radii follow one gradient,
and PGD-10 is a prefix of PGD-50.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwf.attacks import fgsm, input_gradient, pgd, pgd_snapshots
from dwf.attacks.losses import Model
from dwf.attacks.source import undisturbed
from dwf.attacks.target import AttackTarget, attack_target, inner_model
from dwf.attacks.views import AttackSpace, attack_space
from dwf.checks import DataError, ImageTypeError, check_choice, check_labels, check_logits
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, evaluation_batches
from dwf.evaluation.cost import inference_cost
from dwf.evaluation.diagnostics import Diagnostics, diagnose, format_diagnostics
from dwf.evaluation.experts import MixtureSums, look_inside, tables
from dwf.evaluation.suites import AttackSpec, paper_suite
from dwf.evaluation.verdict import findings, float32_verdicts, judge
from dwf.files import atomic_write_json
from dwf.models import ExpertModel

NUM_EXAMPLES = 8
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
    diagnostics: Diagnostics | None = None
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
            "diagnostics": self.diagnostics.table if self.diagnostics else None,
        }

    def write(self, path: Path) -> None:
        """Write the table as JSON and the outcome of each image beside it as .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "correct": torch.stack([row.correct for row in self.rows]).numpy(),
            "sample_index": self.sample_index.numpy(),
            **self.examples,
            **(self.diagnostics.arrays if self.diagnostics else {}),
        }
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path.with_suffix(".npz"))
        atomic_write_json(path, self.to_dict())

    def __str__(self) -> str:
        return format_table(self.to_dict())


def evaluate(
    model: Model,
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
    What a model says in ``evaluation_notes``, strings, becomes findings of the kind "note".

    Raises:
        ModelOutputError, LabelError, ImageTypeError, DataError, ConfigError: before any attack
            runs.
    """
    settings = settings or EvaluationConfig()
    check_choice(protocol, ("pixels", "paper-compat"), "protocol")
    check_choice(clamp, ("unit", "none"), "clamp")
    if dataset.images.dtype is not torch.uint8:
        raise ImageTypeError(
            f"dataset.images: expected torch.uint8 in 0 to 255, found {dataset.images.dtype}"
        )
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to evaluate")
    model = inner_model(model)
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = parameter.device if parameter is not None else "cpu"
    device = torch.device(device)
    if settings.num_images is not None:
        dataset = dataset.subset(torch.arange(min(settings.num_images, len(dataset))))
    table = _Table(paper_suite(settings), dataset, allow_probabilities)
    space = attack_space(model, protocol, clamp, dataset.mean, dataset.std)
    started = time.perf_counter()
    with undisturbed(model, device, seed=seed), torch.no_grad(), float32_verdicts(device):
        for number, (images, labels, index) in enumerate(
            evaluation_batches(dataset, settings.batch_size, device)
        ):
            _evaluate_batch(table, space, model, images, labels, index, seed)
            if progress is not None:
                done = min((number + 1) * settings.batch_size, len(dataset))
                elapsed = time.perf_counter() - started
                left = elapsed / done * (len(dataset) - done)
                progress(f"evaluated {done}/{len(dataset)} images, {left:.0f} s left")
    seconds = time.perf_counter() - started
    images, _, _ = next(evaluation_batches(dataset, settings.batch_size, device))
    result = table.finish(
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
            "attack_path": table.attack_path,
            "epsilon": settings.epsilon,
            **inference_cost(model, images, seed=seed),
            "seconds": round(seconds, 3),
        },
        epsilon=settings.epsilon,
        notes=getattr(model, "evaluation_notes", ()),
    )
    if isinstance(model, ExpertModel) and settings.diagnostic_images:
        result.diagnostics = diagnose(
            model,
            dataset,
            settings,
            protocol=protocol,
            clamp=clamp,
            seed=seed,
            device=device,
            allow_probabilities=allow_probabilities,
            progress=progress,
        )
    return result


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
            clean += int(judge(model(images), labels)[0].sum())
            robust += int(judge(model(here.leave(attacked)), labels)[0].sum())
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
        f"attacks searched by: {evaluation.get('attack_path', 'autograd')}",
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
    if evaluation.get("diagnostics"):
        lines += ["", format_diagnostics(evaluation["diagnostics"])]
    return "\n".join(lines)


def _percent(interval: list[float]) -> str:
    return f"{100 * interval[0]:6.2f} to {100 * interval[1]:6.2f}"


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
        self.attack_path = ""
        self.examples: dict[str, Any] = {}
        self._aux: dict[str, MixtureSums] = {}
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
        self, row: Row, model: Model, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> None:
        """Fill one row's part for one batch."""
        started = time.perf_counter()
        if isinstance(model, ExpertModel) and row.spec.name in self.watched:
            logits, gate_weights, expert_logits = look_inside(model, adversarial)
            sums = self._aux.setdefault(
                row.spec.name, MixtureSums(model.num_experts, self.dataset.num_classes)
            )
            self._expert_names = model.expert_names
            sums.add(gate_weights, expert_logits, labels)
        else:
            logits = model(adversarial)
        correct, finite = judge(logits, labels)
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

    def finish(
        self, facts: dict[str, Any], epsilon: float, notes: Sequence[str] = ()
    ) -> Evaluation:
        within = [row for row in self.rows if row.spec.epsilon <= epsilon + 1e-12]
        largest = max((row.spec.epsilon for row in self.rows), default=0.0)
        gate = experts = None
        if self._aux:
            gate, experts = tables(self._aux, self._expert_names)
        return Evaluation(
            self.rows,
            _worst_case(within, epsilon),
            _worst_case(self.rows, largest),
            findings(
                num_images=len(self.dataset),
                non_finite_clean=self.rows[0].num_non_finite,
                non_finite_attacked=sum(row.num_non_finite for row in self.rows[1:]),
                over_budget=self.num_over_budget,
                zero_gradient=self.num_zero_gradient,
                is_random=self.is_random,
                protocol=facts["protocol"],
                notes=notes,
            ),
            facts,
            gate,
            experts,
            examples=self.examples,
            sample_index=torch.arange(len(self.dataset)),
        )


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
    model: Model,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    seed: int,
) -> None:
    """All rows for one batch, in the order of the table."""
    first, again = model(images), model(images)
    check_logits(first, len(images), allow_probabilities=table.allow_probabilities)
    check_labels(labels, len(images), first.shape[1])
    table.is_random |= bool((first - again).abs().max() > 1e-4 * first.abs().max())
    for row in table.of_kind("clean"):
        table.judge(row, model, images, images, labels)

    started = time.perf_counter()
    options: dict[str, Any] = {
        "seed": seed,
        "clamp": space.clamp,
        "allow_probabilities": table.allow_probabilities,
    }
    inside = space.enter(images)
    target = attack_target(space.model, inside)
    table.attack_path = str(target)
    gradient = input_gradient(target, inside, labels, **options)
    shared = time.perf_counter() - started
    table.num_zero_gradient += int((gradient.flatten(1) == 0).all(dim=1).sum())
    batch = _AttackedBatch(target, inside, labels, index, gradient, options)
    for craft in (_fgsm_rows, _trajectory_rows, _single_rows):
        for row, adversarial, seconds, passes in craft(table, batch):
            row.seconds += seconds + shared
            row.num_forwards += passes
            row.num_backwards += passes
            shared = 0.0
            if space.clamp == "pixels":
                table.check_budget(images, adversarial, row.spec.epsilon)
            table.judge(row, model, images, space.leave(adversarial), labels)
    table.next_batch(len(labels))


@dataclass
class _AttackedBatch:
    """One batch as the attacks see it; ``gradient`` is the loss's at ``images``."""

    model: AttackTarget
    images: Tensor
    labels: Tensor
    sample_index: Tensor
    gradient: Tensor
    options: dict[str, Any]


Crafted = Iterator[tuple[Row, Tensor, float, int]]  # row, adversarial, seconds, image-passes


def _fgsm_rows(table: _Table, batch: _AttackedBatch) -> Crafted:
    passes = len(batch.labels)  # the shared gradient, counted once
    for row in table.of_kind("fgsm"):
        started = time.perf_counter()
        adversarial = fgsm(
            batch.model,
            batch.images,
            batch.labels,
            epsilon=row.spec.epsilon,
            gradient=batch.gradient,
            **batch.options,
        )
        yield row, adversarial, time.perf_counter() - started, passes
        passes = 0


def _trajectory_rows(table: _Table, batch: _AttackedBatch) -> Crafted:
    """Rows that are one PGD run, stopped at different steps."""
    rows = [row for row in table.of_kind("pgd", "adaptive") if row.spec.eot_samples == 1]
    steps = sorted({row.spec.num_steps for row in rows})
    if not steps:
        return
    spec = rows[0].spec
    assert spec.step_size is not None
    started = time.perf_counter()
    found = pgd_snapshots(
        batch.model,
        batch.images,
        batch.labels,
        epsilon=spec.epsilon,
        step_size=spec.step_size,
        num_steps=steps,
        gradient=batch.gradient,
        **batch.options,
    )
    seconds_per_step = (time.perf_counter() - started) / steps[-1]
    done = 0
    for row in sorted(rows, key=lambda row: row.spec.num_steps):
        more = row.spec.num_steps - done
        done = row.spec.num_steps
        if row.spec.kind == "adaptive":
            row.same_as = f"PGD-{row.spec.num_steps}, as EoT of 1 on a deterministic model"
        image = found[steps.index(row.spec.num_steps)]
        yield row, image, more * seconds_per_step, more * len(batch.labels)


def _single_rows(table: _Table, batch: _AttackedBatch) -> Crafted:
    """Rows that share nothing: random starts, and averages over a random model's passes."""
    for row in table.of_kind("multi_start", "adaptive"):
        spec = row.spec
        if spec.kind == "adaptive" and spec.eot_samples == 1:
            continue
        assert spec.step_size is not None
        started = time.perf_counter()
        adversarial = pgd(
            batch.model,
            batch.images,
            batch.labels,
            epsilon=spec.epsilon,
            step_size=spec.step_size,
            num_steps=spec.num_steps,
            random_start=spec.random_start,
            num_restarts=spec.num_restarts,
            eot_samples=spec.eot_samples,
            sample_index=batch.sample_index,
            **batch.options,
        )
        # an upper bound: later restarts only see the images that still stand
        passes = spec.num_steps * spec.num_restarts * spec.eot_samples * len(batch.labels)
        yield row, adversarial, time.perf_counter() - started, passes


def _examples(
    model: Model,
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
