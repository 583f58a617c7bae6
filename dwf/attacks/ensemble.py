"""The standard ensemble: several attacks in turn, each on the images that still stand.

    standard   APGD-CE, targeted APGD-DLR, targeted FAB, Square          (100 steps, 5,000 queries)
    plus       APGD-CE x5, APGD-DLR x5, FAB x5, Square, targeted APGD-DLR, targeted FAB
    rand       APGD-CE and APGD-DLR, each gradient the mean over 20 passes of a random model

Attacks, order, steps and restarts are those of AutoAttack. A model without the classes that a loss
needs is attacked by what that attack falls back to.

Source: Croce and Hein, arXiv:2003.01690.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dwf.attacks.apgd import apgd
from dwf.attacks.fab import fab
from dwf.attacks.losses import Model
from dwf.attacks.setup import Setup
from dwf.attacks.square import square
from dwf.attacks.target import AttackTarget, attack_target
from dwf.checks import check_choice

RAND_EOT_SAMPLES = 20


@dataclass(frozen=True)
class Member:
    """One attack of an ensemble: ``function(model, images, labels, epsilon=..., **settings)``."""

    name: str
    function: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: Model | AttackTarget, images: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        return self.function(model, images, labels, **{**self.settings, **options})


APGD_CE = Member("APGD-CE", apgd, {"loss": "ce", "num_steps": 100})
APGD_DLR = Member("APGD-DLR", apgd, {"loss": "dlr", "num_steps": 100})
APGD_T = Member("APGD-T", apgd, {"loss": "dlr-targeted", "num_steps": 100, "num_target_classes": 9})
FAB_T = Member("FAB-T", fab, {"num_steps": 100, "num_target_classes": 9})
SQUARE = Member("Square", square, {"num_queries": 5000})


def _with(member: Member, name: str, **settings: Any) -> Member:
    return Member(name, member.function, {**member.settings, **settings})


VERSIONS: dict[str, tuple[Member, ...]] = {
    "standard": (APGD_CE, APGD_T, FAB_T, SQUARE),
    "plus": (
        _with(APGD_CE, "APGD-CE x5", num_restarts=5),
        _with(APGD_DLR, "APGD-DLR x5", num_restarts=5),
        Member("FAB x5", fab, {"num_steps": 100, "num_restarts": 5}),
        SQUARE,
        APGD_T,
        FAB_T,
    ),
    "rand": (
        _with(APGD_CE, "APGD-CE EoT", eot_samples=RAND_EOT_SAMPLES),
        _with(APGD_DLR, "APGD-DLR EoT", eot_samples=RAND_EOT_SAMPLES),
    ),
}


def autoattack(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    version: str = "standard",
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
) -> Tensor:
    """Attack images by the standard ensemble, each attack on those that the others left.

    Args:
        norm: "linf" or "l2".
        version: "standard", "plus", or "rand" for random models.
    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``: for each image the first that
        the model in float32 gets wrong, else the image itself.
    Raises:
        As :func:`pgd`.
    """
    check_choice(version, list(VERSIONS), "version")
    eot_samples = max(member.settings.get("eot_samples", 1) for member in VERSIONS[version])
    options: dict[str, Any] = {
        "norm": norm,
        "bn_mode": bn_mode,
        "seed": seed,
        "allow_probabilities": allow_probabilities,
    }
    setup = Setup(
        model=model,
        images=images,
        labels=labels,
        epsilon=epsilon,
        norm=norm,
        bn_mode=bn_mode,
        eot_samples=eot_samples,  # a random model is judged as it is attacked
        seed=seed,
        sample_index=sample_index,
        allow_probabilities=allow_probabilities,
    )
    with setup.opened() as (batch, source):
        found = batch.images.clone()
        standing = torch.nonzero(~source.fooled(batch.images, batch.labels))[:, 0]
        target = attack_target(model, batch.images, bn_mode=bn_mode)
        for member in VERSIONS[version]:
            part = batch.subset(standing)
            if len(part) == 0:
                break
            attacked = member(
                target,
                part.images,
                part.labels,
                epsilon=part.epsilon,
                sample_index=part.sample_index,
                **options,
            )
            fooled = source.fooled(attacked, part.labels)
            found[standing[fooled]] = attacked[fooled]
            standing = standing[~fooled]
    return found
