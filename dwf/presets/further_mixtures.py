"""MoRE, RT-ER, JTDMoE and iGAT: as papers and programs set them on CIFAR-10, and on digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import Config, ModelConfig, PhaseConfig
from dwf.defenses.more import MoreOptions
from dwf.presets.divided_we_fall import dwf_cifar10, dwf_digits, single

# RT-ER's rate goes from half to all and back in 1,000 steps: 12 times in 130 epochs of 95 steps
NUM_CYCLES = 12


def more_cifar10(data_root: str | None = None) -> Config:
    """A clean expert, one for 6/255 and one for 8/255, and a ResNet-18 as the gate."""
    config = single(dwf_cifar10(data_root), "more")
    return replace(
        config,
        attack=replace(config.attack, random_start=True),
        pretrain=PhaseConfig(num_epochs=100, learning_rate=0.1),
        joint=PhaseConfig(
            num_epochs=100,
            batch_size=100,
            learning_rate=0.1,
            gate_learning_rate=0.1,
            weight_decay=0.0,
            optimizer="adam",
            schedule="linear",
            at=(0.0, 0.4, 0.8, 1.0),
            factors=(0.0, 1.0, 0.05, 0.0),
        ),
    )


def more_digits() -> Config:
    """The recipe on handwritten digits, at radii .1 and .15: minutes on two CPU cores."""
    config = single(dwf_digits(), "more")
    mixture = more_cifar10().joint
    assert mixture is not None
    return replace(
        config,
        attack=replace(config.attack, random_start=True),
        pretrain=PhaseConfig(num_epochs=10, batch_size=64, learning_rate=0.1),
        joint=replace(
            mixture,
            num_epochs=5,
            batch_size=64,
            learning_rate=0.01,
            gate_learning_rate=0.01,
        ),
        options=MoreOptions(expert_epsilon=(0.0, 0.1, 0.15)),
    )


def rt_er_cifar10(data_root: str | None = None) -> Config:
    """Four ResNet-18 and a linear router, 130 epochs of Adam."""
    config = single(dwf_cifar10(data_root), "rt-er")
    num_points = 2 * NUM_CYCLES + 1
    return replace(
        config,
        data=replace(config.data, crop_padding=2),
        attack=replace(config.attack, random_start=True),
        pretrain=PhaseConfig(
            num_epochs=130,
            batch_size=512,
            learning_rate=1e-4,
            gate_learning_rate=1e-4,
            weight_decay=0.0,
            optimizer="adam",
            schedule="linear",
            at=tuple(i / (num_points - 1) for i in range(num_points)),
            factors=tuple(1.0 if i % 2 else 0.5 for i in range(num_points)),
        ),
    )


def jtdmoe_cifar10(data_root: str | None = None) -> Config:
    """Eight ResNet-18 in two mixtures, one of them robust; otherwise as RT-ER."""
    return replace(
        rt_er_cifar10(data_root), preset="jtdmoe_cifar10", defense="jtdmoe", options=None
    )


def rt_er_digits() -> Config:
    """The recipe on handwritten digits: minutes on two CPU cores, at a rate for few steps."""
    config = single(dwf_digits(), "rt-er")
    return replace(
        config,
        attack=replace(config.attack, random_start=True),
        pretrain=PhaseConfig(
            num_epochs=15,
            batch_size=64,
            learning_rate=0.01,
            gate_learning_rate=0.01,
            weight_decay=0.0,
            optimizer="adam",
            schedule="linear",
            at=(0.0, 0.4, 1.0),
            factors=(0.5, 1.0, 0.0),
        ),
    )


def jtdmoe_digits() -> Config:
    """The recipe on handwritten digits: minutes on two CPU cores."""
    return replace(rt_er_digits(), preset="jtdmoe_digits", defense="jtdmoe", options=None)


def igat_cifar10(data_root: str | None = None) -> Config:
    """Eight ResNet-20 and attacks of 20 steps: ADP as its code trains it, then iGAT's small rate.

    The 50 epochs of iGAT are ours; its program runs for far longer and keeps every fifth model.
    """
    config = single(dwf_cifar10(data_root), "igat")
    return replace(
        config,
        model=ModelConfig("resnet20", width=16),
        attack=replace(config.attack, num_steps=(20,), random_start=True),
        pretrain=PhaseConfig(
            num_epochs=200,
            learning_rate=0.001,
            weight_decay=1e-4,
            optimizer="adam",
            schedule="steps",
            at=(0.5, 0.75),
            factors=(0.1, 0.01),
        ),
        joint=PhaseConfig(
            num_epochs=50,
            batch_size=512,
            learning_rate=0.001,
            weight_decay=1e-4,
            schedule="steps",
            at=(0.0,),
            factors=(1.0,),
        ),
    )


def igat_digits() -> Config:
    """The recipe on handwritten digits, at rates for few steps: minutes on two CPU cores."""
    config = single(dwf_digits(), "igat")
    ensemble = PhaseConfig(num_epochs=10, batch_size=64, learning_rate=0.1, weight_decay=1e-4)
    return replace(
        config,
        attack=replace(config.attack, random_start=True),
        pretrain=ensemble,
        joint=replace(ensemble, num_epochs=5, learning_rate=0.01),
    )


MAKERS: list[Callable[[], Config]] = [
    more_cifar10,
    more_digits,
    rt_er_cifar10,
    rt_er_digits,
    jtdmoe_cifar10,
    jtdmoe_digits,
    igat_cifar10,
    igat_digits,
]
