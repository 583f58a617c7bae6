"""Immunity, reconstructed: standard training, and adversarial training ("at").

Loss weights, budgets and schedules are ours: of the paper we know the method in words. All presets
average adaptive attacks over 20 draws of the gate.

The gate learns slowly. The further it comes from equal weights, the more a permutation costs: on
digits about 3 points of clean accuracy at the rate 0.001 and 40 at 0.01 (one seed), because experts
are trained to be right together, and most of them are wrong alone. The rate for CIFAR-10, whose
gate has 48 times as many inputs, is a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import Config
from dwf.defenses.immunity import ImmunityOptions
from dwf.defenses.phase import pretrain_schedule
from dwf.presets.divided_we_fall import dwf_cifar10, dwf_digits, single

EOT_SAMPLES = 20


def immunity_cifar10(data_root: str | None = None) -> Config:
    """Immunity on CIFAR-10: five ResNet-18, 100 epochs, no attack in training."""
    config = single(dwf_cifar10(data_root), "immunity")
    return replace(
        config,
        pretrain=replace(pretrain_schedule(config), gate_learning_rate=1e-4),
        evaluation=replace(config.evaluation, eot_samples=EOT_SAMPLES),
    )


def immunity_at_cifar10(data_root: str | None = None) -> Config:
    """The same on images attacked by PGD: 8/255 in 10 steps of 2/255 from a random start."""
    return _adversarial(immunity_cifar10(data_root), "immunity_at_cifar10")


def immunity_digits() -> Config:
    """Immunity on handwritten digits; a minute on two CPU cores."""
    config = single(dwf_digits(), "immunity")
    return replace(
        config,
        pretrain=replace(pretrain_schedule(config), num_epochs=15, gate_learning_rate=1e-3),
        evaluation=replace(
            config.evaluation,
            eot_samples=EOT_SAMPLES,
            batch_size=50,  # each batch is a draw of the gate
        ),
    )


def immunity_at_digits() -> Config:
    """The same on images attacked by PGD."""
    return _adversarial(immunity_digits(), "immunity_at_digits")


def _adversarial(config: Config, preset: str) -> Config:
    return replace(
        config,
        preset=preset,
        attack=replace(config.attack, random_start=True),
        options=ImmunityOptions(attack="pgd"),
    )


MAKERS: list[Callable[[], Config]] = [
    immunity_digits,
    immunity_at_digits,
    immunity_cifar10,
    immunity_at_cifar10,
]
