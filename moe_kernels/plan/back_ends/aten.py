"""Run layers by the convolutions of stock torch, one network at a time.

Values are channels_last tensors [B, C, H, W] in the plan's dtype; convolutions are oneDNN's on a
CPU and cuDNN's on a GPU, the latter with bias, residual and ReLU in one call where cuDNN can. The
input gradient of a convolution of stride 1 is again a convolution, with turned weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.plan.back_ends.base import BackEnd, Weights
from moe_kernels.plan.back_ends.elementwise import masked as zero_where_cut
from moe_kernels.plan.layers import Conv, Head, Layer, Pointwise, Pool

log = logging.getLogger("moe_kernels")

_aten = torch.ops.aten


@dataclass
class _Parameters:
    """Parameters of one layer in the plan's dtype: weight [O, C, R, S] channels_last, bias [O].

    turned: [C, O, R, S], the weights of the input gradient if that is a convolution.
    forward: what the forward reads, which differs for the image split in two.
    """

    weight: Tensor
    bias: Tensor
    forward: Tensor
    turned: Tensor | None
    projection: Tensor | None


class AtenBackEnd(BackEnd):
    """Stock convolutions in `dtype`, for one network, on any device."""

    name = "aten"
    preferred_batch = 128  # all layers' values are kept until the way back

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self._split = dtype is torch.bfloat16
        self._parameters: dict[str, _Parameters] = {}
        self._fused = device.type == "cuda" and _cudnn_fuses(device, dtype)

    def load(self, layers: Sequence[Layer], weights: Sequence[Weights | None]) -> None:
        for layer, values in zip(layers, weights, strict=True):
            if values is None:
                continue
            made = self._make(layer, values)
            if known := self._parameters.get(layer.name):  # a captured graph knows its addresses
                for mine, new in zip(_tensors(known), _tensors(made), strict=True):
                    mine.copy_(new)
            else:
                self._parameters[layer.name] = made

    def _make(self, layer: Layer, values: Weights) -> _Parameters:
        if len(values.weight) != 1:
            raise ValueError(f"aten runs one network at a time, found {len(values.weight)}")
        if isinstance(layer, Head | Pointwise):  # in float32, like the sums before a head
            weight = values.weight[0]
            return _Parameters(weight, values.bias[0], weight, None, None)
        assert isinstance(layer, Conv)
        weight = self._weight(values.weight[0])
        forward, turned, projection = weight, None, None
        if layer.source == 0 and self._split:
            forward = torch.cat([weight, weight], dim=1)
        elif layer.stride == 1 and layer.groups == 1 and layer.padding < min(layer.kernel):
            turned = weight.flip(2, 3).transpose(0, 1)
        if values.projection is not None:
            projection = self._weight(values.projection[0, :, :, None, None])
        return _Parameters(
            weight,
            values.bias[0].to(self.dtype),
            _channels_last(forward),
            None if turned is None else _channels_last(turned),
            projection,
        )

    def _weight(self, weight: Tensor) -> Tensor:
        return _channels_last(weight.to(self.dtype))

    def enter(self, images: Tensor) -> Tensor:
        x = images[0].contiguous(memory_format=torch.channels_last)
        if not self._split:
            return x.to(self.dtype)
        high = x.to(self.dtype)
        return torch.cat([high, (x - high.float()).to(self.dtype)], dim=1)

    def conv(
        self, layer: Conv, source: Tensor, residual: Tensor | None, projected: Tensor | None
    ) -> Tensor:
        own = self._parameters[layer.name]
        if layer.projection is not None:
            assert own.projection is not None
            assert projected is not None
            side = F.conv2d(projected, own.projection, stride=layer.projection.stride)
            residual = side if residual is None else side.add_(residual)
        stride, padding = [layer.stride] * 2, [layer.padding] * 2
        if self._fused and layer.relu:
            options = (own.bias, stride, padding, [1, 1], layer.groups)
            try:
                if residual is None:
                    return torch.cudnn_convolution_relu(source, own.forward, *options)
                return torch.cudnn_convolution_add_relu(
                    source, own.forward, residual, 1.0, *options
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # it may have no kernel for some sizes, as it says only here
                log.info("cuDNN fuses no convolution like %s: %s", layer.name, error)
                self._fused = False
        out = F.conv2d(source, own.forward, own.bias, stride, padding, groups=layer.groups)
        if residual is not None:
            out.add_(residual)
        return out.relu_() if layer.relu else out

    def conv_input_grad(
        self,
        layer: Conv,
        grad: Tensor,
        source: Tensor,
        *,
        masked: bool,
        skip: Tensor | None = None,
        projection: tuple[Conv, Tensor] | None = None,
    ) -> Tensor:
        own = self._parameters[layer.name]
        if own.turned is not None:
            R, S = layer.kernel
            padding = (R - 1 - layer.padding, S - 1 - layer.padding)
            out = F.conv2d(grad, own.turned, padding=padding)
        else:
            out = _input_grad(grad, source, own.weight, layer)
        if projection is not None:
            out.add_(self.projection_input_grad(*projection, source))
        if skip is not None:
            out.add_(skip)
        return zero_where_cut(out, source) if masked else out

    def projection_input_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        weight = self._parameters[layer.name].projection
        assert weight is not None
        assert layer.projection is not None
        side = replace(layer, stride=layer.projection.stride, padding=0, groups=1)
        return _input_grad(grad, source, weight, side)

    def pool(self, layer: Pool, source: Tensor) -> Tensor:
        function = F.max_pool2d if layer.kind == "max" else F.avg_pool2d
        return function(source, layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil)

    def pool_input_grad(
        self,
        layer: Pool,
        grad: Tensor,
        source: Tensor,
        output: Tensor,
        *,
        masked: bool,
        skip: Tensor | None = None,
    ) -> Tensor:
        window = [layer.kernel] * 2, [layer.stride] * 2, [layer.padding] * 2
        if layer.kind == "max":
            _, places = F.max_pool2d(source, *window, ceil_mode=layer.ceil, return_indices=True)
            out = _aten.max_pool2d_with_indices_backward(
                grad, source, *window, [1, 1], layer.ceil, places
            )
        else:
            out = _aten.avg_pool2d_backward(grad, source, *window, False, True, None)
        if skip is not None:
            out = out + skip
        return zero_where_cut(out, source) if masked else out

    def rows(self, value: Tensor) -> Tensor:
        return value.permute(0, 2, 3, 1)

    def value(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.permute(0, 3, 1, 2)

    def affine(self, layer: Pointwise) -> tuple[Tensor, Tensor]:
        own = self._parameters[layer.name]
        return own.weight, own.bias

    def head(self, layer: Head, source: Tensor) -> Tensor:
        own = self._parameters[layer.name]
        mean = source.mean(dim=(2, 3), dtype=self._wide)
        return F.linear(mean, own.weight, own.bias).unsqueeze(0)

    def head_input_grad(
        self, layer: Head, grad_logits: Tensor, source: Tensor, *, masked: bool
    ) -> Tensor:
        H, W = source.shape[2:]
        own = self._parameters[layer.name]
        grad = (grad_logits[0] @ own.weight / (H * W)).to(source.dtype)
        spread = grad[:, :, None, None].expand_as(source)
        if masked:
            return zero_where_cut(spread, source)
        return spread.contiguous(memory_format=torch.channels_last)

    def from_map(self, maps: Tensor) -> Tensor:
        return maps[0].to(self.dtype, memory_format=torch.channels_last, copy=True)

    def to_map(self, value: Tensor, channels: int) -> Tensor:
        return value.to(self._wide, copy=True).unsqueeze(0)

    def image_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        own = self._parameters[layer.name]
        image = source[:, : layer.in_channels]
        out = _input_grad(grad, image, own.weight, layer)
        return out.to(self._wide, memory_format=torch.contiguous_format).unsqueeze(0)


def _input_grad(grad: Tensor, source: Tensor, weight: Tensor, layer: Conv) -> Tensor:
    """The library's input gradient; it looks at the shape of `source` alone."""
    grads = _aten.convolution_backward(
        grad,
        source,
        weight,
        bias_sizes=None,
        stride=[layer.stride] * 2,
        padding=[layer.padding] * 2,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=layer.groups,
        output_mask=[True, False, False],
    )
    return cast(Tensor, grads[0])


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _tensors(parameters: _Parameters) -> list[Tensor]:
    return [x for x in vars(parameters).values() if x is not None]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _cudnn_fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN has convolution + bias + residual + ReLU here, and gets it right."""
    generator = torch.Generator().manual_seed(0)
    x, z = (_channels_last(_normal((2, 16, 8, 8), generator).to(device, dtype)) for _ in range(2))
    w = _channels_last(_normal((16, 16, 3, 3), generator).to(device, dtype) / 12)
    b = _normal((16,), generator).to(device, dtype)
    options = b, [1, 1], [1, 1], [1, 1], 1
    with contextlib.suppress(RuntimeError):
        fused = torch.cudnn_convolution_add_relu(x, w, z, 1.0, *options)
        plain = torch.relu(F.conv2d(x, w, b, padding=1) + z)
        alone = torch.cudnn_convolution_relu(x, w, *options)
        expected = torch.relu(F.conv2d(x, w, b, padding=1))
        return bool(
            torch.allclose(fused, plain, atol=0.05, rtol=0.05)
            and torch.allclose(alone, expected, atol=0.05, rtol=0.05)
        )
    return False
