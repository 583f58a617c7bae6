"""Synergy-of-Experts: its code's ResNet-20, a ResNet-18, a small CIFAR-10 run, and digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import Config, ModelConfig, PhaseConfig
from dwf.presets.divided_we_fall import dwf_cifar10, dwf_cifar10_small, dwf_digits, single


def soe_cifar10(data_root: str | None = None) -> Config:
    """Three ResNet-20, trained at epsilon .02: the settings of the authors' code.

    The table attacks at 8/255, as for all defenses.
    """
    config = single(dwf_cifar10(data_root), "soe")
    return replace(
        config,
        model=ModelConfig("resnet20", width=16),
        attack=replace(config.attack, epsilon=0.02, step_size=0.01),
        pretrain=PhaseConfig(
            num_epochs=200,
            learning_rate=0.1,
            weight_decay=1e-4,
            schedule="steps",
            at=(50 / 200, 75 / 200),
            factors=(0.1, 0.01),
        ),
    )


def soe_r18_cifar10(data_root: str | None = None) -> Config:
    """The same with three ResNet-18, the network of the paper that compares it."""
    config = soe_cifar10(data_root)
    return replace(config, preset="soe_r18_cifar10", model=ModelConfig("resnet18"))


def soe_cifar10_small(data_root: str | None = None) -> Config:
    """A reduced but real CIFAR-10 run: about half an hour on two CPU cores."""
    config = single(dwf_cifar10_small(data_root), "soe")
    return replace(
        config,
        attack=replace(config.attack, num_steps=(5,)),
        pretrain=PhaseConfig(num_epochs=10, learning_rate=0.05, weight_decay=1e-4),
    )


def soe_digits() -> Config:
    """The recipe on handwritten digits: minutes on two CPU cores."""
    config = single(dwf_digits(), "soe")
    return replace(
        config,
        pretrain=PhaseConfig(num_epochs=15, batch_size=64, learning_rate=0.1, weight_decay=1e-4),
    )


MAKERS: list[Callable[[], Config]] = [soe_cifar10, soe_r18_cifar10, soe_cifar10_small, soe_digits]
