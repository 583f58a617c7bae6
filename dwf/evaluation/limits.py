"""Limits of the findings, each with the measurement behind it.

Limits are in points, percent of the images, unless they say otherwise. They leave room above the
values of honest models, which are written beside each. Move a limit only with a measurement.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dwf.evaluation.record import Severity


class Limits(NamedTuple):
    """A finding holds when more than ``suspect`` was measured, and is worse above ``invalid``."""

    suspect: float
    invalid: float = math.inf

    def severity(self, measured: float) -> tuple[Severity | None, float]:
        """The severity that ``measured`` deserves, if any, and the limit that it is held to."""
        if measured > self.invalid:
            return "invalid", self.invalid
        if measured > self.suspect:
            return "suspect", self.suspect
        return None, self.suspect


# Images that a finding lists by their place in the data set.
MAX_SAMPLE_INDICES = 20
# Fewer images than this are no reason for doubt between two attacks, whatever share they are: on
# small samples one image that only a weak attack happened to break would be a whole point.
FEWEST_IMAGES = 3
SMALL_SAMPLE = 1000  # images; below, a 95 % interval is wider than +-3 points
TOO_FEW = 100  # images; below, the interval is wider than +-10 points and nothing is VALID
PROBABILITY_TOLERANCE = 1e-4  # of a sum of float32 or bfloat16 probabilities
# Share of the spread of all answers. Batches of another size round differently by 1e-6; a plan or a
# model in bfloat16 is not asked here.
RANDOM_ABOVE = 1e-4
MIN_EOT_SAMPLES, MIN_VOTES = 20, 10  # where the accuracy of random models stops moving
# The brightest pixel of any set of photographs or scans; images divided by 255 twice stay below.
DARKEST_MAXIMUM = 0.1
# Honest: 0. Below, a note: a model may overflow on a few extreme attacked images.
NON_FINITE_ATTACKED = Limits(0.1, 0.1)
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
CLEAN_BELOW = Limits(3.0, 20.0)  # points below the interval; twice normalized: 47
# Honest mixtures: 0.8 with a soft gate, up to 11 with a hard one. What views broke counts, so it is
# a reason to doubt the number only where views find still more when they attack again.
VIEW_WINS = Limits(3.0, 10.0)
NOT_CONVERGED = Limits(2.0, 5.0)  # honest: 0.2 to 1.6
VIEWS_AGAIN = NOT_CONVERGED.suspect  # points
# As NOT_CONVERGED: a larger ball holds every image of the smaller, so any gain is the attack's
# failure to converge.
EPSILON_HELPS = Limits(2.0, 5.0)
# An undefended network at a radius that a defense is proud of keeps about 0.
CONTROL_STANDS = Limits(5.0, 20.0)
CONSTANT_ABOVE = 95.0  # percent of predictions; the flat 10.00 % of published tables
BALANCED_BELOW = 50.0  # percent of labels in one class; above, a constant may be a right answer
DEAD_GATE_ABOVE, DEAD_GATE_BELOW = 99.0, 1.0  # percent of gate weight
# Percent of images at which a gate prefers an expert that is dead on clean ones. Honest: 0.0.
GATE_WAKES = 10.0
UNIFORM_GATE = 0.98  # of the largest entropy, log E; a gate that did not gate had 0.995
BLIND_GATE = Limits(1.0)  # percent of images; honest soft gates: 0.0
PRECISION = Limits(0.3, 3.0)  # aim: at most 0.3; the float32 number stands below 3

# Where attacks walk. "Honest" are the models of dwf.evaluation.zoo.HONEST_ZOO.
# |measured / predicted - 1|, median over images; honest: at most 0.01, hard-routed through their
# soft view 0.01.
WRONG_GRADIENT = Limits(0.1, 0.5)
ANSWERS_DIFFER = Limits(1e-3, 1e-2)  # share of the spread of answers; honest: 8e-7
JUMPING = Limits(5.0, 25.0)  # percent of images; honest: 0.0
ROUNDING_MATTERS = Limits(6.0, 15.0)  # percent of images; honest: at most 3.1
REVERSED_MARGIN = Limits(1.0, 5.0)  # percent of images; honest: 0.0
# Share, median over images that stand. Honest: at most 0.038; hard-routed through their soft view
# 0.028, where the straight-through gradient of the whole had 0.16.
NOT_STATIONARY = Limits(0.12)
UNLIKE_STATEMENTS = Limits(5.0, 25.0)  # percent of images; honest mixtures: 0.0
# Points that PGD at 1.1 epsilon breaks of what stands at epsilon.
FALLS_BEYOND = Limits(25.0, 50.0)
# Points that 2 epsilon breaks of what epsilon left: no more than this is flat.
FLAT_BELOW = 1.0
# Points that only the doubts broke, all of them together.
DOUBTS_WIN = Limits(3.0, 8.0)
TWINS = Limits(1.0, 10.0)  # percent of test images that are in the training set as well
# Median cosine of a plan's and autograd's gradients; in bfloat16 0.99.
PLAN_GRADIENT_BELOW = 0.9
