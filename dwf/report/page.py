"""One HTML page about one run: what was attacked, how hard, is it believable, how was it made.

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
from dwf.files import atomic_write_bytes, atomic_write_text, explain
from dwf.report import figures
from dwf.report.figures import Figure, NotMeasured, percent, radius
from dwf.report.results import Evaluation, Examples, Results, Score, load_results

# below this many images a 95 % interval is wider than +-3 points at half
QUICK_BELOW = 1000
# bytes of example images: enough for dozens of small ones, and the page still fits into a mail
EXAMPLES_BUDGET = 1_000_000
SEVERITIES = ["invalid", "suspect", "note"]

WEIGHTS = {
    "last": "the weights after the last training step",
    "best": "the weights of best robust accuracy on held-out training images, "
    "chosen without the test set",
    "ema": "the running average of the weights over the last phase of training",
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


def write_report(run: Path, suite: str | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.{png,csv}`` into a run folder; return the page's path.

    Args:
        run: folder of one training run that has been evaluated.
        suite: which ``evaluations/<suite>.json``; "paper" by default, else the one written last.
    Raises:
        CheckpointError: with the file and key that are missing, damaged or contradict another.
    """
    run = Path(run)
    results = load_results(run, suite)
    evaluation = results.evaluation
    epsilon = figures.accuracy_over_epsilon(evaluation)
    steps = figures.accuracy_over_steps(evaluation)
    training = figures.training_curves(results.metrics)
    gate, entropy, experts = _mixture_figures(evaluation)
    under_attack = _under_attack(evaluation)
    examples = list(_examples(results.examples, evaluation)) if results.examples else []
    drawn = [epsilon, steps, *gate, entropy, experts, *under_attack, training]
    if results.examples:
        drawn.append(figures.example_grid(results.examples, evaluation.class_name))
    text = render(
        "page.html.j2",
        results=results,
        evaluation=evaluation,
        clean=evaluation.clean,
        findings=sorted(evaluation.findings, key=lambda f: _severity(f.severity)),
        quick=evaluation.worst_case.score.num_images < QUICK_BELOW,
        quick_below=QUICK_BELOW,
        pixels=evaluation.protocol == "pixels",
        curves=[epsilon, steps],
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
        command=_command(results.environment),
        evaluation_command=_command(evaluation.environment),
        config=json.dumps(results.config, indent=2),
        environment=list(_flatten(results.environment)),
        evaluation_environment=list(_flatten(evaluation.environment)),
        not_measured=list(_not_measured(results)),
    )
    write_figures(run, drawn)
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
    reason = f"The model is one network, or suite {evaluation.suite!r} does not look into mixtures."
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


def _examples(examples: Examples, evaluation: Evaluation) -> Iterator[Example]:
    """As many examples as the page has room for."""
    room = EXAMPLES_BUDGET
    for g, label in enumerate(examples.labels):
        encoded = [
            base64.b64encode(figures.png_of_picture(picture)).decode()
            for picture in figures.pictures(examples, g)
        ]
        room -= sum(len(text) for text in encoded)
        if room < 0:
            return
        clean, adversarial, difference = (f"data:image/png;base64,{text}" for text in encoded)
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


def _severity(name: str) -> int:
    return SEVERITIES.index(name) if name in SEVERITIES else 0


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


def _not_measured(results: Results) -> Iterator[str]:
    """What a careful reader would ask for and this evaluation does not answer.

    Source: the checklist of Carlini et al., arXiv:1902.06705, sections 4 and 5.
    """
    evaluation = results.evaluation
    attacked = [row for row in evaluation.attacks if row.kind != "clean"]
    kinds = {row.kind for row in attacked}

    def lacks(*wanted: str) -> bool:
        return kinds.isdisjoint(wanted)

    if not attacked:
        yield "Any attack: this evaluation holds clean accuracy only."
    elif max(row.num_steps for row in attacked) < 20:
        yield "Attacks of 20 or more steps: whether the attack has converged is open."
    if all(row.num_restarts < 2 for row in attacked):
        yield "Several restarts per image."
    if not any(row.random_start for row in attacked):
        yield "Random starts: every attack began at the clean image."
    if all(row.eot_samples < 2 for row in attacked):
        yield (
            "Expectation over randomness: every gradient was taken once, "
            "which is right for a deterministic model only."
        )
    if lacks("apgd", "autoattack"):
        yield "AutoAttack, or another attack that chooses its own step size and loss."
    if lacks("square", "autoattack"):
        yield "Attacks without gradients (Square), which would show a masked gradient."
    if lacks("transfer") and not evaluation.diagnostics:
        yield "Images crafted on a single expert or on another network and transferred."
    if not evaluation.gate:
        yield "The gate's decisions."
    if not evaluation.experts:
        yield "The accuracy of each expert."
    yield "Threat models other than L-infinity: L2, patches, corruptions."
    yield f"The spread over seeds: this page shows one run, seed {evaluation.seed}."
    others = " and ".join(name for name in WEIGHTS if name != evaluation.weights)
    yield f"Other weights of this run ({others}); this page shows {evaluation.weights}."
