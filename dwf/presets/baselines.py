"""Baselines on one network, as their papers train them on CIFAR-10, on digits, and reduced.

The papers' networks are WideResNet-34-10 (TRADES and TRADES-AWP) and PreActResNet-18 (AWP, Free-AT,
Fast-AT); here ResNet-18 stands for all, and recipes.py has three of them on the papers' networks.
Rates change at the epochs that their code names, which counts from 1. Every baseline is judged by
the same table, that of the DWF preset of its data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dwf.config import AttackConfig, Config, Options, PhaseConfig
from dwf.defenses.multi_step import TradesAwpOptions
from dwf.defenses.phase import pretrain_schedule
from dwf.defenses.single_step import FastAtOptions, FreeAtOptions
from dwf.presets.divided_we_fall import dwf_cifar10, dwf_cifar10_small, dwf_digits, single

MADRY_ATTACK = AttackConfig(num_steps=(10,), random_start=True)
TRADES_ATTACK = AttackConfig(epsilon=0.031, step_size=0.007, num_steps=(10,))
UP_AND_DOWN = PhaseConfig(schedule="linear", at=(0.0, 0.5, 1.0), factors=(0.0, 1.0, 0.0))


def madry_at_cifar10(data_root: str | None = None) -> Config:
    """PGD-10, all images attacked: 200 epochs, rate .1 divided by 10 at 50 % and 75 %."""
    schedule = steps(200, {0.5: 0.1, 0.75: 0.01})
    return _cifar10("madry-at", data_root, MADRY_ATTACK, schedule)


def trades_cifar10(data_root: str | None = None) -> Config:
    """TRADES, beta 6: 76 epochs, the last two at a tenth of the rate."""
    schedule = replace(steps(76, {74 / 76: 0.1}), weight_decay=2e-4)
    return _cifar10("trades", data_root, TRADES_ATTACK, schedule)


def mart_cifar10(data_root: str | None = None) -> Config:
    """MART, beta 5: 120 epochs, rate .01 and less from epochs 75, 90 and 100 on."""
    schedule = steps(120, {74 / 120: 0.1, 89 / 120: 0.01, 99 / 120: 0.001})
    schedule = replace(schedule, learning_rate=0.01, weight_decay=3.5e-3)
    return _cifar10("mart", data_root, TRADES_ATTACK, schedule)


def awp_cifar10(data_root: str | None = None) -> Config:
    """AWP on the recipe of ``madry_at_cifar10``, gamma .01."""
    schedule = steps(200, {0.5: 0.1, 0.75: 0.01})
    return _cifar10("awp", data_root, MADRY_ATTACK, schedule)


def trades_awp_cifar10(data_root: str | None = None) -> Config:
    """TRADES with AWP, gamma .005 after 10 epochs: 200 epochs, 8/255."""
    schedule = steps(200, {99 / 200: 0.1, 149 / 200: 0.01})
    return _cifar10("trades-awp", data_root, AttackConfig(num_steps=(10,)), schedule)


def free_at_cifar10(data_root: str | None = None) -> Config:
    """Free-AT: 10 epochs of 8 replays, rate 0 to .04 and back."""
    schedule = replace(UP_AND_DOWN, num_epochs=10, learning_rate=0.04)
    return replace(_cifar10("free-at", data_root, MADRY_ATTACK, schedule), validate_every=1)


def fast_at_cifar10(data_root: str | None = None) -> Config:
    """Fast-AT: 15 epochs, one step of 10/255, rate 0 to .2 and back."""
    schedule = replace(UP_AND_DOWN, num_epochs=15, learning_rate=0.2)
    return replace(_cifar10("fast-at", data_root, MADRY_ATTACK, schedule), validate_every=1)


def madry_at_cifar10_small(data_root: str | None = None) -> Config:
    """The reduced CIFAR-10 of ``dwf_cifar10_small`` for one network, twice as wide: minutes."""
    return _small("madry-at", data_root)


def trades_cifar10_small(data_root: str | None = None) -> Config:
    """TRADES on the reduced CIFAR-10."""
    return _small("trades", data_root)


def madry_at_digits() -> Config:
    """PGD-10, all images attacked, at the radius of ``dwf_digits``; as do the others below."""
    return _digits("madry-at")


def trades_digits() -> Config:
    """TRADES, beta 6."""
    return _digits("trades")


def mart_digits() -> Config:
    """MART, beta 5."""
    return _digits("mart")


def awp_digits() -> Config:
    """AWP, gamma .01."""
    return _digits("awp")


def trades_awp_digits() -> Config:
    """TRADES with AWP after 1 of 15 epochs."""
    return _digits("trades-awp", TradesAwpOptions(warmup_epochs=1))


def free_at_digits() -> Config:
    """Free-AT: 10 epochs of 4 replays."""
    config = _digits("free-at", FreeAtOptions(replays=4))
    return replace(config, pretrain=replace(pretrain_schedule(config), num_epochs=10))


def fast_at_digits() -> Config:
    """Fast-AT: one step of 1.25 radii."""
    config = dwf_digits()
    return _digits("fast-at", FastAtOptions(step_size=1.25 * config.attack.epsilon))


def steps(num_epochs: int, factors: dict[float, float]) -> PhaseConfig:
    """A schedule of rate .1 in steps: factors of the rate by shares of training."""
    return PhaseConfig(
        num_epochs=num_epochs,
        schedule="steps",
        at=tuple(factors),
        factors=tuple(factors.values()),
    )


def _cifar10(
    defense: str, data_root: str | None, attack: AttackConfig, schedule: PhaseConfig
) -> Config:
    return replace(single(dwf_cifar10(data_root), defense), attack=attack, pretrain=schedule)


def _small(defense: str, data_root: str | None) -> Config:
    config = single(dwf_cifar10_small(data_root), defense)
    return replace(
        config,
        model=replace(config.model, width=16),
        attack=replace(MADRY_ATTACK, num_steps=(7,), step_size=4 / 255),
        pretrain=replace(pretrain_schedule(config), num_epochs=15),
    )


def _digits(defense: str, options: Options | None = None) -> Config:
    config = single(dwf_digits(), defense)
    return replace(
        config,
        attack=replace(config.attack, random_start=True),
        pretrain=replace(pretrain_schedule(config), num_epochs=15),
        options=options if options is not None else config.options,
    )


MAKERS: list[Callable[[], Config]] = [
    madry_at_digits,
    trades_digits,
    mart_digits,
    awp_digits,
    trades_awp_digits,
    free_at_digits,
    fast_at_digits,
    madry_at_cifar10,
    trades_cifar10,
    mart_cifar10,
    awp_cifar10,
    trades_awp_cifar10,
    free_at_cifar10,
    fast_at_cifar10,
    madry_at_cifar10_small,
    trades_cifar10_small,
]
