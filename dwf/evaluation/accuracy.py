"""Judging a model: accuracy under a suite of attacks, and the worst case per image.

An image counts as robust only if the float32 model in eval mode gives finite logits with the right
argmax. NaN or infinite logits are broken, never class 0. Attacks may search by a faster plan of the
model, which never decides.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwf.attacks import apgd, pgd
from dwf.attacks.losses import Model
from dwf.attacks.norms import NORMS
from dwf.attacks.outcomes import Outcomes
from dwf.attacks.source import float32_verdicts, judge, undisturbed
from dwf.attacks.space import AttackSpace, attack_space
from dwf.attacks.table import ATTACKS
from dwf.attacks.target import AttackTarget, attack_target, inner_model
from dwf.checks import (
    ConfigError,
    DataError,
    ImageTypeError,
    check_choice,
    check_epsilon,
    check_labels,
    check_logits,
    check_positive,
)
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, evaluation_batches
from dwf.data.batches import at_equal_distances, batch_at
from dwf.evaluation.cost import inference_cost
from dwf.evaluation.diagnostics import diagnose
from dwf.evaluation.doubts import NUM_DRAWS, NUM_STEPS, Doubts, contracts, doubts
from dwf.evaluation.in_turn import attack_in_turn, key_of
from dwf.evaluation.paper import NUM_EXAMPLES, PaperTable, evaluate_batch, examples
from dwf.evaluation.result import Evaluation, Row, worst_case
from dwf.evaluation.suites import SUITES, AttackSpec, paper_suite, suite_in_turn
from dwf.evaluation.traces import trace
from dwf.evaluation.verdict import (
    Finding,
    Seen,
    black_box_wins,
    budget,
    held,
    mixture_inside,
    model_note,
    non_finite_attacked,
    not_converged,
    precision,
    small_sample,
    view_wins,
)
from dwf.evaluation.view_attacks import prepared
from dwf.models import ExpertModel
from dwf.models.views import attack_views

# How many images are looked at and doubted: enough for shares of a percent.
NUM_DOUBTED = 1000
Progress = Callable[[str], None]


def evaluate(
    model: Model,
    dataset: ImageDataset,
    settings: EvaluationConfig | None = None,
    *,
    suite: str = "paper",
    epsilon: float | Sequence[float] | None = None,
    norm: str = "linf",
    protocol: str = "pixels",
    clamp: str = "unit",
    seed: int = 0,
    device: torch.device | str | None = None,
    allow_probabilities: bool = False,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack a model on a data set with a suite of attacks, and judge it image by image.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K]; any module, or any callable.
        settings: radii, steps and batch size; the paper's grid at 8/255 by default.
        suite: "paper" for the grid of DWF's tables, or attacks in turn: "quick", "standard",
            "full" (see :mod:`dwf.evaluation.suites`).
        epsilon: one radius or several, in place of that of the settings, which is of L-inf; of
            several, the largest is the headline. Several need attacks in turn.
        norm: "linf" or "l2"; of attacks in turn.
        protocol: "pixels", or "paper-compat" for the grid on normalized images with ``clamp``
            "unit" or "none"; epsilon is then in units of the normalized image.
        device: where the model lives; by default that of its parameters.
        partial: a file to keep outcomes in while attacks in turn run, and to continue from if it
            exists; it is left for the caller to remove.
        progress: called with a line of text now and then.

    The model, its buffers and all random states are as before. Results depend on ``seed`` and the
    images' places in the data set only.
    What a model says in ``evaluation_notes``, strings, becomes findings of the kind "note".

    Raises:
        ModelOutputError, LabelError, ImageTypeError, DataError, ConfigError: before any attack
            runs.
    """
    settings = settings or EvaluationConfig()
    epsilons = _radii(epsilon, settings)
    settings = replace(settings, epsilon=epsilons[-1])
    _check_choices(suite, norm, epsilons, protocol, clamp)
    if norm != "linf" and epsilon is None:
        raise ConfigError(
            f"epsilon: name one for norm {norm!r}, 0.5 for example; that of the settings, "
            f"{settings.epsilon:.4g}, is of L-inf and would break hardly anything"
        )
    if dataset.images.dtype is not torch.uint8:
        raise ImageTypeError(
            f"dataset.images: expected torch.uint8 in 0 to 255, found {dataset.images.dtype}"
        )
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to evaluate")
    # a target is a function; the module in it has a mode, which matters
    model = inner_model(model.model if isinstance(model, AttackTarget) else model)
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = parameter.device if parameter is not None else "cpu"
    job = _Job(model, dataset, settings, seed, torch.device(device), allow_probabilities, progress)
    if settings.num_images is not None:
        few = torch.arange(min(settings.num_images, len(dataset)))
        job = replace(job, dataset=dataset.subset(few))
    started = time.perf_counter()
    with undisturbed(model, job.device, seed=seed), torch.no_grad(), float32_verdicts(job.device):
        if suite == "paper":
            result = _by_grid(job, protocol, clamp)
        else:
            result = _in_turn(job, suite, epsilons, norm, partial)
    result.facts = {
        "suite": suite,
        "protocol": protocol,
        "clamp": clamp if protocol == "paper-compat" else "pixels",
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "num_images": len(job.dataset),
            "digest": job.dataset.digest,
            "notes": list(dataset.notes),
            "class_names": list(dataset.class_names),
        },
        "seed": seed,
        "bn_mode": "eval",
        "precision": "float32",
        "norm": norm,
        "epsilon": settings.epsilon,
        **result.facts,
        **inference_cost(model, job.first_images(), seed=seed),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if isinstance(model, ExpertModel) and settings.diagnostic_images and norm == "linf":
        result.diagnostics = diagnose(
            model,
            job.dataset,
            settings,
            protocol=protocol,
            clamp=clamp,
            seed=seed,
            device=job.device,
            allow_probabilities=allow_probabilities,
            progress=progress,
        )
    if suite != "paper" and settings.diagnostic_images:
        result.traces = trace(
            model,
            job.dataset,
            settings,
            norm=norm,
            seed=seed,
            device=job.device,
            allow_probabilities=allow_probabilities,
            progress=progress,
        )
    return result


@dataclass(frozen=True)
class _Job:
    """What is judged, and how."""

    model: Model
    dataset: ImageDataset
    settings: EvaluationConfig
    seed: int
    device: torch.device
    allow_probabilities: bool
    progress: Progress | None

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return evaluation_batches(self.dataset, self.settings.batch_size, self.device)

    def first_images(self) -> Tensor:
        return next(self.batches())[0]

    @property
    def notes(self) -> Sequence[str]:
        notes: Sequence[str] = getattr(self.model, "evaluation_notes", ())
        return notes


def _radii(epsilon: float | Sequence[float] | None, settings: EvaluationConfig) -> list[float]:
    """Ascending, the headline last."""
    if epsilon is None:
        return [settings.epsilon]
    radii = [epsilon] if isinstance(epsilon, int | float | np.number) else list(epsilon)
    if not radii:
        raise ConfigError("epsilon: an empty list, expected at least one radius")
    for radius in radii:
        check_positive(radius, "epsilon")
    return sorted({float(radius) for radius in radii})


def _check_choices(
    suite: str, norm: str, epsilons: Sequence[float], protocol: str, clamp: str
) -> None:
    check_choice(suite, SUITES, "suite")
    check_choice(norm, NORMS, "norm")
    check_choice(protocol, ("pixels", "paper-compat"), "protocol")
    check_choice(clamp, ("unit", "none"), "clamp")
    if norm == "linf":
        check_epsilon(torch.tensor(epsilons))
    if suite == "paper" and (len(epsilons) > 1 or norm != "linf"):
        raise ConfigError(
            "suite 'paper' is a grid of L-inf attacks at one epsilon; several radii and other "
            "norms need attacks in turn: 'quick', 'standard' or 'full'"
        )
    if suite != "paper" and protocol != "pixels":
        raise ConfigError(
            f"protocol {protocol!r} belongs to suite 'paper', found suite {suite!r}, which takes "
            "protocol 'pixels'"
        )


def _by_grid(job: _Job, protocol: str, clamp: str) -> Evaluation:
    """The paper's table: every attack on every image."""
    settings, dataset = job.settings, job.dataset
    table = PaperTable(paper_suite(settings), dataset, job.allow_probabilities)
    space = attack_space(job.model, protocol, clamp, dataset.mean, dataset.std)
    started = time.perf_counter()
    for number, (images, labels, index) in enumerate(job.batches(), start=1):
        evaluate_batch(table, space, job.model, images, labels, index, job.seed)
        if job.progress is not None:
            done = min(number * settings.batch_size, len(dataset))
            left = (time.perf_counter() - started) / done * (len(dataset) - done)
            job.progress(f"evaluated {done}/{len(dataset)} images, {left:.0f} s left")
    return table.finish(settings, protocol, job.notes)


def _in_turn(
    job: _Job, suite: str, epsilons: Sequence[float], norm: str, partial: Path | None
) -> Evaluation:
    """Contracts, attacks in turn, then the measurements that say whether they can be believed."""
    model, dataset, settings = job.model, job.dataset, job.settings
    images = job.first_images()
    logits = check_logits(model(images), len(images), allow_probabilities=job.allow_probabilities)
    check_labels(dataset.labels, len(dataset), logits.shape[1])
    places = at_equal_distances(len(dataset), NUM_DOUBTED)
    looked_at, its_labels, its_index = batch_at(dataset, places, job.device)
    contract = contracts(
        model,
        looked_at,
        its_labels,
        batch_size=settings.batch_size,
        seed=job.seed,
        sample_index=its_index,
    )
    views = prepared(attack_views(model), images) if isinstance(model, ExpertModel) else []
    specs = suite_in_turn(suite, settings, epsilons, norm, has_views=bool(views))
    key = key_of(model, dataset, specs, job.seed)
    outcomes = Outcomes(partial, key, contract.logits, len(specs), len(dataset))
    target = attack_target(model, images)
    rows = attack_in_turn(
        target,
        dataset,
        specs,
        outcomes,
        views=views,
        seed=job.seed,
        batch_size=settings.batch_size,
        device=job.device,
        num_votes=settings.eot_samples,
        allow_probabilities=job.allow_probabilities,
        progress=job.progress,
    )
    if job.progress is not None:
        job.progress("doubting: PGD again, noise, single steps, an epsilon that allows everything")
    started = time.perf_counter()
    doubted = doubts(
        model,
        looked_at,
        its_labels,
        correct=rows[-1].correct[places],
        epsilon=settings.epsilon,
        norm=norm,
        eot_samples=settings.eot_samples,
        num_votes=settings.eot_samples,
        batch_size=settings.batch_size,
        seed=job.seed,
        sample_index=its_index,
        allow_probabilities=job.allow_probabilities,
    )
    seconds = time.perf_counter() - started
    rows += _rows_of_doubts(doubted, places, rows[-1], seconds)
    return Evaluation(
        rows,
        worst_case([row for row in rows if row.spec.epsilon <= settings.epsilon], settings.epsilon),
        worst_case(rows, settings.epsilon),
        [
            *contract.findings(
                declared_random=settings.eot_samples > 1,
                eot_samples=settings.eot_samples,
                num_votes=settings.eot_samples,
                allow_probabilities=job.allow_probabilities,
                views=bool(views),
            ),
            *_findings_in_turn(job, rows),
            *doubted.findings(),
            *held(small_sample(len(dataset)), _mixture_inside(model)),
            *map(model_note, job.notes),
        ],
        {
            "attack_path": str(target),
            # one PGD on all images looked at: half of epsilon, epsilon, twice epsilon, 1
            "doubts": [
                {"epsilon": radius, "accuracy": accuracy}
                for radius, accuracy in zip(doubted.epsilons, doubted.accuracy, strict=True)
            ],
        },
        curve=[
            worst_case([row for row in rows if row.spec.epsilon <= radius], radius)
            for radius in epsilons
        ],
        examples=_examples(job, target, settings.epsilon, norm),
        sample_index=torch.arange(len(dataset)),
    )


def _mixture_inside(model: Model) -> Finding | None:
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    name = next((name for name, part in parts if isinstance(part, ExpertModel)), "")
    return mixture_inside(name) if name else None  # the model itself has no name


def _rows_of_doubts(doubted: Doubts, places: Tensor, last: Row, seconds: float) -> list[Row]:
    """What a short PGD, a single step and noise broke, as rows after the last attack."""
    rows, correct = [], last.correct
    for name, kind, num_steps, broken in (
        (f"PGD-{NUM_STEPS} again", "pgd-again", NUM_STEPS, doubted.pgd),
        ("single step", "single-step", 1, doubted.single_step),
        ("noise", "noise", NUM_DRAWS, doubted.noise),
    ):
        correct = correct.clone()
        correct[places[broken]] = False
        spec = AttackSpec(name, kind, last.spec.epsilon, num_steps=num_steps, norm=last.spec.norm)
        num_attacked = int(last.correct[places].sum())
        rows.append(Row(spec, correct, seconds=seconds, num_attacked=num_attacked))
        seconds = 0.0
    return rows


def _findings_in_turn(job: _Job, rows: Sequence[Row]) -> list[Finding]:
    """What the attacks' own outcomes say about them."""
    num_images = len(job.dataset)
    broken: dict[str, int] = defaultdict(int)
    for before, row in pairwise(rows):
        kind = "doubled" if row.spec.stream else row.spec.kind
        broken[kind] += int((before.correct & ~row.correct).sum())
    attacked = rows[1:]

    def share(count: int) -> Seen:
        return Seen(count, num_images)

    return held(
        non_finite_attacked(share(sum(row.num_non_finite for row in attacked))),
        budget(sum(row.num_over_budget for row in attacked)),
        black_box_wins(share(broken["square"])),
        view_wins(share(broken["views"])),
        not_converged(share(broken["doubled"])),
        precision(share(max((row.num_disagree for row in attacked), default=0))),
    )


def _examples(job: _Job, target: AttackTarget, epsilon: float, norm: str) -> dict[str, Any]:
    """The first few images of the data set as APGD-CE leaves them."""
    images, labels, index = (part[:NUM_EXAMPLES] for part in next(job.batches()))
    adversarial = apgd(
        target,
        images,
        labels,
        loss="ce",
        num_steps=100,
        epsilon=epsilon,
        norm=norm,
        seed=job.seed,
        sample_index=index,
        allow_probabilities=job.allow_probabilities,
    )
    return examples(
        job.model, images, adversarial, job.model(adversarial), labels, ATTACKS["apgd-ce"].name
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
                here,
                here.enter(images),
                labels,
                epsilon=epsilon,
                step_size=step_size,
                num_steps=num_steps,
                random_start=False,
            )
            clean += int(judge(model(images), labels)[0].sum())
            robust += int(judge(model(here.leave(attacked)), labels)[0].sum())
    return clean / len(dataset), robust / len(dataset)
