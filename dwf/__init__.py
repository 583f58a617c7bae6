"""dwf: fast, trustworthy adversarial training of mixture-of-experts image classifiers."""

from dwf import attacks, data, distributed, models, presets
from dwf.attacks import FGSM, PGD, fgsm, pgd
from dwf.config import Config, apply_overrides
from dwf.defenses import load
from dwf.evaluation import evaluate
from dwf.models import Mixture, MlpGate, Normalize, accelerate, as_pixel_model
from dwf.training import train

__version__ = "0.1.0"
__all__ = [
    "FGSM",
    "PGD",
    "Config",
    "Mixture",
    "MlpGate",
    "Normalize",
    "accelerate",
    "apply_overrides",
    "as_pixel_model",
    "attacks",
    "data",
    "distributed",
    "evaluate",
    "fgsm",
    "load",
    "models",
    "pgd",
    "presets",
    "train",
]
