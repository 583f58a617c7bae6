"""Divided We Fall, and the single networks that its paper compares it with.

The paper publishes no epochs, learning rates or batch sizes; those here are our choices, and the
CIFAR and SVHN presets are the paper's recipe with them. ``paper_compat`` attacks normalized images
at the radius that the published tables imply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from dwf.config import (
    AttackConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PhaseConfig,
)

DIGITS_FGSM_EPSILON = tuple(i / 50 for i in range(1, 10))  # .02, .04, ..., .18


def dwf_cifar10(data_root: str | None = None, *, pretrain: bool = True) -> Config:
    """DWF on CIFAR-10: nine ResNet-18, 100 epochs each, then 100 end to end."""
    return Config(
        preset="dwf_cifar10",
        defense="dwf",
        precision="bf16",
        validate_every=5,
        data=DataConfig("cifar10", data_root, crop_padding=4, flip=True),
        pretrain=PhaseConfig(learning_rate=0.1) if pretrain else None,
        joint=PhaseConfig(learning_rate=0.01),
    )


def dwf_cifar100(data_root: str | None = None, *, pretrain: bool = True) -> Config:
    """DWF on CIFAR-100; the recipe of CIFAR-10."""
    config = dwf_cifar10(data_root, pretrain=pretrain)
    return replace(config, preset="dwf_cifar100", data=replace(config.data, name="cifar100"))


def dwf_svhn(data_root: str | None = None, *, pretrain: bool = True) -> Config:
    """DWF on SVHN: crops but no flips (a flipped digit is another shape), lower first rate."""
    config = dwf_cifar10(data_root, pretrain=pretrain)
    return replace(
        config,
        preset="dwf_svhn",
        data=replace(config.data, name="svhn", flip=False),
        pretrain=PhaseConfig(learning_rate=0.01) if pretrain else None,
    )


def dwf_cifar10_small(data_root: str | None = None) -> Config:
    """A reduced but real CIFAR-10 run: about half an hour on two CPU cores.

    Nine ResNet-10 of width 8, a fifth of the images, few epochs, three to seven attack steps of
    twice the length. It shows that the recipe works on photographs; its accuracy is not the
    method's.
    """
    return Config(
        preset="dwf_cifar10_small",
        defense="dwf",
        precision="bf16",
        data=DataConfig(
            "cifar10", data_root, crop_padding=4, flip=True, num_validation=500, num_train=10_000
        ),
        model=ModelConfig("resnet10", width=8, gate_hidden=32),
        attack=AttackConfig(num_steps=(3, 5, 7), step_size=4 / 255),
        pretrain=PhaseConfig(num_epochs=6, learning_rate=0.05),
        joint=PhaseConfig(num_epochs=4, learning_rate=0.05),
        evaluation=EvaluationConfig(num_images=500),
        validation_steps=7,
        validate_every=2,
        checkpoint_every=100,
        log_every=26,
    )


def dwf_digits() -> Config:
    """The complete recipe on scikit-learn's handwritten digits: minutes on two CPU cores.

    Epsilon is 0.15: at 8/255 even undefended networks keep most of their accuracy on 8x8 images.
    Eight steps of 0.02 reach it, so training draws from 4 to 20 steps instead of 10 to 50.
    """
    return Config(
        preset="dwf_digits",
        defense="dwf",
        data=DataConfig("digits", num_validation=200),
        model=ModelConfig("resnet6", width=16, gate_hidden=32),
        attack=AttackConfig(
            fgsm_epsilon=DIGITS_FGSM_EPSILON,
            epsilon=0.15,
            step_size=0.02,
            num_steps=(4, 8, 12, 16, 20),
        ),
        pretrain=PhaseConfig(num_epochs=10, batch_size=64, learning_rate=0.1),
        joint=PhaseConfig(num_epochs=5, batch_size=64, learning_rate=0.1),
        evaluation=EvaluationConfig(fgsm_epsilon=DIGITS_FGSM_EPSILON, epsilon=0.15, step_size=0.02),
        checkpoint_every=100,
        log_every=17,
        validate_every=5,
    )


def smoke() -> Config:
    """Everything once, as small as it gets: does this installation work?"""
    config = dwf_digits()
    return replace(
        config,
        preset="smoke",
        data=replace(config.data, num_validation=100, num_train=256),
        model=ModelConfig("resnet6", width=8, num_fgsm=1, num_pgd=1, gate_hidden=8),
        attack=replace(config.attack, num_steps=(4, 8)),
        pretrain=replace(_phase(config.pretrain), num_epochs=8, batch_size=32),
        joint=replace(_phase(config.joint), num_epochs=4, batch_size=32),
        evaluation=replace(
            config.evaluation,
            num_steps=(5, 10),
            multi_start_steps=10,
            adaptive_steps=20,
            num_images=100,
        ),
        checkpoint_every=50,
        log_every=8,
        validate_every=4,
    )


def single(config: Config, defense: str) -> Config:
    """A baseline on one network, with the data, network, schedule and table of a DWF preset."""
    data = config.preset.removeprefix("dwf_")
    attack = replace(config.attack, fgsm_epsilon=(config.attack.epsilon,))
    if len(config.attack.num_steps) > 1:
        attack = replace(attack, num_steps=(10,))
    return replace(
        config,
        preset=f"{defense.replace('-', '_')}_{data}",
        defense=defense,
        attack=attack,
        joint=None,
    )


def paper_compat(config: Config) -> Config:
    """The protocol that best explains the published tables: epsilon .02, step .005, normalized."""
    return replace(
        config,
        preset=f"{config.preset}_paper_compat",
        attack=replace(config.attack, protocol="paper-compat", epsilon=0.02, step_size=0.005),
        evaluation=replace(config.evaluation, epsilon=0.02, step_size=0.005),
    )


def _phase(phase: PhaseConfig | None) -> PhaseConfig:
    assert phase is not None
    return phase


MAKERS: list[Callable[[], Config]] = [smoke]
for _make in (dwf_digits, dwf_cifar10, dwf_cifar100, dwf_svhn, dwf_cifar10_small):
    MAKERS.append(_make)
    MAKERS += [partial(single, _make(), _name) for _name in ("plain", "fgsm-at", "pgd-at")]
for _make in (dwf_cifar10, dwf_cifar100, dwf_svhn):
    MAKERS.append(partial(paper_compat, _make()))
