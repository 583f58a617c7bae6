"""Who is right, decided in float32; and findings: reasons to doubt a table of results.

A finding is a name, a severity (note, suspect, invalid) and a message, from counts made while the
table was filled. Absence of findings is not a proof; it means that none of these signs was seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_kernels import testing

SMALL_SAMPLE = 1000  # below this a 95 % interval is wider than +-3 points


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(correct, finite) [B]: right argmax and finite logits; finite logits."""
    finite = logits.isfinite().all(dim=1)
    return (logits.argmax(dim=1) == labels) & finite, finite


@contextlib.contextmanager
def float32_verdicts(device: torch.device) -> Iterator[None]:
    """Float32 as the table says, whatever the caller's autocast, and no TF32 inside."""
    with torch.autocast(device.type, enabled=False), testing.without_tf32():
        yield


def findings(
    *,
    num_images: int,
    non_finite_clean: int,
    non_finite_attacked: int,
    over_budget: int,
    zero_gradient: int,
    is_random: bool,
    protocol: str,
    notes: Sequence[str] = (),
) -> list[dict[str, str]]:
    """The findings that hold.

    Args:
        non_finite_clean, non_finite_attacked: images whose logits are NaN or infinite.
        over_budget: attacked pixels outside epsilon or [0, 1].
        zero_gradient: images at which the loss has a gradient of exactly zero.
        is_random: two passes over the same images differ.
        notes: what a reader of this model's numbers has to know.
    """
    candidates = [
        (
            non_finite_clean > 0,
            "non_finite",
            "invalid",
            f"{non_finite_clean} clean images give NaN or infinite logits; they count as broken",
        ),
        (
            non_finite_attacked > 0,
            "non_finite_attacked",
            "suspect",
            f"{non_finite_attacked} logits under attack are NaN or infinite; they count as broken",
        ),
        (
            over_budget > 0,
            "budget",
            "invalid",
            f"{over_budget} attacked pixels are outside epsilon or [0, 1]",
        ),
        (
            zero_gradient > num_images // 100,
            "zero_gradient",
            "invalid" if zero_gradient > num_images // 10 else "suspect",
            f"the loss has a gradient of exactly zero at {zero_gradient} of {num_images} images, "
            "so gradient attacks prove nothing there",
        ),
        (
            is_random,
            "random",
            "suspect",
            "two passes over the same images differ; evaluate a random model with eot_samples of "
            "20 or more",
        ),
        (
            protocol == "paper-compat",
            "protocol",
            "suspect",
            "attacks acted on normalized images (protocol paper-compat): these numbers reproduce "
            "a published table and say nothing about pixels",
        ),
        (
            num_images < SMALL_SAMPLE,
            "small_sample",
            "note",
            f"quick: {num_images} images, fewer than {SMALL_SAMPLE}; the intervals are wide",
        ),
        *((True, "model", "note", note) for note in notes),
    ]
    return [
        {"name": name, "severity": severity, "message": message}
        for holds, name, severity, message in candidates
        if holds
    ]
