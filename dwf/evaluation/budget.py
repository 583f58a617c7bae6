"""The effort of a suite: a cap for quick trials, and an estimate of its time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dwf.attacks.table import ATTACKS, Passes
from dwf.checks import check_count
from dwf.evaluation.suites import AttackSpec

# A backward pass, in forward passes.
BACKWARD = 2
SHORT = "less than a minute"


@dataclass(frozen=True)
class Budget:
    """Caps on the attacks of a suite, for a trial of the verdict: no number to quote comes of it.

    ``num_steps`` caps gradient attacks, ``num_queries`` those without gradients. What doubts a
    suite is not cut.
    """

    num_steps: int
    num_queries: int

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_queries"):  # numbers of numpy become Python's
            object.__setattr__(self, name, check_count(getattr(self, name), f"budget.{name}"))

    def limit(self, spec: AttackSpec) -> AttackSpec:
        """The same attack with no more than this effort."""
        attack = ATTACKS.get(spec.kind)
        queries = attack is not None and not attack.needs_gradients
        most = self.num_queries if queries else self.num_steps
        return replace(spec, num_steps=min(spec.num_steps, most))


def expected_minutes(passes: Passes, *, num_images: int, seconds_per_pass: float) -> str:
    """An upper estimate of the time of all attacks, in words.

    Args:
        passes: for one image that no attack breaks.
        num_images: how many the model gets right without an attack.
        seconds_per_pass: of one image forward.
    """
    each = passes.num_forwards + BACKWARD * passes.num_backwards
    minutes = num_images * each * seconds_per_pass / 60
    if minutes < 1:
        return SHORT
    if minutes < 120:
        return f"at most about {minutes:.0f} minutes"
    return f"at most about {minutes / 60:.0f} hours"
