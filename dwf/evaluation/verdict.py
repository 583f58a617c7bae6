"""Who is right, decided in float32; and findings: reasons to doubt a robustness number.

Each finding has one function here, from what was measured to a :class:`Finding` or None. It reads
numbers and the images that were :func:`seen`, and runs no model. :func:`verdict` is the worst of
them. VALID means "no known sign of overestimation": none of these signs was seen. It is no proof.

Limits are in points, percent of the images, unless they say otherwise. They leave room above what
honest models show, which is written beside each. Move a limit only with a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwf.attacks.norms import num_over_budget as num_over_budget
from dwf.attacks.outcomes import logit_difference as logit_difference
from dwf.attacks.source import float32_verdicts as float32_verdicts
from dwf.attacks.source import judge as judge

SEVERITIES = ("note", "suspect", "invalid")
MAX_SAMPLE_INDICES = 20
# Fewer images than this are no reason for doubt between two attacks, whatever share they are: on
# small samples one image that only a weak attack happened to break would be a whole point.
FEWEST_IMAGES = 3


@dataclass(frozen=True)
class Seen:
    """How many of how many images show something, and the first of them where they are known."""

    count: int
    total: int
    sample_indices: tuple[int, ...] = ()

    @property
    def points(self) -> float:
        return 100 * self.count / max(self.total, 1)


def seen(mask: Tensor, sample_index: Tensor | None = None) -> Seen:
    """From a mask [N]; ``sample_index`` [N] are the images' places in their data set."""
    places = torch.nonzero(mask.cpu())[:MAX_SAMPLE_INDICES, 0]
    first = places if sample_index is None else sample_index.cpu()[places]
    return Seen(int(mask.sum()), len(mask), tuple(int(i) for i in first))


class Limits(NamedTuple):
    """A finding holds when more than this was measured; infinity where there is no such step."""

    suspect: float
    invalid: float = math.inf


SMALL_SAMPLE = 1000  # images; below, a 95 % interval is wider than +-3 points
PROBABILITY_TOLERANCE = 1e-4  # of a sum of float32 or bfloat16 probabilities
# Share of the range of all logits. Batches of another size round differently by 1e-6; a plan or a
# model in bfloat16 is not asked here.
RANDOM_ABOVE = 1e-4
MIN_EOT_SAMPLES, MIN_VOTES = 20, 10  # where the accuracy of random models stops moving
# The brightest pixel of any set of photographs or scans; images divided by 255 twice stay below.
DARKEST_MAXIMUM = 0.1
# Honest: 0. A model may overflow on a few extreme attacked images without being a broken one.
NON_FINITE_ATTACKED = Limits(0.1)
# Honest: 0.0. A few dead images (saturated inputs) mislead no one; a tenth is a masked gradient.
ZERO_GRADIENT = Limits(1.0, 10.0)
# Honest: 0.0. Attacks by the margin loss stand, so it is never invalid.
VANISHING_GRADIENT = Limits(10.0)
# Above chance. Honest: 0.0 % accuracy, since at epsilon 1 every image may become any other.
UNBOUNDED_ABOVE_CHANCE = 1.0
NOISE_WINS = Limits(0.5, 2.0)  # honest: 0.0
BLACK_BOX_WINS = Limits(0.5, 2.0)  # AutoAttack flags 0.2; a short budget of queries is noisier
SINGLE_STEP_WINS = Limits(1.0, 5.0)  # honest: 0.0, as a suite's first steps contain the single one
PGD_WINS = Limits(2.0, 5.0)  # as NOT_CONVERGED: other starts always find an image or two
TRANSFER_WINS = Limits(3.0, 10.0)  # honest: 0.8
VIEW_WINS = Limits(3.0, 10.0)  # honest mixtures: 0.8 with a soft gate, 1.4 with a hard one
NOT_CONVERGED = Limits(2.0, 5.0)  # honest: 0.2 to 1.6
# As NOT_CONVERGED: a larger ball holds every image of the smaller, so any gain is the attack's
# failure to converge.
EPSILON_HELPS = Limits(2.0, 5.0)
# An undefended network at a radius that a defense is proud of keeps about 0.
CONTROL_STANDS = Limits(5.0, 20.0)
CONSTANT_ABOVE = 95.0  # percent of predictions; the flat 10.00 % of published tables
BALANCED_BELOW = 50.0  # percent of labels in one class; above, a constant may be a right answer
DEAD_GATE_ABOVE, DEAD_GATE_BELOW = 99.0, 1.0  # percent of gate weight
BLIND_GATE = Limits(1.0)  # percent of images; honest soft gates: 0.0
PRECISION = Limits(0.3, 3.0)  # aim: at most 0.3; the float32 number stands below 3


@dataclass(frozen=True)
class Finding:
    """One reason to doubt a result.

    Attributes:
        name: which, the same in every version.
        severity: "note", "suspect" or "invalid".
        measured, limit: the number and what it went beyond, in points unless the message says
            otherwise; None where there is no number.
        num_images: images that show it, or 0 where it is not about images.
        sample_indices: the first 20 of them.
        remedy: what to do.
    """

    name: str
    severity: str
    message: str
    remedy: str = ""
    measured: float | None = None
    limit: float | None = None
    num_images: int = 0
    sample_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.severity in SEVERITIES, self.severity

    def to_dict(self) -> dict[str, Any]:
        """JSON values; there is no NaN in JSON, so a number that is not finite becomes None."""
        values = asdict(self) | {"sample_indices": list(self.sample_indices)}
        for key in ("measured", "limit"):
            if values[key] is not None and not math.isfinite(values[key]):
                values[key] = None
        return values

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.severity}: {self.name}: {self.message}{remedy}"


def verdict(findings: Iterable[Finding | Mapping[str, Any]]) -> str:
    """VALID, SUSPECT or INVALID: the worst severity of findings, or of their JSON."""
    severities = {f["severity"] if isinstance(f, Mapping) else f.severity for f in findings}
    return (
        "INVALID" if "invalid" in severities else "SUSPECT" if "suspect" in severities else "VALID"
    )


# -- what the model is, before any attack ---------------------------------------------------------


def non_finite(clean: Seen, *, what: str = "logits") -> Finding | None:
    """``clean``: images at which ``what`` is NaN or infinite without any attack."""
    if clean.count == 0:
        return None
    return _about(
        "non_finite",
        "invalid",
        0.0,
        clean,
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
        f"{len(names)} weights or buffers hold NaN or infinity: {_some(names)}",
        "the training diverged or the file is damaged; take an earlier checkpoint",
        float(len(names)),
        0.0,
    )


def non_finite_attacked(attacked: Seen) -> Finding | None:
    """``attacked``: images that some attack turned into NaN or infinite logits."""
    if attacked.count == 0:
        return None
    severity, limit = _severity(attacked.points, NON_FINITE_ATTACKED)
    return _about(
        "non_finite_attacked",
        severity or "note",
        limit,
        attacked,
        f"{attacked.count} logits under attack are NaN or infinite; they count as broken",
        "bound the activations: an overflow is a failure, but not the one that was to be measured",
    )


def input_scale(max_pixel: float) -> Finding | None:
    """``max_pixel``: of all images."""
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


def pixel_range(error: str) -> Finding:
    """``error``: what was said of the images, from which no attack on pixels can start."""
    return Finding(
        "pixel_range",
        "invalid",
        f"images are not pixels in [0, 1]: {error}",
        "make normalization the first layer of the model (dwf.as_pixel_model)",
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
    """``difference``: of two passes over the same images, by `logit_difference`.

    ``declared``: the caller says that the model is random. ``training``: modules that stay in
    train mode after ``eval()``, which the message names.
    """
    if not difference > RANDOM_ABOVE:
        return None
    if declared and eot_samples >= MIN_EOT_SAMPLES and num_votes >= MIN_VOTES:
        return None
    stuck = f" ({_some(training)}: in train mode after eval())" if training else ""
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
    """``in_company``: of two batches around an image, where two passes differ by ``difference``.

    Nothing can be said of a random model, whose passes differ anyway.
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


def state_changed(buffers: Sequence[str]) -> Finding | None:
    """``buffers``: names of those whose bits a pass in eval mode changed."""
    if not buffers:
        return None
    return Finding(
        "state_changed",
        "invalid",
        f"a forward pass in eval mode changes buffers: {_some(buffers)}",
        "the model that is judged last is not the one that was attacked first; statistics may "
        "move in train mode only",
        float(len(buffers)),
        0.0,
    )


def are_probabilities(logits: Tensor) -> bool:
    """Whether every row [K] lies in [0, 1] and sums to 1."""
    if logits.numel() == 0 or logits.shape[1] < 2:
        return False
    rows = logits.detach().float()
    inside = bool(((rows >= 0) & (rows <= 1)).all())
    return inside and bool(((rows.sum(dim=1) - 1).abs() <= PROBABILITY_TOLERANCE).all())


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
    return _about(
        "constant_output",
        "invalid",
        CONSTANT_ABOVE,
        favored,
        f"{favored.points:.1f} % of the images are called class {favorite}",
        "the model ignores its input: its accuracy, attacked or not, is the share of that class",
    )


def dead_gate(mean_weights: Sequence[float], max_weights: Sequence[float]) -> Finding | None:
    """``mean_weights``, ``max_weights`` [E]: of the gate, over clean images."""
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
    return Finding(
        "dead_gate",
        "suspect",
        f"{message}: as judged, this is not a mixture of {len(mean)}",
        "report it as the experts that count, or train the gate with a balance loss",
        measured,
        limit,
    )


def blind_gate(without_gradient: Seen, *, views: bool = False) -> Finding | None:
    """``without_gradient``: images at which the gate's weights have a gradient of exactly zero,
    although they differ from image to image. A note where ``views`` were attacked that do not need
    it.
    """
    found = _share(
        "blind_gate",
        without_gradient,
        BLIND_GATE,
        "the gate's choice has a gradient of zero, so an attack on the whole model cannot steer it",
        "attack through views of the mixture as well: each expert, a uniform gate, a soft gate in "
        "place of the hard one",
        fewest=1,
    )
    return replace(found, severity="note") if found is not None and views else found


# -- what attacks did -----------------------------------------------------------------------------


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
    return _share(
        "zero_gradient",
        images,
        ZERO_GRADIENT,
        f"the loss has a gradient of exactly zero at {images.count} of {images.total} images, so "
        "gradient attacks prove nothing there",
        "look for quantization, argmax, no_grad or detach in the model; attack a smooth stand-in",
        fewest=1,
    )


def vanishing_gradient(images: Seen) -> Finding | None:
    """``images`` at which the cross-entropy alone has a gradient of exactly zero."""
    return _share(
        "vanishing_gradient",
        images,
        VANISHING_GRADIENT,
        f"the cross-entropy has a gradient of exactly zero at {images.count} of {images.total} "
        "images and the margin loss has not: attacks by cross-entropy alone stand still",
        "believe the attacks by margin or DLR, or divide the logits by a constant",
        fewest=1,
    )


def unbounded(standing: Seen, num_classes: int) -> Finding | None:
    """``standing``: images still right after gradient attacks with an epsilon from black to white:
    1 in L-inf."""
    limit = 100 / num_classes + UNBOUNDED_ABOVE_CHANCE
    if not standing.points > limit:
        return None
    return _about(
        "unbounded",
        "invalid",
        limit,
        standing,
        "at an epsilon at which any image may become any other, gradient attacks fail on "
        f"{standing.points:.1f} % of the images",
        _MASKED,
    )


def noise_wins(only: Seen) -> Finding | None:
    """``only``: images that random draws break and no attack does."""
    return _share(
        "noise_wins", only, NOISE_WINS, "random noise breaks what no attack broke", _MASKED
    )


def black_box_wins(only: Seen) -> Finding | None:
    """``only``: images that an attack without gradients breaks and none with gradients does."""
    message = "an attack without gradients breaks what none with gradients broke"
    return _share("black_box_wins", only, BLACK_BOX_WINS, message, _MASKED)


def pgd_wins(only: Seen) -> Finding | None:
    """``only``: images that a PGD of a few steps breaks and the suite did not."""
    message = "a short PGD breaks what the suite did not"
    return _share("pgd_wins", only, PGD_WINS, message, "give the suite more steps and restarts")


def single_step_wins(only: Seen) -> Finding | None:
    """``only``: images that one step breaks and no iterative attack does."""
    message = "one step of length epsilon breaks what no iterative attack broke"
    remedy = f"give the iterative attacks more and other steps; if that is not it, {_MASKED}"
    return _share("single_step_wins", only, SINGLE_STEP_WINS, message, remedy)


def transfer_wins(only: Seen, *, source: str = "another model") -> Finding | None:
    """``only``: images made on another model, ``source``, that break this one, and that no attack
    on this one breaks."""
    message = f"attacks on {source} break what no attack on the model itself broke"
    return _share("transfer_wins", only, TRANSFER_WINS, message, _MASKED)


def view_wins(only: Seen, *, view: str = "its views") -> Finding | None:
    """``only``: images that break the mixture and were found through views of it alone."""
    return _share(
        "view_wins",
        only,
        VIEW_WINS,
        f"attacks on the mixture through {view} break what attacks on the whole did not",
        "the gate masks gradients: believe the worst case with all views, and no table that "
        "attacked such a mixture without them",
    )


def not_converged(only: Seen) -> Finding | None:
    """``only``: images that the suite left and one of twice the effort breaks."""
    return _share(
        "not_converged",
        only,
        NOT_CONVERGED,
        "twice the steps and restarts break what the suite did not",
        "give the suite more steps and restarts until doubling changes nothing",
    )


def epsilon_helps(epsilon: Sequence[float], accuracy: Sequence[float]) -> Finding | None:
    """``accuracy`` in [0, 1] under the same attack at each ``epsilon``, ascending."""
    lowest, at = math.inf, 0.0
    gain, smaller, larger = 0.0, 0.0, 0.0
    for radius, value in zip(epsilon, accuracy, strict=True):
        if value - lowest > gain:
            gain, smaller, larger = value - lowest, at, radius
        if value < lowest:
            lowest, at = value, radius
    severity, limit = _severity(100 * gain, EPSILON_HELPS)
    if severity is None:
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
    return _share(
        "control_stands",
        standing,
        CONTROL_STANDS,
        "an undefended network withstands the same attacks at the same epsilon",
        "the attacks are too weak or misapplied (pixel scale, normalization, clamping, steps): no "
        "number of this table shows a defense",
        fewest=1,
    )


def precision(disagree: Seen) -> Finding | None:
    """``disagree``: attacked images on which the search's logits and float32 differ about who is
    right."""
    return _share(
        "precision",
        disagree,
        PRECISION,
        "the search and float32 disagree about who is right",
        "the number of float32 stands; search in float32 to lose nothing",
    )


# -- how it was done ------------------------------------------------------------------------------


def incomplete(missing: Sequence[str], *, given_as_complete: bool = False) -> Finding | None:
    """``missing``: attacks of the suite that did not run."""
    if not missing:
        return None
    return Finding(
        "incomplete",
        "invalid" if given_as_complete else "suspect",
        f"{len(missing)} attacks of the suite did not run: {_some(missing)}; the worst case is "
        "over the others",
        "run the same command again, it continues",
        float(len(missing)),
        0.0,
    )


def selection(split: str) -> Finding | None:
    """``split``: of the images by which the checkpoint was chosen."""
    if split != "test":
        return None
    return Finding(
        "selection",
        "suspect",
        "the checkpoint was chosen by its accuracy on the test split",
        "choose by held-out training images and judge again",
    )


def protocol(name: str) -> Finding | None:
    """``name``: "pixels", or of a published protocol that differs from it."""
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
    if num_images >= SMALL_SAMPLE:
        return None
    return Finding(
        "small_sample",
        "note",
        f"quick: {num_images} images, fewer than {SMALL_SAMPLE}; the intervals are wide",
        "judge more images",
        float(num_images),
        float(SMALL_SAMPLE),
    )


def model_note(note: str) -> Finding:
    """What a reader of this model's numbers has to know."""
    return Finding("model", "note", note)


def only_a_grid() -> Finding:
    """Said of a table whose numbers nothing else was tried to doubt."""
    return Finding(
        "only_a_grid",
        "note",
        "a grid of gradient attacks: no noise, no black box, no radius that allows everything was "
        "tried, and a mixture was not attacked through its parts",
        "dwf eval --suite standard does",
    )


def mixture_inside(name: str) -> Finding:
    """Said of a mixture that is a part of what is judged, so that nobody can ask it for views."""
    return Finding(
        "mixture_inside",
        "note",
        f"{name}, a mixture, is a part of the model; it was attacked as a whole, not through its "
        "experts and its gate",
        "judge the mixture itself, with what surrounds it as its normalization",
    )


def held(*candidates: Finding | None) -> list[Finding]:
    """Those that hold."""
    return [finding for finding in candidates if finding is not None]


_MASKED = (
    "gradients are masked or noisy: use black-box and transfer attacks, and attack a smooth "
    "stand-in for what hides them"
)


def _share(
    name: str,
    images: Seen,
    limits: Limits,
    message: str,
    remedy: str,
    *,
    fewest: int = FEWEST_IMAGES,
) -> Finding | None:
    """A finding about too large a share of the images."""
    severity, limit = _severity(images.points, limits)
    if severity is None or images.count < fewest:
        return None
    if fewest > 1 or name in ("control_stands", "blind_gate"):
        message += f": {images.count} of {images.total} images"
    return _about(name, severity, limit, images, message, remedy)


def _about(
    name: str, severity: str, limit: float, images: Seen, message: str, remedy: str
) -> Finding:
    extent = images.points, limit, images.count, images.sample_indices
    return Finding(name, severity, message, remedy, *extent)


def _severity(measured: float, limits: Limits) -> tuple[str | None, float]:
    """The severity that ``measured`` deserves and the limit that it went beyond."""
    if measured > limits.invalid:
        return "invalid", limits.invalid
    if measured > limits.suspect:
        return "suspect", limits.suspect
    return None, limits.suspect


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
