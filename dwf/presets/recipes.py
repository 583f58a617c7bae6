"""Recipes with a published number: single-step and multi-step training of one network on CIFAR-10.

The settings are those of the FastAT benchmark (fzjcdt/FastAT_Benchmark, ResNet-18): SGD at .1 with
one cycle, decay 5e-4, smoothed labels, and the average of the weights at its best robust validation
on 1,000 held-out training images. `PUBLISHED` has the numbers that recipes are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dwf.config import AttackConfig, Config, PhaseConfig
from dwf.defenses.multi_norm import MultiNormOptions
from dwf.presets.baselines import fast_at_cifar10, trades_awp_cifar10, trades_cifar10
from dwf.presets.divided_we_fall import dwf_cifar10, dwf_digits, single

ONE_STEP = AttackConfig(num_steps=(1,), step_size=8 / 255)


@dataclass(frozen=True)
class Published:
    """What others report for a recipe, in percent; ``robust`` is AutoAttack at 8/255 in L-inf."""

    preset: str
    source: str
    clean: float
    robust: float
    network: str = "resnet18"


FASTAT = "FastAT benchmark, 2026"
PUBLISHED = [
    Published("n_fgsm_cifar10", f"N-FGSM, arXiv:2202.01181; {FASTAT}", 78.59, 47.77),
    Published("fgsm_pgi_cifar10", f"FGSM-PGI, arXiv:2207.08859; {FASTAT}", 79.72, 49.89),
    Published("liet_cifar10", f"LIET, ICCV 2025; {FASTAT}", 80.68, 49.99),
    Published("madry_at_average_cifar10", f"PGD-AT with averaging; {FASTAT}", 82.36, 50.49),
    Published("free_at_cifar10", f"Free-AT, arXiv:1904.12843; {FASTAT}", 75.20, 44.34),
    Published(
        "fast_at_preactresnet18_cifar10",
        "Fast-AT, arXiv:2001.03994; RobustBench",
        83.34,
        43.21,
        "preactresnet18",
    ),
    Published(
        "trades_wrn34_10_cifar10",
        "TRADES, arXiv:1901.08573; RobustBench",
        84.92,
        53.08,
        "wrn34_10",
    ),
    Published(
        "trades_awp_wrn34_10_cifar10",
        "TRADES-AWP, arXiv:2004.05884; RobustBench",
        85.36,
        56.17,
        "wrn34_10",
    ),
]


def n_fgsm_cifar10(data_root: str | None = None) -> Config:
    """N-FGSM: 100 epochs, labels smoothed by .4."""
    return _recipe("n-fgsm", data_root, ONE_STEP, 0.4)


def n_fgsm_short_cifar10(data_root: str | None = None) -> Config:
    """N-FGSM in 20 epochs: two gradients a step, for a machine without a GPU."""
    config = n_fgsm_cifar10(data_root)
    schedule = replace(_schedule(0.4), num_epochs=20)
    # an average over 500 steps: 383 are an epoch
    return replace(config, preset="n_fgsm_short_cifar10", pretrain=schedule, ema_decay=0.998)


def fgsm_pgi_cifar10(data_root: str | None = None) -> Config:
    """FGSM-PGI with the epoch's prior and momentum: 100 epochs, labels smoothed by .4."""
    return _recipe("fgsm-pgi", data_root, ONE_STEP, 0.4)


def liet_cifar10(data_root: str | None = None) -> Config:
    """LIET: 100 epochs, labels smoothed by .6."""
    return _recipe("liet", data_root, ONE_STEP, 0.6)


def madry_at_average_cifar10(data_root: str | None = None) -> Config:
    """PGD-10 on all images with averaging: 100 epochs, labels smoothed by .4."""
    attack = AttackConfig(num_steps=(10,), random_start=True)
    config = _recipe("madry-at", data_root, attack, 0.4)
    return replace(config, preset="madry_at_average_cifar10")


def fast_at_preactresnet18_cifar10(data_root: str | None = None) -> Config:
    """Fast-AT on the paper's network."""
    return _on("preactresnet18", fast_at_cifar10(data_root))


def trades_wrn34_10_cifar10(data_root: str | None = None) -> Config:
    """TRADES on the paper's network."""
    return _on("wrn34_10", trades_cifar10(data_root))


def trades_awp_wrn34_10_cifar10(data_root: str | None = None) -> Config:
    """TRADES-AWP on the paper's network."""
    return _on("wrn34_10", trades_awp_cifar10(data_root))


def n_fgsm_digits() -> Config:
    """N-FGSM on handwritten digits: under a minute."""
    return _digits("n-fgsm")


def fgsm_pgi_digits() -> Config:
    """FGSM-PGI on handwritten digits: under a minute."""
    return _digits("fgsm-pgi")


def liet_digits() -> Config:
    """LIET on handwritten digits: under a minute."""
    return _digits("liet")


def multi_norm_digits() -> Config:
    """L-inf of .15 and L2 of .6, image by image the one of larger loss."""
    config = _digits("multi-norm")
    return replace(
        config,
        attack=replace(config.attack, num_steps=(10,)),
        options=MultiNormOptions(l2_epsilon=0.6),
    )


def _schedule(smoothing: float) -> PhaseConfig:
    return PhaseConfig(schedule="one-cycle", label_smoothing=smoothing)


def _recipe(defense: str, data_root: str | None, attack: AttackConfig, smoothing: float) -> Config:
    return replace(
        single(dwf_cifar10(data_root), defense),
        attack=attack,
        pretrain=_schedule(smoothing),
        ema_decay=0.9995,
        weights="best-ema",
        validate_every=1,
    )


def _on(network: str, config: Config) -> Config:
    """A CIFAR-10 recipe on another network, which its name then says."""
    name = f"{config.preset.removesuffix('_cifar10')}_{network}_cifar10"
    return replace(config, preset=name, model=replace(config.model, network=network))


def _digits(defense: str) -> Config:
    config = single(dwf_digits(), defense)
    return replace(config, pretrain=PhaseConfig(num_epochs=15, batch_size=64, learning_rate=0.1))


MAKERS: list[Callable[[], Config]] = [
    n_fgsm_digits,
    fgsm_pgi_digits,
    liet_digits,
    multi_norm_digits,
    n_fgsm_cifar10,
    n_fgsm_short_cifar10,
    fgsm_pgi_cifar10,
    liet_cifar10,
    madry_at_average_cifar10,
    fast_at_preactresnet18_cifar10,
    trades_wrn34_10_cifar10,
    trades_awp_wrn34_10_cifar10,
]
