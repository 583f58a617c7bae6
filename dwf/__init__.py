"""dwf: fast, trustworthy adversarial training of mixture-of-experts image classifiers."""

from dwf import attacks, data, distributed, models, presets
from dwf.attacks import (
    APGD,
    BIM,
    FAB,
    FGSM,
    MIM,
    PGD,
    AutoAttack,
    CarliniWagner,
    RandomNoise,
    Square,
    apgd,
    autoattack,
    bim,
    carlini_wagner,
    fab,
    fgsm,
    mim,
    pgd,
    random_noise,
    square,
)
from dwf.config import Config, apply_overrides
from dwf.defenses import load
from dwf.evaluation import evaluate
from dwf.models import Mixture, MlpGate, Normalize, accelerate, as_pixel_model
from dwf.training import train
from dwf.version import __version__

__all__ = [
    "APGD",
    "BIM",
    "FAB",
    "FGSM",
    "MIM",
    "PGD",
    "AutoAttack",
    "CarliniWagner",
    "Config",
    "Mixture",
    "MlpGate",
    "Normalize",
    "RandomNoise",
    "Square",
    "__version__",
    "accelerate",
    "apgd",
    "apply_overrides",
    "as_pixel_model",
    "attacks",
    "autoattack",
    "bim",
    "carlini_wagner",
    "data",
    "distributed",
    "evaluate",
    "fab",
    "fgsm",
    "load",
    "mim",
    "models",
    "pgd",
    "presets",
    "random_noise",
    "square",
    "train",
]
