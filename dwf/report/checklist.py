"""The checklist for evaluating robustness, answered by what was measured, or "not measured".

Each item is a question that a careful reader asks, the answer with its numbers, and where on the
page they stand; an item that was not measured names the command that measures it. A question about
images is answered by the outcomes of the same images; a limit is that of the finding of its name.

Source: Carlini et al., arXiv:1902.06705, the checklist at its end.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dwf.evaluation.limits import (
    EPSILON_HELPS,
    MIN_EOT_SAMPLES,
    SMALL_SAMPLE,
    UNBOUNDED_ABOVE_CHANCE,
    VIEW_WINS,
)
from dwf.report.figures import norm_name, percent, radius
from dwf.report.results import AttackRow, Evaluation, Results

# attacks that take many steps, and those that choose step size and loss by themselves
ITERATIVE = ("pgd", "multi_start", "adaptive", "apgd-ce", "apgd-t", "fab-t", "views")
SELF_TUNING = ("apgd-ce", "apgd-t", "fab-t")
FINDINGS = ("findings", "Findings")
ATTACKS = ("attacks", "Attacks")
CURVES = ("curves", "Curves")
RESULT = ("result", "Result")


@dataclass(frozen=True)
class Item:
    """One question. ``status``: "yes", "no" (a reason for doubt) or "not measured".

    ``where`` is (id, title) of a section of the page; ``command`` would measure what was not.
    """

    question: str
    status: str
    answer: str
    where: tuple[str, str] | None = None
    command: str | None = None


@dataclass(frozen=True)
class InTurn:
    """A row of attacks in turn: how many images it saw, and how many of them it broke."""

    row: AttackRow
    saw: int
    broke: int


def in_turn(evaluation: Evaluation) -> list[InTurn]:
    """The rows after one another; what a row broke is what no longer stands after it."""
    before = [evaluation.num_images, *(row.score.num_correct for row in evaluation.attacks)]
    return [
        InTurn(
            row,
            stood if row.num_attacked is None else row.num_attacked,
            stood - row.score.num_correct,
        )
        for stood, row in zip(before, evaluation.attacks, strict=False)
    ]


def checklist(results: Results) -> list[Item]:
    """All items, in the order in which a reader asks."""
    return [item for ask in QUESTIONS for item in ask(_Asked(results))]


class _Asked:
    """An evaluation, and the answers that several questions share."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.evaluation = results.evaluation
        self.attacked = [row for row in self.evaluation.attacks if row.kind != "clean"]
        self.turns = in_turn(self.evaluation) if self.evaluation.in_turn else []

    def of_kind(self, *kinds: str) -> list[AttackRow]:
        return [row for row in self.attacked if row.kind in kinds]

    def broke(self, choose: Callable[[AttackRow], bool]) -> int:
        return sum(turn.broke for turn in self.turns if choose(turn.row))

    def saw(self, choose: Callable[[AttackRow], bool]) -> int:
        return max((turn.saw for turn in self.turns if choose(turn.row)), default=0)

    def status(self, *findings: str) -> str:
        """ "no" where one of these findings is more than a note."""
        held = [self.evaluation.finding(name) for name in findings]
        return "no" if any(f and f.severity != "note" for f in held) else "yes"

    def command(self, suite: str) -> str:
        """What measures a missing answer: the same model with that suite."""
        if self.results.trained_here:
            words = ["dwf", "eval", str(self.results.run)]
        else:
            words = ["dwf", "eval", "--model", str(self.results.config.get("model"))]
            words += ["--data", self.evaluation.data_name, "--out", str(self.results.run)]
        return shlex.join([*words, "--suite", suite])

    def radius(self, epsilon: float) -> str:
        return radius(epsilon, pixels=self.evaluation.of_255)


def _threat_model(asked: _Asked) -> Iterator[Item]:
    evaluation = asked.evaluation
    yield Item(
        "Is the threat model precise?",
        "yes" if evaluation.pixels else "no",
        f"{norm_name(evaluation.norm)} ball, epsilon {asked.radius(evaluation.epsilon)}, white "
        "box: the attacker knows weights, gate and experts"
        + ("" if evaluation.pixels else "; but on normalized images, not on pixels"),
        RESULT,
    )


def _clean(asked: _Asked) -> Iterator[Item]:
    clean = asked.evaluation.clean
    question = "Is accuracy without an attack reported?"
    if clean is None:
        yield Item(question, "not measured", "the suite holds no clean row")
        return
    yield Item(question, "yes", percent(clean.score.accuracy, clean.score.num_images), RESULT)


def _per_image(asked: _Asked) -> Iterator[Item]:
    worst = asked.evaluation.worst_case
    low, high = worst.score.interval
    yield Item(
        "Is success counted per image, over all attacks, with an interval?",
        "yes",
        f"{worst.score.num_correct} of {worst.score.num_images} images stand under every one of "
        f"{len(worst.attacks)} rows; 95 % Wilson interval "
        f"{percent(low)} to {percent(high)}",
        RESULT,
    )
    count = asked.evaluation.num_images
    yield Item(
        "Are there enough images?",
        "yes" if count >= SMALL_SAMPLE else "no",
        f"{count:,}; below {SMALL_SAMPLE:,} the interval is wider than +-3 points",
        RESULT,
    )


def _adaptive(asked: _Asked) -> Iterator[Item]:
    question = "Are attacks adapted to the defense?"
    views = asked.of_kind("views")
    if views:
        found: dict[str, int] = {}
        for row in views:
            for view, count in row.broken_by.items():
                found[view] = found.get(view, 0) + count
        shown = ", ".join(f"{view} {count}" for view, count in found.items()) or "none"
        yield Item(
            question,
            asked.status("view_wins"),
            "the mixture is also attacked through its experts, its gate and smooth stand-ins for "
            f"it; images that only these broke: {shown}",
            ATTACKS,
        )
    elif asked.evaluation.in_turn:
        yield Item(
            question,
            "yes",
            "the model shows no experts; it is differentiated end to end, nothing of it left out",
            ATTACKS,
        )
    else:
        yield Item(
            question,
            "not measured",
            "the model was attacked as a whole only; of a mixture, attacks through its experts "
            "and its gate are missing",
            command=asked.command("standard"),
        )


def _iterative(asked: _Asked) -> Iterator[Item]:
    question = "Do iterative attacks beat a single step?"
    single = asked.of_kind("single-step")
    epsilon = asked.evaluation.worst_case.epsilon or asked.evaluation.epsilon
    if single:
        yield Item(
            question,
            asked.status("single_step_wins"),
            f"one step of length epsilon broke {asked.broke(_is('single-step'))} images that the "
            f"suite had left; {asked.saw(_is('single-step'))} were looked at",
            ATTACKS,
        )
        return
    within = [row for row in asked.of_kind("fgsm") if row.epsilon <= epsilon + 1e-12]
    many = [row for row in asked.of_kind(*ITERATIVE) if row.epsilon <= epsilon + 1e-12]
    if not within or not many:
        answer = "the suite holds no single step beside iterative attacks"
        yield Item(question, "not measured", answer, command=asked.command("standard"))
        return
    one, other = (min(rows, key=lambda row: row.score.accuracy) for rows in (within, many))
    yield Item(
        question,
        "yes" if other.score.accuracy <= one.score.accuracy else "no",
        f"{one.name} leaves {percent(one.score.accuracy)}, {other.name} "
        f"{percent(other.score.accuracy)}",
        ATTACKS,
    )


def _budget(asked: _Asked) -> Iterator[Item]:
    evaluation = asked.evaluation
    question = "Does a larger epsilon never help the defense?"
    fgsm = sorted(asked.of_kind("fgsm"), key=lambda row: row.epsilon)
    if evaluation.in_turn:
        yield Item(
            question,
            asked.status("epsilon_helps"),
            "one PGD on all images looked at"
            + "".join(f", {percent(left)} at {radius:.4g}" for radius, left in evaluation.doubts)
            + f"; a gain of more than {EPSILON_HELPS.suspect:g} points is a finding",
            FINDINGS,
        )
        yield Item(
            "Does accuracy fall to chance when epsilon is unbounded?",
            asked.status("unbounded"),
            "the same PGD with epsilon 1, where any image may become any other; more than "
            f"{UNBOUNDED_ABOVE_CHANCE:g} point above chance is a finding",
            FINDINGS,
        )
    else:
        if len(fgsm) > 1:
            rises = [
                100 * (larger.score.accuracy - smaller.score.accuracy)
                for smaller, larger in pairwise(fgsm)
            ]
            yield Item(
                question,
                "yes" if max(rises) <= EPSILON_HELPS.suspect else "no",
                f"FGSM at {len(fgsm)} radii; largest rise from one to the next "
                f"{max(0.0, max(rises)):.1f} points",
                CURVES,
            )
        else:
            answer = "no attack at several radii"
            yield Item(question, "not measured", answer, command=asked.command("standard"))
        yield Item(
            "Does accuracy fall to chance when epsilon is unbounded?",
            "not measured",
            "no attack without a bound",
            command=asked.command("standard"),
        )
    question = "Is accuracy shown against epsilon?"
    radii = len(evaluation.curve) or len(fgsm)
    if radii > 1:
        kind = "worst case" if evaluation.in_turn else "FGSM"
        yield Item(question, "yes", f"{kind} at {radii} radii", CURVES)
    else:
        several = ",".join(f"{evaluation.epsilon / part:.4g}" for part in (4, 2, 1))
        command = f"{asked.command('standard')} --epsilon {several}"
        yield Item(question, "not measured", "one radius only", command=command)


def _gradient(asked: _Asked) -> Iterator[Item]:
    found = [asked.evaluation.finding(name) for name in ("zero_gradient", "vanishing_gradient")]
    messages = [finding.message for finding in found if finding]
    yield Item(
        "Does the loss have a gradient everywhere?",
        asked.status("zero_gradient", "vanishing_gradient", "blind_gate"),
        "; ".join(messages) or "no image of those looked at has a gradient of exactly zero",
        FINDINGS,
    )


def _other_attacks(asked: _Asked) -> Iterator[Item]:
    square = asked.of_kind("square")
    question = "Do attacks without gradients find nothing more?"
    if square:
        yield Item(
            question,
            asked.status("black_box_wins"),
            f"Square with {square[0].num_steps:,} queries broke {asked.broke(_is('square'))} of "
            f"{asked.saw(_is('square'))} images that gradients had left",
            ATTACKS,
        )
    else:
        answer = "no attack without gradients"
        yield Item(question, "not measured", answer, command=asked.command("standard"))
    question = "Does random noise find nothing more?"
    if asked.of_kind("noise"):
        yield Item(
            question,
            asked.status("noise_wins"),
            f"random draws in the ball broke {asked.broke(_is('noise'))} images that the suite had "
            f"left; {asked.saw(_is('noise'))} were looked at",
            ATTACKS,
        )
    else:
        answer = "no random draws"
        yield Item(question, "not measured", answer, command=asked.command("quick"))
    question = "Are the attacks diverse, and do they choose their own step size?"
    tuned = sorted({row.kind for row in asked.of_kind(*SELF_TUNING)})
    if tuned:
        names = ", ".join(sorted({row.name for row in asked.of_kind(*SELF_TUNING)}))
        yield Item(question, "yes", f"{names}: cross-entropy, margins, boundaries", ATTACKS)
    else:
        answer = "no AutoAttack or other attack that tunes itself"
        yield Item(question, "not measured", answer, command=asked.command("standard"))


def _converged(asked: _Asked) -> Iterator[Item]:
    traces = asked.evaluation.traces
    question = "Does doubling the steps change nothing?"
    doubled = [row for row in asked.attacked if row.stream]
    pgd = sorted(asked.of_kind("pgd"), key=lambda row: row.num_steps)
    if doubled:
        yield Item(
            question,
            asked.status("not_converged"),
            f"{', '.join(row.name for row in doubled)}: new starts, {doubled[0].num_steps} steps; "
            f"broke {asked.broke(_repeated)} of {asked.saw(_repeated)} images that were left",
            ATTACKS,
        )
    elif len(pgd) > 1:
        fewer, more = pgd[-2:]
        drop = 100 * (fewer.score.accuracy - more.score.accuracy)
        yield Item(
            question,
            "not measured",
            f"{fewer.name} to {more.name} breaks {drop:.1f} points more, but nothing was doubled",
            CURVES,
            asked.command("full"),
        )
    else:
        answer = "no attack was repeated with more steps"
        yield Item(question, "not measured", answer, command=asked.command("full"))
    question = "Are there several random starts?"
    if traces is not None and traces.num_restarts > 1:
        ends = ", ".join(percent(row[-1]) for row in traces.accuracy)
        yield Item(
            question,
            "yes",
            f"PGD-{traces.num_steps} from {traces.num_restarts} starts on {traces.num_images} "
            f"images leaves {ends}",
            CURVES,
        )
    elif any(row.num_restarts > 1 for row in asked.attacked):
        row = max(asked.attacked, key=lambda row: row.num_restarts)
        yield Item(question, "yes", f"{row.name}: {row.num_restarts}", ATTACKS)
    else:
        answer = "every attack starts once"
        yield Item(question, "not measured", answer, command=asked.command("full"))


def _randomness(asked: _Asked) -> Iterator[Item]:
    random = asked.evaluation.finding("random")
    samples = max((row.eot_samples for row in asked.attacked), default=1)
    question = "Is randomness averaged over?"
    if random is not None:
        yield Item(question, "no", random.message, FINDINGS)
    elif samples > 1:
        answer = f"{samples} passes for each gradient; {MIN_EOT_SAMPLES} are needed"
        yield Item(question, "yes" if samples >= MIN_EOT_SAMPLES else "no", answer, ATTACKS)
    else:
        answer = "two passes over the same images agree: the model is deterministic"
        yield Item(question, "yes", answer, FINDINGS)


def _transfer(asked: _Asked) -> Iterator[Item]:
    diagnostics = asked.evaluation.diagnostics
    question = "Do images crafted elsewhere find nothing more?"
    if diagnostics is not None:
        alone = diagnostics.accuracy["mixture_attacked"][-1] or 0.0
        yield Item(
            question,
            "yes" if 100 * (alone - diagnostics.worst_case) <= VIEW_WINS.suspect else "no",
            f"crafted on each expert and on the mixture: {percent(diagnostics.worst_case)} stand "
            f"under all of them, {percent(alone)} under those of the mixture alone; other networks "
            "were not tried",
            ("experts", "Experts"),
        )
    else:
        yield Item(question, "not measured", "no other network to craft images on")
    yield Item(
        "Does an undefended network fall to the same attacks?",
        "not measured",
        f"train the defense plain on {asked.evaluation.data_name}, evaluate it alike, and put both "
        "in one table with dwf compare",
    )


def _how(asked: _Asked) -> Iterator[Item]:
    commit = asked.results.environment.get("commit")
    yield Item(
        "Are attacks, settings and code named?",
        "yes",
        "every row with its settings, the command, seeds"
        + (f", commit {commit}" if commit and asked.results.trained_here else ""),
        ("made", "How it was made"),
    )
    yield Item(
        "Are other threat models tried?",
        "not measured",
        f"only {norm_name(asked.evaluation.norm)} here: no patches, corruptions or other norms",
        command=None
        if asked.evaluation.norm == "l2"
        else f"{asked.command('standard')} --norm l2 --epsilon 0.5",
    )
    if asked.results.trained_here:
        yield Item(
            "Is the spread over training seeds known?",
            "not measured",
            f"one run, seed {asked.results.config.get('seed', 'not recorded')}, weights "
            f"{asked.evaluation.weights}; train other seeds, and put them in one table with "
            "dwf compare",
        )


QUESTIONS: Sequence[Callable[[_Asked], Iterator[Item]]] = (
    _threat_model,
    _clean,
    _per_image,
    _adaptive,
    _iterative,
    _budget,
    _gradient,
    _other_attacks,
    _converged,
    _randomness,
    _transfer,
    _how,
)


def _is(kind: str) -> Callable[[AttackRow], bool]:
    return lambda row: row.kind == kind


def _repeated(row: AttackRow) -> bool:
    return row.stream > 0
