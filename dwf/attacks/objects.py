"""Attacks as objects, built once and called on many batches; each is a shell over its function.

attack = PGD(model, epsilon=8 / 255, num_steps=20)
adversarial = attack(images, labels)
attack.save("adversarial.safetensors", [(images, labels), ...])
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dwf.attacks.apgd import apgd
from dwf.attacks.carlini_wagner import carlini_wagner
from dwf.attacks.ddn import ddn
from dwf.attacks.door import model_name
from dwf.attacks.ensemble import autoattack
from dwf.attacks.fab import fab
from dwf.attacks.hop_skip_jump import hop_skip_jump
from dwf.attacks.losses import Model
from dwf.attacks.pgd import bim, fgsm, mim, pgd
from dwf.attacks.random_noise import random_noise
from dwf.attacks.rays import rays
from dwf.attacks.saved_images import save_images
from dwf.attacks.simba import simba
from dwf.attacks.square import square
from dwf.attacks.target import AttackReport
from dwf.checks import ConfigError, check_seed
from dwf.config import derive_seed

# Arguments that belong to a batch, and so to a call; all others are settings of an object.
_OF_A_CALL = ("model", "images", "labels", "sample_index", "targets", "start", "report")
# Defaults of settings that the functions want to be told.
_DEFAULTS = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10, "random_start": True}


@dataclass
class _Calls:
    """How often an object was called without a sample_index."""

    number: int = 0


@dataclass(frozen=True, repr=False)
class Attack:
    """A model and the settings of an attack function, under the function's names.

    Each call draws new random numbers, so that a training loop sees new start noise in every batch
    and epoch: the first call uses ``seed``, call k a seed made from it and k. The same object made
    again gives the same series. A call with a ``sample_index`` uses ``seed`` itself, however many
    calls went before: its images depend on the index alone.

    ``dataclasses.replace(attack, epsilon=...)`` is the attack with another setting.
    """

    function: ClassVar[Callable[..., Tensor]]

    model: Model
    _report: AttackReport = field(default_factory=AttackReport, init=False, compare=False)
    _calls: _Calls = field(default_factory=_Calls, init=False, compare=False)

    if TYPE_CHECKING:  # subclasses are made below, with their functions' settings

        def __init__(self, model: Model, **settings: Any) -> None: ...

        def __getattr__(self, setting: str) -> Any: ...

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        sample_index: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch: adversarial images [B, C, H, W], from arguments as in the function.

        Raises:
            ConfigError: targets or a start for an attack that takes none; and as the function.
        """
        of_this_call = {"sample_index": sample_index, "targets": targets, "start": start}
        given = {name: value for name, value in of_this_call.items() if value is not None}
        for name in given:
            if name not in inspect.signature(type(self).function).parameters:
                raise ConfigError(f"{name}: {type(self).__name__} takes none")
        settings = {name: getattr(self, name) for name in self._settings()}
        if sample_index is None:
            settings["seed"] = self._next_seed()
        return type(self).function(
            self.model, images, labels, report=self._report, **given, **settings
        )

    def _next_seed(self) -> int:
        """The seed of this call; every call has its own."""
        number, seed = self._calls.number, check_seed(self.seed)
        self._calls.number += 1
        return seed if number == 0 else derive_seed(seed, "call", number)

    def report(self) -> AttackReport:
        """Report of the last call: back end, passes and speed."""
        return self._report

    def save(
        self, path: str | Path, batches: Iterable[tuple[Tensor, Tensor]], *, first_index: int = 0
    ) -> None:
        """Attack batches of (images, labels), and write the adversarial images to one file.

        Images are counted from ``first_index`` on for their random numbers. `load_images` reads the
        file. An error leaves no file behind.
        """
        found, all_labels, index = [], [], first_index
        for images, labels in batches:
            own = torch.arange(index, index + len(images), device=images.device)
            found.append(self(images, labels, own).cpu())
            all_labels.append(labels.cpu())
            index += len(images)
        if not found:
            raise ConfigError("batches: empty, there is nothing to attack")
        save_images(path, torch.cat(found), torch.cat(all_labels), made_by=repr(self))

    def __repr__(self) -> str:
        """The model's class, epsilon, and the settings that are not the default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        shown = [model_name(self.model)]
        for name in self._settings():
            value = getattr(self, name)
            changed = isinstance(value, Tensor) or value != defaults[name]
            if name == "epsilon" or changed:
                shown.append(f"{name}={_short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def _settings(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if f.init and f.name != "model"]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _object(name: str, function: Callable[..., Tensor]) -> type[Attack]:
    """The class over an attack function: a field for each setting, with the same default."""
    settings: list[tuple[str, Any, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in _OF_A_CALL:
            default = parameter.default
            if default is inspect.Parameter.empty:
                default = _DEFAULTS[parameter.name]
            settings.append((parameter.name, parameter.annotation, field(default=default)))
    summary = (function.__doc__ or "").partition("\n")[0]
    namespace = {
        "__doc__": f"{summary}\n\nA shell over :func:`dwf.attacks.{function.__name__}`.",
        "__module__": __name__,
        "function": staticmethod(function),
    }
    return make_dataclass(
        name, settings, bases=(Attack,), namespace=namespace, frozen=True, kw_only=True, repr=False
    )


FGSM = _object("FGSM", fgsm)
PGD = _object("PGD", pgd)
BIM = _object("BIM", bim)
MIM = _object("MIM", mim)
APGD = _object("APGD", apgd)
FAB = _object("FAB", fab)
CarliniWagner = _object("CarliniWagner", carlini_wagner)
DDN = _object("DDN", ddn)
Square = _object("Square", square)
SimBA = _object("SimBA", simba)
HopSkipJump = _object("HopSkipJump", hop_skip_jump)
RayS = _object("RayS", rays)
RandomNoise = _object("RandomNoise", random_noise)
AutoAttack = _object("AutoAttack", autoattack)
# Every attack as an object.
OBJECTS = (
    FGSM,
    PGD,
    BIM,
    MIM,
    APGD,
    FAB,
    CarliniWagner,
    DDN,
    Square,
    SimBA,
    HopSkipJump,
    RayS,
    RandomNoise,
    AutoAttack,
)
