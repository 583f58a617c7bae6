"""Print numbers, radii, attacks and verdicts in the same words on every page and in every table.

Accuracies are fractions in data and percent in print.
"""

from __future__ import annotations

from dwf.attacks.table import ATTACKS
from dwf.evaluation.record import AttackRow, EvaluationRecord, Score

VERDICTS = {
    "VALID": "no known sign was seen that robustness is overestimated; that is not a proof.",
    "UNPROVEN": "no sign was seen, but too little was tried to see one: too few images, or a grid "
    "of gradient attacks alone.",
    "SUSPECT": "a measurement gives reason to doubt these numbers; do not quote them without the "
    "findings.",
    "INVALID": "a measurement contradicts these numbers; they show no robustness.",
}

WEIGHTS = {
    "last": "the weights after the last training step",
    "best": "the weights of best robust accuracy on held-out training images, "
    "chosen without the test set",
    "ema": "the running average of the weights over the last phase of training",
    "best-ema": "the average of the weights at its best robust validation accuracy",
    "as given": "the weights of the model that was handed in",
}


def percent(value: float | None, num_images: int = 0) -> str:
    """A fraction as percent: one decimal, two from 10,000 images on; "-" for None."""
    return "-" if value is None else f"{100 * value:.{2 if num_images >= 10_000 else 1}f} %"


def bare_percent(value: float, num_images: int = 0) -> str:
    """The same without the sign, for use inside an interval or a table of percents."""
    return percent(value, num_images).removesuffix(" %")


def interval(score: Score) -> str:
    """The 95 % interval of a score in percent."""
    low, high = (bare_percent(bound, score.num_images) for bound in score.interval)
    return f"{low} to {high} %"


def radius(epsilon: float, *, of_255: bool = True) -> str:
    """An epsilon or step size; also as k/255 where ``of_255`` is true and k is an integer."""
    k = round(epsilon * 255)
    if of_255 and k > 0 and abs(epsilon * 255 - k) < 1e-6:
        return f"{k}/255 = {epsilon:.3g}"
    return f"{epsilon:.4g}"


def norm_name(norm: str) -> str:
    """The usual name of the norm ``linf`` or ``l2``."""
    return {"linf": "L-infinity", "l2": "L2"}[norm]


def unit(evaluation: EvaluationRecord) -> str:
    """The unit of epsilon, for the axis of a chart."""
    return "pixels in [0, 1]" if evaluation.pixels else "normalized units"


def attack_settings(row: AttackRow, of_255: bool) -> str:
    """The budget of one attack: its radius, steps or queries, start and averaging."""
    if row.kind == "clean":
        return "no attack"
    parts = [f"epsilon {radius(row.epsilon, of_255=of_255)}"]
    if row.kind in ATTACKS and ATTACKS[row.kind].length == "num_queries":
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


def duration(seconds: float) -> str:
    """Seconds in words: 12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def scaled(number: int | None) -> str:
    """A count with three digits and a unit, such as 9.61 M; empty for None."""
    if number is None:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
