"""Mixtures of today: Divided We Fall with a modern joint objective, and adaptive smoothing.

Experts of `dwf_modern` train from scratch and jointly, each at its own learning rate: E times the
one given here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import AttackConfig, Config, PhaseConfig
from dwf.presets.divided_we_fall import dwf_cifar10, dwf_cifar10_small, dwf_digits


def dwf_modern_digits() -> Config:
    """Nine experts on handwritten digits, TRADES over the mixture: some minutes on a CPU core."""
    config = _modern(dwf_digits(), PhaseConfig(num_epochs=20, batch_size=64))
    return replace(config, attack=replace(config.attack, num_steps=(10,)))


def dwf_modern_cifar10_small(data_root: str | None = None) -> Config:
    """Nine experts on the reduced CIFAR-10 of ``dwf_cifar10_small``."""
    config = _modern(dwf_cifar10_small(data_root), PhaseConfig(num_epochs=15, learning_rate=0.05))
    return replace(config, attack=replace(config.attack, num_steps=(5,)))


def dwf_modern_cifar10(data_root: str | None = None) -> Config:
    """Nine ResNet-18 on CIFAR-10: 100 epochs, the average of the weights chosen by validation."""
    schedule = PhaseConfig(decay_vectors=False, label_smoothing=0.1, schedule="one-cycle")
    config = _modern(dwf_cifar10(data_root), schedule)
    return replace(config, attack=AttackConfig(num_steps=(10,)), weights="best-ema")


def adaptive_smoothing_digits() -> Config:
    """A plain network, a TRADES network, and a gate that mixes them: a minute on a CPU core."""
    config = dwf_digits()
    schedule = PhaseConfig(num_epochs=10, batch_size=64, gate_learning_rate=0.1)
    return replace(
        config,
        preset="adaptive_smoothing_digits",
        defense="adaptive-smoothing",
        attack=replace(config.attack, num_steps=(10,)),
        pretrain=schedule,
        joint=replace(schedule, num_epochs=5),
        options=None,
    )


def _modern(config: Config, schedule: PhaseConfig) -> Config:
    return replace(
        config,
        preset=config.preset.replace("dwf_", "dwf_modern_"),
        defense="dwf-modern",
        pretrain=None,
        joint=replace(schedule, gate_learning_rate=schedule.learning_rate),
        options=None,
    )


MAKERS: list[Callable[[], Config]] = [
    dwf_modern_digits,
    dwf_modern_cifar10_small,
    dwf_modern_cifar10,
    adaptive_smoothing_digits,
]
