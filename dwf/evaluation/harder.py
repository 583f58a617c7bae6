"""Attack once more where gradients lie: by labels alone, on 8-bit images, through a stand-in.

Findings about gradients and answers make the suite's number too high by an unknown amount. What
these attacks break counts in the headline, which then is near the truth for many such models. They
run for models with such a finding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwf.attacks.losses import Model
from dwf.attacks.rays import rays
from dwf.attacks.source import judge, voted
from dwf.attacks.surrogate import through_surrogate
from dwf.evaluation.measures import parts
from dwf.evaluation.record import Finding
from dwf.evaluation.stand_in import smooth_stand_in

# Findings that say so, as more than a note.
REASONS = frozenset(
    "zero_gradient wrong_gradient answers_differ jumps rounding reversed_margin unlike_statements "
    "inner_optimization not_stationary unbounded noise_wins black_box_wins epsilon_helps flat "
    "single_step_wins transfer_wins doubts_win pgd_wins not_converged".split()
)
NUM_QUERIES = 2000
NUM_LESSONS = 240  # batches that a stand-in learns from


class Harder(NamedTuple):
    """One attack more: its name and kind, its length, and what it broke, [N] bool."""

    name: str
    kind: str
    num_steps: int
    broken: Tensor


def is_needed(findings: Sequence[Finding]) -> bool:
    """Whether a finding makes gradients doubtful, and none makes each answer a matter of chance."""
    held = {finding.name for finding in findings if finding.severity in ("suspect", "invalid")}
    return bool(held & REASONS) and "random" not in held


def attack_harder(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    left: Tensor,
    epsilon: float,
    norm: str,
    num_classes: int,
    seed: int,
    sample_index: Tensor,
    batch_size: int,
    effort: float = 1.0,
) -> list[Harder]:
    """Attack the images [N, C, H, W] that are ``left`` [N] bool, each attack what still stands.

    ``effort``: a share of the queries and of the stand-in's lessons, for trials.
    The model is asked as it is, in eval mode, without a plan.
    """
    stand_in = smooth_stand_in(
        model,
        images,
        epsilon=epsilon,
        num_classes=num_classes,
        num_steps=max(round(effort * NUM_LESSONS), 1),
        seed=seed,
    )
    # its own output, reversed, climbs where the margin was turned around
    attacks: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
        ("PGD on 8 bits", "eight-bits", 40, {"surrogate": model, "eight_bits": True}),
        ("PGD on a stand-in", "stand-in", 60, {"surrogate": stand_in}),
        ("PGD backward", "backward", 40, {"surrogate": _Backward(model)}),
        ("RayS", "rays", max(round(effort * NUM_QUERIES), 1), {}),
    )
    found, standing = [], left.clone()
    for name, kind, length, options in attacks:
        broken = torch.zeros_like(standing)
        for part in parts(torch.nonzero(standing)[:, 0], batch_size):
            given: dict[str, Any] = {
                "epsilon": epsilon,
                "norm": norm,
                "seed": seed,
                "sample_index": sample_index[part],
                "allow_probabilities": True,
            }
            x, y = images[part], labels[part]
            if kind == "rays":
                adversarial = rays(model, x, y, num_queries=length, **given)
            else:
                given |= {"num_steps": length, "num_restarts": 2, **options}
                adversarial = through_surrogate(model, x, y, **given)
            broken[part] = ~judge(voted(model, adversarial), y)[0]
        standing &= ~broken
        found.append(Harder(name, kind, length, broken.cpu()))
    return found


class _Backward:
    """A model whose logits have the other sign: an attack on it climbs what others descend."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = -self.model(images)
        return logits
