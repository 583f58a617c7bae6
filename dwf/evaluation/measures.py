"""Count the images that show something, and turn them into findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwf.evaluation.limits import (
    FEWEST_IMAGES,
    MAX_SAMPLE_INDICES,
    PROBABILITY_TOLERANCE,
    Limits,
)
from dwf.evaluation.record import Finding, Severity


@dataclass(frozen=True)
class Seen:
    """How many of how many images show something, and the first of them where they are known."""

    count: int
    total: int
    sample_indices: tuple[int, ...] = ()

    @property
    def points(self) -> float:
        """The share of the images, in percent."""
        return 100 * self.count / max(self.total, 1)

    def finding(
        self, name: str, severity: Severity, limit: float, message: str, remedy: str
    ) -> Finding:
        """A finding about these images."""
        return Finding(
            name,
            severity,
            message,
            remedy,
            measured=self.points,
            limit=limit,
            num_images=self.count,
            sample_indices=self.sample_indices,
        )

    def beyond(
        self,
        name: str,
        limits: Limits,
        message: str,
        remedy: str,
        *,
        fewest: int = FEWEST_IMAGES,
        counted: bool = True,
    ) -> Finding | None:
        """A finding if these are too large a share of the images, and at least ``fewest``.

        ``counted``: the message ends with how many of how many images.
        """
        severity, limit = limits.severity(self.points)
        if severity is None or self.count < fewest:
            return None
        extent = f": {self.count} of {self.total} images" if counted else ""
        return self.finding(name, severity, limit, message + extent, remedy)


def seen(mask: Tensor, sample_index: Tensor | None = None) -> Seen:
    """From a mask [N]; ``sample_index`` [N] are the images' places in their data set."""
    places = torch.nonzero(mask.cpu())[:MAX_SAMPLE_INDICES, 0]
    first = places if sample_index is None else sample_index.cpu()[places]
    return Seen(int(mask.sum()), len(mask), tuple(int(i) for i in first))


def held(*candidates: Finding | None) -> list[Finding]:
    """The findings among the candidates."""
    return [finding for finding in candidates if finding is not None]


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def are_probabilities(logits: Tensor) -> bool:
    """Whether every row [K] lies in [0, 1] and sums to 1."""
    if logits.numel() == 0 or logits.shape[1] < 2:
        return False
    rows = logits.detach().float()
    inside = bool(((rows >= 0) & (rows <= 1)).all())
    return inside and bool(((rows.sum(dim=1) - 1).abs() <= PROBABILITY_TOLERANCE).all())


def parts(rows: Tensor, size: int) -> list[Tensor]:
    """Rows [N, ...] in pieces of at most ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def known_places(sample_index: Tensor | None, images: Tensor) -> Tensor:
    """``sample_index`` on the device of ``images``; 0 to N - 1 where it is None."""
    if sample_index is None:
        return torch.arange(len(images), device=images.device)
    return sample_index.to(images.device)


def largest_entry(gradient: Tensor) -> Tensor:
    """[B]: the largest absolute value in each row of [B, ...]."""
    return gradient.flatten(1).abs().amax(dim=1)


def answer_scale(logits: Tensor) -> float:
    """The spread of answers [N, K] that changes of an answer are shares of.

    The median over images of the distance from the highest logit to the median one: a class at
    -1e6 does not stretch it.
    """
    rows = logits[logits.isfinite().all(dim=1)].double()
    if len(rows) == 0:
        return 1.0
    spread = float((rows.amax(dim=1) - rows.median(dim=1).values).median())
    # logits that are nearly equal beside their own size differ by rounding
    return max(spread, 1e-4 * float(rows.abs().median()), 1e-30)


def answer_change(old: Tensor, new: Tensor, scale: float) -> Tensor:
    """[N]: the largest change of an image's logits [N, K], as a share of ``scale``.

    Logits that are not finite in both are no change; in one alone they are an infinite one.
    """
    finite = old.isfinite().all(dim=1), new.isfinite().all(dim=1)
    change = (old.double() - new.double()).abs().amax(dim=1) / scale
    change = change.masked_fill(~finite[0] & ~finite[1], 0.0)
    return change.masked_fill(finite[0] ^ finite[1], torch.inf)


def answer_difference(first: Tensor, again: Tensor) -> float:
    """The largest `answer_change` of any image between two passes [N, K]; 0 without images."""
    if len(first) == 0:
        return 0.0
    return float(answer_change(first, again, answer_scale(first)).max())
