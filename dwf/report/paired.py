"""Compare two models image by image: McNemar's exact test.

Two models that were judged on the same images are no independent samples: only the images count on
which they differ. If neither is better, each of these falls to either side with probability 1/2.

Source: McNemar, Psychometrika 12 (1947); the exact form is the sign test on discordant pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
        first_only, second_only: images that one of them alone gets right.
        p_value: probability of a difference at least as large if neither is better.
    """

    first_only: int
    second_only: int

    @property
    def p_value(self) -> float:
        """Two-sided, exact."""
        count = self.first_only + self.second_only
        few = min(self.first_only, self.second_only)
        tail = sum(math.comb(count, k) for k in range(few + 1))
        # integers of any size divide exactly
        return min(1.0, 2 * tail / 2**count) if count else 1.0


def paired(first: Tensor, second: Tensor) -> Paired:
    """From masks [N] bool of the same images, right or not."""
    return Paired(int((first & ~second).sum()), int((second & ~first).sum()))


def worst_case_of(rows: Sequence[Tensor | None]) -> Tensor | None:
    """[N] bool, images that stand in every row; None where a row's outcomes are not known."""
    known = [row for row in rows if row is not None]
    if len(known) != len(rows) or not known:
        return None
    stands = known[0].clone()
    for row in known[1:]:
        stands &= row
    return stands
