"""The accuracies that training watches: on clean images, and under one PGD run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.pgd import pgd
from dwf.attacks.source import judge
from dwf.attacks.space import AttackSpace
from dwf.data import ImageDataset, evaluation_batches


def clean_and_robust_accuracy(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    batch_size: int,
    device: torch.device,
    space: Callable[[Model], AttackSpace],
    norm: str = "linf",
) -> tuple[float, float]:
    """Accuracy without an attack, and under PGD without random start; fractions.

    ``epsilon`` and ``step_size`` are in units of the ``space`` that the attack acts in. The
    model is judged in eval mode and left as it was.
    """
    clean = robust = 0
    with undisturbed(model, device), torch.no_grad():
        for images, labels, _ in evaluation_batches(dataset, batch_size, device):
            here = space(model)
            attacked = pgd(
                here,
                here.enter(images),
                labels,
                epsilon=epsilon,
                step_size=step_size,
                num_steps=num_steps,
                random_start=False,
                norm=norm,
            )
            clean += int(judge(ask(model, images), labels)[0].sum())
            robust += int(judge(ask(model, here.leave(attacked)), labels)[0].sum())
    return clean / len(dataset), robust / len(dataset)
