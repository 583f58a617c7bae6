"""Write one HTML page about one run: is it believable, how was it attacked, how was it made.

Everything comes from the run folder and nothing is computed anew. The page loads nothing: style,
drawings and images are inside it, and its security policy forbids the rest.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dwf.checks import CheckpointError
from dwf.evaluation.record import SEVERITIES, EvaluationRecord
from dwf.evaluation.table import robustbench_json
from dwf.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    explain,
)
from dwf.report import figures, words
from dwf.report.checklist import checklist, in_turn
from dwf.report.figures import Figure, NotMeasured
from dwf.report.figures.canvas import png_of_picture
from dwf.report.figures.pictures import Picture, amplification, overlay, picture, pictures
from dwf.report.results import Examples, Heatmaps, Results, load_results

# below this many images a 95 % interval is wider than +-3 points at half
FEW_BELOW = 1000
# bytes of example images: enough for dozens of small ones, and the page still fits into a mail
EXAMPLES_BUDGET = 1_000_000
# suites that hold AutoAttack's four attacks, so that a leaderboard may list their result
OF_A_LEADERBOARD = ("standard", "full")

Drawn = Figure | NotMeasured


@dataclass(frozen=True)
class Example:
    """One attacked image: three pictures as data URIs, and the names of its classes."""

    clean: str
    adversarial: str
    difference: str
    label: str
    prediction_clean: str
    prediction_adversarial: str


@dataclass(frozen=True)
class Looks:
    """An image, and the image with the heatmap of each expert by name; data URIs."""

    image: str
    label: str
    experts: list[tuple[str, str]]


@dataclass(frozen=True)
class PageFigures:
    """The figures of a page by its sections."""

    curves: Sequence[Drawn]
    gate: Sequence[Drawn]
    experts: Sequence[Drawn]
    training: Drawn
    pictures: Sequence[Figure]  # shown by the page itself, one image at a time

    def all(self) -> list[Drawn]:
        """Every figure of the page."""
        return [*self.curves, *self.gate, *self.experts, self.training, *self.pictures]


def write_report(run: Path, suite: str | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.{png,csv}`` into a run folder; return the page's path.

    For the suites "standard" and "full" also write ``robustbench.json``.

    Args:
        run: folder of one training run that has been evaluated, or of an evaluation alone.
        suite: which ``evaluations/<suite>.json``; the one written last by default.
    Raises:
        CheckpointError: with the file and key that are missing, damaged or contradict another.
    """
    run = Path(run)
    results = load_results(run, suite)
    evaluation = results.evaluation
    drawn = _figures(results)
    text = render(
        "page.html.j2",
        results=results,
        evaluation=evaluation,
        clean=evaluation.clean,
        of_255=evaluation.of_255,
        pixels=evaluation.pixels,
        norm=words.norm_name(evaluation.norm),
        verdict_means=words.VERDICTS[evaluation.verdict],
        weights_rule=words.WEIGHTS.get(evaluation.weights, evaluation.weights),
        few_below=FEW_BELOW,
        findings=sorted(evaluation.findings, key=lambda f: -SEVERITIES.index(f.severity)),
        checklist=checklist(results),
        turns=in_turn(evaluation),
        views=_views(evaluation),
        diagnostics=evaluation.diagnostics,
        figures=drawn,
        looks=list(_looks(results.heatmaps, evaluation)) if results.heatmaps else [],
        examples=list(_examples(results.examples, evaluation)) if results.examples else [],
        amplification=amplification(results.examples) if results.examples else 1,
        command=_command(results.environment),
        evaluation_command=_command(evaluation.environment),
        config=json.dumps(results.config, indent=2),
        environment=list(_flatten(results.environment)),
        evaluation_environment=list(_flatten(evaluation.environment)),
    )
    write_figures(run, drawn.all())
    if evaluation.suite.split("-")[0] in OF_A_LEADERBOARD:
        table = robustbench_json(evaluation, run.resolve().name)
        atomic_write_json(run / "robustbench.json", table)
    page = run / "report.html"
    atomic_write_text(page, text)
    return page


def write_figures(parent: Path, drawn: Sequence[Drawn]) -> None:
    """Write each figure and its data into ``parent/figures``, which is made if it does not exist.

    Raises:
        CheckpointError: the folder or a file cannot be written.
    """
    folder = parent / "figures"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be made, {explain(error, folder)}") from error
    for figure in drawn:
        if isinstance(figure, Figure):
            atomic_write_bytes(folder / f"{figure.name}.png", figure.png)
            atomic_write_text(folder / f"{figure.name}.csv", figure.csv())


def render(template: str, **context: Any) -> str:
    """Fill a template of ``report/templates``; everything but drawings is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    files = resources.files("dwf.report").joinpath("templates")
    environment = Environment(
        loader=FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda score: words.percent(score.accuracy, score.num_images)
    environment.filters["interval"] = words.interval
    environment.filters["radius"] = lambda value, of_255: words.radius(value, of_255=of_255)
    environment.filters["settings"] = words.attack_settings
    environment.filters["duration"] = words.duration
    # matplotlib has escaped the text inside its drawings
    environment.filters["drawing"] = Markup
    return environment.get_template(template).render(context)


def _figures(results: Results) -> PageFigures:
    """Draw every figure of the page, or say why one cannot be drawn."""
    evaluation = results.evaluation
    class_name = evaluation.class_name
    one_network = "The model is one network, or its suite does not look at this; suite paper does."
    gate: list[Drawn] = [
        NotMeasured("Gate weights", one_network),
        NotMeasured("Gate entropy", one_network),
    ]
    if evaluation.gate:
        gate = [
            *figures.gate_weights(evaluation.gate, class_name),
            figures.gate_entropy(evaluation.gate),
        ]
    experts: list[Drawn] = [NotMeasured("Accuracy of each expert", one_network)]
    if evaluation.experts:
        experts = [figures.expert_accuracy(evaluation.experts, evaluation.attacks)]
    if evaluation.diagnostics:
        experts += figures.experts_under_attack(evaluation.diagnostics)
    else:
        reason = "The model is one network, or evaluation.diagnostic_images was 0."
        experts.append(NotMeasured("Each expert under attack", reason))
    shown: list[Figure] = []
    if results.heatmaps:
        shown.append(figures.grad_cam(results.heatmaps, class_name))
    if results.examples:
        shown.append(figures.example_grid(results.examples, class_name))
    return PageFigures(
        curves=[
            figures.accuracy_over_epsilon(evaluation),
            figures.accuracy_over_steps(evaluation),
            figures.loss_over_steps(evaluation),
        ],
        gate=gate,
        experts=experts,
        training=(
            figures.training_curves(results.metrics)
            if results.trained_here
            else NotMeasured("Training curves", "The model was trained elsewhere.")
        ),
        pictures=shown,
    )


def _views(evaluation: EvaluationRecord) -> list[tuple[str, list[int]]]:
    """How many images each view of a mixture broke, in every row that attacks views."""
    rows = [row for row in evaluation.attacks if row.kind == "views"]
    names = dict.fromkeys(name for row in rows for name in row.broken_by)
    return [(name, [row.broken_by.get(name, 0) for row in rows]) for name in names]


def _looks(heatmaps: Heatmaps, evaluation: EvaluationRecord) -> Iterator[Looks]:
    """As many images with heatmaps as the page has room for."""
    room = EXAMPLES_BUDGET
    for g, label in enumerate(heatmaps.labels):
        image = _data_uri(picture(heatmaps.images[g]))
        experts = [
            (name, _data_uri(overlay(heatmaps, e, g))) for e, name in enumerate(heatmaps.experts)
        ]
        room -= len(image) + sum(len(uri) for _, uri in experts)
        if room < 0:
            return
        yield Looks(image, evaluation.class_name(label), experts)


def _examples(examples: Examples, evaluation: EvaluationRecord) -> Iterator[Example]:
    """As many examples as the page has room for."""
    room = EXAMPLES_BUDGET
    for g, label in enumerate(examples.labels):
        clean, adversarial, difference = map(_data_uri, pictures(examples, g))
        room -= len(clean) + len(adversarial) + len(difference)
        if room < 0:
            return
        yield Example(
            clean=clean,
            adversarial=adversarial,
            difference=difference,
            label=evaluation.class_name(label),
            prediction_clean=evaluation.class_name(examples.predictions_clean[g]),
            prediction_adversarial=evaluation.class_name(examples.predictions_adversarial[g]),
        )


def _data_uri(shown: Picture) -> str:
    encoded = base64.b64encode(png_of_picture(shown)).decode()
    return f"data:image/png;base64,{encoded}"


def _command(environment: Mapping[str, Any]) -> str | None:
    """The exact command, quoted for a shell; None where none was recorded."""
    argv = environment.get("argv")
    if isinstance(argv, list) and argv:
        return shlex.join(str(word) for word in argv)
    return argv if isinstance(argv, str) and argv else None


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested JSON with its dotted key."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flatten(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        yield key, ", ".join(str(part) for part in value)
    else:
        yield key, "not recorded" if value is None else str(value)
