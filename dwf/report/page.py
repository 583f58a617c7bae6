"""One HTML page about one run: is it believable, what was attacked, how hard, how was it made.

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
    read_json,
)
from dwf.report import figures
from dwf.report.checklist import checklist, in_turn
from dwf.report.figures import Figure, NotMeasured, norm_name, percent, radius
from dwf.report.results import (
    AttackRow,
    Evaluation,
    Examples,
    Heatmaps,
    Results,
    Score,
    load_results,
)

# below this many images a 95 % interval is wider than +-3 points at half
QUICK_BELOW = 1000
# bytes of example images: enough for dozens of small ones, and the page still fits into a mail
EXAMPLES_BUDGET = 1_000_000
# suites that hold AutoAttack's four attacks, so that a leaderboard may list their result
OF_A_LEADERBOARD = ("standard", "full")

VERDICTS = {
    "VALID": "no known sign was seen that robustness is overestimated; that is not a proof.",
    "SUSPECT": "a measurement gives reason to doubt these numbers; do not quote them without the "
    "findings.",
    "INVALID": "a measurement contradicts these numbers; they show no robustness.",
}

WEIGHTS = {
    "last": "the weights after the last training step",
    "best": "the weights of best robust accuracy on held-out training images, "
    "chosen without the test set",
    "ema": "the running average of the weights over the last phase of training",
    "as given": "those of the model that was handed in",
}


@dataclass(frozen=True)
class Example:
    """One row of the grid: three pictures as data URIs, and what the model said."""

    clean: str
    adversarial: str
    difference: str
    label: str
    prediction_clean: str
    prediction_adversarial: str


@dataclass(frozen=True)
class Looks:
    """An image and, for each expert by name, the image with its heatmap; data URIs."""

    image: str
    label: str
    experts: list[tuple[str, str]]


def write_report(run: Path, suite: str | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.{png,csv}`` into a run folder; return the page's path.

    Of suites "standard" and "full" also ``robustbench.json``.

    Args:
        run: folder of one training run that has been evaluated, or of an evaluation alone.
        suite: which ``evaluations/<suite>.json``; "paper" by default, else the one written last.
    Raises:
        CheckpointError: with the file and key that are missing, damaged or contradict another.
    """
    run = Path(run)
    results = load_results(run, suite)
    evaluation = results.evaluation
    epsilon = figures.accuracy_over_epsilon(evaluation)
    steps = figures.accuracy_over_steps(evaluation)
    loss = figures.loss_over_steps(evaluation)
    training = _training(results)
    gate, entropy, experts = _mixture_figures(evaluation)
    under_attack = _under_attack(evaluation)
    examples = list(_examples(results.examples, evaluation)) if results.examples else []
    drawn = [epsilon, steps, loss, *gate, entropy, experts, *under_attack, training]
    if results.heatmaps:
        drawn.append(figures.grad_cam(results.heatmaps, evaluation.class_name))
    if results.examples:
        drawn.append(figures.example_grid(results.examples, evaluation.class_name))
    text = render(
        "page.html.j2",
        results=results,
        evaluation=evaluation,
        clean=evaluation.clean,
        verdict_means=VERDICTS[evaluation.verdict],
        norm=norm_name(evaluation.norm),
        findings=sorted(evaluation.findings, key=lambda f: -SEVERITIES.index(f.severity)),
        checklist=checklist(results),
        turns=in_turn(evaluation),
        settings=_settings,
        views=_views(evaluation),
        looks=list(_looks(results.heatmaps, evaluation)) if results.heatmaps else [],
        quick=evaluation.worst_case.score.num_images < QUICK_BELOW,
        quick_below=QUICK_BELOW,
        pixels=evaluation.pixels,
        of_255=evaluation.of_255,
        curves=[epsilon, steps, loss],
        gate=gate,
        entropy=entropy,
        experts=experts,
        diagnostics=evaluation.diagnostics,
        under_attack=under_attack,
        examples=examples,
        examples_missing=_examples_missing(results),
        training=training,
        amplification=figures.AMPLIFICATION,
        weights_rule=WEIGHTS.get(evaluation.weights, evaluation.weights),
        command=_command(results.environment) if results.trained_here else None,
        evaluation_command=_command(evaluation.environment),
        config=json.dumps(results.config, indent=2),
        environment=list(_flatten(results.environment)) if results.trained_here else [],
        evaluation_environment=list(_flatten(evaluation.environment)),
    )
    write_figures(run, drawn)
    if evaluation.suite.split("-")[0] in OF_A_LEADERBOARD:
        table = robustbench_json(
            EvaluationRecord.from_json(read_json(evaluation.file), evaluation.file),
            run.resolve().name,
        )
        atomic_write_json(run / "robustbench.json", table)
    page = run / "report.html"
    atomic_write_text(page, text)
    return page


def write_figures(parent: Path, drawn: Sequence[Figure | NotMeasured]) -> None:
    """Write each figure and its data into ``figures/``, which is made if it does not exist."""
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
    """Fill one of the templates beside this file."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    files = resources.files("dwf.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda score: percent(score.accuracy, score.num_images)
    environment.filters["interval"] = _interval
    environment.filters["radius"] = lambda value, pixels: radius(value, pixels=pixels)
    environment.filters["duration"] = duration
    # matplotlib has escaped the text inside its drawings
    environment.filters["drawing"] = Markup
    return environment.get_template(template).render(context)


def _mixture_figures(
    evaluation: Evaluation,
) -> tuple[Sequence[Figure | NotMeasured], Figure | NotMeasured, Figure | NotMeasured]:
    """Gate weights, gate entropy, accuracy of each expert."""
    reason = "The model is one network, or its suite does not look at this; suite paper does."
    weights: Sequence[Figure | NotMeasured] = [NotMeasured("Gate weights", reason)]
    entropy: Figure | NotMeasured = NotMeasured("Gate entropy", reason)
    experts: Figure | NotMeasured = NotMeasured("Accuracy of each expert", reason)
    if evaluation.gate:
        weights = figures.gate_weights(evaluation.gate, evaluation.class_name)
        entropy = figures.gate_entropy(evaluation.gate)
    if evaluation.experts:
        experts = figures.expert_accuracy(evaluation.experts, evaluation.attacks)
    return weights, entropy, experts


def _under_attack(evaluation: Evaluation) -> Sequence[Figure | NotMeasured]:
    """The experts, each attacked by itself."""
    if evaluation.diagnostics:
        return figures.experts_under_attack(evaluation.diagnostics)
    reason = "The model is one network, or evaluation.diagnostic_images was 0."
    return [NotMeasured("Each expert under attack", reason)]


def _training(results: Results) -> Figure | NotMeasured:
    if results.trained_here:
        return figures.training_curves(results.metrics)
    return NotMeasured("Training curves", "The model was trained elsewhere.")


def _settings(row: AttackRow, of_255: bool) -> str:
    """How hard an attack in turn tries."""
    if row.kind == "clean":
        return "no attack"
    parts = [f"epsilon {radius(row.epsilon, pixels=of_255)}"]
    if row.kind == "square":
        parts.append(f"{row.num_steps:,} queries")
    elif row.kind != "noise":
        parts.append("1 step" if row.num_steps == 1 else f"{row.num_steps:,} steps")
    if row.step_size is not None:
        parts.append(f"step size {row.step_size:.4g}")
    if row.random_start:
        parts.append("new random start" if row.stream else "random start")
    if row.eot_samples > 1:
        parts.append(f"mean over {row.eot_samples} passes")
    if row.num_non_finite:
        parts.append(f"{row.num_non_finite} outputs not finite")
    return ", ".join(parts)


def _views(evaluation: Evaluation) -> list[tuple[str, list[int]]]:
    """Of each view of a mixture how many images it broke, in every row that attacks views."""
    rows = [row for row in evaluation.attacks if row.kind == "views"]
    names = dict.fromkeys(name for row in rows for name in row.broken_by)
    return [(name, [row.broken_by.get(name, 0) for row in rows]) for name in names]


def _looks(heatmaps: Heatmaps, evaluation: Evaluation) -> Iterator[Looks]:
    """As many images with heatmaps as the page has room for."""
    room = EXAMPLES_BUDGET
    for g, label in enumerate(heatmaps.labels):
        image = _data_uri(figures.picture(heatmaps.images[g]))
        experts = [
            (name, _data_uri(figures.overlay(heatmaps, e, g)))
            for e, name in enumerate(heatmaps.experts)
        ]
        room -= len(image) + sum(len(uri) for _, uri in experts)
        if room < 0:
            return
        yield Looks(image, evaluation.class_name(label), experts)


def _data_uri(picture: Any) -> str:
    encoded = base64.b64encode(figures.png_of_picture(picture)).decode()
    return f"data:image/png;base64,{encoded}"


def _examples(examples: Examples, evaluation: Evaluation) -> Iterator[Example]:
    """As many examples as the page has room for."""
    room = EXAMPLES_BUDGET
    for g, label in enumerate(examples.labels):
        clean, adversarial, difference = map(_data_uri, figures.pictures(examples, g))
        room -= len(clean) + len(adversarial) + len(difference)
        if room < 0:
            return
        yield Example(
            clean,
            adversarial,
            difference,
            evaluation.class_name(label),
            evaluation.class_name(examples.predictions_clean[g]),
            evaluation.class_name(examples.predictions_adversarial[g]),
        )


def _examples_missing(results: Results) -> str:
    file = results.evaluation.file.with_suffix(".npz").name
    return f"evaluations/{file} holds no example images, or does not exist."


def _interval(score: Score) -> str:
    """A 95 % interval in percent."""
    low, high = (percent(bound, score.num_images).removesuffix(" %") for bound in score.interval)
    return f"{low} to {high} %"


def duration(seconds: float) -> str:
    """Seconds in words: 12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


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
