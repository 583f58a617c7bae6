"""Answer the checklist for evaluating robustness from what was measured, or say "not measured".

Each answer gives its numbers and where on the page they stand; one that was not measured names the
command that measures it. Questions about images are answered by the outcomes of the same images.
Limits come from `dwf.evaluation.limits`.

Source: Carlini et al., arXiv:1902.06705, the checklist at its end.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from dwf.attacks.table import ATTACKS
from dwf.evaluation.limits import (
    EPSILON_HELPS,
    MIN_EOT_SAMPLES,
    SMALL_SAMPLE,
    UNBOUNDED_ABOVE_CHANCE,
)
from dwf.evaluation.record import AttackRow, EvaluationRecord
from dwf.report.results import Results
from dwf.report.words import norm_name, percent, radius

# attacks of many steps in the paper's grid, and attacks that choose their own step size
ITERATIVE = ("pgd", "multi_start", "adaptive")
SELF_TUNING = tuple(key for key, attack in ATTACKS.items() if attack.needs_gradients)
YES, NO, NOT_MEASURED = "yes", "no", "not measured"
# sections of the page: id and title
IN_RESULT = ("result", "Result")
IN_FINDINGS = ("findings", "Findings")
IN_ATTACKS = ("attacks", "Attacks")
IN_CURVES = ("curves", "Curves")
IN_EXPERTS = ("experts", "Experts")
IN_MADE = ("made", "How it was made")


@dataclass(frozen=True)
class Answer:
    """``status`` is YES, NO (a reason for doubt) or NOT_MEASURED; ``text`` gives the numbers.

    ``where`` is (id, title) of a section of the page; ``command`` would measure what was not.
    """

    status: str
    text: str
    where: tuple[str, str] | None = None
    command: str | None = None


@dataclass(frozen=True)
class Item:
    """One question of the checklist with its answer."""

    question: str
    answer: Answer


@dataclass(frozen=True)
class InTurn:
    """A row of attacks in turn: how many images it saw, and how many of them it broke."""

    row: AttackRow
    saw: int
    broke: int


def in_turn(evaluation: EvaluationRecord) -> list[InTurn]:
    """Rows of attacks in turn; a row broke what stood before it and not after it."""
    before = [evaluation.num_images, *(row.num_correct for row in evaluation.attacks)]
    return [
        InTurn(
            row=row,
            saw=stood if row.num_attacked is None else row.num_attacked,
            broke=stood - row.num_correct,
        )
        for stood, row in zip(before, evaluation.attacks, strict=False)
    ]


def checklist(results: Results) -> list[Item]:
    """All questions that apply, in the order of ``QUESTIONS``."""
    asked = _Asked(results)
    answers = ((question, answer(asked)) for question, answer in QUESTIONS.items())
    return [Item(question, answer) for question, answer in answers if answer is not None]


class _Asked:
    """An evaluation, and the look-ups that several questions share."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.evaluation = results.evaluation
        self.attacked = [row for row in self.evaluation.attacks if row.kind != "clean"]
        self.turns = in_turn(self.evaluation) if self.evaluation.in_turn else []

    def of_kind(self, *kinds: str) -> list[AttackRow]:
        return [row for row in self.attacked if row.kind in kinds]

    def turns_of(self, rows: list[AttackRow]) -> tuple[int, int]:
        """How many images these rows saw at most, and how many they broke together."""
        turns = [turn for turn in self.turns if turn.row in rows]
        return max((turn.saw for turn in turns), default=0), sum(turn.broke for turn in turns)

    def unless(self, *findings: str) -> str:
        """NO where one of these findings is more than a note, else YES."""
        held = [self.evaluation.finding(name) for name in findings]
        return NO if any(f and f.severity != "note" for f in held) else YES

    def unless_broke(self, count: int, *findings: str) -> str:
        """NO where images fell, however few, or a finding holds: the text beside it names them."""
        return NO if count else self.unless(*findings)

    def not_measured(self, text: str, suite: str) -> Answer:
        """The answer that names the suite that would measure it."""
        return Answer(NOT_MEASURED, text, command=self.command(suite))

    def command(self, suite: str) -> str:
        """The command that evaluates the same model with a suite."""
        if self.results.trained_here:
            words = ["dwf", "eval", str(self.results.run)]
        else:
            words = ["dwf", "eval", "--model", str(self.results.config.get("model"))]
            words += ["--data", self.evaluation.data.name, "--out", str(self.results.run)]
        return shlex.join([*words, "--suite", suite])


def _threat_model(asked: _Asked) -> Answer:
    evaluation = asked.evaluation
    epsilon = radius(evaluation.epsilon, of_255=evaluation.of_255)
    text = (
        f"{norm_name(evaluation.norm)} ball, epsilon {epsilon}, white box: the attacker knows "
        "weights, gate and experts"
    )
    if evaluation.pixels:
        return Answer(YES, text, IN_RESULT)
    return Answer(NO, f"{text}; but on normalized images, not on pixels", IN_RESULT)


def _clean(asked: _Asked) -> Answer:
    clean = asked.evaluation.clean
    if clean is None:
        return Answer(NOT_MEASURED, "the suite holds no clean row")
    return Answer(YES, percent(clean.accuracy, clean.num_images), IN_RESULT)


def _per_image(asked: _Asked) -> Answer:
    worst = asked.evaluation.worst_case
    low, high = worst.interval
    text = (
        f"{worst.num_correct} of {worst.num_images} images stand under every one of "
        f"{len(worst.attacks)} rows; 95 % Wilson interval {percent(low)} to {percent(high)}"
    )
    return Answer(YES, text, IN_RESULT)


def _enough_images(asked: _Asked) -> Answer:
    count = asked.evaluation.num_images
    text = f"{count:,}; below {SMALL_SAMPLE:,} the interval is wider than +-3 points"
    return Answer(YES if count >= SMALL_SAMPLE else NO, text, IN_RESULT)


def _adapted(asked: _Asked) -> Answer:
    views = asked.of_kind("views")
    if views:
        found: dict[str, int] = {}
        for row in views:
            for view, count in row.broken_by.items():
                found[view] = found.get(view, 0) + count
        shown = ", ".join(f"{view} {count}" for view, count in found.items()) or "none"
        text = (
            "the mixture is also attacked through its experts, its gate and smooth stand-ins for "
            f"it; images that only these broke: {shown}"
        )
        return Answer(asked.unless("view_wins"), text, IN_ATTACKS)
    if asked.evaluation.in_turn:
        text = "the model shows no experts; it is differentiated end to end, nothing of it left out"
        return Answer(YES, text, IN_ATTACKS)
    text = (
        "the model was attacked as a whole only; of a mixture, attacks through its experts and its "
        "gate are missing"
    )
    return asked.not_measured(text, "standard")


def _iterative(asked: _Asked) -> Answer:
    single = asked.of_kind("single-step")
    if single:
        saw, broke = asked.turns_of(single)
        text = (
            f"one step of length epsilon broke {broke} images that the suite had left; {saw} were "
            "looked at"
        )
        return Answer(asked.unless_broke(broke, "single_step_wins"), text, IN_ATTACKS)
    epsilon = asked.evaluation.worst_case.epsilon or asked.evaluation.epsilon
    within = [row for row in asked.of_kind("fgsm") if row.epsilon <= epsilon + 1e-12]
    many = [row for row in asked.of_kind(*ITERATIVE) if row.epsilon <= epsilon + 1e-12]
    if not within or not many:
        text = "the suite holds no single step beside iterative attacks"
        return asked.not_measured(text, "standard")
    one, other = (min(rows, key=lambda row: row.accuracy) for rows in (within, many))
    text = f"{one.name} leaves {percent(one.accuracy)}, {other.name} {percent(other.accuracy)}"
    return Answer(YES if other.accuracy <= one.accuracy else NO, text, IN_ATTACKS)


def _larger_epsilon(asked: _Asked) -> Answer:
    if asked.evaluation.in_turn:
        left = "".join(
            f", {percent(one.accuracy)} at {one.epsilon:.4g}" for one in asked.evaluation.doubts
        )
        text = (
            f"one PGD on all images looked at{left}; a gain of more than {EPSILON_HELPS.suspect:g} "
            "points is a finding"
        )
        accuracies = [one.accuracy for one in asked.evaluation.doubts]
        rises = any(larger > smaller for smaller, larger in pairwise(accuracies))
        return Answer(NO if rises else asked.unless("epsilon_helps"), text, IN_FINDINGS)
    fgsm = sorted(asked.of_kind("fgsm"), key=lambda row: row.epsilon)
    if len(fgsm) < 2:
        return asked.not_measured("no attack at several radii", "standard")
    rise = max(100 * (larger.accuracy - smaller.accuracy) for smaller, larger in pairwise(fgsm))
    text = (
        f"FGSM at {len(fgsm)} radii; largest rise from one to the next {max(0.0, rise):.1f} points"
    )
    return Answer(YES if rise <= 0 else NO, text, IN_CURVES)


def _unbounded(asked: _Asked) -> Answer:
    if not asked.evaluation.in_turn:
        return asked.not_measured("no attack without a bound", "standard")
    text = (
        "the same PGD with epsilon 1, where any image may become any other; more than "
        f"{UNBOUNDED_ABOVE_CHANCE:g} point above chance is a finding"
    )
    return Answer(asked.unless("unbounded"), text, IN_FINDINGS)


def _curve(asked: _Asked) -> Answer:
    evaluation = asked.evaluation
    radii = len(evaluation.curve) or len(asked.of_kind("fgsm"))
    if radii > 1:
        kind = "worst case" if evaluation.in_turn else "FGSM"
        return Answer(YES, f"{kind} at {radii} radii", IN_CURVES)
    several = ",".join(f"{evaluation.epsilon / part:.4g}" for part in (4, 2, 1))
    command = f"{asked.command('standard')} --epsilon {several}"
    return Answer(NOT_MEASURED, "one radius only", command=command)


def _gradient(asked: _Asked) -> Answer:
    names = ("zero_gradient", "vanishing_gradient")
    found = [asked.evaluation.finding(name) for name in names]
    messages = [finding.message for finding in found if finding]
    text = "; ".join(messages) or "no image of those looked at has a gradient of exactly zero"
    return Answer(asked.unless(*names, "blind_gate"), text, IN_FINDINGS)


def _without_gradients(asked: _Asked) -> Answer:
    square = asked.of_kind("square")
    if not square:
        return asked.not_measured("no attack without gradients", "standard")
    saw, broke = asked.turns_of(square)
    text = (
        f"Square with {square[0].num_steps:,} queries broke {broke} of {saw} images that gradients "
        "had left"
    )
    return Answer(asked.unless_broke(broke, "black_box_wins"), text, IN_ATTACKS)


def _noise(asked: _Asked) -> Answer:
    noise = asked.of_kind("noise")
    if not noise:
        return asked.not_measured("no random draws", "quick")
    saw, broke = asked.turns_of(noise)
    text = (
        f"random draws in the ball broke {broke} images that the suite had left; {saw} were "
        "looked at"
    )
    return Answer(asked.unless_broke(broke, "noise_wins"), text, IN_ATTACKS)


def _diverse(asked: _Asked) -> Answer:
    names = sorted({row.name for row in asked.of_kind(*SELF_TUNING)})
    if not names:
        text = "no AutoAttack or other attack that tunes itself"
        return asked.not_measured(text, "standard")
    return Answer(YES, f"{', '.join(names)}: cross-entropy, margins, boundaries", IN_ATTACKS)


def _doubled(asked: _Asked) -> Answer:
    doubled = [row for row in asked.attacked if row.stream]
    if doubled:
        saw, broke = asked.turns_of(doubled)
        text = (
            f"{', '.join(row.name for row in doubled)}: new starts, {doubled[0].num_steps} steps; "
            f"broke {broke} of {saw} images that were left"
        )
        return Answer(asked.unless_broke(broke, "not_converged"), text, IN_ATTACKS)
    pgd = sorted(asked.of_kind("pgd"), key=lambda row: row.num_steps)
    if len(pgd) < 2:
        return asked.not_measured("no attack was repeated with more steps", "full")
    fewer, more = pgd[-2:]
    drop = 100 * (fewer.accuracy - more.accuracy)
    text = f"{fewer.name} to {more.name} breaks {drop:.1f} points more, but nothing was doubled"
    return Answer(NOT_MEASURED, text, IN_CURVES, asked.command("full"))


def _starts(asked: _Asked) -> Answer:
    traces = asked.evaluation.traces
    if traces is not None and traces.num_restarts > 1:
        ends = ", ".join(percent(row[-1]) for row in traces.accuracy)
        text = (
            f"PGD-{traces.num_steps} from {traces.num_restarts} starts on {traces.num_images} "
            f"images leaves {ends}"
        )
        return Answer(YES, text, IN_CURVES)
    most = max(asked.attacked, key=lambda row: row.num_restarts, default=None)
    if most is not None and most.num_restarts > 1:
        return Answer(YES, f"{most.name}: {most.num_restarts}", IN_ATTACKS)
    return asked.not_measured("every attack starts once", "full")


def _randomness(asked: _Asked) -> Answer:
    random = asked.evaluation.finding("random")
    if random is not None:
        return Answer(NO, random.message, IN_FINDINGS)
    samples = max((row.eot_samples for row in asked.attacked), default=1)
    if samples > 1:
        text = f"{samples} passes for each gradient; {MIN_EOT_SAMPLES} are needed"
        return Answer(YES if samples >= MIN_EOT_SAMPLES else NO, text, IN_ATTACKS)
    text = "two passes over the same images agree: the model is deterministic"
    return Answer(YES, text, IN_FINDINGS)


def _transfer(asked: _Asked) -> Answer:
    diagnostics = asked.evaluation.diagnostics
    if diagnostics is None:
        return Answer(NOT_MEASURED, "no other network to craft images on")
    rows = asked.of_kind("experts")
    if rows:
        saw, broke = asked.turns_of(rows)
        text = (
            f"images crafted on each expert broke {broke} of {saw} images that the suite had left; "
            "other networks were not tried"
        )
        return Answer(asked.unless_broke(broke), text, IN_ATTACKS)
    alone = diagnostics.accuracy.mixture_attacked[-1]
    gain = 100 * (alone - diagnostics.worst_case)
    text = (
        f"{percent(diagnostics.worst_case)} stand under images crafted on each expert and on the "
        f"mixture, {percent(alone)} under images crafted on the mixture alone; other networks were "
        "not tried"
    )
    return Answer(YES if gain <= 0 else NO, text, IN_EXPERTS)


def _undefended(asked: _Asked) -> Answer:
    text = (
        f"train the defense plain on {asked.evaluation.data.name}, evaluate it alike, and put both "
        "in one table with dwf compare"
    )
    return Answer(NOT_MEASURED, text)


def _named(asked: _Asked) -> Answer:
    commit = asked.results.environment.get("commit") if asked.results.trained_here else None
    text = "every row with its settings, the command, seeds"
    return Answer(YES, f"{text}, commit {commit}" if commit else text, IN_MADE)


def _other_threat_models(asked: _Asked) -> Answer:
    norm = asked.evaluation.norm
    text = f"only {norm_name(norm)} here: no patches, corruptions or other norms"
    other = None if norm == "l2" else f"{asked.command('standard')} --norm l2 --epsilon 0.5"
    return Answer(NOT_MEASURED, text, command=other)


def _training_seeds(asked: _Asked) -> Answer | None:
    if not asked.results.trained_here:
        return None
    text = (
        f"one run, seed {asked.results.config.get('seed', 'not recorded')}, weights "
        f"{asked.evaluation.weights}; train other seeds, and put them in one table with "
        "dwf compare"
    )
    return Answer(NOT_MEASURED, text)


# In the order in which a reader asks; an answer of None means that a question does not apply.
QUESTIONS: Mapping[str, Callable[[_Asked], Answer | None]] = {
    "Is the threat model precise?": _threat_model,
    "Is accuracy without an attack reported?": _clean,
    "Is success counted per image, over all attacks, with an interval?": _per_image,
    "Are there enough images?": _enough_images,
    "Are attacks adapted to the defense?": _adapted,
    "Do iterative attacks beat a single step?": _iterative,
    "Does a larger epsilon never help the defense?": _larger_epsilon,
    "Does accuracy fall to chance when epsilon is unbounded?": _unbounded,
    "Is accuracy shown against epsilon?": _curve,
    "Does the loss have a gradient everywhere?": _gradient,
    "Do attacks without gradients find nothing more?": _without_gradients,
    "Does random noise find nothing more?": _noise,
    "Are the attacks diverse, and do they choose their own step size?": _diverse,
    "Does doubling the steps change nothing?": _doubled,
    "Are there several random starts?": _starts,
    "Is randomness averaged over?": _randomness,
    "Do images crafted elsewhere find nothing more?": _transfer,
    "Does an undefended network fall to the same attacks?": _undefended,
    "Are attacks, settings and code named?": _named,
    "Are other threat models tried?": _other_threat_models,
    "Is the spread over training seeds known?": _training_seeds,
}
