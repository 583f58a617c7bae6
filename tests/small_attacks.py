"""The attacks below the public functions, called as the public ones are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dwf.attacks.ascent import Ascent, ascend, snapshots
from dwf.attacks.setup import Setup
from dwf.attacks.space import AttackSpace


def _same(images: Tensor) -> Tensor:
    return images


def clamped(model: Any, clamp: str) -> AttackSpace:
    """The model in a space whose points are clamped so."""
    return AttackSpace(model, _same, _same, clamp)


def pgd_snapshots(
    model: Any,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Any,
    step_size: Any,
    num_steps: list[int],
    gradient: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    setup = Setup(model=model, images=images, labels=labels, epsilon=epsilon, **options)
    return snapshots(setup, Ascent(step_size=step_size, num_steps=1, gradient=gradient), num_steps)


def pgd_from_gradient(
    model: Any,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Any,
    step_size: Any,
    num_steps: Any = 1,
    gradient: Tensor | None = None,
    **options: Any,
) -> Tensor:
    setup = Setup(model=model, images=images, labels=labels, epsilon=epsilon, **options)
    how = Ascent(step_size=step_size, num_steps=num_steps, gradient=gradient)
    return setup.held(ascend(setup, how))
