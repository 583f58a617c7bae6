"""Provide the steps that several defenses share: cross-entropy of benign or attacked images."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.data import Batch, classes_of
from dwf.defenses.crafter import Craft, Crafter
from dwf.defenses.phase import StepResult

# ``train_on(forward, images, wanted, num_clean)``: the loss of rows [R], the first ``num_clean`` of
# them benign; ``wanted`` as of a batch, classes [R] or shares of them [R, K].
TrainOn = Callable[[Model, Tensor, Tensor, int], StepResult]


def cross_entropy_step(
    forward: Model, images: Tensor, wanted: Tensor, num_clean: int
) -> StepResult:
    """Mean cross-entropy of one train-mode forward over all rows."""
    logits = forward(images)
    loss = F.cross_entropy(logits.float(), wanted)
    return StepResult(loss, logits.detach(), classes_of(wanted), num_clean)


def plain_step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    train_on: TrainOn = cross_entropy_step,
) -> StepResult:
    """CE(f(x), y), or another loss, of the images as they are."""
    return train_on(forward, batch.images, batch.wanted, len(batch.images))


def attacked_step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    craft: Craft,
    train_on: TrainOn = cross_entropy_step,
) -> StepResult:
    """CE(f(x'), y), or another loss, where ``craft`` attacks all images of the batch."""
    return train_on(forward, craft(crafter, model, batch), batch.wanted, 0)
