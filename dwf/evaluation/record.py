"""The stored form of an evaluation: one dataclass for each part of ``evaluations/<name>.json``.
What is stored about a mixture is in :mod:`dwf.evaluation.mixture_record`.

``from_json`` of :mod:`dwf.typed_json` reads them and checks that no two numbers contradict each
other; ``to_json`` writes them. Accuracies and shares are fractions in [0, 1], radii and step sizes
are in units of the attacked image, times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from dwf.evaluation.mixture_record import Diagnostics, Experts, Gate, require_table
from dwf.typed_json import (
    NOT_IN_JSON,
    Count,
    Fraction,
    NonNegative,
    Place,
    from_json,
    require_object,
    to_json,
)

SCHEMA = 1
R = TypeVar("R", bound="EvaluationRecord")
Severity = Literal["note", "unproven", "suspect", "invalid"]
SEVERITIES: tuple[Severity, ...] = ("note", "unproven", "suspect", "invalid")
VERDICTS = ("VALID", "UNPROVEN", "SUSPECT", "INVALID")
# Files hold decimal text, so an accuracy equals its own quotient up to rounding.
ACCURACY_TOLERANCE = 1e-6


# -- scores ---------------------------------------------------------------------------------------


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion; (0, 1) when nothing was tried. Wilson, 1927."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Correct images out of ``num_images``, with a 95 % Wilson interval."""

    num_images: Count
    num_correct: Count
    accuracy: Fraction
    interval: tuple[Fraction, Fraction]

    def check(self, place: Place) -> None:
        """Raise unless accuracy and interval follow from the counts."""
        if self.num_images == 0:
            raise place.at("num_images").error("at least 1", 0)
        if self.num_correct > self.num_images:
            raise place.at("num_correct").error(f"at most {self.num_images}", self.num_correct)
        quotient = self.num_correct / self.num_images
        if abs(self.accuracy - quotient) > ACCURACY_TOLERANCE:
            expected = f"{self.num_correct}/{self.num_images} = {quotient:.6f}"
            raise place.at("accuracy").error(expected, self.accuracy)
        low, high = self.interval
        if not low - ACCURACY_TOLERANCE <= self.accuracy <= high + ACCURACY_TOLERANCE:
            raise place.at("interval").error(f"two numbers around {self.accuracy:g}", [low, high])


def score(correct: Tensor) -> dict[str, Any]:
    """The fields of a :class:`Score` from a mask [N] bool; N is at least 1."""
    num_correct, num_images = int(correct.sum()), len(correct)
    return {
        "num_images": num_images,
        "num_correct": num_correct,
        "accuracy": num_correct / num_images,
        "interval": wilson_interval(num_correct, num_images),
    }


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """The images whose searches an attack left early, because they promised nothing.

    Attributes:
        num_images: how many.
        num_controls, num_fallen: of these, drawn to be searched to the end all the same; and how
            many of the controls fell. If one falls, all are searched to the end.
        num_left: of these, never searched to the end.
    """

    num_images: Count
    num_controls: Count
    num_fallen: Count
    num_left: Count


@dataclass(frozen=True, kw_only=True)
class AttackRow(Score):
    """One line of the table: an attack, its settings, its score and its cost.

    In a suite of attacks in turn the score counts what stands after this attack. In the paper's
    grid every attack sees all images. Costs are what this row added to the rows before it.

    Attributes:
        kind: which attack; see :class:`dwf.evaluation.suites.AttackSpec`, as for the settings.
        same_as: the row whose result this one shares, or None.
        num_attacked: how many images it saw; None where every attack sees all.
        broken_by: how many images each part of the attack broke; for "views" only.
        given_up: the images given up; None of attacks that search every image to the end.
        num_forwards, num_backwards: passes, counted per image.
        correct: [N] bool, the outcome of each image; beside the JSON, in the .npz.
    """

    name: str
    kind: str
    epsilon: NonNegative = 0.0
    step_size: NonNegative | None = None
    num_steps: Count
    num_restarts: Count
    random_start: bool
    eot_samples: Count
    norm: str = "linf"
    stream: Count = 0
    num_non_finite: Count
    seconds: NonNegative
    num_forwards: Count
    num_backwards: Count
    same_as: str | None = None
    num_attacked: Count | None = None
    broken_by: dict[str, Count] = field(default_factory=dict)
    given_up: GivenUp | None = None
    correct: Tensor | None = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)


@dataclass(frozen=True, kw_only=True)
class WorstCase(Score):
    """Images that every one of the named attacks left correct.

    ``epsilon`` is the largest radius of these attacks; None in files that do not say.
    """

    epsilon: NonNegative | None = None
    attacks: list[str]


@dataclass(frozen=True, kw_only=True)
class Certified(Score):
    """Images that cannot fall within ``epsilon``, by proof: a bound from below.

    Attributes:
        of: "model", whose robust accuracy is no lower; or "smoothed model", another classifier.
        clean: accuracy of the smoothed model without an attack; None for the model.
    """

    method: str
    epsilon: NonNegative
    of: Literal["model", "smoothed model"] = "model"
    clean: Fraction | None = None
    seconds: NonNegative = 0.0


@dataclass(frozen=True)
class AtRadius:
    """What one PGD leaves of all images at a radius."""

    epsilon: NonNegative
    accuracy: Fraction


# -- findings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One reason to doubt a result.

    Attributes:
        name: which, the same in every version.
        severity: "note"; "unproven", too little was tried to call the number VALID; "suspect" or
            "invalid".
        measured, limit: the number and what it went beyond, in points unless the message says
            otherwise; None where there is no finite number.
        num_images: images that show it, or 0 where it is not about images.
        sample_indices: the first 20 of them, by their place in the data set.
        remedy: what to do.
    """

    name: str
    severity: Severity
    message: str
    remedy: str = ""
    measured: float | None = None
    limit: float | None = None
    num_images: Count = 0
    sample_indices: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        assert self.severity in SEVERITIES, self.severity
        for name in ("measured", "limit"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):  # JSON has no such number
                object.__setattr__(self, name, None)

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.severity}: {self.name}: {self.message}{remedy}"


def verdict(findings: Iterable[Finding]) -> str:
    """VALID, UNPROVEN, SUSPECT or INVALID: the worst severity among the findings."""
    return VERDICTS[max((SEVERITIES.index(finding.severity) for finding in findings), default=0)]


# -- how the attack went --------------------------------------------------------------------------


@dataclass(frozen=True)
class LossOverSteps:
    """Cross-entropy at each of S + 1 states, over images and restarts: mean, 10 and 90 % quantile.

    None where no loss is finite.
    """

    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Traces:
    """PGD watched after every step; :func:`dwf.evaluation.traces.trace` measures it.

    Attributes:
        accuracy: [R][S + 1], share of images that are right at every state so far, of this restart
            and of all before it, so it never rises.
        experts: names of the experts with heatmaps; empty without.
    """

    num_images: Count
    epsilon: NonNegative
    norm: str = "linf"
    step_size: NonNegative
    num_steps: Count
    num_restarts: Count
    eot_samples: Count = 1
    seed: int = 0
    loss: LossOverSteps
    accuracy: list[list[Fraction]]
    experts: list[str] = field(default_factory=list)
    seconds: NonNegative = 0.0

    def check(self, place: Place) -> None:
        """Raise unless loss and accuracy have one value for each state."""
        for key in ("mean", "low", "high"):
            values = getattr(self.loss, key)
            place.at("loss").at(key).require_length(values, self.num_steps + 1)
        require_table(self.accuracy, self.num_restarts, self.num_steps + 1, place.at("accuracy"))


# -- the whole ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataFacts:
    """Which images were judged."""

    name: str
    split: str
    num_images: Count
    digest: str
    notes: list[str]
    class_names: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Everything that ``evaluations/<name>.json`` holds.

    Attributes:
        suite: name of the results: the suite, and what else differs from `dwf eval`'s defaults.
        protocol: "pixels", or "paper-compat" for attacks on normalized images.
        clamp: "pixels", or what normalized images are clamped to: "unit" or "none".
        epsilon: the headline's radius; the largest where there are several.
        attack_path: what attacks searched by: autograd, or a faster plan of the model.
        num_parameters: None for a callable that is no module.
        flop_per_image: of one forward pass; None in files from before this was counted.
        worst_case: per image over all attacks within ``epsilon``; ``worst_case_all`` over all rows.
        curve: worst cases at ascending radii, the last at ``epsilon``; empty in the paper's grid.
        doubts: one PGD at radii ascending to 1; empty in the paper's grid.
        certified: bounds from below, for networks of a kind that has them.
        weights: which weights of a run were judged: "last", "best", "ema", or "as given".
        run: name of the run folder, if there is one.
        environment: versions, hardware and command line.
    """

    suite: str
    protocol: str
    clamp: str | None = None
    data: DataFacts
    seed: Count
    bn_mode: str
    precision: str
    norm: Literal["linf", "l2"] = "linf"
    epsilon: NonNegative
    attack_path: str | None = None
    num_parameters: Count | None = None
    flop_per_image: Count | None = None
    seconds: NonNegative
    model: str
    weights: str
    run: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    attacks: list[AttackRow]
    worst_case: WorstCase
    worst_case_all: WorstCase
    curve: list[WorstCase] = field(default_factory=list)
    doubts: list[AtRadius] = field(default_factory=list)
    certified: list[Certified] = field(default_factory=list)
    findings: list[Finding]
    gate: Gate | None = None
    experts: Experts | None = None
    diagnostics: Diagnostics | None = None
    traces: Traces | None = None

    @property
    def verdict(self) -> str:
        """VALID, UNPROVEN, SUSPECT or INVALID: the worst of the findings."""
        return verdict(self.findings)

    @property
    def clean(self) -> AttackRow | None:
        """The row without an attack, if the suite holds one."""
        return next((row for row in self.attacks if row.kind == "clean"), None)

    @property
    def num_images(self) -> int:
        """How many images were judged."""
        return self.data.num_images

    @property
    def in_turn(self) -> bool:
        """Whether each attack saw only what those before it had left."""
        return bool(self.curve)

    @property
    def pixels(self) -> bool:
        """Whether radii are in pixel units of [0, 1]."""
        return self.protocol == "pixels"

    @property
    def of_255(self) -> bool:
        """Whether radii mean brightness, and so may be shown as k/255."""
        return self.pixels and self.norm == "linf"

    def finding(self, name: str) -> Finding | None:
        """The finding of this name, or None."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def class_name(self, k: int) -> str:
        """The name of class k; its number where the data set gives no names."""
        names = self.data.class_names
        return names[k] if 0 <= k < len(names) else str(k)

    def check(self, place: Place) -> None:
        """Raise unless worst cases and curve agree with the rows."""
        if not self.attacks:
            raise place.at("attacks").error("at least one row", [])
        self._check_worst_case(self.worst_case, place.at("worst_case"))
        self._check_worst_case(self.worst_case_all, place.at("worst_case_all"))
        for i, part in enumerate(self.curve):
            self._check_worst_case(part, place.at("curve").at(i))
        self._check_curve(place.at("curve"))

    def _check_worst_case(self, worst: WorstCase, place: Place) -> None:
        rows = {row.name: row for row in self.attacks}
        for i, name in enumerate(worst.attacks):
            if name not in rows:
                raise place.at("attacks").at(i).error(f"one of {list(rows)}", name)
            row = rows[name]
            if row.num_images == worst.num_images and row.num_correct < worst.num_correct:
                expected = f"at most the {row.num_correct} of {name!r}"
                raise place.at("num_correct").error(expected, worst.num_correct)

    def _check_curve(self, place: Place) -> None:
        """Radii ascend, no larger one leaves more images, and the last is the headline."""
        for i, (part, larger) in enumerate(pairwise(self.curve), start=1):
            if part.epsilon is None or larger.epsilon is None or part.epsilon >= larger.epsilon:
                expected = f"a radius above {part.epsilon}"
                raise place.at(i).at("epsilon").error(expected, larger.epsilon)
            if larger.num_correct > part.num_correct:
                expected = f"at most the {part.num_correct} of a smaller radius"
                raise place.at(i).at("num_correct").error(expected, larger.num_correct)
        headline = self.worst_case.num_correct
        if self.curve and self.curve[-1].num_correct != headline:
            expected = f"the {headline} of worst_case at the largest radius"
            raise place.error(expected, self.curve[-1].num_correct)

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        values: dict[str, Any] = to_json(self)
        return {"schema": SCHEMA, **values, "verdict": self.verdict}

    @classmethod
    def from_json(cls: type[R], value: object, file: Path) -> R:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: with the key in ``file`` that is missing, impossible or contradicts
                another.
        """
        place = Place(file)
        schema = require_object(value, place).get("schema")
        if schema != SCHEMA:
            raise place.at("schema").error(f"{SCHEMA}, which this version reads", schema)
        found = from_json(cls, value, place)
        stored = require_object(value, place).get("verdict", found.verdict)
        if stored != found.verdict:
            expected = f"{found.verdict}, as its findings say"
            raise place.at("verdict").error(expected, stored)
        return found
