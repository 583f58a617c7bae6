"""Findings: reasons to doubt a table of results, from counts made while it was filled.

A finding is a name, a severity (note, suspect, invalid) and a message. Absence of findings is not a
proof; it means that none of these signs was seen.
"""

from __future__ import annotations

SMALL_SAMPLE = 1000  # below this a 95 % interval is wider than +-3 points


def findings(
    *,
    num_images: int,
    non_finite_clean: int,
    non_finite_attacked: int,
    over_budget: int,
    zero_gradient: int,
    is_random: bool,
    protocol: str,
) -> list[dict[str, str]]:
    """The findings that hold.

    Args:
        non_finite_clean, non_finite_attacked: images whose logits are NaN or infinite.
        over_budget: attacked pixels outside epsilon or [0, 1].
        zero_gradient: images at which the loss has a gradient of exactly zero.
        is_random: two passes over the same images differ.
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
    ]
    return [
        {"name": name, "severity": severity, "message": message}
        for holds, name, severity, message in candidates
        if holds
    ]
