"""What a run watches itself for while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLLAPSE = 0.2


def catastrophic_overfitting(rows: Sequence[dict[str, Any]], phase: str) -> str | None:
    """What to say if a phase has collapsed by its newest validation; None if all is well.

    Training on weak attacks, above all on single steps, can within an epoch make a model that
    withstands these attacks and no others: its accuracy on attacked training images rises while
    that under PGD falls to nothing. So the newest validation is compared with the phase's most
    robust one: under PGD, over 20 points lost; under the attack of training, something gained.

    Args:
        rows: metrics of the run, in the order in which they were written.
        phase: the phase to judge. It is warned of once: not if ``rows`` hold a warning of it.
    Source: Wong et al., arXiv:2001.03994, whose code stops at such a drop; 20 points are theirs.
    """
    own = [row for row in rows if row["phase"] == phase]
    validated = [i for i, row in enumerate(own) if row["kind"] == "validation"]
    if not validated or any(row["kind"] == "warning" for row in own):
        return None
    peak = max(validated, key=lambda i: float(own[i]["robust_accuracy"]))
    before, now = (float(own[i]["robust_accuracy"]) for i in (peak, validated[-1]))
    trained = [_under_training_attack(own[:i]) for i in (peak, validated[-1])]
    if trained[0] is None or trained[1] is None:
        return None
    if before - now <= COLLAPSE or trained[1] <= trained[0]:
        return None
    return (
        f"catastrophic overfitting since epoch {own[peak]['epoch'] + 1}: under PGD "
        f"{100 * before:.1f} % -> {100 * now:.1f} %, under the attack of training "
        f"{100 * trained[0]:.1f} % -> {100 * trained[1]:.1f} %"
    )


def _under_training_attack(rows: Sequence[dict[str, Any]]) -> float | None:
    """The newest accuracy on attacked training images."""
    newest = [row["robust_accuracy"] for row in rows if row["kind"] == "train"][-1:]
    return newest[0] if newest else None
