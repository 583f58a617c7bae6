"""dwf: fast, trustworthy adversarial training of mixture-of-experts image classifiers."""

from dwf import attacks, data, distributed, models, presets
from dwf.attacks import APGD, BIM, FGSM, MIM, PGD, apgd, bim, fgsm, mim, pgd
from dwf.config import Config, apply_overrides
from dwf.defenses import load
from dwf.evaluation import evaluate
from dwf.models import Mixture, MlpGate, Normalize, accelerate, as_pixel_model
from dwf.training import train
from dwf.version import __version__

__all__ = [
    "APGD",
    "BIM",
    "FGSM",
    "MIM",
    "PGD",
    "Config",
    "Mixture",
    "MlpGate",
    "Normalize",
    "__version__",
    "accelerate",
    "apgd",
    "apply_overrides",
    "as_pixel_model",
    "attacks",
    "bim",
    "data",
    "distributed",
    "evaluate",
    "fgsm",
    "load",
    "mim",
    "models",
    "pgd",
    "presets",
    "train",
]
