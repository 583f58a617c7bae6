"""Run layers of all networks of a plan at once on slabs, one launch for each layer.

Values are slabs [E, H, W, N, C] in the plan's dtype (slab.py, grouped_conv.py, head.py), where the
rows from B to N are no images: forward they hold anything finite, backward zeros. Value 0 is the
images themselves, as they came; the layer that reads them makes its columns.

Axes: E networks that run together, B images, N rows; C D input, O output channels; R S filter taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_kernels.ops import grouped_conv_sm90a  # noqa: F401  registers the compiled kernel
from moe_kernels.ops.grouped_conv import grouped_conv, grouped_conv_input_grad
from moe_kernels.ops.head import pooled_cross_entropy, pooled_logits, pooled_logits_input_grad
from moe_kernels.ops.pool import pool, pool_input_grad
from moe_kernels.ops.slab import image_columns, num_columns, num_rows, num_sets, stem_input_grad
from moe_kernels.plan.back_ends.base import BackEnd, Weights
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv, Entry, Head, Layer, Pointwise, Pool, reads


@dataclass(frozen=True, repr=False)
class Slab:
    """A value or its gradient [E, H, W, N, C]; the first `num_images` of N rows are images."""

    rows: Tensor
    num_images: int


@dataclass(frozen=True)
class _Parameters:
    """Parameters of one layer, as its ops take them.

    weight: [E, O, R, S, C]; of the layer that reads the images [E, O, 1, 1, K], for its columns;
    of a Head [E, K, C] float32.
    weight_t: [E, C, R, S, O]; of the layer that reads the images [E, R, S, C, O].
    bias: [E, O] float32. projection: [E, O, D]; projection_t: [E, D, O].
    """

    weight: Tensor
    bias: Tensor
    weight_t: Tensor | None = None
    projection: Tensor | None = None
    projection_t: Tensor | None = None


class SlabBackEnd(BackEnd):
    """Grouped ops on slabs in `dtype`, for any number of networks."""

    name = "slab"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self._parameters: dict[str, _Parameters] = {}

    def load(self, layers: Sequence[Layer], weights: Sequence[Weights | None]) -> None:
        for layer, values in zip(layers, weights, strict=True):
            own = layer.source if isinstance(layer, Conv | Entry) else None
            if any(value == 0 for value in reads(layer) if value != own):
                raise ValueError(f"{layer.name}: only a convolution can read the images")
            if isinstance(layer, Conv) and layer.groups != 1:
                raise CannotPlan(f"{layer.name} is a grouped convolution")
            if isinstance(layer, Pool) and layer.ceil:
                raise CannotPlan(f"{layer.name} rounds its size up")
            if values is None:
                continue
            made = self._make(layer, values)
            known = self._parameters.get(layer.name)
            if known is None or not _refilled(known, made):
                self._parameters[layer.name] = made

    def _make(self, layer: Layer, values: Weights) -> _Parameters:
        bias = self._kept(values.bias, self._wide)
        if isinstance(layer, Head | Pointwise):
            return _Parameters(self._kept(values.weight, self._wide), bias)
        assert isinstance(layer, Conv)
        # [E, O, C, R, S] in all that follows.
        weight = values.weight
        if layer.source == 0:
            taps = weight.permute(0, 1, 3, 4, 2).flatten(2)  # [E, O, R * S * C]
            columns = torch.cat([taps] * num_sets(self.dtype), dim=2)
            columns = pad(columns, (0, num_columns(taps.shape[2], self.dtype) - columns.shape[2]))
            turned = weight.permute(0, 3, 4, 2, 1)
            return _Parameters(self._kept(columns[:, :, None, None]), bias, self._kept(turned))
        projection = values.projection
        return _Parameters(
            self._kept(weight.permute(0, 1, 3, 4, 2)),
            bias,
            self._kept(weight.permute(0, 2, 3, 4, 1)),
            None if projection is None else self._kept(projection),
            None if projection is None else self._kept(projection.mT),
        )

    def _kept(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of our own: the caller's tensor may change."""
        return weight.to(self.device, dtype or self.dtype).clone(
            memory_format=torch.contiguous_format
        )

    def enter(self, images: Tensor) -> Tensor:
        return images.to(self._wide)

    def conv(
        self,
        layer: Conv,
        source: Slab | Tensor,
        residual: Slab | None,
        projected: Slab | None,
    ) -> Slab:
        own = self._parameters[layer.name]
        if isinstance(source, Tensor):
            rows = image_columns(
                source,
                kernel=layer.kernel,
                stride=layer.stride,
                padding=layer.padding,
                dtype=self.dtype,
            )
            num_images, stride, padding = source.shape[1], 1, 0
        else:
            rows, num_images = source.rows, source.num_images
            stride, padding = layer.stride, layer.padding
        y = grouped_conv(
            rows,
            own.weight,
            own.bias,
            _rows(residual),
            _rows(projected),
            own.projection,
            stride=stride,
            padding=padding,
            side_stride=layer.projection.stride if layer.projection else 1,
            relu=layer.relu,
        )
        return Slab(y, num_images)

    def conv_input_grad(
        self,
        layer: Conv,
        grad: Slab,
        source: Slab,
        *,
        masked: bool,
        skip: Slab | None = None,
        projection: tuple[Conv, Slab] | None = None,
    ) -> Slab:
        weight_t = self._parameters[layer.name].weight_t
        assert weight_t is not None
        side, side_weight_t, side_stride = None, None, 1
        if projection is not None:
            other, beside = projection
            assert other.projection is not None
            side, side_stride = beside.rows, other.projection.stride
            side_weight_t = self._parameters[other.name].projection_t
        _, H, W, _, _ = source.rows.shape
        grad_rows = grouped_conv_input_grad(
            grad.rows,
            weight_t,
            _rows(skip),
            side,
            side_weight_t,
            source.rows if masked else None,
            H=H,
            W=W,
            stride=layer.stride,
            padding=layer.padding,
            side_stride=side_stride,
        )
        return Slab(grad_rows, grad.num_images)

    def projection_input_grad(self, layer: Conv, grad: Slab, source: Slab) -> Slab:
        weight_t = self._parameters[layer.name].projection_t
        assert weight_t is not None
        assert layer.projection is not None
        E, H, W, _, D = source.rows.shape
        grad_rows = grouped_conv_input_grad(
            grad.rows,
            weight_t.view(E, D, 1, 1, -1),
            H=H,
            W=W,
            stride=layer.projection.stride,
        )
        return Slab(grad_rows, grad.num_images)

    def pool(self, layer: Pool, source: Slab) -> Slab:
        window = {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
        return Slab(pool(source.rows, kind=layer.kind, **window), source.num_images)

    def pool_input_grad(
        self,
        layer: Pool,
        grad: Slab,
        source: Slab,
        output: Slab,
        *,
        masked: bool,
        skip: Slab | None = None,
    ) -> Slab:
        grad_rows = pool_input_grad(
            grad.rows,
            source.rows,
            _rows(skip),
            kind=layer.kind,
            kernel=layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            masked=masked,
        )
        return Slab(grad_rows, grad.num_images)

    def rows(self, value: Slab) -> Tensor:
        return value.rows

    def value(self, rows: Tensor, like: Slab) -> Slab:
        return Slab(rows, like.num_images)

    def affine(self, layer: Pointwise) -> tuple[Tensor, Tensor]:
        own = self._parameters[layer.name]
        return own.weight[:, None, None, None], own.bias[:, None, None, None]

    def head(self, layer: Head, source: Slab) -> Tensor:
        own = self._parameters[layer.name]
        return pooled_logits(source.rows, own.weight, own.bias, B=source.num_images)

    def head_input_grad(
        self, layer: Head, grad_logits: Tensor, source: Slab, *, masked: bool
    ) -> Slab:
        weight = self._parameters[layer.name].weight
        grad_logits = grad_logits.to(self._wide)
        grad_rows = pooled_logits_input_grad(grad_logits, weight, source.rows, masked=masked)
        return Slab(grad_rows, source.num_images)

    def cross_entropy(
        self, layer: Head, source: Slab, gate_logits: Tensor, labels: Tensor, *, masked: bool
    ) -> tuple[Tensor, Tensor, Slab]:
        own = self._parameters[layer.name]
        inputs = source.rows, own.weight, own.bias, gate_logits.to(self._wide), labels
        _, logits, grad_gate, grad_rows = pooled_cross_entropy(*inputs, masked=masked)
        return logits, grad_gate, Slab(grad_rows, source.num_images)

    def from_map(self, maps: Tensor) -> Slab:
        G, B, C, H, W = maps.shape
        rows = maps.new_zeros(G, H, W, num_rows(B), C, dtype=self.dtype)
        rows[:, :, :, :B] = maps.permute(0, 3, 4, 1, 2)
        return Slab(rows, B)

    def to_map(self, value: Slab, channels: int) -> Tensor:
        rows = value.rows[:, :, :, : value.num_images]
        return rows.permute(0, 3, 4, 1, 2).to(self._wide, copy=True)

    def image_grad(self, layer: Conv, grad: Slab, source: Tensor) -> Tensor:
        weight_t = self._parameters[layer.name].weight_t
        assert weight_t is not None
        G, B, _, H, W = source.shape
        return stem_input_grad(
            grad.rows,
            weight_t,
            image_shape=(B, H, W),
            stride=layer.stride,
            padding=layer.padding,
            shared=G == 1,
        )


def _rows(value: Slab | None) -> Tensor | None:
    return None if value is None else value.rows


def _refilled(known: _Parameters, made: _Parameters) -> bool:
    """Copy into the same memory, whose addresses a captured graph knows; False if shapes differ."""
    pairs = list(zip(vars(known).values(), vars(made).values(), strict=True))
    if any(getattr(a, "shape", None) != getattr(b, "shape", None) for a, b in pairs):
        return False
    for mine, new in pairs:
        if mine is not None:
            mine.copy_(new)
    return True
