"""Attacks: functions of a model, images and labels that give adversarial images."""

from dwf.attacks.losses import cross_entropy
from dwf.attacks.objects import FGSM, PGD
from dwf.attacks.pgd import fgsm, input_gradient, pgd, pgd_snapshots

__all__ = ["FGSM", "PGD", "cross_entropy", "fgsm", "input_gradient", "pgd", "pgd_snapshots"]
