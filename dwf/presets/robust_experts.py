"""Robust Experts: the paper's main setting, ConvMoE, a small CIFAR-10 run, and digits.

The released code trains on 40,000 images and attacks in train mode: ``data.num_validation=10000
attack.bn_mode=train``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import Config, ModelConfig, PhaseConfig
from dwf.defenses.robust_experts import RobustExpertsOptions
from dwf.presets.divided_we_fall import dwf_cifar10_small, dwf_cifar100, dwf_digits, single


def robust_experts_cifar100(data_root: str | None = None) -> Config:
    """ResNet-18 whose last two blocks are mixtures of four, one of which computes an image."""
    config = single(dwf_cifar100(data_root), "robust-experts")
    return replace(
        config,
        model=ModelConfig("resnet18"),
        attack=replace(config.attack, num_steps=(7,), random_start=True),
        pretrain=PhaseConfig(
            num_epochs=200,
            batch_size=640,
            learning_rate=0.1,
            nesterov=True,
            schedule="polynomial",
        ),
    )


def robust_experts_conv_cifar100(data_root: str | None = None) -> Config:
    """The same with mixtures of convolutions, the shortcut's too."""
    config = robust_experts_cifar100(data_root)
    return replace(
        config,
        preset="robust_experts_conv_cifar100",
        options=RobustExpertsOptions(moe="conv"),
    )


def robust_experts_top2_cifar10_small(data_root: str | None = None) -> Config:
    """A reduced but real CIFAR-10 run: two of four blocks compute an image."""
    config = single(dwf_cifar10_small(data_root), "robust-experts")
    return replace(
        config,
        preset="robust_experts_top2_cifar10_small",
        attack=replace(config.attack, num_steps=(5,), random_start=True),
        pretrain=PhaseConfig(
            num_epochs=16, learning_rate=0.1, nesterov=True, schedule="polynomial"
        ),
        options=RobustExpertsOptions(top_k=2),
    )


def robust_experts_digits() -> Config:
    """The recipe on handwritten digits: minutes on two CPU cores.

    With Conv-GAP gates: means over whole digits hardly differ, and GAP-FC sends all to one expert.
    Small batches, because each expert learns from a part of 1,097 images.
    """
    config = single(dwf_digits(), "robust-experts")
    return replace(
        config,
        attack=replace(config.attack, num_steps=(10,), random_start=True),
        pretrain=PhaseConfig(
            num_epochs=15,
            batch_size=32,
            learning_rate=0.1,
            nesterov=True,
            schedule="polynomial",
        ),
        options=RobustExpertsOptions(gate="conv_gap"),
    )


MAKERS: list[Callable[[], Config]] = [
    robust_experts_cifar100,
    robust_experts_conv_cifar100,
    robust_experts_top2_cifar10_small,
    robust_experts_digits,
]
