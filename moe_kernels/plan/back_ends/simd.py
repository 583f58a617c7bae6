"""Run layers by compiled convolutions on CPUs with AVX-512 or AVX2, one network at a time.

Values are [H, W, B, C] in the plan's dtype, C padded with zero channels to 16 words.
3x3 convolutions of stride 1 and their input gradients run by Winograd's F(2x4, 3x3), which needs
3 times fewer products; other ones go tap by tap and skip the padding. Sums are float32 in a
fixed order, so an image's bits depend neither on its batch nor on the number of threads. For
bfloat16, which AVX-512 has, the image is read as high and low part; the classifier is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.native import FLOATS
from moe_kernels.plan.back_ends.base import BackEnd, Weights
from moe_kernels.plan.back_ends.simd_calls import (
    LINEAR,
    address,
    available,
    conv_sizes,
    convolve,
    instructions_for,
)
from moe_kernels.plan.back_ends.simd_weights import (
    LANES,
    PackedWeights,
    empty,
    is_depthwise,
    padded,
)
from moe_kernels.plan.layers import RELU, Conv, Head, Layer, Pointwise, Pool, output_size


class SimdBackEnd(BackEnd):
    """Compiled convolutions in `dtype` (float32 or bfloat16), for one network, on a CPU.

    Args:
        name: the instructions, "avx512" or "avx2"; the first that this CPU has by default.

    Raises:
        RuntimeError: what `available` returns.
    """

    # Activations of a part of the batch stay in the caches from layer to layer.
    preferred_batch = 32

    def __init__(self, dtype: torch.dtype, name: str | None = None) -> None:
        self.name = name or instructions_for(dtype)
        if reason := available(self.name, dtype):
            raise RuntimeError(reason)
        self.dtype = dtype
        self._code = FLOATS.index(dtype)
        self._weights = PackedWeights(dtype, self.name)
        self._kernels = self._weights.kernels

    def load(self, layers: Sequence[Layer], weights: Sequence[Weights | None]) -> None:
        self._weights.load(layers, weights)

    def enter(self, images: Tensor) -> Tensor:
        x = images[0].permute(2, 3, 0, 1)
        if self.dtype is torch.float32:
            return x.contiguous()
        high = x.to(self.dtype, memory_format=torch.contiguous_format)
        return torch.stack([high, (x - high.float()).to(self.dtype)], dim=-1).flatten(3)

    def conv(
        self, layer: Conv, source: Tensor, residual: Tensor | None, projected: Tensor | None
    ) -> Tensor:
        H, W, B, _ = source.shape
        P, Q = output_size(layer, (H, W))
        out = source.new_empty(P, Q, B, self.num_padded(layer.out_channels))
        if is_depthwise(layer):
            bias = self._weights.packed(layer).bias
            self._depthwise(layer, source, out, bias=bias, addend=residual, relu=layer.relu)
            return out
        own = self._weights.of(layer, H, W)
        assert own.main is not None
        side = None
        if layer.projection is not None:
            assert own.projection is not None
            assert projected is not None
            side = (projected, own.projection.forward, layer.projection.stride)
        convolve(
            self._kernels,
            source,
            own.main.forward,
            out,
            layer,
            bias=own.bias,
            addend=residual,
            side=side,
            relu=layer.relu,
            winograd=own.winograd,
        )
        return out

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
        out = torch.empty_like(source)
        activation = source if masked else None
        if layer.groups != 1 and projection is not None:
            side = self.projection_input_grad(*projection, source)
            skip, projection = side if skip is None else self.add(side, skip), None
        if is_depthwise(layer):
            self._depthwise(layer, grad, out, addend=skip, activation=activation, input_grad=True)
            return out
        own = self._weights.of(layer)
        assert own.main is not None
        convolve(
            self._kernels,
            grad,
            own.main.gradient,
            out,
            layer,
            addend=skip,
            activation=activation,
            side=None if projection is None else self._side_gradient(*projection),
            input_grad=True,
            winograd=own.winograd,
        )
        return out

    def _depthwise(
        self,
        layer: Conv,
        source: Tensor,
        output: Tensor,
        *,
        bias: Tensor | None = None,
        addend: Tensor | None = None,
        activation: Tensor | None = None,
        relu: bool = False,
        input_grad: bool = False,
    ) -> None:
        weight = self._weights.packed(layer).channelwise
        self._kernels.conv_depthwise(
            source=source.data_ptr(),
            weight=address(weight),
            bias=address(bias),
            addend=address(addend),
            activation=address(activation),
            output=output.data_ptr(),
            sizes=conv_sizes(layer, source, output, input_grad=input_grad),
            relu=relu,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )

    def projection_input_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        out = torch.empty_like(source)
        convolve(
            self._kernels,
            None,
            None,
            out,
            None,
            side=self._side_gradient(layer, grad),
            input_grad=True,
        )
        return out

    def _side_gradient(self, layer: Conv, grad: Tensor) -> tuple[Tensor, Tensor, int]:
        own = self._weights.packed(layer)
        assert own.projection is not None
        assert layer.projection is not None
        return grad, own.projection.gradient, layer.projection.stride

    def pool(self, layer: Pool, source: Tensor) -> Tensor:
        H, W, B, C = source.shape
        P, Q = output_size(layer, (H, W))
        out = source.new_empty(P, Q, B, C)
        self._kernels.pool(
            source=source.data_ptr(),
            output=out.data_ptr(),
            sizes=_pool_sizes(layer, source, out),
            maximum=layer.kind == "max",
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        return out

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
        out = torch.empty_like(source)
        self._kernels.pool_backward(
            grad=grad.data_ptr(),
            source=source.data_ptr(),
            output=address(output if layer.kind == "max" else None),
            skip=address(skip),
            activation=address(source if masked else None),
            grad_source=out.data_ptr(),
            sizes=_pool_sizes(layer, source, grad),
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        return out

    def rows(self, value: Tensor) -> Tensor:
        return value

    def value(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows

    def affine(self, layer: Pointwise) -> tuple[Tensor, Tensor]:
        own = self._weights.packed(layer)
        assert own.channelwise is not None
        return own.channelwise[0], own.bias

    def pointwise(self, layer: Pointwise, source: Tensor) -> Tensor:
        if not _is_compiled(layer):
            computed: Tensor = super().pointwise(layer, source)
            return computed
        out = torch.empty_like(source)
        scale, shift = self.affine(layer)
        if layer.epsilon is not None:
            self._kernels.layer_norm(
                source=source.data_ptr(),
                scale=scale.data_ptr(),
                shift=shift.data_ptr(),
                output=out.data_ptr(),
                **self._norm_facts(layer, source),
            )
            return out
        self._scale(source, scale, out, shift=shift, relu=layer.activation == RELU)
        return out

    def pointwise_input_grad(
        self, layer: Pointwise, grad: Tensor, source: Tensor, *, masked: bool, skip: Tensor | None
    ) -> Tensor:
        if not _is_compiled(layer):
            computed: Tensor = super().pointwise_input_grad(
                layer, grad, source, masked=masked, skip=skip
            )
            return computed
        out = torch.empty_like(source)
        scale, _ = self.affine(layer)
        activation = source if masked else None
        if layer.epsilon is not None:
            self._kernels.layer_norm_backward(
                grad=grad.data_ptr(),
                source=source.data_ptr(),
                scale=scale.data_ptr(),
                addend=address(skip),
                activation=address(activation),
                grad_source=out.data_ptr(),
                **self._norm_facts(layer, source),
            )
            return out
        self._scale(grad, scale, out, addend=skip, activation=activation)
        return out

    def _norm_facts(self, layer: Pointwise, source: Tensor) -> dict[str, Any]:
        """What the compiled functions of a LayerNorm take besides their tensors."""
        channels = source.shape[-1]
        return {
            "rows": source.numel() // channels,
            "C": channels,
            "channels": layer.channels,
            "epsilon": layer.epsilon,
            "dtype": self._code,
            "num_threads": torch.get_num_threads(),
        }

    def _scale(
        self,
        source: Tensor,
        scale: Tensor,
        output: Tensor,
        *,
        second: Tensor | None = None,
        second_scale: Tensor | None = None,
        shift: Tensor | None = None,
        addend: Tensor | None = None,
        activation: Tensor | None = None,
        relu: bool = False,
    ) -> None:
        channels = source.shape[-1]
        self._kernels.scale_shift(
            source=source.data_ptr(),
            scale=scale.data_ptr(),
            second=address(second),
            second_scale=address(second_scale),
            shift=address(shift),
            addend=address(addend),
            activation=address(activation),
            output=output.data_ptr(),
            rows=source.numel() // channels,
            C=channels,
            relu=relu,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )

    def num_padded(self, channels: int) -> int:
        return padded(channels, self._weights.multiple)

    def head(self, layer: Head, source: Tensor) -> Tensor:
        own = self._weights.of(layer)
        assert own.main is not None
        means = self._means(source)
        logits = empty(1, 1, source.shape[2], len(own.bias))
        convolve(self._kernels, means, own.main.forward, logits, LINEAR, bias=own.bias)
        return logits[0, :, :, : layer.num_classes]

    def _means(self, source: Tensor) -> Tensor:
        """Means over pixels [1, 1, B, C], float32."""
        H, W, B, C = source.shape
        means = empty(1, 1, B, C)
        self._kernels.pixel_mean(
            source=source.data_ptr(),
            mean=means.data_ptr(),
            pixels=H * W,
            N=B,
            C=C,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        return means

    def head_input_grad(
        self, layer: Head, grad_logits: Tensor, source: Tensor, *, masked: bool
    ) -> Tensor:
        H, W, B, C = source.shape
        own = self._weights.of(layer)
        assert own.main is not None
        grad_means = empty(1, 1, B, C)
        convolve(
            self._kernels, grad_logits.contiguous()[None], own.main.gradient, grad_means, LINEAR
        )
        out = torch.empty_like(source)
        self._kernels.pixel_mean_backward(
            grad=grad_means.data_ptr(),
            activation=address(source if masked else None),
            grad_source=out.data_ptr(),
            pixels=H * W,
            N=B,
            C=C,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        return out

    def from_map(self, maps: Tensor) -> Tensor:
        pixels = maps[0].permute(2, 3, 0, 1)
        *sizes, channels = pixels.shape
        out = pixels.new_empty(*sizes, self.num_padded(channels), dtype=self.dtype)
        out[..., :channels] = pixels
        out[..., channels:] = 0
        return out

    def to_map(self, value: Tensor, channels: int) -> Tensor:
        maps = value[..., :channels].permute(2, 3, 0, 1)
        return maps.to(torch.float32, memory_format=torch.channels_last, copy=True)[None]

    def image_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        H, W, B, _ = source.shape
        own = self._weights.of(layer, H, W)
        assert own.main is not None
        out = empty(H, W, B, padded(layer.in_channels, LANES))
        convolve(self._kernels, grad, own.main.gradient, out, layer, input_grad=True)
        return out[..., : layer.in_channels].permute(2, 3, 0, 1).contiguous()[None]


def _is_compiled(layer: Pointwise) -> bool:
    """Whether the compiled `scale_shift` or `layer_norm` computes it."""
    if layer.epsilon is not None:
        return layer.affine and layer.activation is None
    return layer.affine and layer.activation in (None, RELU)


def _pool_sizes(layer: Pool, source: Tensor, output: Tensor) -> Any:
    """What the compiled pooling takes, of a source [H, W, B, C] and an output [P, Q, B, C]."""
    H, W, B, C = source.shape
    P, Q = output.shape[:2]
    return native.module.PoolSizes(
        N=B,
        H=H,
        W=W,
        C=C,
        P=P,
        Q=Q,
        kernel=layer.kernel,
        stride=layer.stride,
        padding=layer.padding,
    )
