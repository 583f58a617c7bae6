"""Question a suite after its attacks: doubts, a look at the model's behaviour, harder attacks.

The doubts try what should be weaker than the suite. The look at where attacks walk asks whether
answers and gradients are what they claim to be. If one of them says that they are not,
whoever the suite gave up is searched to the end, and attacks follow that need neither. Whatever
they break is a row of the table.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dwf.attacks.losses import Model
from dwf.attacks.source import judge
from dwf.attacks.target import attack_target
from dwf.data.batches import at_equal_distances
from dwf.evaluation import behaviour_findings, findings
from dwf.evaluation.behaviour import NUM_IMAGES, Behaviour, behaviour
from dwf.evaluation.budget import Budget
from dwf.evaluation.contracts import Contracts
from dwf.evaluation.doubts import NUM_DRAWS, NUM_QUERIES, NUM_STEPS, Doubts, doubts
from dwf.evaluation.harder import attack_harder, is_needed
from dwf.evaluation.job import Job
from dwf.evaluation.measures import Seen, held
from dwf.evaluation.record import Finding
from dwf.evaluation.result import Row
from dwf.evaluation.suites import AttackSpec
from dwf.evaluation.view_attacks import AGAIN_STEPS, fall_again
from dwf.models.views import FROZEN, SOFT_AS_IT_IS, View

# One image of so many is looked at closely, so that small suites are not all questions.
ONE_OF, FEWEST = 6, 16
TRIAL = 0.25  # of the harder attacks, under a budget


class Questioned(NamedTuple):
    """What was found after a suite; ``rows`` are those of the suite, and more.

    ``views_again``: what views broke when they attacked once more, because they or Square had won;
    ``preferred`` is that of `Behaviour`.
    """

    rows: list[Row]
    findings: list[Finding]
    doubts: Doubts
    views_again: Seen | None = None
    preferred: Tensor | None = None


def question(
    job: Job,
    images: Tensor,
    labels: Tensor,
    places: Tensor,
    rows: Sequence[Row],
    contract: Contracts,
    views: Sequence[View],
    epsilon: float,
    norm: str,
    *,
    to_the_end: Callable[[], list[Row]],
    budget: Budget | None = None,
) -> Questioned:
    """Ask all questions about a suite whose last row is ``rows[-1]``.

    Args:
        images, labels, places: those to ask about, and their places in the data set.
        views: of the mixture, if it is one.
        to_the_end: searches whom the suite gave up to the end, and returns its rows.
        budget: of a trial of the verdict, which cuts the harder attacks to a quarter.
    """
    settings = job.settings
    num_votes = settings.eot_samples
    last = rows[-1]
    job.say("doubting: PGD again, noise, single steps, an epsilon that allows everything")
    started = time.perf_counter()
    left = last.correct[places.cpu()]
    doubted = doubts(
        job.searched,
        images,
        labels,
        correct=left,
        epsilon=epsilon,
        norm=norm,
        sources=job.sources,
        eot_samples=settings.eot_samples,
        num_votes=num_votes,
        batch_size=settings.batch_size,
        seed=job.seed,
        sample_index=places,
        allow_probabilities=job.allow_probabilities,
    )
    more = _rows_of_doubts(doubted, places.cpu(), last, time.perf_counter() - started)
    job.say("looking at the model where attacks walk")
    measured = _look(job, images, labels, places, left, contract, views, epsilon, norm)
    found = [*doubted.findings(), *behaviour_findings.findings_of(measured)]
    found += held(
        findings.doubts_win(_broken_by_doubts(rows, doubted, len(last.correct))),
        behaviour_findings.one_pass(
            measured.one_pass,
            num_votes,
            float(rows[0].correct.double().mean()),
            float(last.correct.double().mean()),
        ),
    )
    again, by_queries = None, held(findings.black_box_wins(_broken_by(rows, "square")))
    won = by_queries or findings.view_wins(_broken_by(rows, "views"))
    if views and won and not measured.random:
        job.say("attacking through views once more")
        best = _best_views(views, rows)
        row = _row_of_views(job, images, labels, places, more[-1], best, epsilon, norm, budget)
        again = Seen(int((more[-1].correct & ~row.correct).sum()), len(images))
        more.append(row)
    declared = contract.findings(declared_random=num_votes > 1, eot_samples=num_votes)
    if is_needed([*found, *declared, *by_queries]):
        if any(row.given_up is not None and row.given_up.num_left for row in rows):
            job.say("searching to the end whom attacks gave up")
            rows = to_the_end()
            for row in more:
                row.correct = row.correct & rows[-1].correct
        job.say("attacking by labels alone, on 8-bit images and through a stand-in")
        effort = 1.0 if budget is None else TRIAL
        more += _harder_rows(job, images, labels, places, more[-1], contract, epsilon, norm, effort)
    return Questioned([*rows, *more], found, doubted, again, measured.preferred)


def _look(
    job: Job,
    images: Tensor,
    labels: Tensor,
    places: Tensor,
    left: Tensor,
    contract: Contracts,
    views: Sequence[View],
    epsilon: float,
    norm: str,
) -> Behaviour:
    """Behaviour on some images that are right without an attack, half of them of those left."""
    clean = judge(contract.logits, contract.labels)[0]
    count = min(NUM_IMAGES, max(len(images) // ONE_OF, FEWEST))
    standing, fallen = (mask.nonzero()[:, 0] for mask in (clean & left, clean & ~left))
    half = max(count // 2, count - len(fallen))
    some = [rows[at_equal_distances(len(rows), most)] for rows, most in ((standing, half),)]
    some.append(fallen[at_equal_distances(len(fallen), count - len(some[0]))])
    few = torch.cat(some).sort().values.to(images.device)
    smooth = _true_function(views, images[few]) if len(few) else None
    return behaviour(
        job.model,
        images[few],
        labels[few],
        epsilon=epsilon,
        norm=norm,
        untouched=job.untouched,
        gradient_of=smooth,
        num_votes=job.settings.eot_samples,
        seed=job.seed,
        sample_index=places[few],
    )


def _true_function(views: Sequence[View], images: Tensor) -> Model | None:
    """A view of a mixture whose gradient is right if its parts' are; None of other models.

    A straight-through gradient of a choice is wrong on purpose.
    """
    by_name = {view.name.rpartition(": ")[2]: view for view in views}
    for name in (SOFT_AS_IT_IS, FROZEN):
        if name in by_name:
            return by_name[name].make(images)
    return None


def _rows_of_doubts(doubted: Doubts, places: Tensor, last: Row, seconds: float) -> list[Row]:
    """What each doubt broke, as rows after the last attack."""
    rows, correct = [], last.correct
    elsewhere = [
        (f"transfer from {name}", "transfer", 2 * NUM_STEPS, broken)
        for name, broken in doubted.transfer.items()
    ]
    for name, kind, num_steps, broken in (
        (f"PGD-{NUM_STEPS} again", "pgd-again", NUM_STEPS, doubted.pgd),
        ("single step", "single-step", 1, doubted.single_step),
        ("noise", "noise", NUM_DRAWS, doubted.noise),
        ("RayS on some", "rays", NUM_QUERIES, doubted.rays),
        *elsewhere,
    ):
        correct = correct.clone()
        correct[places[broken]] = False
        spec = AttackSpec(name, kind, last.spec.epsilon, num_steps=num_steps, norm=last.spec.norm)
        num_attacked = int(last.correct[places].sum())
        rows.append(Row(spec, correct, seconds=seconds, num_attacked=num_attacked))
        seconds = 0.0
    return rows


def _best_views(views: Sequence[View], rows: Sequence[Row]) -> list[View]:
    """The views that broke something, or else those that soften what the mixture chooses.

    All of them, twice as long, would take as much time as the suite.
    """
    names = {name for row in rows for name, count in row.broken_by.items() if count}
    return [v for v in views if v.name in names] or [v for v in views if v.soft] or list(views)


def _row_of_views(
    job: Job,
    images: Tensor,
    labels: Tensor,
    places: Tensor,
    last: Row,
    views: Sequence[View],
    epsilon: float,
    norm: str,
    budget: Budget | None,
) -> Row:
    """What views break of these images when they attack again, after all other attacks."""
    started, at = time.perf_counter(), places.cpu()
    num_steps = min(AGAIN_STEPS, 2 * budget.num_steps) if budget else AGAIN_STEPS
    left = last.correct[at]
    fell = fall_again(
        attack_target(job.searched, images[:1]),
        images,
        labels,
        left=left.to(images.device),
        views=views,
        epsilon=epsilon,
        norm=norm,
        num_steps=num_steps,
        seed=job.seed + 1,
        sample_index=places,
        batch_size=job.settings.batch_size,
        allow_probabilities=job.allow_probabilities,
    )
    correct = last.correct.clone()
    correct[at[fell.cpu()]] = False
    spec = AttackSpec("views again", "views-again", epsilon, num_steps=num_steps, norm=norm)
    seconds = time.perf_counter() - started
    return Row(spec, correct, seconds=seconds, num_attacked=int(left.sum()))


def _harder_rows(
    job: Job,
    images: Tensor,
    labels: Tensor,
    places: Tensor,
    last: Row,
    contract: Contracts,
    epsilon: float,
    norm: str,
    effort: float,
) -> list[Row]:
    started, rows, correct = time.perf_counter(), [], last.correct
    at = places.cpu()
    with warnings.catch_warnings():
        # the finding zero_gradient says it
        warnings.filterwarnings("ignore", message="the model's output does not depend")
        attacks = attack_harder(
            job.model,
            images,
            labels,
            left=correct[at].to(images.device),
            epsilon=epsilon,
            norm=norm,
            num_classes=contract.logits.shape[1],
            seed=job.seed,
            sample_index=places,
            batch_size=job.settings.batch_size,
            effort=effort,
        )
    for attack in attacks:
        num_attacked = int(correct[at].sum())
        correct = correct.clone()
        correct[at[attack.broken]] = False
        kind = f"harder-{attack.kind}"
        spec = AttackSpec(attack.name, kind, epsilon, num_steps=attack.num_steps, norm=norm)
        rows.append(Row(spec, correct, num_attacked=num_attacked))
    rows[0].seconds = time.perf_counter() - started
    return rows


def _broken_by_doubts(rows: Sequence[Row], doubted: Doubts, num_images: int) -> Seen:
    """Images that Square, noise, a single step, a short PGD or RayS broke, and nothing before."""
    broken = doubted.pgd | doubted.noise | doubted.single_step | doubted.rays
    return Seen(_broken_by(rows, "square").count + int(broken.sum()), num_images)


def _broken_by(rows: Sequence[Row], kind: str) -> Seen:
    """Images that stood before the rows of a kind and not after."""
    pairs = [(before, row) for before, row in pairwise(rows) if row.spec.kind == kind]
    broken = sum(int((before.correct & ~row.correct).sum()) for before, row in pairs)
    return Seen(broken, len(rows[0].correct))
