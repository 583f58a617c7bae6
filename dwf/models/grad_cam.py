"""Compute differentiable Grad-CAM of a whole batch, and heatmaps that sum to 1.

    cam[b](u) = ReLU(sum_c alpha[b, c] A[b, c](u)),   alpha[b, c] = mean_v d score[b] / d A[b, c](v)

A are the feature maps of one layer; u and v are pixels of these maps. One backward pass serves all
images and all networks, because the scores are summed and an image's maps enter its score alone.
This requires that no layer between the maps and the score mixes images, as BatchNorm in train mode
does. After the last stage of ResNet, GoogLeNet and DenseNet there are only pooling and a linear
layer.

Axes: E networks, B images, C feature maps of h x w pixels.
Source: Selvaraju et al., arXiv:1610.02391, eqs. (1)-(2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Maps with a smaller sum count as zero, so that no gradient is divided by less.
_SMALLEST_SUM = 1e-8


@contextlib.contextmanager
def captured(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the layers inside the block, in the order of the calls.

    The layers have hooks inside the block only: a module with hooks cannot be planned.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            # a frozen network; a copy, because a leaf may not be rectified in place
            output = output.requires_grad_().clone()
        outputs.append(output)
        return output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def grad_cam(
    scores: Tensor, features: Sequence[Tensor], *, create_graph: bool = True
) -> list[Tensor]:
    """Grad-CAM of each of E networks, for all images in one backward pass.

    Args:
        scores: the logits to explain, one for each network and image, in any shape.
        features: E tensors [B, C, h, w]; ``features[e]`` are the maps A of network e that its
            scores were computed from.
        create_graph: keep the graph, so that a loss of the maps can be differentiated.
    Returns:
        E maps [B, h, w] float32 (float64 of float64 features), >= 0.
    """
    grads = torch.autograd.grad(
        scores.sum(), list(features), create_graph=create_graph, retain_graph=True
    )
    maps = []
    for grad, feature in zip(grads, features, strict=True):
        dtype = torch.promote_types(feature.dtype, torch.float32)  # also under autocast
        alpha = grad.to(dtype).mean(dim=(2, 3), keepdim=True)
        maps.append((alpha * feature.to(dtype)).sum(dim=1).relu())
    return maps


def heatmaps(maps: Sequence[Tensor]) -> Tensor:
    """Distributions over one grid: E maps [B, h, w] >= 0 to [E, B, h, w], each with sum 1.

    Larger maps are averaged down to the size of the smallest. A map that is zero everywhere becomes
    uniform and passes no gradient.
    """
    size = min(m.shape[1] for m in maps), min(m.shape[2] for m in maps)
    common = torch.stack(
        [m if m.shape[1:] == size else F.adaptive_avg_pool2d(m, size) for m in maps]
    )
    total = common.sum(dim=(2, 3), keepdim=True)
    shared = common / total.clamp(min=_SMALLEST_SUM)
    return torch.where(total > _SMALLEST_SUM, shared, 1 / (size[0] * size[1]))
