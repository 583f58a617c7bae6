"""Notice catastrophic overfitting while a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLLAPSE = 0.2


def catastrophic_overfitting(rows: Sequence[dict[str, Any]], phase: str) -> str | None:
    """A warning if a phase has collapsed by its newest validation, else None.

    Training on weak attacks, above all on single steps, can within an epoch make a model that
    withstands these attacks and no others: its accuracy on attacked training images rises, and its
    accuracy under PGD falls to nothing. The newest validation is compared with the phase's most
    robust one. A phase has collapsed if it lost over 20 points under PGD, and gained under the
    attack of training.

    Args:
        rows: metrics of the run, in the order in which they were written.
        phase: the phase to judge. If ``rows`` hold a warning about it, there is no second one.
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
