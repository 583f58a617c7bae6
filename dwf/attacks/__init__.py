"""Attacks: functions of a model, images and labels that give adversarial images; and as objects."""

from dwf.attacks.apgd import apgd
from dwf.attacks.bpda import with_backward_pass_of
from dwf.attacks.carlini_wagner import carlini_wagner
from dwf.attacks.ddn import ddn
from dwf.attacks.ensemble import autoattack
from dwf.attacks.fab import fab
from dwf.attacks.hop_skip_jump import hop_skip_jump
from dwf.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from dwf.attacks.minimum_norm import NearestAdversarial, minimum_norm
from dwf.attacks.objects import (
    APGD,
    BIM,
    DDN,
    FAB,
    FGSM,
    MIM,
    PGD,
    Attack,
    AutoAttack,
    CarliniWagner,
    HopSkipJump,
    RandomNoise,
    RayS,
    SimBA,
    Square,
)
from dwf.attacks.pgd import bim, fgsm, input_gradient, mim, pgd
from dwf.attacks.random_noise import random_noise
from dwf.attacks.rays import rays
from dwf.attacks.saved_images import load_images, save_images
from dwf.attacks.simba import simba
from dwf.attacks.square import square
from dwf.attacks.surrogate import through_surrogate
from dwf.attacks.target import AttackReport, AttackTarget, attack_target
from dwf.attacks.transfer import TransferTable, transfer

__all__ = [
    "APGD",
    "BIM",
    "DDN",
    "FAB",
    "FGSM",
    "MIM",
    "PGD",
    "Attack",
    "AttackReport",
    "AttackTarget",
    "AutoAttack",
    "CarliniWagner",
    "HopSkipJump",
    "NearestAdversarial",
    "RandomNoise",
    "RayS",
    "SimBA",
    "Square",
    "TransferTable",
    "apgd",
    "attack_target",
    "autoattack",
    "bim",
    "carlini_wagner",
    "cross_entropy",
    "ddn",
    "dlr",
    "fab",
    "fgsm",
    "hop_skip_jump",
    "input_gradient",
    "load_images",
    "margin",
    "mim",
    "minimum_norm",
    "pgd",
    "random_noise",
    "rays",
    "save_images",
    "simba",
    "square",
    "targeted_dlr",
    "through_surrogate",
    "transfer",
    "with_backward_pass_of",
]
