"""ADVMoE: two pathways of half the width and their router, trained in turn.

``advmoe_cifar10`` is the paper's recipe. Its attack takes two steps of 5/8 of the radius, and so do
the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import AttackConfig, Config, DataConfig, ModelConfig, PhaseConfig
from dwf.defenses.advmoe import AdvMoeOptions
from dwf.presets.divided_we_fall import dwf_cifar10_small, dwf_digits


def advmoe_cifar10(data_root: str | None = None) -> Config:
    """ResNet-18, two pathways of half its width, 100 epochs; one rate for pathways and router."""
    return Config(
        preset="advmoe_cifar10",
        defense="advmoe",
        precision="bf16",
        validate_every=5,
        data=DataConfig("cifar10", data_root, crop_padding=4, flip=True),
        attack=AttackConfig(num_steps=(2,), step_size=5 / 255),
        pretrain=PhaseConfig(gate_learning_rate=0.1),
    )


def advmoe_cifar10_small(data_root: str | None = None) -> Config:
    """The data and table of ``dwf_cifar10_small``, for two CPU cores.

    ResNet-10 of width 16: each of the two pathways is as wide as one of that preset's nine experts.
    Float32: attacks by autograd were slower in bfloat16 on the CPU where both were tried.
    """
    config = dwf_cifar10_small(data_root)
    return replace(
        config,
        preset="advmoe_cifar10_small",
        defense="advmoe",
        precision="fp32",
        model=ModelConfig("resnet10", width=16),
        attack=AttackConfig(num_steps=(2,), step_size=5 / 255),
        pretrain=PhaseConfig(num_epochs=10, learning_rate=0.1, gate_learning_rate=0.1),
        joint=None,
        options=AdvMoeOptions(router_width=8),
    )


def advmoe_digits() -> Config:
    """The recipe on handwritten digits at the radius of ``dwf_digits``: minutes on two CPU cores.

    ResNet-6 of width 32, so that each pathway is as wide as one of that preset's experts.
    """
    config = dwf_digits()
    epsilon = config.attack.epsilon
    return replace(
        config,
        preset="advmoe_digits",
        defense="advmoe",
        model=replace(config.model, width=32),
        attack=replace(config.attack, num_steps=(2,), step_size=5 / 8 * epsilon),
        pretrain=PhaseConfig(
            num_epochs=15, batch_size=64, learning_rate=0.1, gate_learning_rate=0.1
        ),
        joint=None,
        options=AdvMoeOptions(router_width=4),
    )


MAKERS: list[Callable[[], Config]] = [advmoe_digits, advmoe_cifar10, advmoe_cifar10_small]
