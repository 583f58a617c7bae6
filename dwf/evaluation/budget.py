"""The effort of a suite: a cap for quick trials, and an estimate of its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dwf.checks import check_count
from dwf.evaluation.suites import AttackSpec

# A forward and a backward pass, in forward passes.
GRADIENT = 3
# Attacks that run once for each wrong class, and for at most so many.
TARGETED = ("apgd-t", "fab-t")
MOST_TARGETS = 9


@dataclass(frozen=True)
class Budget:
    """Caps on the attacks of a suite, for a trial of the verdict: no number to quote comes of it.

    ``num_steps`` caps gradient attacks, ``num_queries`` those without gradients. What doubts a
    suite is not cut.
    """

    num_steps: int
    num_queries: int

    def __post_init__(self) -> None:
        check_count(self.num_steps, "budget.num_steps")
        check_count(self.num_queries, "budget.num_queries")

    def limit(self, spec: AttackSpec) -> AttackSpec:
        """The same attack with no more than this effort."""
        most = self.num_queries if spec.kind == "square" else self.num_steps
        return replace(spec, num_steps=min(spec.num_steps, most))


def passes_per_image(spec: AttackSpec, num_classes: int, num_views: int) -> int:
    """The cost of an attack on an image that stands to the end, in forward passes."""
    if spec.kind == "square":
        return spec.num_steps
    runs = spec.num_restarts * spec.eot_samples
    if spec.kind in TARGETED:
        runs *= min(MOST_TARGETS, num_classes - 1)
    if spec.kind == "views":
        runs *= num_views + 1  # and the relay
    return GRADIENT * runs * spec.num_steps


def expected_minutes(
    specs: Sequence[AttackSpec],
    *,
    num_images: int,
    num_classes: int,
    num_views: int,
    seconds_per_pass: float,
) -> str:
    """An upper estimate for all attacks, in words.

    Args:
        num_images: how many the model gets right without an attack.
        seconds_per_pass: of one image forward.
    """
    passes = sum(passes_per_image(spec, num_classes, num_views) for spec in specs)
    minutes = num_images * passes * seconds_per_pass / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 120:
        return f"at most about {minutes:.0f} minutes"
    return f"at most about {minutes / 60:.0f} hours"
