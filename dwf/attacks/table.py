"""The table of attacks: key, name, function, settings and cost of each. A new attack is one row.

Ensembles, suites of an evaluation and other tools' scripts name attacks by their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from dwf.attacks.apgd import apgd
from dwf.attacks.fab import fab
from dwf.attacks.hop_skip_jump import hop_skip_jump
from dwf.attacks.losses import Model
from dwf.attacks.random_noise import random_noise
from dwf.attacks.rays import rays
from dwf.attacks.simba import simba
from dwf.attacks.square import square
from dwf.attacks.target import AttackTarget


class CraftedInParts(NamedTuple):
    """Result of an attack of several parts: images, and the number of the part that made each."""

    images: Tensor  # [B, C, H, W]
    part: Tensor  # [B] int64


class Passes(NamedTuple):
    """Passes through the model for an image that no attack breaks. A gradient counts in both."""

    num_forwards: int
    num_backwards: int


Cost = Callable[[Mapping[str, Any], int], Passes]


@dataclass(frozen=True)
class AttackEntry:
    """One row of the table.

    Attributes:
        key: how it is named in suites, results and scripts.
        name: how it is shown.
        function: ``function(target, images, labels, epsilon=..., **settings)`` to adversarial
            images, or to CraftedInParts.
        cost: (settings, number of classes) to its Passes.
        settings: arguments of the function that make it this attack.
        length: the setting that says how long it runs.
        needs_gradients: whether it differentiates the model.
        random_start: whether it starts from a random point of the ball.
        steps_per_radius: with a fixed step size, how many steps cross the radius.
        parts: names of its parts, by the numbers in CraftedInParts.
    """

    key: str
    name: str
    function: Callable[..., Tensor | CraftedInParts]
    cost: Cost
    settings: Mapping[str, Any] = field(default_factory=dict)
    length: str = "num_steps"
    needs_gradients: bool = True
    random_start: bool = False
    steps_per_radius: int | None = None
    parts: Sequence[str] = ()

    def __call__(
        self, model: Model | AttackTarget, images: Tensor, labels: Tensor, **options: Any
    ) -> Tensor | CraftedInParts:
        return self.function(model, images, labels, **{**self.settings, **options})

    def changed(self, name: str | None = None, **settings: Any) -> AttackEntry:
        """The same attack with other settings, and under another name."""
        return replace(self, name=name or self.name, settings={**self.settings, **settings})

    def passes(self, num_classes: int, **options: Any) -> Passes:
        """Passes for one image that stands, with these options in place of the settings."""
        return self.cost({**self.settings, **options}, num_classes)


def _cost_of_apgd(settings: Mapping[str, Any], num_classes: int) -> Passes:
    num_runs = _num_aims(settings, num_classes) * settings.get("num_restarts", 1)
    gradients = (settings["num_steps"] + 1) * num_runs
    eot_samples = settings.get("eot_samples", 1)
    # the first verdict, and one after each run
    return Passes((gradients + 1 + num_runs) * eot_samples, gradients * eot_samples)


def _cost_of_fab(settings: Mapping[str, Any], num_classes: int) -> Passes:
    aims = settings.get("num_target_classes")
    steps = settings["num_steps"] * settings.get("num_restarts", 1)
    steps *= _num_aims(settings, num_classes)
    gradients = steps if aims else steps * (num_classes - 1)
    eot_samples = settings.get("eot_samples", 1)
    return Passes((gradients + steps + 1) * eot_samples, gradients * eot_samples)


def _cost_of_queries(settings: Mapping[str, Any], num_classes: int) -> Passes:
    queries = settings["num_queries"] * settings.get("num_restarts", 1)
    return Passes((queries + 1) * settings.get("eot_samples", 1), 0)


def _cost_of_noise(settings: Mapping[str, Any], num_classes: int) -> Passes:
    return Passes((settings["num_draws"] + 1) * settings.get("eot_samples", 1), 0)


def _num_aims(settings: Mapping[str, Any], num_classes: int) -> int:
    aims = settings.get("num_target_classes")
    return 1 if aims is None else min(int(aims), num_classes - 1)


def _apgd(key: str, name: str, **settings: Any) -> AttackEntry:
    """A row of Auto-PGD."""
    return AttackEntry(
        key,
        name,
        apgd,
        _cost_of_apgd,
        {"num_steps": 100, **settings},
        random_start=True,
    )


def _fab(key: str, name: str, **settings: Any) -> AttackEntry:
    """A row of FAB."""
    settings = {"num_steps": 100, "gives_up": False, **settings}
    return AttackEntry(key, name, fab, _cost_of_fab, settings)


def _queries(key: str, name: str, function: Callable[..., Tensor], **settings: Any) -> AttackEntry:
    """A row of an attack that asks for no gradient."""
    settings = {"num_queries": 5000, **settings}
    return AttackEntry(
        key,
        name,
        function,
        _cost_of_queries,
        settings,
        length="num_queries",
        needs_gradients=False,
    )


SQUARE = _queries("square", "Square", square, gives_up=False)
NOISE = AttackEntry(
    "noise",
    "noise",
    random_noise,
    _cost_of_noise,
    {"num_draws": 200},
    length="num_draws",
    needs_gradients=False,
)
# AutoAttack's attacks with its settings, then ours.
ATTACKS: dict[str, AttackEntry] = {
    entry.key: entry
    for entry in (
        _apgd("apgd-ce", "APGD-CE", loss="ce"),
        _apgd("apgd-dlr", "APGD-DLR", loss="dlr", gives_up=False),
        _fab("fab", "FAB"),
        SQUARE,
        _apgd("apgd-t", "APGD-T", loss="dlr-targeted", num_target_classes=9, gives_up=False),
        _fab("fab-t", "FAB-T", num_target_classes=9),
        NOISE,
        _queries("simba", "SimBA", simba),
        _queries("hop-skip-jump", "HopSkipJump", hop_skip_jump),
        _queries("rays", "RayS", rays),
    )
}

RAND_EOT_SAMPLES = 20
# AutoAttack's versions: the attacks of each, in their order.
VERSIONS: dict[str, tuple[AttackEntry, ...]] = {
    "standard": (ATTACKS["apgd-ce"], ATTACKS["apgd-t"], ATTACKS["fab-t"], ATTACKS["square"]),
    "plus": (
        ATTACKS["apgd-ce"].changed("APGD-CE x5", num_restarts=5),
        ATTACKS["apgd-dlr"].changed("APGD-DLR x5", num_restarts=5),
        ATTACKS["fab"].changed("FAB x5", num_restarts=5),
        ATTACKS["square"],
        ATTACKS["apgd-t"],
        ATTACKS["fab-t"],
    ),
    "rand": (
        ATTACKS["apgd-ce"].changed("APGD-CE EoT", eot_samples=RAND_EOT_SAMPLES),
        ATTACKS["apgd-dlr"].changed("APGD-DLR EoT", eot_samples=RAND_EOT_SAMPLES),
    ),
}
