"""Findings about how a model behaves where attacks walk: one function each, from measurements.

Nothing here runs a model; :mod:`dwf.evaluation.behaviour` measures. Limits are in
:mod:`dwf.evaluation.limits`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dwf.evaluation.behaviour import Behaviour
from dwf.evaluation.limits import (
    ANSWERS_DIFFER,
    FEWEST_IMAGES,
    JUMPING,
    NOT_STATIONARY,
    REVERSED_MARGIN,
    ROUNDING_MATTERS,
    UNLIKE_STATEMENTS,
    WRONG_GRADIENT,
)
from dwf.evaluation.measures import Seen, held, seen
from dwf.evaluation.record import Finding

_ELSEWHERE = (
    "believe the rows of attacks without this gradient; attack by a smooth stand-in: "
    "dwf.attacks.with_backward_pass_of for one layer, --sources for another model"
)


def findings_of(measured: Behaviour) -> list[Finding]:
    """The reasons to doubt a model that behaves so."""
    index = measured.sample_index
    if measured.random:
        return []
    found = held(
        wrong_gradient(measured.derivative, index),
        answers_differ(measured.differs),
        inner_optimization(measured.inner_gradients),
    )
    if measured.jumps is not None:
        assert measured.rounding is not None
        assert measured.raised is not None
        found += held(
            jumps(seen(measured.jumps, index)),
            rounding(seen(measured.rounding, index), *_rounded_and_not(measured)),
            reversed_margin(seen(measured.raised, index)),
            not_stationary(measured.stationarity, index),
        )
    if measured.unlike is not None:
        found += held(unlike_statements(seen(measured.unlike, index)))
    return found


def _rounded_and_not(measured: Behaviour) -> tuple[float, float]:
    assert measured.stands_rounded is not None
    assert measured.stands_float is not None
    stands = measured.stands_rounded, measured.stands_float
    return tuple(100 * float(x.double().mean()) for x in stands)  # type: ignore[return-value]


def wrong_gradient(derivative: Tensor, sample_index: Tensor) -> Finding | None:
    """``derivative`` [N]: change of the margin along the gradient over what it predicts, or NaN."""
    known = ~derivative.isnan()
    if int(known.sum()) < max(FEWEST_IMAGES, len(derivative) // 4):
        return None  # that there is no gradient is a finding of its own
    away = (derivative - 1).abs()
    middle = float(away[known].median())
    severity, limit = WRONG_GRADIENT.severity(middle)
    if severity is None:
        return None
    wrong = seen((away > limit) & known, sample_index)
    share = float(derivative[known].median())
    return Finding(
        "wrong_gradient",
        severity,
        "the gradient is not the derivative of the output: a small step along it changes the "
        f"margin by {share:.2f} of what it predicts (median over {int(known.sum())} attacked "
        "images; 1 is right)",
        _ELSEWHERE,
        middle,
        limit,
        wrong.count,
        wrong.sample_indices,
    )


def answers_differ(differs: Mapping[str, float]) -> Finding | None:
    """``differs``: change of answers by circumstance, as a share of their spread."""
    if not differs:
        return None
    worst = max(differs, key=lambda name: differs[name])
    severity, limit = ANSWERS_DIFFER.severity(differs[worst])
    if severity is None:
        return None
    return Finding(
        "answers_differ",
        severity,
        f"the same images, clean or attacked, get other logits {worst} than in a batch without "
        f"one: they differ by {differs[worst]:.2g} of the spread of all logits",
        "an answer may depend on nothing but the image: look for requires_grad, the batch size, "
        "counters and other state in forward",
        differs[worst],
        limit,
    )


def inner_optimization(num_gradients: int) -> Finding | None:
    """``num_gradients``: calls of autograd inside one forward pass."""
    if num_gradients == 0:
        return None
    return Finding(
        "inner_optimization",
        "suspect",
        f"the forward pass takes {num_gradients} gradients of its own: its output is not "
        "differentiated as it is computed, and attacks by gradients are weak",
        "attack through every step of the inner optimization, or the model without it "
        "(arXiv:2202.13711)",
        float(num_gradients),
        0.0,
    )


def jumps(images: Seen) -> Finding | None:
    """``images`` whose answer jumps within 1e-4 of the clean or the attacked image."""
    return images.beyond(
        "jumps",
        JUMPING,
        "moving every pixel by 1e-4 makes the answer jump by more than 2 % of the spread of all "
        "answers",
        "no gradient reaches over a jump: look for rounding, comparisons and hard choices in "
        "forward; attack a smooth stand-in for them",
    )


def rounding(images: Seen, rounded: float, beside: float) -> Finding | None:
    """``images`` that, attacked, are judged otherwise on the 8-bit grid than beside it.

    ``rounded``, ``beside``: percent of the attacked images that stand so.
    """
    return images.beyond(
        "rounding",
        ROUNDING_MATTERS,
        f"of the attacked images {rounded:.1f} % stand rounded to 8 bits, as a file would hold "
        f"them, and {beside:.1f} % a quarter of a level beside; judged otherwise",
        "believe the rows of attacks on 8-bit images; nobody sends floats",
    )


def reversed_margin(images: Seen) -> Finding | None:
    """``images`` that fell while their margin was raised."""
    return images.beyond(
        "reversed_margin",
        REVERSED_MARGIN,
        "steps toward a larger margin, which should make the model surer, break it",
        "the margin does not say how far the decision is: attack the network without what "
        "processes its logits",
    )


def not_stationary(stationarity: Tensor | None, sample_index: Tensor) -> Finding | None:
    """``stationarity`` [N]: what is left to gain where PGD ended; NaN where it broke the image."""
    if stationarity is None:
        return None
    known = ~stationarity.isnan()
    if int(known.sum()) < FEWEST_IMAGES:
        return None
    middle = float(stationarity[known].median())
    severity, limit = NOT_STATIONARY.severity(middle)
    if severity is None:
        return None
    open_ = seen((stationarity > limit) & known, sample_index)
    return Finding(
        "not_stationary",
        severity,
        f"PGD ends where its gradient still promises {middle:.2f} of all that it could (median "
        "over images that stand; 0 is a point where no step helps)",
        "the attack is lost in gradients that change from step to step: average them over "
        "neighbors, take more and smaller steps",
        middle,
        limit,
        open_.count,
        open_.sample_indices,
    )


def unlike_statements(images: Seen) -> Finding | None:
    """``images`` at which a mixture's answer is not what its gate and its experts make."""
    return images.beyond(
        "unlike_statements",
        UNLIKE_STATEMENTS,
        "the mixture's answer is not what its gate_weights and its experts say, so its views "
        "attack another model",
        "gate_weights(x) and expert(e)(x) have to be those of forward; a mixture of feature maps "
        "says mixes_logits = False",
    )


def one_pass(
    accuracy: tuple[float, float] | None, num_votes: int, clean: float, robust: float
) -> Finding | None:
    """``accuracy`` of single passes on clean and on attacked images of a random model.

    ``clean``, ``robust``: shares that the table shows, by ``num_votes`` passes each.
    """
    if accuracy is None:
        return None
    return Finding(
        "one_pass",
        "note",
        f"the table counts votes of {num_votes} passes: {100 * clean:.1f} % clean, "
        f"{100 * robust:.1f} % under attack; of the images looked at one pass alone gets "
        f"{100 * accuracy[0]:.1f} % right clean, and {100 * accuracy[1]:.1f} % after a short PGD",
        "quote both, unless the model is always asked so often",
        100 * accuracy[0],
    )
