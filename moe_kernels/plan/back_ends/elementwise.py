"""Compute layers that work number by number or channel by channel, in stock torch on any layout.

Tensors are rows [..., C] in a back end's dtype, the last axis being channels. An affine, scale and
shift, is float32 and broadcasts over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.plan.layers import RELU, Join, Pointwise

Affine = tuple[Tensor, Tensor]
_aten = torch.ops.aten
# Gradients that autograd would call, whose graph costs more than they do on few images.
_DIRECT = {
    "gelu": _aten.gelu_backward,
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
}


def pointwise(layer: Pointwise, rows: Tensor, affine: Affine | None) -> Tensor:
    """The output [..., C] of a layer that reads `rows`, in their dtype."""
    return _activated(layer, _scaled(layer, rows, affine)).to(rows.dtype)


def pointwise_input_grad(
    layer: Pointwise, grad: Tensor, rows: Tensor, affine: Affine | None
) -> Tensor:
    """Gradient of `rows` from that of the output; of a ReLU's output it is masked already."""
    if layer.epsilon is None and layer.activation in (None, RELU):
        return (grad if affine is None else grad * affine[0]).to(rows.dtype)
    known = layer.activation
    if known is not None and known.name in _DIRECT and not layer.affine:
        return cast(Tensor, _DIRECT[known.name](grad, rows, **dict(known.options)))
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        output = _activated(layer, _scaled(layer, leaf, affine))
    (grad,) = torch.autograd.grad(output, leaf, grad.to(output.dtype))
    return grad


def join(layer: Join, rows: Sequence[Tensor], total: int) -> Tensor:
    """The output of a layer that reads several rows, with `total` channels if side by side."""
    if layer.kind == "concat":
        parts = [x[..., :channels] for x, channels in zip(rows, layer.channels, strict=True)]
        if total > sum(layer.channels):
            parts.append(parts[0].new_zeros(*parts[0].shape[:-1], total - sum(layer.channels)))
        return torch.cat(parts, dim=-1)
    a, b = rows
    return a + b if layer.kind == "sum" else a * b


def join_input_grads(layer: Join, grad: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of all rows from that of the output."""
    if layer.kind == "sum":
        return [grad, grad]
    if layer.kind == "product":
        a, b = rows
        return [(grad * b).sum_to_size(a.shape), (grad * a).sum_to_size(b.shape)]
    grads, start = [], 0
    for x, channels in zip(rows, layer.channels, strict=True):
        own = grad[..., start : start + channels]
        grads.append(F.pad(own, (0, x.shape[-1] - channels)).contiguous())
        start += channels
    return grads


def masked(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient, zero where rows are not positive."""
    return cast(Tensor, torch.ops.aten.threshold_backward(grad, rows, 0))


def _scaled(layer: Pointwise, rows: Tensor, affine: Affine | None) -> Tensor:
    """In float32 if there is an affine: its sums may cancel."""
    if layer.epsilon is not None:
        own = rows[..., : layer.channels]
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        normalized = F.layer_norm(own, (layer.channels,), eps=layer.epsilon)
        rows = F.pad(normalized, (0, rows.shape[-1] - layer.channels))
    return rows if affine is None else torch.addcmul(affine[1], rows, affine[0])


def _activated(layer: Pointwise, x: Tensor) -> Tensor:
    if layer.activation is None:
        return x
    function = getattr(F, layer.activation.name)
    return cast(Tensor, function(x, **dict(layer.activation.options)))
