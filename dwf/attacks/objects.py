"""Attacks as objects, for code that builds an attack once and calls it on many batches."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from torch import Tensor

from dwf.attacks.losses import Loss, Model, cross_entropy
from dwf.attacks.pgd import fgsm, pgd
from dwf.attacks.target import AttackReport


@dataclass(frozen=True)
class FGSM:
    """``attack = FGSM(model, epsilon=8 / 255); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.fgsm`. ``attack.report()`` tells what ran in the last call.
    """

    model: Model
    _: KW_ONLY
    epsilon: float = 8 / 255
    random_start: bool = False
    loss: Loss = cross_entropy
    bn_mode: str = "eval"
    seed: int = 0
    _report: AttackReport = field(
        default_factory=AttackReport, init=False, repr=False, compare=False
    )

    def __call__(
        self, images: Tensor, labels: Tensor, sample_index: Tensor | None = None
    ) -> Tensor:
        settings = _settings(self)
        return fgsm(self.model, images, labels, sample_index=sample_index, **settings)

    def report(self) -> AttackReport:
        """What ran in the last call, and how fast."""
        return self._report


@dataclass(frozen=True)
class PGD:
    """``attack = PGD(model, num_steps=20); adversarial = attack(images, labels)``.

    A shell over :func:`dwf.attacks.pgd`. ``num_restarts=3`` is multi-start PGD; ``eot_samples=20``
    adapts it to a randomized model. ``attack.report()`` tells what ran in the last call.
    """

    model: Model
    _: KW_ONLY
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    eot_samples: int = 1
    loss: Loss = cross_entropy
    bn_mode: str = "eval"
    seed: int = 0
    _report: AttackReport = field(
        default_factory=AttackReport, init=False, repr=False, compare=False
    )

    def __call__(
        self, images: Tensor, labels: Tensor, sample_index: Tensor | None = None
    ) -> Tensor:
        settings = _settings(self)
        return pgd(self.model, images, labels, sample_index=sample_index, **settings)

    def report(self) -> AttackReport:
        """What ran in the last call, and how fast."""
        return self._report


def _settings(attack: FGSM | PGD) -> dict[str, Any]:
    settings = {f.name: getattr(attack, f.name) for f in fields(attack) if f.init}
    del settings["model"]
    return settings | {"report": attack._report}
