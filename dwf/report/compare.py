"""Put runs side by side: what each defense costs and what it withstands.

Only runs that were judged alike stand in one table: on the same images, by the same protocol,
radius and attacks. Runs that differ in their seed alone become one row, with mean and standard
deviation. `dwf.report.table` prints and writes what this module loads.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from dwf.checks import ConfigError
from dwf.config import from_dict
from dwf.defenses import get
from dwf.evaluation.record import AttackRow, EvaluationRecord, Score
from dwf.report.paired import worst_case_of
from dwf.report.results import Results, load_results

CLEAN, WORST = "clean", "worst case"
OF_THE_MODEL = ("views", "experts", "transfer")  # attacks that not every model has
# settings that change neither what a run computes nor what its table says
FREE = ("seed", "device", "pretrain_together", "checkpoint_every", "log_every", "evaluation")


@dataclass(frozen=True)
class Entry:
    """One run in a comparison.

    Attributes:
        num_parameters, flop_per_image: None where the evaluation does not say.
        train_seconds: time of training steps alone, without validation and evaluation; None where
            no metrics were recorded.
        eot_samples: gradients averaged by the adaptive attack; 1 without such an attack.
        doubt: the gravest finding of the evaluation: "invalid", "suspect" or "".
        scores: clean accuracy, accuracy under one attack of each kind, worst case, by column.
        settings: every setting that a run of another seed must share to stand in the same row.
        stands: [N] bool, the images of the worst case; None where they were not stored.
    """

    run: Path
    preset: str
    defense: str
    network: str
    seed: int
    num_parameters: int | None
    flop_per_image: int | None
    train_seconds: float | None
    train_device: str
    eot_samples: int
    doubt: str
    scores: dict[str, Score]
    settings: dict[str, Any]
    stands: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Spread:
    """Mean accuracy over seeds with their standard deviation, or one run with its 95 % interval.

    Exactly one of ``sd`` and ``interval`` is None.
    """

    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of an error bar."""
        if self.interval is not None:
            return self.interval
        return self.mean - (self.sd or 0.0), self.mean + (self.sd or 0.0)


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in their seed alone; ``name`` is unique in a comparison."""

    name: str
    entries: list[Entry]

    @property
    def first(self) -> Entry:
        """The run that was named first; it speaks for what all runs of the group share."""
        return self.entries[0]

    @property
    def train_seconds(self) -> float | None:
        """Mean over the runs whose time is known."""
        known = [e.train_seconds for e in self.entries if e.train_seconds is not None]
        return statistics.fmean(known) if known else None

    @property
    def train_devices(self) -> list[str]:
        """Every device that trained one of the runs, each once."""
        return list(dict.fromkeys(entry.train_device for entry in self.entries))

    @property
    def doubt(self) -> str:
        """The gravest doubt about any of the runs."""
        return _gravest({entry.doubt for entry in self.entries})

    def spread(self, column: str) -> Spread:
        """The accuracy in one column of the table."""
        scores = [entry.scores[column] for entry in self.entries]
        values = [score.accuracy for score in scores]
        if len(scores) == 1:
            return Spread(values[0], None, scores[0].interval)
        return Spread(statistics.fmean(values), statistics.stdev(values), None)


@dataclass(frozen=True)
class Comparison:
    """Groups in the order in which their first runs were given.

    ``columns`` are clean, one attack of each kind, and worst case; ``facts`` hold what all runs
    share.
    """

    suite: str
    facts: dict[str, Any]
    columns: list[str]
    groups: list[SeedGroup]

    @property
    def num_images(self) -> int:
        """How many images every run was judged on."""
        return int(self.facts["data.num_images"])

    @property
    def pixels(self) -> bool:
        """Whether radii are in pixel units of [0, 1]."""
        return bool(self.facts["protocol"] == "pixels")

    @property
    def of_255(self) -> bool:
        """Whether radii mean brightness, and so may be shown as k/255."""
        return self.pixels and bool(self.facts["norm"] == "linf")


def load_comparison(runs: Sequence[Path], suite: str = "paper") -> Comparison:
    """Read the evaluations of several run folders into one table.

    Raises:
        CheckpointError: a run is missing, damaged or has no such evaluation.
        ConfigError: two runs were judged differently, or are the same configuration and seed.
    """
    results = [load_results(Path(run), suite) for run in runs]
    facts = [_facts(result.evaluation) for result in results]
    for result, other in zip(results[1:], facts[1:], strict=True):
        _check_alike(results[0].run, facts[0], result.run, other)
    attacks = _columns(results[0].evaluation)
    entries = [_entry(result, attacks) for result in results]
    return Comparison(suite, facts[0], [*attacks, WORST], _groups(entries))


def _facts(evaluation: EvaluationRecord) -> dict[str, Any]:
    """What has to be equal, most telling first; the digest covers the images themselves."""
    attacks = [
        [
            row.name,
            row.epsilon,
            row.step_size,
            row.num_steps,
            row.num_restarts,
            "random start" if row.random_start else "clean start",
        ]
        # eot_samples may differ: what a random model needs, a deterministic one does not
        for row in evaluation.attacks
        if row.kind not in OF_THE_MODEL and not row.kind.startswith("harder-")
    ]
    return {
        "data.name": evaluation.data.name,
        "data.split": evaluation.data.split,
        "data.num_images": evaluation.num_images,
        "data.digest": evaluation.data.digest,
        "protocol": evaluation.protocol,
        "clamp": evaluation.clamp,
        "norm": evaluation.norm,
        "epsilon": evaluation.epsilon,
        "radii": [part.epsilon for part in evaluation.curve],
        "weights": evaluation.weights,
        "bn_mode": evaluation.bn_mode,
        "precision": evaluation.precision,
        "attacks": attacks,
    }


def _check_alike(
    first: Path, facts: dict[str, Any], second: Path, other_facts: dict[str, Any]
) -> None:
    differing = [key for key in facts if facts[key] != other_facts[key]]
    if not differing:
        return
    # a digest or an attack differs as a consequence of these
    causes = [key for key in differing if key not in ("data.digest", "attacks")] or differing
    parts = []
    for key in causes:
        one, other = facts[key], other_facts[key]
        if key == "attacks":
            one, other = _first_difference(one, other)
        parts.append(f"{key} is {one} in {first} and {other} in {second}")
    raise ConfigError(
        f"these runs cannot stand in one table: {'; '.join(parts)}; evaluate all of them alike"
    )


def _first_difference(one: list[Any], other: list[Any]) -> tuple[Any, Any]:
    pairs = zip_longest(one, other, fillvalue="missing")
    return next(pair for pair in pairs if pair[0] != pair[1])


def _columns(evaluation: EvaluationRecord) -> list[str]:
    """Names of the clean row and of the strongest attack of each kind."""
    rows: list[AttackRow] = []
    if evaluation.clean is not None:
        rows.append(evaluation.clean)
    fgsm = [row for row in evaluation.attacks if row.kind == "fgsm"]
    within = [row for row in fgsm if row.epsilon <= evaluation.epsilon + 1e-12]
    if within:
        rows.append(max(within, key=lambda row: row.epsilon))
    elif fgsm:  # the grid of radii need not hold the primary one
        rows.append(min(fgsm, key=lambda row: row.epsilon))
    for kind in ("pgd", "multi_start", "adaptive"):
        same = [row for row in evaluation.attacks if row.kind == kind]
        if same:
            rows.append(max(same, key=lambda row: row.num_steps))
    return [row.name for row in rows]


def _entry(result: Results, names: Sequence[str]) -> Entry:
    evaluation, config = result.evaluation, from_dict(result.config)
    rows = {row.name: row for row in evaluation.attacks}
    title = get(config.defense).title
    settings = {k: v for k, v in config.to_dict().items() if k not in FREE}
    settings["data"] = {k: v for k, v in settings["data"].items() if k != "root"}
    seconds = [r.seconds for r in result.metrics if r.kind == "train" and r.seconds is not None]
    device = str(result.environment.get("device") or "")
    if config.device == "cpu" and result.environment.get("cuda"):
        device = "CPU"  # the environment names the GPU that was there
    adaptive = [row.eot_samples for row in evaluation.attacks if row.kind == "adaptive"]
    return Entry(
        run=result.run,
        preset=config.preset,
        defense=title,
        network=evaluation.model.removeprefix(title).removeprefix(", "),
        seed=config.seed,
        num_parameters=evaluation.num_parameters,
        flop_per_image=evaluation.flop_per_image,
        train_seconds=sum(seconds) if seconds else None,
        train_device=device,
        eot_samples=max(adaptive, default=1),
        doubt=_gravest({finding.severity for finding in evaluation.findings}),
        scores={
            **{name: rows[name] for name in names},
            WORST: evaluation.worst_case,
        },
        settings=settings,
        stands=worst_case_of([rows[name].correct for name in evaluation.worst_case.attacks]),
    )


def _gravest(severities: set[str]) -> str:
    return next((x for x in ("invalid", "suspect") if x in severities), "")


def _groups(entries: Sequence[Entry]) -> list[SeedGroup]:
    grouped: list[list[Entry]] = []
    for entry in entries:
        same = next((g for g in grouped if g[0].settings == entry.settings), None)
        if same is None:
            grouped.append([entry])
            continue
        for other in same:
            if other.seed == entry.seed:
                raise ConfigError(
                    f"{other.run} and {entry.run} are the same configuration and seed "
                    f"{entry.seed}; name one of them"
                )
        same.append(entry)
    names = [group[0].defense for group in grouped]
    # where names collide, first the preset tells them apart, then the folder
    for more in ([g[0].preset for g in grouped], [str(g[0].run) for g in grouped]):
        count = Counter(names)
        names = [
            f"{name} ({text})" if count[name] > 1 else name
            for name, text in zip(names, more, strict=True)
        ]
    return [SeedGroup(name, group) for name, group in zip(names, grouped, strict=True)]
