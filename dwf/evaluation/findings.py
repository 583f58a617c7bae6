"""Findings about attacks and about how an evaluation was done: one function each.

A finding is a reason to doubt a robustness number. Each function turns what was measured into a
:class:`Finding` or None and runs no model. VALID means that none of these signs was seen; it is no
proof. Limits are in :mod:`dwf.evaluation.limits`, findings about the model itself in
:mod:`dwf.evaluation.model_findings`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dwf.evaluation.limits import (
    BLACK_BOX_WINS,
    CLEAN_BELOW,
    CONTROL_STANDS,
    DOUBTS_WIN,
    EPSILON_HELPS,
    FALLS_BEYOND,
    FEWEST_IMAGES,
    FLAT_BELOW,
    NOISE_WINS,
    NON_FINITE_ATTACKED,
    NOT_CONVERGED,
    PGD_WINS,
    PLAN_GRADIENT_BELOW,
    PRECISION,
    SINGLE_STEP_WINS,
    SMALL_SAMPLE,
    TOO_FEW,
    TRANSFER_WINS,
    TWINS,
    UNBOUNDED_ABOVE_CHANCE,
    VANISHING_GRADIENT,
    VIEW_WINS,
    VIEWS_AGAIN,
    ZERO_GRADIENT,
)
from dwf.evaluation.measures import Seen
from dwf.evaluation.record import Finding, wilson_interval

_MASKED = (
    "gradients are masked or noisy: use black-box and transfer attacks, and attack a smooth "
    "stand-in for what hides them"
)


def non_finite_attacked(attacked: Seen) -> Finding | None:
    """``attacked``: images that some attack turned into NaN or infinite logits."""
    if attacked.count == 0:
        return None
    severity, limit = NON_FINITE_ATTACKED.severity(attacked.points)
    return attacked.finding(
        "non_finite_attacked",
        severity or "note",
        limit,
        f"{attacked.count} logits under attack are NaN or infinite; they count as broken",
        "bound the activations: an overflow is a failure, but not the one that was to be measured",
    )


def budget(num_pixels: int, outside: Seen | None = None) -> Finding | None:
    """``num_pixels``: attacked ones beyond epsilon or [0, 1]; ``outside``: their images."""
    if num_pixels == 0:
        return None
    return Finding(
        "budget",
        "invalid",
        f"{num_pixels} attacked pixels are outside epsilon or [0, 1]",
        "an attack of this suite is broken, so its numbers are no lower bound: report it",
        float(num_pixels),
        0.0,
        outside.count if outside else 0,
        outside.sample_indices if outside else (),
    )


def zero_gradient(images: Seen) -> Finding | None:
    """``images`` at which cross-entropy *and* margin have a gradient of exactly zero."""
    return images.beyond(
        "zero_gradient",
        ZERO_GRADIENT,
        f"the loss has a gradient of exactly zero at {images.count} of {images.total} images, so "
        "gradient attacks prove nothing there",
        "look for quantization, argmax, no_grad or detach in the model; attack a smooth stand-in",
        fewest=1,
        counted=False,
    )


def vanishing_gradient(images: Seen) -> Finding | None:
    """``images`` at which the cross-entropy alone has a gradient of exactly zero."""
    return images.beyond(
        "vanishing_gradient",
        VANISHING_GRADIENT,
        f"the cross-entropy has a gradient of exactly zero at {images.count} of {images.total} "
        "images and the margin loss has not: attacks by cross-entropy alone stand still",
        "believe the attacks by margin or DLR, or divide the logits by a constant",
        fewest=1,
        counted=False,
    )


def unbounded(standing: Seen, num_classes: int) -> Finding | None:
    """``standing``: images still right when gradient attacks may turn black into white."""
    limit = 100 / num_classes + UNBOUNDED_ABOVE_CHANCE
    if not standing.points > limit:
        return None
    return standing.finding(
        "unbounded",
        "invalid",
        limit,
        "at an epsilon at which any image may become any other, gradient attacks fail on "
        f"{standing.points:.1f} % of the images",
        _MASKED,
    )


def noise_wins(only: Seen) -> Finding | None:
    """``only``: images that random draws break and no attack does."""
    return only.beyond(
        "noise_wins", NOISE_WINS, "random noise breaks what no attack broke", _MASKED
    )


def black_box_wins(only: Seen, *, again: Seen | None = None) -> Finding | None:
    """``only``: images that an attack without gradients breaks and none with gradients does.

    ``again``: images of a mixture that fell when its views, and harder attacks, followed. If those
    find no more, a few such images are a note, as in `view_wins`; many never are.
    """
    message = "an attack without gradients breaks what none with gradients broke"
    found = only.beyond("black_box_wins", BLACK_BOX_WINS, message, _MASKED)
    if found is None or again is None or found.severity == "invalid":
        return found
    message = f"{found.message}; all attacks that followed break {again.count} more"
    return replace(found, message=message, severity="note" if _settled(again) else found.severity)


def pgd_wins(only: Seen) -> Finding | None:
    """``only``: images that a PGD of a few steps breaks and the suite did not."""
    message = "a short PGD breaks what the suite did not"
    return only.beyond("pgd_wins", PGD_WINS, message, "give the suite more steps and restarts")


def single_step_wins(only: Seen) -> Finding | None:
    """``only``: images that one step breaks and no iterative attack does."""
    message = "one step of length epsilon breaks what no iterative attack broke"
    remedy = f"give the iterative attacks more and other steps; if that is not it, {_MASKED}"
    return only.beyond("single_step_wins", SINGLE_STEP_WINS, message, remedy)


def transfer_wins(only: Seen, *, source: str = "another model") -> Finding | None:
    """``only``: images that attacks on ``source`` break, and no attack on the model itself does."""
    message = f"attacks on {source} break what no attack on the model itself broke"
    return only.beyond("transfer_wins", TRANSFER_WINS, message, _MASKED)


def clean_below(correct: Tensor, expected: float | None) -> Finding | None:
    """``correct`` [N] bool on clean images, of a model from which ``expected`` in [0, 1] is known.

    A finding where even the upper end of the 95 % interval is more points below.
    """
    if expected is None:
        return None
    score = wilson_interval(int(correct.sum()), len(correct))
    missing = 100 * (expected - score[1])
    severity, limit = CLEAN_BELOW.severity(missing)
    if severity is None:
        return None
    return Finding(
        "clean_below",
        severity,
        f"clean accuracy {100 * float(correct.double().mean()):.1f} %, {100 * expected:.1f} % "
        "expected: the model does not see what it was trained on",
        "look for images that are normalized twice or not at all, another order of channels, other "
        "classes, other data",
        measured=missing,
        limit=limit,
    )


def view_wins(only: Seen, *, view: str = "its views", again: Seen | None = None) -> Finding | None:
    """``only``: images that attacks on views break, and no attack on the whole mixture does.

    ``again``: images that fell when views attacked once more, longer and from other starts; None if
    they did not. The number counts what views broke, so where they find no more it is a note.
    """
    found = only.beyond(
        "view_wins",
        VIEW_WINS,
        f"attacks on the mixture through {view} break what attacks on the whole did not",
        "the gate masks gradients: believe the worst case with all views, and no table that "
        "attacked such a mixture without them",
    )
    if found is None or again is None:
        return found
    message = f"{found.message}; the best of them, again and longer, break {again.count} more"
    return replace(found, message=message, severity="note" if _settled(again) else found.severity)


def _settled(again: Seen) -> bool:
    """Whether what fell to more of the same is no more than other starts always find."""
    return again.points <= VIEWS_AGAIN or again.count < FEWEST_IMAGES


def not_converged(only: Seen) -> Finding | None:
    """``only``: images that the suite left and attacks of twice the effort break."""
    return only.beyond(
        "not_converged",
        NOT_CONVERGED,
        "twice the steps and restarts break what the suite did not",
        "give the suite more steps and restarts until doubling changes nothing",
    )


def epsilon_helps(
    epsilon: Sequence[float], accuracy: Sequence[float], num_images: int
) -> Finding | None:
    """``accuracy`` in [0, 1] under the same attack at each ``epsilon``, ascending."""
    lowest, at = math.inf, 0.0
    gain, smaller, larger = 0.0, 0.0, 0.0
    for radius, value in zip(epsilon, accuracy, strict=True):
        if value - lowest > gain:
            gain, smaller, larger = value - lowest, at, radius
        if value < lowest:
            lowest, at = value, radius
    severity, limit = EPSILON_HELPS.severity(100 * gain)
    if severity is None or round(gain * num_images) < FEWEST_IMAGES:
        return None
    return Finding(
        "epsilon_helps",
        severity,
        f"the same attack leaves {100 * gain:.1f} points more at epsilon {larger:.4g} than at "
        f"{smaller:.4g}, whose images are all allowed there",
        f"give the attacks more steps, restarts and losses; if that is not it, {_MASKED}",
        100 * gain,
        limit,
    )


def control_stands(standing: Seen) -> Finding | None:
    """``standing``: images at which an undefended twin withstands the same suite."""
    return standing.beyond(
        "control_stands",
        CONTROL_STANDS,
        "an undefended network withstands the same attacks at the same epsilon",
        "the attacks are too weak or misapplied (pixel scale, normalization, clamping, steps): no "
        "number of this table shows a defense",
        fewest=1,
    )


def precision(disagree: Seen) -> Finding | None:
    """``disagree``: attacked images that are right by only one of the search and float32."""
    return disagree.beyond(
        "precision",
        PRECISION,
        "the search and float32 disagree about who is right",
        "the number of float32 stands; search in float32 to lose nothing",
    )


# -- how it was done ------------------------------------------------------------------------------


def protocol(name: str) -> Finding | None:
    """``name``: "pixels", or a published protocol that differs from it."""
    if name == "pixels":
        return None
    return Finding(
        "protocol",
        "suspect",
        f"attacks acted on normalized images (protocol {name}): these numbers reproduce a "
        "published table and say nothing about pixels",
        "evaluate with protocol pixels",
    )


def small_sample(num_images: int) -> Finding | None:
    """``num_images``: how many were judged."""
    if num_images >= SMALL_SAMPLE:
        return None
    too_few = num_images < TOO_FEW
    message = f"few images: {num_images}, fewer than {SMALL_SAMPLE}; the intervals are wide"
    if too_few:
        message = f"{num_images} images, too few to be VALID: fewer than {TOO_FEW}"
    return Finding(
        "small_sample",
        "unproven" if too_few else "note",
        message,
        "judge more images",
        float(num_images),
        float(TOO_FEW if too_few else SMALL_SAMPLE),
    )


def small_budget(num_steps: int, num_queries: int) -> Finding:
    """For a suite whose attacks were cut to so many steps and queries."""
    return Finding(
        "small_budget",
        "note",
        f"every attack was cut to {num_steps} steps or {num_queries} queries: a trial of the "
        "verdict, not a number to quote",
        "evaluate without a budget",
    )


def model_note(note: str) -> Finding:
    """``note``: what the model itself says to readers of its numbers."""
    return Finding("model", "note", note)


def only_a_grid() -> Finding:
    """For the paper's grid, which tries nothing that could doubt its numbers."""
    return Finding(
        "only_a_grid",
        "unproven",
        "a grid of gradient attacks: no noise, no black box, no radius that allows everything was "
        "tried, and a mixture was not attacked through its parts",
        "dwf eval --suite standard does",
    )


def mixture_inside(name: str) -> Finding:
    """``name``: a mixture inside the model, which is attacked through the views of that part."""
    return Finding(
        "mixture_inside",
        "note",
        f"{name}, a mixture, is a part of the model; the whole is attacked through its views",
    )


def falls_beyond(fell: Seen) -> Finding | None:
    """``fell``: images that stand at epsilon and fall to a short PGD at 1.1 epsilon."""
    return fell.beyond(
        "falls_beyond",
        FALLS_BEYOND,
        "robustness ends right outside the ball: at 1.1 epsilon a short PGD breaks what nothing "
        "broke at epsilon",
        "look for a memory of these images or of this radius in the model, and judge images that "
        "it has never seen",
    )


def flat(
    epsilon: Sequence[float], accuracy: Sequence[float], radius: float, clean: float, chance: float
) -> Finding | None:
    """``accuracy`` in [0, 1] under the same attack at each ``epsilon``, ascending.

    Flat is what falls below the clean accuracy, and then is the same at ``radius`` and at twice it.
    An epsilon at which nothing has fallen yet shows nothing.
    """
    known = dict(zip(epsilon, accuracy, strict=True))
    at, twice = known.get(radius), known.get(2 * radius)
    if at is None or twice is None or at <= chance + 0.1 or clean - at < 0.05:
        return None
    fall = 100 * (at - twice)
    if fall > FLAT_BELOW:
        return None
    return Finding(
        "flat",
        "suspect",
        f"the same attack leaves {100 * at:.1f} % at epsilon and {100 * twice:.1f} % at twice "
        "epsilon: the attack ends somewhere, not the robustness",
        f"give the attacks other losses and starts; if that is not it, {_MASKED}",
        fall,
        FLAT_BELOW,
    )


def doubts_win(only: Seen) -> Finding | None:
    """``only``: images that fell to any of the doubts, and to no attack by gradients."""
    return only.beyond(
        "doubts_win",
        DOUBTS_WIN,
        "weak attacks break, all together, what the suite's gradients left",
        _MASKED,
    )


def sandwich(broken: Seen) -> Finding | None:
    """``broken``: images that are certified, and that an attack broke all the same."""
    if broken.count == 0:
        return None
    return broken.finding(
        "sandwich",
        "invalid",
        0.0,
        f"{broken.count} of {broken.total} images cannot fall within epsilon, by proof, and did",
        "an attack left its ball, or the model is judged otherwise than it computes: report it",
    )


def twins(same: Seen) -> Finding | None:
    """``same``: test images that the training set holds as well, pixel by pixel."""
    return same.beyond(
        "twins",
        TWINS,
        "test images are in the training set, so this is no accuracy on new images",
        "remove them from one of the two, or say so beside the number",
    )


def plan_gradient(cosine: float) -> Finding:
    """``cosine``: median cosine of the plan's and autograd's gradients of the margin."""
    return Finding(
        "plan_gradient",
        "note",
        f"the fast path's gradients are not those of autograd (cosine {cosine:.2f}): attacks ran "
        "by autograd, and nothing of it is the model's fault",
        "report it with the network: dwf doctor --selftest",
        cosine,
        PLAN_GRADIENT_BELOW,
    )
