"""Fold BatchNorm into weights and bias: the float32 parameters of a plan's layers.

    weight' = weight * gamma / sqrt(variance + eps)
    bias' = beta + (bias - mean) * gamma / sqrt(variance + eps)

over E networks at once, so that a GPU launches once per layer and not once per network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv, Head, Layer, Pointwise, Source
from moe_kernels.plan.modules import evaluated


@torch.no_grad()
def fold(
    networks: Sequence[nn.Module], layers: Sequence[Layer], sources: Sequence[Source]
) -> list[Weights | None]:
    """Float32 copies of every layer's parameters, stacked over G networks of equal layers.

    Args:
        sources: where each layer's parameters are in the networks.
    Returns:
        One entry for each layer; None for a layer without parameters.

    Raises:
        CannotPlan: parameters of another shape than their module says.
    """
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.enter_context(evaluated(network))  # some parametrizations move on in train mode
        folded = [_fold_layer(networks, *pair) for pair in zip(layers, sources, strict=True)]
    for layer, weights in zip(layers, folded, strict=True):
        if weights is not None and _shapes(weights) != _expected(layer, len(networks)):
            raise CannotPlan(f"{layer.name} has parameters of another shape than it says")
    return folded


def _shapes(weights: Weights) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in vars(weights).values() if x is not None]


def _expected(layer: Layer, num_networks: int) -> list[tuple[int, ...]]:
    if isinstance(layer, Head):
        G_K = num_networks, layer.num_classes
        return [(*G_K, layer.in_channels), G_K]
    if isinstance(layer, Pointwise):
        return [(num_networks, layer.channels)] * 2
    assert isinstance(layer, Conv)
    G_O = num_networks, layer.out_channels
    shapes = [(*G_O, layer.in_channels // layer.groups, *layer.kernel), G_O]
    return shapes if layer.projection is None else [*shapes, (*G_O, layer.projection.in_channels)]


def _fold_layer(networks: Sequence[nn.Module], layer: Layer, source: Source) -> Weights | None:
    if isinstance(layer, Head):
        if not source.identity:
            return Weights(*_convolution(networks, source.module, None))
        device = next(networks[0].parameters()).device
        eye = torch.eye(layer.num_classes, dtype=torch.float32, device=device).expand(
            len(networks), -1, -1
        )
        return Weights(eye.contiguous(), eye.new_zeros(eye.shape[:2]))
    if isinstance(layer, Pointwise) and layer.affine:
        return _pointwise(networks, layer, source)
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
    return Weights(weight, bias + side_bias, side.flatten(2))


def _pointwise(networks: Sequence[nn.Module], layer: Pointwise, source: Source) -> Weights:
    """Scale and shift [G, C]."""
    if source.norm is None:
        assert source.scale is not None
        path, _, name = source.scale.rpartition(".")
        scale = _stack([getattr(x.get_submodule(path), name).flatten() for x in networks])
        return Weights(scale, torch.zeros_like(scale))
    if layer.epsilon is None:
        scale, mean, beta = _batch_norm(networks, source.norm)
        return Weights(scale, beta - mean * scale)
    norms: list[Any] = [x.get_submodule(source.norm) for x in networks]
    device = next(networks[0].parameters()).device
    ones = torch.ones(layer.channels, dtype=torch.float32, device=device)
    return Weights(
        _optional([x.weight for x in norms], ones),
        _optional([x.bias for x in norms], torch.zeros_like(ones)),
    )


def _convolution(
    networks: Sequence[nn.Module], name: str, norm: str | None
) -> tuple[Tensor, Tensor]:
    modules: list[Any] = [x.get_submodule(name) for x in networks]
    weight = _stack([x.weight for x in modules])
    bias = _optional([x.bias for x in modules], weight.new_zeros(weight.shape[1]))
    if norm is None:
        return weight, bias
    scale, mean, beta = _batch_norm(networks, norm)
    bias = (bias - mean) * scale + beta
    return weight * scale.view(*scale.shape, *[1] * (weight.dim() - 2)), bias


def _batch_norm(networks: Sequence[nn.Module], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a BatchNorm (x - mean) * scale + beta: scale, mean and beta, each [G, C]."""
    norms: list[Any] = [x.get_submodule(name) for x in networks]
    # one by one: a tensor of them would be a copy from the host, which waits for the device
    scale = torch.rsqrt(torch.stack([x.running_var.detach().float() + x.eps for x in norms]))
    scale = scale * _optional([x.weight for x in norms], torch.ones_like(scale[0]))
    beta = _optional([x.bias for x in norms], torch.zeros_like(scale[0]))
    return scale, _stack([x.running_mean for x in norms]), beta


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.detach().float() for x in tensors])


def _optional(tensors: Sequence[Tensor | None], default: Tensor) -> Tensor:
    return _stack([default if x is None else x for x in tensors])
