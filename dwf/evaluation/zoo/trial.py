"""Run the zoo through `evaluate`, and say of each broken model: found, flagged or fooled.

The truth of a broken model is what its own adaptive attack leaves: margin and cross-entropy on
every smooth function that its specimen names, from the image and from random starts, then a search
by labels alone; the model judges.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.rays import rays
from dwf.attacks.source import judge
from dwf.attacks.surrogate import through_surrogate
from dwf.checks import DwfError
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, load
from dwf.data.batches import to_unit_range
from dwf.evaluation.evaluate import evaluate
from dwf.evaluation.zoo import BROKEN_ZOO, EPSILON, HONEST_ZOO, Parts, Specimen
from dwf.typed_json import to_json

NUM_IMAGES = 100
# A number this near the truth, in points, is right.
NEAR = 5.0
_TRUTH_STEPS, _TRUTH_QUERIES = 50, 600
# Models that remember the judged images are asked about these.
_FRESH = slice(300, 400)


@dataclass(frozen=True)
class ZooRow:
    """The verdict on one model of the zoo.

    Attributes:
        outcome: "found", the number is near the truth; "flagged", it is not, and the verdict says
            so; "fooled"; for an honest model "right" or "false alarm".
        robust, truth: percent of the images; NaN for a model that was refused, and for the truth of
            an honest model.
        findings: names of those that are more than a note.
    """

    name: str
    kind: str
    outcome: str
    verdict: str
    clean: float
    robust: float
    truth: float
    findings: list[str]
    description: str
    source: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the verdict did what it is for."""
        return self.outcome not in ("fooled", "false alarm")


def run_zoo(
    *,
    names: Sequence[str] | None = None,
    num_images: int = NUM_IMAGES,
    suite: str = "quick",
    parts: Parts | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[ZooRow]:
    """Judge all broken and all honest models, or those of ``names``, on test images of digits."""
    say = progress or (lambda line: None)
    parts = parts or Parts()
    digits = load("digits", split="test").subset(torch.arange(num_images))
    for name, specimen in BROKEN_ZOO.items():
        if names is None or name in names:
            say(f"judging {name}")
            yield judge_specimen(name, specimen, parts, digits, suite)
    for name, honest in HONEST_ZOO.items():
        if names is None or name in names:
            say(f"judging the honest model {name}")
            yield judge_honest(name, honest.make(), honest.epsilon, digits, suite)


def judge_specimen(
    name: str, specimen: Specimen, parts: Parts, dataset: ImageDataset, suite: str = "quick"
) -> ZooRow:
    """The verdict on a broken model, beside its truth."""
    started = time.perf_counter()
    model = specimen.make(parts)
    facts = _evaluated(model, dataset, EPSILON, suite)
    images, labels = to_unit_range(dataset.images), dataset.labels
    if specimen.remembers:
        images, labels = parts.test_images[_FRESH], parts.test_labels[_FRESH]
    truth = 100 * true_robustness(specimen, parts, model, images, labels)
    if facts["robust"] <= truth + NEAR:
        outcome = "found"
    else:
        outcome = "flagged" if facts["verdict"] in ("SUSPECT", "INVALID") else "fooled"
    return ZooRow(
        name=name,
        kind="broken",
        outcome=outcome,
        truth=truth,
        description=specimen.description,
        source=specimen.source,
        seconds=time.perf_counter() - started,
        **facts,
    )


def judge_honest(
    name: str, model: nn.Module, epsilon: float, dataset: ImageDataset, suite: str = "quick"
) -> ZooRow:
    """The verdict on an honest model."""
    started = time.perf_counter()
    facts = _evaluated(model, dataset, epsilon, suite)
    return ZooRow(
        name=name,
        kind="honest",
        outcome="right" if facts["verdict"] == "VALID" else "false alarm",
        truth=float("nan"),
        description="trained as it should be",
        source="",
        seconds=time.perf_counter() - started,
        **facts,
    )


def _evaluated(
    model: nn.Module, dataset: ImageDataset, epsilon: float, suite: str
) -> dict[str, Any]:
    settings = EvaluationConfig(epsilon=epsilon, step_size=epsilon / 5, diagnostic_images=0)
    try:
        with warnings.catch_warnings():
            # the finding zero_gradient says it
            warnings.filterwarnings("ignore", message="the model's output does not depend")
            result = evaluate(model, dataset, settings, suite=suite)
    except DwfError as error:  # refused before any attack
        return {
            "verdict": "INVALID",
            "clean": float("nan"),
            "robust": float("nan"),
            "findings": [type(error).__name__],
        }
    return {
        "verdict": result.verdict,
        "clean": 100 * result.clean_accuracy,
        "robust": 100 * result.robust_accuracy,
        "findings": [f.name for f in result.findings if f.severity in ("suspect", "invalid")],
    }


def true_robustness(
    specimen: Specimen, parts: Parts, model: nn.Module, images: Tensor, labels: Tensor
) -> float:
    """The share of images [N, C, H, W] that stands the adaptive attack of a specimen."""
    with undisturbed(model, images.device), torch.no_grad():
        stands = _right(model, images, labels, specimen.num_votes)
        for smooth in specimen.smooth(parts, model):
            for loss in ("margin", "ce"):
                rows = (stands > 0).nonzero()[:, 0]
                if len(rows) == 0:
                    break
                adversarial = through_surrogate(
                    model if specimen.num_votes == 1 else smooth,
                    images[rows],
                    labels[rows],
                    surrogate=smooth,
                    epsilon=EPSILON,
                    num_steps=_TRUTH_STEPS,
                    num_restarts=2,
                    loss=loss,
                    eight_bits=specimen.eight_bits,
                    sample_index=rows,
                    allow_probabilities=True,
                )
                now = _right(model, adversarial, labels[rows], specimen.num_votes)
                stands[rows] = torch.minimum(stands[rows], now)
        rows = (stands > 0).nonzero()[:, 0]
        if specimen.num_votes == 1 and len(rows):
            adversarial = rays(
                model, images[rows], labels[rows], epsilon=EPSILON, num_queries=_TRUTH_QUERIES
            )
            stands[rows] = torch.minimum(stands[rows], _right(model, adversarial, labels[rows], 1))
    return float(stands.mean())


def _right(model: nn.Module, images: Tensor, labels: Tensor, num_votes: int) -> Tensor:
    """[N] float64: the share of single passes that are right."""
    passes = [judge(ask(model, images), labels)[0].double() for _ in range(num_votes)]
    return torch.stack(passes).mean(dim=0)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `as_json` as a table of text."""
    lines = [
        f"  {'model':<34} {'verdict':<9} {'robust':>7} {'truth':>7}  {'outcome':<12} findings",
        *(
            f"  {row['name']:<34} {row['verdict']:<9} {_percent(row['robust'])} "
            f"{_percent(row['truth'])}  {row['outcome']:<12} {' '.join(row['findings']) or '-'}"
            for row in rows
        ),
    ]
    counts = {name: sum(row["outcome"] == name for row in rows) for name in OUTCOMES}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([f"Zoo: {told}", *lines])


OUTCOMES = ("found", "flagged", "fooled", "right", "false alarm")


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.1f}"


def as_json(row: ZooRow) -> dict[str, Any]:
    """A row as JSON values; NaN is null."""
    values: dict[str, Any] = to_json(row)
    for name in ("clean", "robust", "truth"):
        value = values[name]
        values[name] = None if value is None or math.isnan(value) else round(value, 2)
    values["seconds"] = round(row.seconds, 1)
    return values
