"""Findings about a model before any attack: one function each, from a number to a Finding or None.

Nothing here runs a model; :mod:`dwf.evaluation.contracts` measures. Limits are in
:mod:`dwf.evaluation.limits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dwf.evaluation.limits import (
    BALANCED_BELOW,
    BLIND_GATE,
    CONSTANT_ABOVE,
    DARKEST_MAXIMUM,
    DEAD_GATE_ABOVE,
    DEAD_GATE_BELOW,
    FEWEST_IMAGES,
    GATE_WAKES,
    MIN_EOT_SAMPLES,
    MIN_VOTES,
    RANDOM_ABOVE,
    UNIFORM_GATE,
)
from dwf.evaluation.measures import Seen, seen, some
from dwf.evaluation.record import Finding


def non_finite(clean: Seen, *, what: str = "logits") -> Finding | None:
    """``clean``: images at which ``what`` is NaN or infinite without any attack."""
    if clean.count == 0:
        return None
    return clean.finding(
        "non_finite",
        "invalid",
        0.0,
        f"{clean.count} clean images give NaN or infinite {what}; they count as broken",
        "find the layer that overflows or divides by zero; argmax of NaN is class 0, so other "
        "tools may call these images robust",
    )


def non_finite_weights(names: Sequence[str]) -> Finding | None:
    """``names`` of parameters and buffers that hold NaN or infinity."""
    if not names:
        return None
    return Finding(
        "non_finite",
        "invalid",
        f"{len(names)} weights or buffers hold NaN or infinity: {some(names)}",
        "the training diverged or the file is damaged; take an earlier checkpoint",
        float(len(names)),
        0.0,
    )


def input_scale(max_pixel: float) -> Finding | None:
    """``max_pixel``: the largest value in all images."""
    if not max_pixel <= DARKEST_MAXIMUM:
        return None
    return Finding(
        "input_scale",
        "suspect",
        f"no pixel is brighter than {max_pixel:.4g}: were the images divided by 255 twice?",
        "an epsilon in units of [0, 1] is enormous here; give images in [0, 1]",
        max_pixel,
        DARKEST_MAXIMUM,
    )


def not_logits(probabilities: bool, *, declared: bool = False) -> Finding | None:
    """``probabilities``: every row of the output lies in [0, 1] and sums to 1."""
    if not probabilities:
        return None
    return Finding(
        "not_logits",
        "suspect" if declared else "invalid",
        "the model returns probabilities: the cross-entropy of a softmax of a softmax saturates, "
        "so gradient attacks look weaker than they are",
        "return logits, drop the last softmax",
    )


def random_output(
    difference: float,
    *,
    declared: bool = False,
    eot_samples: int = 1,
    num_votes: int = 1,
    training: Sequence[str] = (),
) -> Finding | None:
    """``difference``: between two passes over the same images, by `answer_difference`.

    ``declared``: the caller says that the model is random. ``training``: modules that stay in
    train mode after ``eval()``, which the message names.
    """
    if not difference > RANDOM_ABOVE:
        return None
    if declared and eot_samples >= MIN_EOT_SAMPLES and num_votes >= MIN_VOTES:
        return None
    stuck = f" ({some(training)}: in train mode after eval())" if training else ""
    return Finding(
        "random",
        "suspect" if declared else "invalid",
        f"two passes over the same images differ{stuck}; evaluate a random model with "
        f"eot_samples of {MIN_EOT_SAMPLES} or more and {MIN_VOTES} votes",
        f"here eot_samples={eot_samples}, votes {num_votes}"
        + ("" if declared else ", and nobody said that the model is random"),
        difference,
        RANDOM_ABOVE,
    )


def batch_dependent(difference: float, in_company: float) -> Finding | None:
    """``in_company``: difference of an image's logits between two batches.

    Two passes over one batch differ by ``difference``; a random model's differ anyway, so nothing
    can be said of it.
    """
    if difference > RANDOM_ABOVE or not in_company > RANDOM_ABOVE:
        return None
    return Finding(
        "batch_dependent",
        "invalid",
        "an image's logits depend on the others of its batch",
        "normalize by running statistics, and route each image by itself",
        in_company,
        RANDOM_ABOVE,
    )


def state_changed(names: Sequence[str]) -> Finding | None:
    """``names``: parameters and buffers whose bits a pass in eval mode changed."""
    if not names:
        return None
    return Finding(
        "state_changed",
        "invalid",
        f"a forward pass in eval mode changes parameters or buffers: {some(names)}",
        "the model that is judged last is not the one that was attacked first; weights and "
        "statistics may move in train mode only",
        float(len(names)),
        0.0,
    )


def constant_output(predictions: Tensor, labels: Tensor) -> Finding | None:
    """``predictions`` [N] on clean images; no finding where the labels are one class themselves."""
    if len(labels) < FEWEST_IMAGES:
        return None
    favorite = int(predictions.mode().values)
    favored = seen(predictions == favorite)
    if seen(labels == labels.mode().values).points > BALANCED_BELOW:
        return None
    if not favored.points > CONSTANT_ABOVE:
        return None
    return favored.finding(
        "constant_output",
        "invalid",
        CONSTANT_ABOVE,
        f"{favored.points:.1f} % of the images are called class {favorite}",
        "the model ignores its input: its accuracy, attacked or not, is the share of that class",
    )


def dead_gate(
    mean_weights: Sequence[float], max_weights: Sequence[float], wakes: Seen | None = None
) -> Finding | None:
    """``mean_weights``, ``max_weights`` [E]: mean and maximum of the gate over clean images.

    ``wakes``: images, clean or attacked, at which the gate or its soft weights prefer an expert
    that is dead on clean images; None if nobody looked. Without them the number is that of the
    experts that count, and there is nothing to doubt in it: a note.
    """
    mean, largest = [100 * w for w in mean_weights], [100 * w for w in max_weights]
    if len(mean) < 2 or not all(map(math.isfinite, mean + largest)):
        return None
    highest, lowest = max(mean), min(largest)
    if highest > DEAD_GATE_ABOVE:
        measured, limit = highest, DEAD_GATE_ABOVE
        message = f"expert {mean.index(highest)} holds {highest:.1f} % of the gate's weight"
    elif lowest < DEAD_GATE_BELOW:
        measured, limit = lowest, DEAD_GATE_BELOW
        message = (
            f"expert {largest.index(lowest)} never gets more than {lowest:.2f} % of the weight"
        )
    else:
        return None
    if wakes is not None and wakes.count:
        message += f", and another is preferred at {wakes.count} of {wakes.total} images looked at"
    settled = wakes is not None and wakes.points <= GATE_WAKES
    return Finding(
        "dead_gate",
        "note" if settled else "suspect",
        f"{message}: as judged, this is not a mixture of {len(mean)}",
        "report it as the experts that count, or train the gate with a balance loss",
        measured,
        limit,
    )


def blind_gate(
    without_gradient: Seen, *, cut: Seen | None = None, views: bool = False
) -> Finding | None:
    """``without_gradient``: images at which the gate's weights have a gradient of exactly zero.

    It is a finding only for a gate whose weights differ from image to image. It is a note where
    ``views`` of the mixture were attacked, which need no gradient of a hard gate. It is no note
    for a soft gate whose gradient is ``cut``, by detach for example: views steer it by a short
    PGD only, and none of the stronger attacks can.
    """
    found = without_gradient.beyond(
        "blind_gate",
        BLIND_GATE,
        "the gate's choice has a gradient of zero, so an attack on the whole model cannot steer it",
        "attack through views of the mixture as well: each expert, a uniform gate, a soft gate in "
        "place of the hard one; give a soft gate its gradient back",
        fewest=1,
    )
    is_cut = cut is not None and BLIND_GATE.severity(cut.points)[0] is not None
    if found is not None and views and not is_cut:
        return replace(found, severity="note")
    return found


def uniform_gate(share: float) -> Finding | None:
    """``share``: the mean entropy of the gate's weights on clean images, as a part of log E."""
    if share <= UNIFORM_GATE:
        return None
    return Finding(
        "uniform_gate",
        "note",
        "the gate does not gate: its weights are nearly equal on every image",
        "read the mixture as an average of its experts; train the gate longer, or at a higher rate",
        measured=share,
        limit=UNIFORM_GATE,
    )
