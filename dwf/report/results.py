"""The stored results of one run, read and checked before anything is drawn.

Every value passes through a ``Record``, so a missing, mistyped or impossible one becomes a
CheckpointError that names the file and the key. What an evaluation may leave out (gate, experts,
example images, metrics; all that older ones do not have) becomes None or empty, never an error.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwf.checks import CheckpointError
from dwf.evaluation.record import SEVERITIES, verdict
from dwf.files import read_json

SCHEMA = 1
NORMS = ("linf", "l2")
# stored as decimal text, so an accuracy equals its own quotient up to rounding
ACCURACY_TOLERANCE = 1e-6


class Record:
    """A JSON object that knows where it came from and checks each value it hands out."""

    def __init__(self, value: object, file: Path, key: str = "") -> None:
        self.file, self.key = file, key
        if not isinstance(value, dict):
            raise self.error("", "an object", value)
        self.fields: dict[str, Any] = value

    def error(self, key: str, expected: str, found: object) -> CheckpointError:
        """The error for a value of this record; an empty key means the record itself."""
        path = ".".join(part for part in (self.key, key) if part) or "content"
        return CheckpointError(f"{self.file}: {path}: expected {expected}, found {found!r:.60}")

    def _value(self, key: str, expected: str) -> Any:
        if key not in self.fields:
            path = self._path(key)
            raise CheckpointError(f"{self.file}: {path}: missing, expected {expected}")
        return self.fields[key]

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.fields.get(key) is not None

    def text(self, key: str) -> str:
        value = self._value(key, "a string")
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.error(key, f"one of {list(choices)}", value)
        return value

    def flag(self, key: str) -> bool:
        value = self._value(key, "true or false")
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def count(self, key: str) -> int:
        value = self._value(key, "an integer of 0 or more")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "an integer of 0 or more", value)
        return value

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        return self._number(self._value(key, "a number"), key, low, high)

    def fraction(self, key: str) -> float:
        return self.number(key, 0.0, 1.0)

    def optional_number(
        self, key: str, low: float = -math.inf, high: float = math.inf
    ) -> float | None:
        """A number, or None where the key is missing or null."""
        return self.number(key, low, high) if self.has(key) else None

    def _number(self, value: object, key: str, low: float, high: float) -> float:
        expected = "a finite number"
        if not math.isinf(low):
            expected += f" of {low:g} or more" if math.isinf(high) else f" in [{low:g}, {high:g}]"
        # an integer too long for a float is as impossible as NaN
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise self.error(key, expected, value)
        if not (math.isfinite(value) and low <= value <= high):
            raise self.error(key, expected, value)
        return float(value)

    def fractions(
        self, key: str, length: int, *, optional: bool = False, low: float = 0.0
    ) -> list[float | None]:
        """A list of ``length`` numbers in [low, 1]; ``optional`` lets null stand for "no such
        image"."""
        values = self._list(key)
        if len(values) != length:
            raise self.error(key, f"{length} values", f"{len(values)} values")
        return [
            None if optional and value is None else self._number(value, f"{key}[{i}]", low, 1.0)
            for i, value in enumerate(values)
        ]

    def table(
        self,
        key: str,
        num_rows: int,
        num_columns: int,
        *,
        optional: bool = False,
        low: float = 0.0,
    ) -> list[list[float | None]]:
        """A list of ``num_rows`` lists of ``num_columns`` numbers; see :meth:`fractions`."""
        rows = self._list(key)
        if len(rows) != num_rows:
            raise self.error(key, f"{num_rows} rows", f"{len(rows)} rows")
        table = Record({f"[{i}]": row for i, row in enumerate(rows)}, self.file, self._path(key))
        return [
            table.fractions(name, num_columns, optional=optional, low=low) for name in table.fields
        ]

    def counts(self, key: str) -> list[int]:
        """A list of integers of 0 or more."""
        values = self._list(key)
        table = Record({f"{key}[{i}]": v for i, v in enumerate(values)}, self.file, self.key)
        return [table.count(name) for name in table.fields]

    def optional_numbers(self, key: str, length: int) -> list[float | None]:
        """A list of ``length`` finite numbers or nulls."""
        values = self._list(key)
        if len(values) != length:
            raise self.error(key, f"{length} values", f"{len(values)} values")
        table = Record({f"{key}[{i}]": v for i, v in enumerate(values)}, self.file, self.key)
        return [table.optional_number(name) for name in table.fields]

    def texts(self, key: str) -> list[str]:
        values = self._list(key)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(f"{key}[{i}]", "a string", value)
        return values

    def record(self, key: str) -> Record:
        return Record(self._value(key, "an object"), self.file, self._path(key))

    def records(self, key: str) -> list[Record]:
        values = self._list(key)
        return [Record(v, self.file, f"{self._path(key)}[{i}]") for i, v in enumerate(values)]

    def _list(self, key: str) -> list[Any]:
        value = self._value(key, "a list")
        if not isinstance(value, list):
            raise self.error(key, "a list", value)
        return value

    def _path(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key else key


@dataclass(frozen=True)
class Score:
    """Correct images out of ``num_images``, with a 95 % interval; fractions."""

    num_correct: int
    num_images: int
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class AttackRow:
    """One line of the table. ``same_as`` names the row whose result this one shares.

    Of attacks in turn the score is what stands after this one, ``num_attacked`` how many images it
    saw (None where every attack sees all), ``broken_by`` how many each view of a mixture broke, and
    ``stream`` is not 0 where an attack is repeated with other starts.
    """

    name: str
    kind: str
    epsilon: float
    step_size: float | None
    num_steps: int
    num_restarts: int
    random_start: bool
    eot_samples: int
    score: Score
    num_non_finite: int
    seconds: float
    num_forwards: int
    num_backwards: int
    same_as: str | None
    stream: int
    num_attacked: int | None
    broken_by: dict[str, int]


@dataclass(frozen=True)
class WorstCase:
    """Images that every listed attack left correct. ``epsilon`` is None over all rows."""

    epsilon: float | None
    score: Score
    attacks: list[str]


@dataclass(frozen=True)
class Finding:
    """``measured`` went beyond ``limit``; both None where there is no number."""

    name: str
    severity: str
    message: str
    remedy: str
    measured: float | None
    limit: float | None
    num_images: int
    sample_indices: list[int]


@dataclass(frozen=True)
class Gate:
    """Mean gate weights per attack, [class][expert]; None where a class has no image."""

    attacks: list[str]
    experts: list[str]
    mean_weights: dict[str, list[list[float | None]]]
    entropy: dict[str, float]


@dataclass(frozen=True)
class Experts:
    """Accuracy of each expert alone on the images crafted against the whole model."""

    names: list[str]
    accuracy: dict[str, list[float | None]]


@dataclass(frozen=True)
class GateLoad:
    """Mean entropy in nats; of each expert the mean weight, and how often it is preferred."""

    entropy: float
    mean_weight: list[float | None]
    top_share: list[float | None]
    dead: list[str]


@dataclass(frozen=True)
class Diagnostics:
    """Experts and gate under attack; as `dwf.evaluation.diagnostics.diagnose` wrote them."""

    num_images: int
    epsilon: float
    step_size: float
    num_steps: int
    names: list[str]
    accuracy: dict[str, list[float | None]]
    transfer: list[list[float | None]]
    worst_case: float
    clean: GateLoad
    attacked: GateLoad
    routing_flips: float
    flips_again: float
    gradient_cosine: list[list[float | None]]

    @property
    def dead(self) -> list[str]:
        return self.clean.dead


@dataclass(frozen=True)
class Traces:
    """PGD from ``num_restarts`` starts, watched at ``num_steps + 1`` states; see
    `dwf.evaluation.traces.trace`."""

    num_images: int
    epsilon: float
    step_size: float
    num_steps: int
    num_restarts: int
    loss: dict[str, list[float | None]]
    accuracy: list[list[float | None]]


@dataclass(frozen=True)
class Evaluation:
    """One ``evaluations/<suite>.json``."""

    file: Path
    suite: str
    protocol: str
    clamp: str | None
    weights: str
    model: str
    num_parameters: int | None  # None of what is no module
    flop_per_image: int | None  # None in evaluations from before this was counted
    data_name: str
    data_split: str
    data_digest: str
    data_notes: list[str]
    class_names: list[str]
    num_images: int
    seed: int
    bn_mode: str
    precision: str
    attack_path: str | None
    norm: str
    epsilon: float
    attacks: list[AttackRow]
    worst_case: WorstCase
    worst_case_all: WorstCase
    curve: list[WorstCase]  # of attacks in turn, one for each radius
    doubts: list[tuple[float, float]]  # radii, ascending to 1, and what one PGD leaves at each
    verdict: str
    findings: list[Finding]
    gate: Gate | None
    experts: Experts | None
    diagnostics: Diagnostics | None
    traces: Traces | None
    environment: dict[str, Any]
    seconds: float

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
        return next((finding for finding in self.findings if finding.name == name), None)

    @property
    def clean(self) -> AttackRow | None:
        """The row without an attack, if the suite holds one."""
        return next((row for row in self.attacks if row.kind == "clean"), None)

    def class_name(self, k: int) -> str:
        """The name of class k; its number where the data set gives no names."""
        return self.class_names[k] if 0 <= k < len(self.class_names) else str(k)


@dataclass(frozen=True)
class Examples:
    """Images [G, C, H, W] before and after one attack, with labels and predictions [G]."""

    attack: str
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    labels: list[int]
    predictions_clean: list[int]
    predictions_adversarial: list[int]


@dataclass(frozen=True)
class Heatmaps:
    """Grad-CAM [E, G, h, w] of each expert on images [G, C, H, W]; each map sums to 1."""

    experts: list[str]
    maps: NDArray[np.float32]
    images: NDArray[np.float32]
    labels: list[int]


@dataclass(frozen=True)
class MetricsRow:
    """One line of metrics.jsonl; what a line does not carry is None."""

    kind: str
    phase: str
    epoch: int
    step: int
    global_step: int
    loss: float | None
    clean_accuracy: float | None
    robust_accuracy: float | None
    learning_rate: float | None
    seconds: float | None


@dataclass(frozen=True)
class Results:
    """Everything a report shows."""

    run: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    evaluation: Evaluation
    other_suites: list[str]
    examples: Examples | None
    heatmaps: Heatmaps | None
    metrics: list[MetricsRow]

    @property
    def trained_here(self) -> bool:
        """Whether the folder is that of a training run, not only of an evaluation."""
        return "model" not in self.config or "defense" in self.config


def load_results(run: Path, suite: str | None = None) -> Results:
    """Read and check a run folder.

    ``suite`` defaults to "paper" where that was run, else to the evaluation written last.

    Raises:
        CheckpointError: with the file and key that are missing, damaged or contradict another.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: not found, expected a run folder")
    config = Record(read_json(run / "config.json"), run / "config.json").fields
    environment = Record(read_json(run / "environment.json"), run / "environment.json").fields
    file, other_suites = _choose_suite(run, suite)
    evaluation = _read_evaluation(file)
    arrays = _read_arrays(file.with_suffix(".npz"))
    _check_outcomes(evaluation, arrays)
    return Results(
        run=run,
        config=config,
        environment=environment,
        evaluation=evaluation,
        other_suites=other_suites,
        examples=_read_examples(file.with_suffix(".npz"), arrays),
        heatmaps=_read_heatmaps(file, arrays),
        metrics=_read_metrics(run / "metrics.jsonl"),
    )


def _choose_suite(run: Path, suite: str | None) -> tuple[Path, list[str]]:
    files = {path.stem: path for path in sorted((run / "evaluations").glob("*.json"))}
    if not files:
        raise CheckpointError(f"{run}: no evaluations/*.json; run `dwf eval {run}` first")
    if suite is None:
        newest = max(files, key=lambda name: (files[name].stat().st_mtime_ns, name))
        suite = "paper" if "paper" in files else newest
    if suite not in files:
        raise CheckpointError(
            f"{run / 'evaluations'}: no suite {suite!r}, expected one of {list(files)}"
            + (f"; run `dwf eval {run}` to make it" if suite == "paper" else "")
        )
    return files[suite], [name for name in files if name != suite]


def _read_evaluation(file: Path) -> Evaluation:
    record = Record(read_json(file), file)
    if record.count("schema") != SCHEMA:
        raise record.error("schema", f"{SCHEMA}, which this version reads", record.count("schema"))
    data = record.record("data")
    attacks = [_attack_row(row) for row in record.records("attacks")]
    if not attacks:
        raise record.error("attacks", "at least one row", [])
    findings = [_finding(finding) for finding in record.records("findings")]
    worst = _worst_case(record.record("worst_case"), attacks)
    return Evaluation(
        file=file,
        suite=record.text("suite"),
        protocol=record.text("protocol"),
        clamp=record.text("clamp") if record.has("clamp") else None,
        weights=record.text("weights"),
        model=record.text("model"),
        num_parameters=record.count("num_parameters") if record.has("num_parameters") else None,
        flop_per_image=record.count("flop_per_image") if record.has("flop_per_image") else None,
        data_name=data.text("name"),
        data_split=data.text("split"),
        data_digest=data.text("digest"),
        data_notes=data.texts("notes"),
        class_names=data.texts("class_names") if data.has("class_names") else [],
        num_images=data.count("num_images"),
        seed=record.count("seed"),
        bn_mode=record.text("bn_mode"),
        precision=record.text("precision"),
        attack_path=record.text("attack_path") if record.has("attack_path") else None,
        norm=record.choice("norm", NORMS) if record.has("norm") else "linf",
        epsilon=record.number("epsilon", 0.0),
        attacks=attacks,
        worst_case=worst,
        worst_case_all=_worst_case(record.record("worst_case_all"), attacks),
        curve=_curve(record, attacks, worst) if record.has("curve") else [],
        doubts=[
            (part.number("epsilon", 0.0), part.fraction("accuracy"))
            for part in (record.records("doubts") if record.has("doubts") else [])
        ],
        verdict=_verdict(record, findings),
        findings=findings,
        gate=_gate(record.record("gate")) if record.has("gate") else None,
        experts=_experts(record.record("experts")) if record.has("experts") else None,
        diagnostics=(
            _diagnostics(record.record("diagnostics")) if record.has("diagnostics") else None
        ),
        traces=_traces(record.record("traces")) if record.has("traces") else None,
        environment=record.record("environment").fields if record.has("environment") else {},
        seconds=record.number("seconds", 0.0),
    )


def _score(record: Record) -> Score:
    num_images, num_correct = record.count("num_images"), record.count("num_correct")
    accuracy = record.fraction("accuracy")
    if num_images == 0:
        raise record.error("num_images", "at least 1", 0)
    if num_correct > num_images:
        raise record.error("num_correct", f"at most {num_images}", num_correct)
    if abs(accuracy - num_correct / num_images) > ACCURACY_TOLERANCE:
        expected = f"{num_correct}/{num_images} = {num_correct / num_images:.6f}"
        raise record.error("accuracy", expected, accuracy)
    low, high = record.fractions("interval", 2)
    if (
        low is None
        or high is None
        or not (low - ACCURACY_TOLERANCE <= accuracy <= high + ACCURACY_TOLERANCE)
    ):
        raise record.error("interval", f"two numbers around {accuracy:g}", [low, high])
    return Score(num_correct, num_images, accuracy, (low, high))


def _attack_row(record: Record) -> AttackRow:
    return AttackRow(
        name=record.text("name"),
        kind=record.text("kind"),
        epsilon=record.optional_number("epsilon", 0.0) or 0.0,
        step_size=record.optional_number("step_size", 0.0),
        num_steps=record.count("num_steps"),
        num_restarts=record.count("num_restarts"),
        random_start=record.flag("random_start"),
        eot_samples=record.count("eot_samples"),
        score=_score(record),
        num_non_finite=record.count("num_non_finite"),
        seconds=record.number("seconds", 0.0),
        num_forwards=record.count("num_forwards"),
        num_backwards=record.count("num_backwards"),
        same_as=record.text("same_as") if record.has("same_as") else None,
        stream=record.count("stream") if record.has("stream") else 0,
        num_attacked=record.count("num_attacked") if record.has("num_attacked") else None,
        broken_by=_broken_by(record.record("broken_by")) if record.has("broken_by") else {},
    )


def _broken_by(record: Record) -> dict[str, int]:
    return {view: record.count(view) for view in record.fields}


def _finding(record: Record) -> Finding:
    return Finding(
        name=record.text("name"),
        severity=record.choice("severity", SEVERITIES),
        message=record.text("message"),
        remedy=record.text("remedy") if record.has("remedy") else "",
        measured=record.optional_number("measured"),
        limit=record.optional_number("limit"),
        num_images=record.count("num_images") if record.has("num_images") else 0,
        sample_indices=record.counts("sample_indices") if record.has("sample_indices") else [],
    )


def _verdict(record: Record, findings: Sequence[Finding]) -> str:
    """The worst of the findings; what the file says has to be that."""
    worst = verdict(findings)  # type: ignore[arg-type]
    if record.has("verdict") and record.text("verdict") != worst:
        raise record.error("verdict", f"{worst}, as its findings say", record.text("verdict"))
    return worst


def _curve(record: Record, attacks: list[AttackRow], headline: WorstCase) -> list[WorstCase]:
    """Worst cases at ascending radii, of which none stands better than a smaller one."""
    curve = [_worst_case(part, attacks) for part in record.records("curve")]
    for i, (part, larger) in enumerate(pairwise(curve), start=1):
        if part.epsilon is None or larger.epsilon is None or part.epsilon >= larger.epsilon:
            expected = f"a radius above {part.epsilon}"
            raise record.error(f"curve[{i}].epsilon", expected, larger.epsilon)
        if larger.score.num_correct > part.score.num_correct:
            expected = f"at most the {part.score.num_correct} of a smaller radius"
            raise record.error(f"curve[{i}].num_correct", expected, larger.score.num_correct)
    if curve and curve[-1].score.num_correct != headline.score.num_correct:
        expected = f"the {headline.score.num_correct} of worst_case at the largest radius"
        raise record.error("curve", expected, curve[-1].score.num_correct)
    return curve


def _traces(record: Record) -> Traces:
    num_steps, num_restarts = record.count("num_steps"), record.count("num_restarts")
    loss = record.record("loss")
    return Traces(
        num_images=record.count("num_images"),
        epsilon=record.number("epsilon", 0.0),
        step_size=record.number("step_size", 0.0),
        num_steps=num_steps,
        num_restarts=num_restarts,
        loss={key: loss.optional_numbers(key, num_steps + 1) for key in ("mean", "low", "high")},
        accuracy=record.table("accuracy", num_restarts, num_steps + 1),
    )


def _worst_case(record: Record, attacks: list[AttackRow]) -> WorstCase:
    rows = {row.name: row for row in attacks}
    score, names = _score(record), record.texts("attacks")
    for i, name in enumerate(names):
        if name not in rows:
            raise record.error(f"attacks[{i}]", f"one of {list(rows)}", name)
        row = rows[name].score
        if row.num_images == score.num_images and row.num_correct < score.num_correct:
            expected = f"at most the {row.num_correct} of {name!r}"
            raise record.error("num_correct", expected, score.num_correct)
    return WorstCase(record.optional_number("epsilon", 0.0), score, names)


def _gate(record: Record) -> Gate:
    attacks, experts = record.texts("attacks"), record.texts("experts")
    mean_weights, entropy = record.record("mean_weights"), record.record("entropy")
    weights: dict[str, list[list[float | None]]] = {}
    for attack in attacks:
        rows = mean_weights.fields.get(attack)
        if not isinstance(rows, list) or not rows:
            raise mean_weights.error(attack, "a list with one row per class", rows)
        table = Record(
            {f"class {k}": row for k, row in enumerate(rows)},
            record.file,
            f"{mean_weights.key}.{attack}",
        )
        weights[attack] = [
            table.fractions(label, len(experts), optional=True) for label in table.fields
        ]
    return Gate(attacks, experts, weights, {a: entropy.number(a, -1e-6) for a in attacks})


def _experts(record: Record) -> Experts:
    names, accuracy = record.texts("names"), record.record("accuracy")
    return Experts(
        names, {attack: accuracy.fractions(attack, len(names)) for attack in accuracy.fields}
    )


def _diagnostics(record: Record) -> Diagnostics:
    names, accuracy = record.texts("names"), record.record("accuracy")
    if not names:
        raise record.error("names", "at least one name", names)
    E, gate, flips = len(names) - 1, record.record("gate"), record.record("routing_flips")
    kinds = ("clean", "mixture_attacked", "self_attacked")
    return Diagnostics(
        num_images=record.count("num_images"),
        epsilon=record.number("epsilon", 0.0),
        step_size=record.number("step_size", 0.0),
        num_steps=record.count("num_steps"),
        names=names,
        accuracy={kind: accuracy.fractions(kind, E + 1) for kind in kinds},
        transfer=record.table("transfer", E + 1, E + 1),
        worst_case=record.fraction("worst_case"),
        clean=_gate_load(gate.record("clean"), E),
        attacked=_gate_load(gate.record("attacked"), E),
        routing_flips=flips.fraction("attacked"),
        flips_again=flips.fraction("again"),
        gradient_cosine=record.table("gradient_cosine", E, E, optional=True, low=-1.0),
    )


def _gate_load(record: Record, num_experts: int) -> GateLoad:
    return GateLoad(
        record.number("entropy", -1e-6),
        record.fractions("mean_weight", num_experts),
        record.fractions("top_share", num_experts),
        record.texts("dead"),
    )


def _read_arrays(file: Path) -> Mapping[str, NDArray[Any]]:
    """Read the arrays beside an evaluation; none if the file is absent."""
    if not file.exists():
        return {}
    try:
        # from memory, because np.load leaves a damaged file open
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file}: not a readable .npz file, {error}") from error


def _check_outcomes(evaluation: Evaluation, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Require that the per-image outcomes add up to the printed counts."""
    correct = arrays.get("correct")
    if correct is None:
        return
    file = evaluation.file.with_suffix(".npz")
    expected = (len(evaluation.attacks), evaluation.num_images)
    if correct.dtype != np.bool_ or correct.shape != expected:
        found = f"{correct.dtype} {list(correct.shape)}"
        raise CheckpointError(f"{file}: correct: expected bool {list(expected)}, found {found}")
    for row, outcomes in zip(evaluation.attacks, correct, strict=True):
        if int(outcomes.sum()) != row.score.num_correct:
            raise CheckpointError(
                f"{file}: correct: {int(outcomes.sum())} images for {row.name!r}, "
                f"but {evaluation.file.name} says num_correct {row.score.num_correct}"
            )


def _read_examples(file: Path, arrays: Mapping[str, NDArray[Any]]) -> Examples | None:
    names = [
        "example_attack",
        "example_clean",
        "example_adversarial",
        "example_labels",
        "example_predictions_clean",
        "example_predictions_adversarial",
    ]
    found = [name for name in names if name in arrays]
    if not found or ("example_clean" in arrays and len(arrays["example_clean"]) == 0):
        return None
    if found != names:
        absent = [name for name in names if name not in arrays]
        raise CheckpointError(f"{file}: {absent[0]}: missing, expected an array")
    attack, clean, adversarial, labels, before, after = (arrays[name] for name in names)
    for name in names[1:3]:
        array = arrays[name]
        if array.ndim != 4 or array.shape != clean.shape or not np.isfinite(array).all():
            raise CheckpointError(
                f"{file}: {name}: expected finite images {list(clean.shape)}, "
                f"found {array.dtype} {list(array.shape)}"
            )
    for name in names[3:]:
        array = arrays[name]
        if array.shape != clean.shape[:1] or array.dtype.kind not in "iu":
            raise CheckpointError(
                f"{file}: {name}: expected {len(clean)} integers, "
                f"found {array.dtype} {list(array.shape)}"
            )
    return Examples(
        attack=str(attack),
        clean=clean.astype(np.float32),
        adversarial=adversarial.astype(np.float32),
        labels=[int(i) for i in labels],
        predictions_clean=[int(i) for i in before],
        predictions_adversarial=[int(i) for i in after],
    )


def _read_heatmaps(file: Path, arrays: Mapping[str, NDArray[Any]]) -> Heatmaps | None:
    """The experts' names are in the table, their maps beside it."""
    names = ["cam_maps", "cam_images", "cam_labels"]
    absent = [name for name in names if name not in arrays]
    if len(absent) == len(names):
        return None
    beside = file.with_suffix(".npz")
    if absent:
        raise CheckpointError(f"{beside}: {absent[0]}: missing, expected an array")
    experts = Record(read_json(file), file).record("traces").texts("experts")
    maps, images, labels = (arrays[name] for name in names)
    count = [len(experts), len(images)]
    if maps.ndim != 4 or list(maps.shape[:2]) != count or not np.isfinite(maps).all():
        raise CheckpointError(
            f"{beside}: cam_maps: expected finite maps {[*count, 'h', 'w']}, "
            f"found {maps.dtype} {list(maps.shape)}"
        )
    if images.ndim != 4 or not np.isfinite(images).all():
        raise CheckpointError(
            f"{beside}: cam_images: expected finite images [G, C, H, W], "
            f"found {images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise CheckpointError(
            f"{beside}: cam_labels: expected {len(images)} integers, "
            f"found {labels.dtype} {list(labels.shape)}"
        )
    return Heatmaps(
        experts, maps.astype(np.float32), images.astype(np.float32), [int(k) for k in labels]
    )


def _read_metrics(file: Path) -> list[MetricsRow]:
    """Read the metrics in order of step; none if the file is absent.

    A run that was killed may leave half a last line, and one that resumed repeats steps: the half
    line is dropped, and of repeated steps the last counts.
    """
    if not file.exists():
        return []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable, {error}") from error
    rows: dict[tuple[int, str, str], MetricsRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise CheckpointError(f"{file}: line {number}: not readable JSON, {error}") from error
        record = Record(value, file, f"line {number}")
        row = MetricsRow(
            kind=record.text("kind"),
            phase=record.text("phase"),
            epoch=record.count("epoch"),
            step=record.count("step"),
            global_step=record.count("global_step"),
            loss=record.optional_number("loss"),
            clean_accuracy=record.optional_number("clean_accuracy", 0.0, 1.0),
            robust_accuracy=record.optional_number("robust_accuracy", 0.0, 1.0),
            learning_rate=record.optional_number("learning_rate"),
            seconds=record.optional_number("seconds", 0.0),
        )
        rows[row.global_step, row.phase, row.kind] = row
    return sorted(rows.values(), key=lambda row: row.global_step)
