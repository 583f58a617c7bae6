"""BatchNorm into weights and bias: the float32 parameters of a plan's layers.

    weight' = weight * gamma / sqrt(variance + eps)
    bias' = beta + (bias - mean) * gamma / sqrt(variance + eps)

over E networks at once, so that a GPU launches once per layer and not once per network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Weights
from .layers import Conv, Head, Layer
from .trace import Source


@torch.no_grad()
def fold(
    networks: Sequence[nn.Module], layers: Sequence[Layer], sources: Sequence[Source]
) -> list[Weights | None]:
    """Parameters of every layer, stacked over the networks: copies, whatever their dtype was."""
    return [_fold_layer(networks, *pair) for pair in zip(layers, sources, strict=True)]


def _fold_layer(networks: Sequence[nn.Module], layer: Layer, source: Source) -> Weights | None:
    if isinstance(layer, Head):
        if source.identity:
            device = next(networks[0].parameters()).device
            eye = torch.eye(layer.num_classes, device=device).expand(len(networks), -1, -1)
            return Weights(eye.contiguous(), eye.new_zeros(eye.shape[:2]))
        modules = [x.get_submodule(source.module) for x in networks]
        return Weights(_stack(modules, "weight"), _bias(modules, layer.num_classes))
    if not isinstance(layer, Conv):
        return None
    weight, bias = _convolution(networks, source.module, source.norm)
    if weight.dim() == 3:  # linear, [E, O, C * P * Q]
        weight = weight.view(*weight.shape[:2], layer.in_channels, -1)
        if source.pooling is not None:
            weight = weight @ source.pooling.to(weight)
        weight = weight.view(*weight.shape[:3], *layer.kernel)
    if source.projection is None:
        return Weights(weight, bias)
    side, side_bias = _convolution(networks, source.projection, source.projection_norm)
    return Weights(weight, bias + side_bias, side.flatten(3).squeeze(3))


def _convolution(
    networks: Sequence[nn.Module], name: str, norm: str | None
) -> tuple[Tensor, Tensor]:
    modules = [x.get_submodule(name) for x in networks]
    weight = _stack(modules, "weight")
    bias = _bias(modules, weight.shape[1])
    if norm is None:
        return weight, bias
    norms: list[Any] = [x.get_submodule(norm) for x in networks]
    eps = torch.tensor([x.eps for x in norms], device=weight.device).unsqueeze(1)
    scale = torch.rsqrt(_stack(norms, "running_var") + eps)
    shift = -_stack(norms, "running_mean")
    if norms[0].affine:
        scale = scale * _stack(norms, "weight")
        bias = _stack(norms, "bias") + (bias + shift) * scale
    else:
        bias = (bias + shift) * scale
    return weight * scale.view(*scale.shape, *[1] * (weight.dim() - 2)), bias


def _stack(modules: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([getattr(x, name).detach().float() for x in modules])


def _bias(modules: Sequence[Any], size: int) -> Tensor:
    if modules[0].bias is None:
        return _stack(modules, "weight").new_zeros(len(modules), size)
    return _stack(modules, "bias")
