"""Attacks as objects, for code that builds an attack once and calls it on many batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from dwf.attacks.apgd import apgd
from dwf.attacks.losses import Loss, Model
from dwf.attacks.pgd import bim, fgsm, mim, pgd
from dwf.attacks.target import AttackReport


@dataclass(frozen=True)
class Attack:
    """A shell over an attack function; settings are its arguments, under their names.

    ``attack(images, labels)`` gives adversarial images, ``attack.report()`` tells what ran in the
    last call.
    """

    function: ClassVar[Callable[..., Tensor]]

    model: Model
    _: KW_ONLY
    epsilon: float = 8 / 255
    norm: str = "linf"
    eot_samples: int = 1
    bn_mode: str = "eval"
    seed: int = 0
    _report: AttackReport = field(
        default_factory=AttackReport, init=False, repr=False, compare=False
    )

    def __call__(
        self, images: Tensor, labels: Tensor, sample_index: Tensor | None = None
    ) -> Tensor:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        model = settings.pop("model")
        return type(self).function(
            model, images, labels, sample_index=sample_index, report=self._report, **settings
        )

    def report(self) -> AttackReport:
        """What ran in the last call, and how fast."""
        return self._report


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """``attack = FGSM(model, epsilon=8 / 255); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.fgsm`.
    """

    function = staticmethod(fgsm)

    random_start: bool = False
    loss: str | Loss = "ce"


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """``attack = PGD(model, num_steps=20); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.pgd`. ``num_restarts=3`` is multi-start PGD; ``eot_samples=20``
    adapts it to a randomized model.
    """

    function = staticmethod(pgd)

    step_size: float = 2 / 255
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    loss: str | Loss = "ce"


@dataclass(frozen=True, kw_only=True)
class BIM(Attack):
    """``attack = BIM(model, num_steps=20); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.bim`.
    """

    function = staticmethod(bim)

    step_size: float = 2 / 255
    num_steps: int = 10
    loss: str | Loss = "ce"


@dataclass(frozen=True, kw_only=True)
class MIM(Attack):
    """``attack = MIM(model, decay=1.0); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.mim`.
    """

    function = staticmethod(mim)

    step_size: float = 2 / 255
    num_steps: int = 10
    decay: float = 1.0
    loss: str | Loss = "ce"


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """``attack = APGD(model, loss="dlr"); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.apgd`.
    """

    function = staticmethod(apgd)

    loss: str | Loss = "ce"
    num_steps: int = 100
    num_restarts: int = 1
    num_target_classes: int | None = None
