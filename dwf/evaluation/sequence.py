"""Judge a model by attacks in turn.

First come the contracts, which look at the model before any attack; then the suite, each attack on
the images that still stand; then the questions of :mod:`dwf.evaluation.questions`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dwf.attacks import apgd
from dwf.attacks.door import ask
from dwf.attacks.losses import Model
from dwf.attacks.outcomes import Outcomes
from dwf.attacks.source import judge
from dwf.attacks.table import ATTACKS
from dwf.attacks.target import AttackTarget, attack_target
from dwf.checks import check_labels, check_logits
from dwf.data.batches import at_equal_distances, batch_at
from dwf.evaluation import findings
from dwf.evaluation.budget import SHORT, Budget, expected_minutes
from dwf.evaluation.contracts import NUM_PASSES, contracts
from dwf.evaluation.in_turn import attack_in_turn, key_of
from dwf.evaluation.job import Job, Judged, Say
from dwf.evaluation.measures import Seen, held
from dwf.evaluation.paper import NUM_EXAMPLES, examples
from dwf.evaluation.questions import question
from dwf.evaluation.record import AtRadius, Finding, WorstCase
from dwf.evaluation.result import Arrays, Row, worst_case
from dwf.evaluation.suites import passes_of, suite_in_turn
from dwf.evaluation.view_attacks import prepared
from dwf.models.inner_views import mixture_inside, views_of

# Images that contracts and doubts measure: enough to see shares of a percent.
NUM_DOUBTED = 1000


def judge_in_turn(
    job: Job,
    suite: str,
    epsilons: Sequence[float],
    norm: str,
    partial: Path | None,
    budget: Budget | None,
    announce: Say,
) -> Judged:
    """Run a suite of attacks in turn at radii ``epsilons``, ascending; the last is the headline.

    ``partial`` is a file that outcomes are kept in. ``announce`` is told before the attacks how
    long they take, if that is a minute or more. The caller has put the model into eval mode,
    without gradients to weights.
    """
    model, dataset, settings = job.model, job.dataset, job.settings
    images = job.first_images()
    logits = check_logits(
        ask(model, images), len(images), allow_probabilities=job.allow_probabilities
    )
    check_labels(dataset.labels, len(dataset), logits.shape[1])
    places = at_equal_distances(len(dataset), NUM_DOUBTED)
    looked_at, its_labels, its_index = batch_at(dataset, places, job.device)
    started = time.perf_counter()
    contract = contracts(
        model,
        looked_at,
        its_labels,
        batch_size=settings.batch_size,
        seed=job.seed,
        sample_index=its_index,
    )
    seconds_per_pass = (time.perf_counter() - started) / (NUM_PASSES * len(looked_at))
    views = prepared(views_of(model), images)
    # at radius 0 there is nothing to search: the clean row is the answer
    attacked = [radius for radius in epsilons if radius > 0]
    doubtful = contract.findings(
        declared_random=settings.eot_samples > 1,
        allow_probabilities=job.allow_probabilities,
        views=bool(views),
    )
    specs = suite_in_turn(
        suite,
        settings,
        attacked,
        norm,
        has_views=bool(views),
        gives_up=settings.eot_samples == 1 and all(f.severity == "note" for f in doubtful),
    )
    if budget is not None:
        specs = [budget.limit(spec) for spec in specs]
    right = judge(contract.logits, contract.labels)[0].double().mean()
    expected = expected_minutes(
        passes_of(specs, logits.shape[1], views),
        num_images=round(float(right) * len(dataset)),
        seconds_per_pass=seconds_per_pass,
    )
    if expected != SHORT:
        announce(f"suite {suite} on {len(dataset)} images takes {expected}")
    target = attack_target(job.searched, images)
    outcomes = Outcomes(
        partial,
        key_of(model, dataset, specs, job.seed),
        contract.logits,
        len(specs),
        len(dataset),
        seed=job.seed,
    )

    def attacked_rows(to_the_end: bool = False) -> list[Row]:
        return attack_in_turn(
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
            progress=lambda line: job.say(f"{line}; the suite takes {expected}"),
            # each process asks its questions by itself, and waits for no other's answers
            shared=job.shared and not to_the_end,
            to_the_end=to_the_end,
        )

    def to_the_end() -> list[Row]:
        outcomes.path = None  # who continues a stopped run has to ask the same questions
        return attacked_rows(to_the_end=True)

    questioned = question(
        job,
        looked_at,
        its_labels,
        its_index,
        attacked_rows(),
        contract,
        views,
        epsilons[-1],
        norm,
        to_the_end=to_the_end,
        budget=budget,
    )
    rows = questioned.rows
    return Judged(
        rows=rows,
        worst_case=_worst_case_within(rows, epsilons[-1]),
        worst_case_all=worst_case(rows, epsilons[-1]),
        findings=[
            *contract.findings(
                declared_random=settings.eot_samples > 1,
                eot_samples=settings.eot_samples,
                num_votes=settings.eot_samples,
                allow_probabilities=job.allow_probabilities,
                views=bool(views),
                preferred=questioned.preferred,
            ),
            *_findings_of_rows(rows, len(dataset), questioned.views_again),
            *questioned.findings,
            *held(
                findings.small_sample(len(dataset)),
                _mixture_inside(model),
                findings.small_budget(budget.num_steps, budget.num_queries) if budget else None,
            ),
            *map(findings.model_note, job.notes),
        ],
        attack_path=str(target),
        curve=[_worst_case_within(rows, radius) for radius in epsilons],
        doubts=[
            AtRadius(radius, accuracy)
            for radius, accuracy in zip(
                questioned.doubts.epsilons, questioned.doubts.accuracy, strict=True
            )
        ],
        examples=_examples(job, target, epsilons[-1], norm, budget),
    )


def _worst_case_within(rows: Sequence[Row], epsilon: float) -> WorstCase:
    return worst_case([row for row in rows if row.spec.epsilon <= epsilon], epsilon)


def _mixture_inside(model: Model) -> Finding | None:
    """A finding if the model is no mixture but contains one."""
    name = mixture_inside(model)
    return findings.mixture_inside(name) if name else None


def _findings_of_rows(rows: Sequence[Row], num_images: int, again: Seen | None) -> list[Finding]:
    """What the attacks' own outcomes say about them; ``again``: of views that attacked again."""
    broken: dict[str, int] = defaultdict(int)
    for before, row in pairwise(rows):
        kind = "doubled" if row.spec.stream else row.spec.kind
        broken[kind] += int((before.correct & ~row.correct).sum())
    attacked = rows[1:]
    after = None
    if again is not None:
        harder = sum(count for kind, count in broken.items() if kind.startswith("harder-"))
        after = Seen(again.count + harder, again.total)

    def share(count: int) -> Seen:
        return Seen(count, num_images)

    return held(
        findings.non_finite_attacked(share(sum(row.num_non_finite for row in attacked))),
        findings.budget(sum(row.num_over_budget for row in attacked)),
        findings.black_box_wins(share(broken["square"] + broken["rays"]), again=after),
        findings.view_wins(share(broken["views"]), again=again),
        findings.not_converged(share(broken["doubled"])),
        findings.precision(share(max((row.num_disagree for row in attacked), default=0))),
    )


def _examples(
    job: Job, target: AttackTarget, epsilon: float, norm: str, budget: Budget | None
) -> Arrays:
    """The first few images of the data set as APGD-CE leaves them."""
    images, labels, index = (part[:NUM_EXAMPLES] for part in next(job.batches()))
    adversarial = apgd(
        target,
        images,
        labels,
        loss="ce",
        num_steps=100 if budget is None else min(100, budget.num_steps),
        epsilon=epsilon,
        norm=norm,
        seed=job.seed,
        sample_index=index,
        allow_probabilities=job.allow_probabilities,
    )
    return examples(
        job.model, images, adversarial, ask(job.model, adversarial), labels, ATTACKS["apgd-ce"].name
    )
