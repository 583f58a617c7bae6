"""List the attacks that `attack_bench.py` compares, each with settings for 2,000 propagations.

A step of most is one forward and one backward pass, so 1,000 steps. Attacks of a fixed radius look
for the smallest one by bisection, image by image, as AttackBench lets them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dwf
from dwf.attacks import AttackTarget, minimum_norm

Attack = Callable[[nn.Module, Tensor, Tensor], Any]
AtRadius = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]
# Where bisections begin: nearly any image falls within half of it.
LARGEST = {"linf": 0.5, "l2": 4.0}
NUM_RADII, STEPS = 10, 95
NUM_CLASSES = 10


class Contender(NamedTuple):
    """An attack of a library."""

    library: str
    name: str
    attack: Attack


def contenders(norm: str) -> list[Contender]:
    """Ours, and those of every library that is installed, for "linf" or "l2"."""
    libraries = {
        "dwf": ours,
        "adv-lib": adv_lib,
        "foolbox": foolbox,
        "torchattacks": torchattacks,
        "ART": art,
        "AutoAttack": autoattack,
    }
    found = []
    for library, attacks in libraries.items():
        try:
            its = attacks(norm)
        except ImportError as error:
            print(f"without {library}: {error}")
            continue
        found += [Contender(library, f"{library} {name}", attack) for name, attack in its.items()]
    return found


def ours(norm: str) -> dict[str, Attack]:
    """Those of dwf, by autograd: a plan would not be counted."""

    def run(attack: Any, **settings: Any) -> Attack:
        def call(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
            target = AttackTarget(model, reason="its passes are counted")
            return minimum_norm(attack, target, images, labels, norm=norm, **settings)

        return call

    # images that fall soon leave passes for more radii; what is asked beyond 2,000 does not count
    radii = {"largest": LARGEST[norm], "num_radii": 16}
    found = {
        "FAB": run(dwf.fab, num_steps=105),
        "FAB-T": run(dwf.fab, num_steps=73, num_target_classes=9),
        "APGD-CE": run(dwf.apgd, loss="ce", num_steps=STEPS, **radii),
        "APGD-DLR": run(dwf.apgd, loss="dlr", num_steps=STEPS, **radii),
        "APGD-margin": run(dwf.apgd, loss="margin", num_steps=STEPS, **radii),
    }
    if norm == "l2":
        found["DDN"] = run(dwf.ddn, num_steps=1000)
        found["CW"] = run(dwf.carlini_wagner, num_searches=5, num_steps=200)
    return found


def adv_lib(norm: str) -> dict[str, Attack]:
    """adv-lib, by AttackBench's settings where these fit."""
    attacks = importlib.import_module("adv_lib.attacks")
    auto_pgd = importlib.import_module("adv_lib.attacks.auto_pgd")
    p = float("inf") if norm == "linf" else 2
    apgd = {"norm": p, "max_eps": LARGEST[norm] / 2, "binary_search_steps": 20}
    found = {
        "FMN": partial(attacks.fmn, norm=p, steps=1000),
        "FAB": partial(attacks.fab, norm=p, n_iter=180),
        "APGD-CE": partial(auto_pgd.minimal_apgd, loss_function="ce", n_iter=STEPS, **apgd),
        "APGD-DLR": partial(auto_pgd.minimal_apgd, loss_function="dlr", n_iter=STEPS, **apgd),
        "TR": partial(attacks.tr, p=p, iter=600),
    }
    if norm == "linf":
        found["PDPGD"] = partial(attacks.pdpgd, norm=p, num_steps=1000)
        found["CW"] = partial(attacks.carlini_wagner_linf, max_iterations=1000)
    else:
        found["DDN"] = partial(attacks.ddn, steps=1000, levels=None)
        found["PDGD"] = partial(attacks.pdgd, num_steps=1000)
        found["ALMA"] = partial(attacks.alma, num_steps=1000, init_lr_distance=1)
        found["CW"] = partial(
            attacks.carlini_wagner_l2, binary_search_steps=5, max_iterations=200, learning_rate=0.05
        )
        found["SuperDeepFool"] = attacks.sdf
    found["DeepFool"] = partial(attacks.df, norm=p)
    return found


def foolbox(norm: str) -> dict[str, Attack]:
    """foolbox, whose attacks search for the smallest perturbation themselves."""
    attacks = importlib.import_module("foolbox.attacks")
    box = importlib.import_module("foolbox")

    def run(attack: Any) -> Attack:
        def call(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
            adopted = box.PyTorchModel(model, bounds=(0, 1), device="cpu")
            return attack.run(adopted, images, box.criteria.Misclassification(labels))

        return call

    found = {}
    if norm == "linf":
        found["FMN"] = run(attacks.LInfFMNAttack(steps=990))
        found["DeepFool"] = run(attacks.LinfDeepFoolAttack(steps=90))
    else:
        found["FMN"] = run(attacks.L2FMNAttack(steps=990))
        found["DDN"] = run(attacks.DDNAttack(steps=990))
        found["DeepFool"] = run(attacks.L2DeepFoolAttack(steps=90))
        found["CW"] = run(
            attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=200, stepsize=0.05)
        )
    return found


def torchattacks(norm: str) -> dict[str, Attack]:
    """torchattacks: fixed radii, but for CW and DeepFool."""
    box = importlib.import_module("torchattacks")
    name = "Linf" if norm == "linf" else "L2"

    def apgd(model: nn.Module, images: Tensor, labels: Tensor, epsilon: Tensor, loss: str) -> Any:
        return box.APGD(model, norm=name, eps=epsilon, steps=STEPS, loss=loss)(images, labels)

    found = {
        "APGD-CE": by_radius(partial(apgd, loss="ce"), norm),
        "APGD-DLR": by_radius(partial(apgd, loss="dlr"), norm),
    }
    if norm == "l2":
        found["CW"] = lambda model, x, y: box.CW(model, c=1, steps=990)(x, y)
    return found


def art(norm: str) -> dict[str, Attack]:
    """ART, through its classifier of torch modules."""
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")

    def pgd(model: nn.Module, images: Tensor, labels: Tensor, epsilon: Tensor) -> Any:
        classifier = estimators.PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=NUM_CLASSES,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attack = evasion.ProjectedGradientDescentPyTorch(
            classifier,
            norm="inf" if norm == "linf" else 2,
            eps=epsilon.numpy(),
            eps_step=epsilon.numpy() / 10,
            max_iter=STEPS,
            batch_size=1000,
            verbose=False,
        )
        return attack.generate(images.numpy(), labels.numpy())

    return {"PGD": by_radius(pgd, norm)}


def autoattack(norm: str) -> dict[str, Attack]:
    """The original AutoAttack's parts."""
    apgd = importlib.import_module("autoattack.autopgd_base")
    fab = importlib.import_module("autoattack.fab_pt")
    name = "Linf" if norm == "linf" else "L2"

    def at_radius(
        model: nn.Module, images: Tensor, labels: Tensor, epsilon: Tensor, loss: str
    ) -> Any:
        attack = apgd.APGDAttack(
            model, n_iter=STEPS, norm=name, eps=epsilon, loss=loss, device="cpu"
        )
        return attack.perturb(images, labels)

    def boundary(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
        attack = fab.FABAttack_PT(
            model, norm=name, n_iter=180, eps=LARGEST[norm], seed=0, device="cpu"
        )
        return attack.perturb(images, labels)

    return {
        "APGD-CE": by_radius(partial(at_radius, loss="ce"), norm),
        "APGD-DLR": by_radius(partial(at_radius, loss="dlr"), norm),
        "FAB": boundary,
    }


def by_radius(attack: AtRadius, norm: str) -> Attack:
    """Bisection of an attack of a fixed radius, which takes one for each image [B, 1, 1, 1]."""

    def call(model: nn.Module, images: Tensor, labels: Tensor) -> None:
        rows = (model.tally.distance > 0).nonzero()[:, 0]
        low = torch.zeros(len(rows), dtype=torch.float64)
        high = torch.full_like(low, LARGEST[norm])
        for _ in range(NUM_RADII):
            radius = (low + high) / 2
            attack(model, images[rows], labels[rows], radius.float().view(-1, 1, 1, 1))
            reached = model.tally.distance[rows] <= radius * (1 + 1e-6)
            high = torch.where(reached, model.tally.distance[rows], high)
            low = torch.where(reached, low.minimum(high), radius)

    return call
