"""Fold BatchNorm into weights and bias: the float32 parameters of a plan's layers.

    weight' = weight * gamma / sqrt(variance + eps)
    bias' = beta + (bias - mean) * gamma / sqrt(variance + eps)

A factor for each channel behind a convolution is folded in the same way. All that over E networks
at once, so that a GPU launches once per layer and not once per network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.contents import Group, held
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv, Head, Layer, Pointwise, Source
from moe_kernels.plan.modules import evaluated


@torch.no_grad()
def fold(
    networks: Sequence[nn.Module],
    layers: Sequence[Layer],
    sources: Sequence[Source],
    dtype: torch.dtype = torch.float32,
) -> list[Weights | None]:
    """Copies of every layer's parameters, stacked over G networks of equal layers.

    Args:
        sources: where each layer's parameters are in the networks.
        dtype: of the result, float32 or float64.
    Returns:
        One entry for each layer; None for a layer without parameters.

    Raises:
        CannotPlan: parameters of another shape than their module says.
    """
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.enter_context(evaluated(network))  # some parametrizations move on in train mode
        folded = [
            _converted(_fold_layer(networks, *pair), dtype)
            for pair in zip(layers, sources, strict=True)
        ]
    for layer, weights in zip(layers, folded, strict=True):
        if weights is not None and _shapes(weights) != _expected(layer, len(networks)):
            raise CannotPlan(f"{layer.name} has parameters of another shape than it says")
    return folded


def read_by(networks: Sequence[nn.Module], layer: Layer, source: Source) -> Group | None:
    """What `fold` reads to fold a layer; None if a module computes a part of it at each reading."""
    places: list[tuple[str | None, tuple[str, ...]]] = []
    if isinstance(layer, Pointwise) and layer.affine:
        places = [(source.norm, _BATCH_NORM if layer.epsilon is None else _PRODUCT)]
    elif isinstance(layer, Conv | Head):
        places = [(None if source.identity else source.module, _PRODUCT)]
        places += [(source.norm, _BATCH_NORM), (source.projection, _PRODUCT)]
        places += [(source.projection_norm, _BATCH_NORM)]
    if source.scale is not None:
        owner, _, name = source.scale.rpartition(".")
        places.append((owner, (name,)))
    group = Group([])
    for network in networks:
        for path, names in places:
            if path is None:
                continue
            module = network.get_submodule(path)
            tensors = held(module, names)
            if tensors is None:
                return None
            epsilon = getattr(module, "eps", None)
            group = Group(group.tensors + tensors, (*group.values, epsilon))
    return group


_PRODUCT = ("weight", "bias")
_BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


def _converted(weights: Weights | None, dtype: torch.dtype) -> Weights | None:
    if weights is None:
        return None
    projection = weights.projection
    return Weights(
        weights.weight.to(dtype),
        weights.bias.to(dtype),
        None if projection is None else projection.to(dtype),
    )


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
        return Weights(*_product(networks, source, layer.num_classes))
    if isinstance(layer, Pointwise) and layer.affine:
        return _pointwise(networks, layer, source)
    if not isinstance(layer, Conv):
        return None
    weight, bias = _normalized(
        networks, _product(networks, source, layer.out_channels), source.norm
    )
    if weight.dim() == 3:  # linear, or the identity, [E, O, C * P * Q]
        weight = weight.view(*weight.shape[:2], layer.in_channels, -1)
        if source.pooling is not None:
            weight = weight @ source.pooling.to(weight)
        weight = weight.view(*weight.shape[:3], *layer.kernel)
    if source.scale is not None:
        scale = _scale(networks, source.scale)
        weight, bias = weight * scale[:, :, None, None, None], bias * scale
    if source.projection is None:
        return Weights(weight, bias)
    side, side_bias = _normalized(
        networks, _stored_product(networks, source.projection), source.projection_norm
    )
    return Weights(weight, bias + side_bias, side.flatten(2))


def _pointwise(networks: Sequence[nn.Module], layer: Pointwise, source: Source) -> Weights:
    """Scale and shift [G, C]."""
    if source.norm is None:
        assert source.scale is not None
        scale = _scale(networks, source.scale)
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


def _scale(networks: Sequence[nn.Module], name: str) -> Tensor:
    """A parameter of one number for each channel, [G, C]."""
    owner, _, last = name.rpartition(".")
    return _stack([getattr(x.get_submodule(owner), last).flatten() for x in networks])


def _product(networks: Sequence[nn.Module], source: Source, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer's linear map: a module's, or the identity of some channels."""
    if not source.identity:
        return _stored_product(networks, source.module)
    device = next(networks[0].parameters()).device
    eye = torch.eye(channels, dtype=torch.float32, device=device).repeat(len(networks), 1, 1)
    return eye, eye.new_zeros(eye.shape[:2])


def _stored_product(networks: Sequence[nn.Module], name: str) -> tuple[Tensor, Tensor]:
    modules: list[Any] = [x.get_submodule(name) for x in networks]
    weight = _stack([x.weight for x in modules])
    return weight, _optional([x.bias for x in modules], weight.new_zeros(weight.shape[1]))


def _normalized(
    networks: Sequence[nn.Module], product: tuple[Tensor, Tensor], norm: str | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias with the BatchNorm behind them folded in."""
    weight, bias = product
    if norm is None:
        return weight, bias
    scale, mean, beta = _batch_norm(networks, norm)
    bias = (bias - mean) * scale + beta
    return weight * scale.view(*scale.shape, *[1] * (weight.dim() - 2)), bias


def _batch_norm(networks: Sequence[nn.Module], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a BatchNorm (x - mean) * scale + beta: scale, mean and beta, each [G, C]."""
    norms: list[Any] = [x.get_submodule(name) for x in networks]
    # one by one: a tensor of them would be a copy from the host, which waits for the device
    scale = torch.rsqrt(torch.stack([_wide(x.running_var) + x.eps for x in norms]))
    scale = scale * _optional([x.weight for x in norms], torch.ones_like(scale[0]))
    beta = _optional([x.bias for x in norms], torch.zeros_like(scale[0]))
    return scale, _stack([x.running_mean for x in norms]), beta


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([_wide(x) for x in tensors])


def _optional(tensors: Sequence[Tensor | None], default: Tensor) -> Tensor:
    return _stack([default if x is None else x for x in tensors])
