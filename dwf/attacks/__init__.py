"""Attacks: functions of a model, images and labels that give adversarial images."""

from dwf.attacks.losses import cross_entropy
from dwf.attacks.objects import FGSM, PGD
from dwf.attacks.pgd import fgsm, input_gradient, pgd, pgd_snapshots
from dwf.attacks.target import AttackReport, AttackTarget, attack_target

__all__ = [
    "FGSM",
    "PGD",
    "AttackReport",
    "AttackTarget",
    "attack_target",
    "cross_entropy",
    "fgsm",
    "input_gradient",
    "pgd",
    "pgd_snapshots",
]
