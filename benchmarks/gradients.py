"""Judge a model by gradient attacks alone, where a suite takes too long."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dwf
from dwf.data import ImageDataset, evaluation_batches


def left_by_gradients(
    model: nn.Module,
    test_set: ImageDataset,
    num_images: int,
    device: torch.device,
    *,
    epsilon: float,
    norm: str = "linf",
) -> tuple[float, float]:
    """Shares of the first test images that are right, and that APGD-CE and APGD-DLR leave so."""
    subset = test_set.subset(torch.arange(num_images))
    images, labels, index = next(evaluation_batches(subset, num_images, device))

    def right(x: Tensor) -> Tensor:
        with torch.no_grad():
            answers: Tensor = model(x).argmax(dim=1)
        return answers == labels

    stands = right(images)
    clean = float(stands.float().mean())
    for loss in ("ce", "dlr"):
        attacked = dwf.apgd(
            model, images, labels, epsilon=epsilon, norm=norm, loss=loss, sample_index=index
        )
        stands &= right(attacked)
    return clean, float(stands.float().mean())
