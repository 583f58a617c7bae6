"""The grid of DWF's tables: every attack on every image, in batches.

Rows share work where this is exact: all FGSM radii follow one gradient, and PGD-10 is a prefix of
PGD-50.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dwf.attacks.ascent import Ascent, ascend, gradient_at_images, snapshots
from dwf.attacks.door import ask
from dwf.attacks.losses import Model
from dwf.attacks.norms import num_over_budget
from dwf.attacks.setup import Setup
from dwf.attacks.source import judge
from dwf.attacks.space import AttackSpace, attack_space
from dwf.attacks.target import attack_target
from dwf.checks import check_labels, check_logits
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset
from dwf.evaluation import findings, model_findings
from dwf.evaluation.experts import MixtureSums, look_inside, tables
from dwf.evaluation.job import Job, Judged
from dwf.evaluation.measures import Seen, answer_difference, held
from dwf.evaluation.record import Finding
from dwf.evaluation.result import Arrays, Row, worst_case
from dwf.evaluation.suites import AttackSpec, paper_suite
from dwf.models import ExpertModel

NUM_EXAMPLES = 8


def judge_by_grid(job: Job, protocol: str, clamp: str) -> Judged:
    """Run the paper's grid: every attack on every image.

    ``protocol`` and ``clamp`` are those of :func:`dwf.evaluation.evaluate`.
    """
    settings, dataset = job.settings, job.dataset
    table = PaperTable(paper_suite(settings), dataset, job.allow_probabilities)
    space = attack_space(job.searched, protocol, clamp, dataset.mean, dataset.std)
    started = time.perf_counter()
    for number, (images, labels, index) in enumerate(job.batches(), start=1):
        evaluate_batch(table, space, job.model, images, labels, index, job.seed)
        done = min(number * settings.batch_size, len(dataset))
        left = (time.perf_counter() - started) / done * (len(dataset) - done)
        job.say(f"evaluated {done}/{len(dataset)} images, {left:.0f} s left")
    return table.finish(settings, protocol, job.notes)


class PaperTable:
    """The rows of the grid while they fill, batch by batch, and findings' measurements."""

    def __init__(
        self, specs: list[AttackSpec], dataset: ImageDataset, allow_probabilities: bool
    ) -> None:
        n = len(dataset)
        self.rows = [Row(spec, torch.zeros(n, dtype=torch.bool)) for spec in specs]
        self.dataset = dataset
        self.allow_probabilities = allow_probabilities
        self.num_over_budget = 0
        self.num_zero_gradient = 0
        self.difference = 0.0
        self.attack_path = ""
        self.examples: Arrays = {}
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
        """The rows whose attack is one of these kinds."""
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
            logits = ask(model, adversarial)
        correct, finite = judge(logits, labels)
        part = slice(self._filled, self._filled + len(labels))
        row.correct[part] = correct.cpu()
        row.num_non_finite += int((~finite).sum())
        row.num_forwards += len(labels)
        row.seconds += time.perf_counter() - started
        if row.spec.name == self.shown and not self.examples:
            self.examples = examples(model, images, adversarial, logits, labels, self.shown)

    def next_batch(self, num_images: int) -> None:
        """End a batch: later verdicts are of the images after it."""
        self._filled += num_images

    def finish(self, settings: EvaluationConfig, protocol: str, notes: Sequence[str]) -> Judged:
        """The outcome, once all batches were judged."""
        epsilon = settings.epsilon
        within = [row for row in self.rows if row.spec.epsilon <= epsilon + 1e-12]
        largest = max((row.spec.epsilon for row in self.rows), default=0.0)
        gate = experts = None
        if self._aux:
            gate, experts = tables(self._aux, self._expert_names)
        return Judged(
            rows=self.rows,
            worst_case=worst_case(within, epsilon),
            worst_case_all=worst_case(self.rows, largest),
            findings=self._findings(settings, protocol, notes),
            attack_path=self.attack_path,
            gate=gate,
            experts=experts,
            examples=self.examples,
        )

    def _findings(
        self, settings: EvaluationConfig, protocol: str, notes: Sequence[str]
    ) -> list[Finding]:
        n = len(self.dataset)
        clean, *attacked = (row.num_non_finite for row in self.rows)
        return held(
            model_findings.non_finite(Seen(clean, n)),
            findings.non_finite_attacked(Seen(sum(attacked), n * len(attacked))),
            findings.budget(self.num_over_budget),
            findings.zero_gradient(Seen(self.num_zero_gradient, n)),
            model_findings.random_output(
                self.difference,
                declared=settings.eot_samples > 1,
                eot_samples=settings.eot_samples,
            ),
            findings.protocol(protocol),
            findings.small_sample(n),
            findings.only_a_grid(),
            *map(findings.model_note, notes),
        )


def evaluate_batch(
    table: PaperTable,
    space: AttackSpace,
    model: Model,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    seed: int,
) -> None:
    """All rows for one batch, in the order of the table."""
    first, again = ask(model, images), ask(model, images)
    check_logits(first, len(images), allow_probabilities=table.allow_probabilities)
    check_labels(labels, len(images), first.shape[1])
    table.difference = max(table.difference, answer_difference(first, again))
    for row in table.of_kind("clean"):
        table.judge(row, model, images, images, labels)

    started = time.perf_counter()
    inside = space.enter(images)
    target = attack_target(space.model, inside)
    table.attack_path = str(target)
    setup = Setup(
        model=replace(space, model=target),
        images=inside,
        labels=labels,
        seed=seed,
        sample_index=index,
        allow_probabilities=table.allow_probabilities,
    )
    gradient = gradient_at_images(setup)
    shared = time.perf_counter() - started
    table.num_zero_gradient += int((gradient.flatten(1) == 0).all(dim=1).sum())
    for craft in (_fgsm_rows, _trajectory_rows, _single_rows):
        for row, adversarial, seconds, passes in craft(table, setup, gradient):
            row.seconds += seconds + shared
            row.num_forwards += passes
            row.num_backwards += passes
            shared = 0.0
            if space.clamp == "pixels":
                table.num_over_budget += num_over_budget(images, adversarial, row.spec.epsilon)
            table.judge(row, model, images, space.leave(adversarial), labels)
    table.next_batch(len(labels))


Crafted = Iterator[tuple[Row, Tensor, float, int]]  # row, adversarial, seconds, image-passes


def _fgsm_rows(table: PaperTable, setup: Setup, gradient: Tensor) -> Crafted:
    passes = len(setup.labels)  # the shared gradient, counted once
    for row in table.of_kind("fgsm"):
        started = time.perf_counter()
        radius = row.spec.epsilon
        how = Ascent(step_size=radius, num_steps=1, gradient=gradient)
        adversarial = ascend(replace(setup, epsilon=radius), how)
        yield row, adversarial, time.perf_counter() - started, passes
        passes = 0


def _trajectory_rows(table: PaperTable, setup: Setup, gradient: Tensor) -> Crafted:
    """Rows that are one PGD run, stopped at different steps."""
    rows = [row for row in table.of_kind("pgd", "adaptive") if row.spec.eot_samples == 1]
    steps = sorted({row.spec.num_steps for row in rows})
    if not steps:
        return
    spec = rows[0].spec
    assert spec.step_size is not None
    started = time.perf_counter()
    how = Ascent(step_size=spec.step_size, num_steps=steps[-1], gradient=gradient)
    found = snapshots(replace(setup, epsilon=spec.epsilon), how, steps)
    seconds_per_step = (time.perf_counter() - started) / steps[-1]
    done = 0
    for row in sorted(rows, key=lambda row: row.spec.num_steps):
        more = row.spec.num_steps - done
        done = row.spec.num_steps
        if row.spec.kind == "adaptive":
            row.same_as = f"PGD-{row.spec.num_steps}, as EoT of 1 on a deterministic model"
        image = found[steps.index(row.spec.num_steps)]
        yield row, image, more * seconds_per_step, more * len(setup.labels)


def _single_rows(table: PaperTable, setup: Setup, gradient: Tensor) -> Crafted:
    """Rows that share nothing: random starts, and averages over a random model's passes."""
    for row in table.of_kind("multi_start", "adaptive"):
        spec = row.spec
        if spec.kind == "adaptive" and spec.eot_samples == 1:
            continue
        assert spec.step_size is not None
        started = time.perf_counter()
        how = Ascent(
            step_size=spec.step_size,
            num_steps=spec.num_steps,
            random_start=spec.random_start,
            num_restarts=spec.num_restarts,
        )
        own = replace(setup, epsilon=spec.epsilon, eot_samples=spec.eot_samples)
        adversarial = ascend(own, how)
        # an upper bound: later restarts only see the images that still stand
        passes = spec.num_steps * spec.num_restarts * spec.eot_samples * len(setup.labels)
        yield row, adversarial, time.perf_counter() - started, passes


def examples(
    model: Model,
    images: Tensor,
    adversarial: Tensor,
    logits: Tensor,
    labels: Tensor,
    attack: str,
) -> Arrays:
    """The first few images of the data set, with and without the attack."""
    few = slice(0, NUM_EXAMPLES)
    return {
        "example_clean": images[few].cpu().numpy(),
        "example_adversarial": adversarial[few].float().cpu().numpy(),
        "example_labels": labels[few].cpu().numpy(),
        "example_predictions_clean": ask(model, images[few]).argmax(dim=1).cpu().numpy(),
        "example_predictions_adversarial": logits[few].argmax(dim=1).cpu().numpy(),
        "example_attack": np.array(attack),
    }
