"""Run layers by compiled convolutions on CPUs with AVX-512, one network at a time.

Values are [H, W, B, C] in the plan's dtype, C padded with zero channels to 16 words.
3x3 convolutions of stride 1 and their input gradients run by Winograd's F(2x4, 3x3), which needs
3 times fewer products; other ones go tap by tap and skip the padding. Sums are float32 in a
fixed order, so an image's bits depend neither on its batch nor on the number of threads. For
bfloat16 the image is read as high and low part; the classifier is float32.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.native import FLOATS
from moe_kernels.plan.back_ends.avx512_weights import (
    LANES,
    PackedWeights,
    empty,
    is_depthwise,
    num_blocks,
    padded,
)
from moe_kernels.plan.back_ends.base import BackEnd, Weights
from moe_kernels.plan.layers import RELU, Conv, Head, Layer, Pointwise, Pool, output_size

_FEATURES = {
    torch.float32: ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    torch.bfloat16: ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16"),
}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Avx512BackEnd(BackEnd):
    """Compiled convolutions in `dtype` (float32 or bfloat16), for one network, on a CPU.

    Raises:
        RuntimeError: what `available` returns.
    """

    name = "avx512"
    # Activations of a part of the batch stay in the caches from layer to layer.
    preferred_batch = 32

    def __init__(self, dtype: torch.dtype) -> None:
        if reason := self.available(dtype):
            raise RuntimeError(reason)
        self.dtype = dtype
        self._code = FLOATS.index(dtype)
        self._weights = PackedWeights(dtype)

    @staticmethod
    def available(dtype: torch.dtype) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        if dtype not in _FEATURES:
            return f"compiled convolutions are float32 or bfloat16, not {dtype}"
        if not native.has_cpu:
            return f"no compiled kernels: {native.missing}"
        if not hasattr(native.module, "conv_direct"):
            return f"no compiled convolutions for {platform.machine()}, or too old a compiler"
        missing = [x for x in _FEATURES[dtype] if x not in native.module.cpu_features]
        return f"this CPU lacks {', '.join(missing)}" if missing else None

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
        _convolve(
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
        _convolve(
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
        native.module.conv_depthwise(
            source=source.data_ptr(),
            weight=_address(weight),
            bias=_address(bias),
            addend=_address(addend),
            activation=_address(activation),
            output=output.data_ptr(),
            sizes=_conv_sizes(layer, source, output, input_grad=input_grad),
            relu=relu,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )

    def projection_input_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        out = torch.empty_like(source)
        _convolve(None, None, out, None, side=self._side_gradient(layer, grad), input_grad=True)
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
        native.module.pool(
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
        native.module.pool_backward(
            grad=grad.data_ptr(),
            source=source.data_ptr(),
            output=_address(output if layer.kind == "max" else None),
            skip=_address(skip),
            activation=_address(source if masked else None),
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
        if not _is_scale_shift(layer):
            out: Tensor = super().pointwise(layer, source)
            return out
        out = torch.empty_like(source)
        scale, shift = self.affine(layer)
        self._scale(source, scale, out, shift=shift, relu=layer.activation == RELU)
        return out

    def pointwise_input_grad(
        self, layer: Pointwise, grad: Tensor, source: Tensor, *, masked: bool, skip: Tensor | None
    ) -> Tensor:
        if not _is_scale_shift(layer):
            out: Tensor = super().pointwise_input_grad(
                layer, grad, source, masked=masked, skip=skip
            )
            return out
        out = torch.empty_like(source)
        scale, _ = self.affine(layer)
        self._scale(grad, scale, out, addend=skip, activation=source if masked else None)
        return out

    def _scale(
        self,
        source: Tensor,
        scale: Tensor,
        output: Tensor,
        *,
        shift: Tensor | None = None,
        addend: Tensor | None = None,
        activation: Tensor | None = None,
        relu: bool = False,
    ) -> None:
        channels = source.shape[-1]
        native.module.scale_shift(
            source=source.data_ptr(),
            scale=scale.data_ptr(),
            shift=_address(shift),
            addend=_address(addend),
            activation=_address(activation),
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
        H, W, B, C = source.shape
        own = self._weights.of(layer)
        assert own.main is not None
        means = empty(1, 1, B, C)
        native.module.pixel_mean(
            source=source.data_ptr(),
            mean=means.data_ptr(),
            pixels=H * W,
            N=B,
            C=C,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        logits = empty(1, 1, B, len(own.bias))
        _convolve(means, own.main.forward, logits, _LINEAR, bias=own.bias)
        return logits[0, :, :, : layer.num_classes]

    def head_input_grad(
        self, layer: Head, grad_logits: Tensor, source: Tensor, *, masked: bool
    ) -> Tensor:
        H, W, B, C = source.shape
        own = self._weights.of(layer)
        assert own.main is not None
        grad_means = empty(1, 1, B, C)
        _convolve(grad_logits.contiguous()[None], own.main.gradient, grad_means, _LINEAR)
        out = torch.empty_like(source)
        native.module.pixel_mean_backward(
            grad=grad_means.data_ptr(),
            activation=_address(source if masked else None),
            grad_source=out.data_ptr(),
            pixels=H * W,
            N=B,
            C=C,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        return out

    def image_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        H, W, B, _ = source.shape
        own = self._weights.of(layer, H, W)
        assert own.main is not None
        out = empty(H, W, B, padded(layer.in_channels, LANES))
        _convolve(grad, own.main.gradient, out, layer, input_grad=True)
        return out[..., : layer.in_channels].permute(2, 3, 0, 1).contiguous()[None]


_LINEAR = Conv("", 0, 0, 0, 0, (1, 1))


def _is_scale_shift(layer: Pointwise) -> bool:
    """Whether the compiled `scale_shift` computes it."""
    return layer.affine and layer.epsilon is None and layer.activation in (None, RELU)


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


def _conv_sizes(
    layer: Conv | None,
    source: Tensor,
    output: Tensor,
    side: Tensor | None = None,
    side_stride: int = 1,
    *,
    input_grad: bool,
) -> Any:
    """What the compiled convolutions take, of a source [H, W, B, C] and an output [P, Q, B, O]."""
    H, W, B, C = source.shape
    P, Q, _, O = output.shape  # noqa: E741  (the letter of an axis)
    R, S = (0, 0) if layer is None else layer.kernel
    side_H, side_W, D = (0, 0, 0) if side is None else (*side.shape[:2], side.shape[3])
    groups = 1
    if layer is not None and layer.groups != 1 and not is_depthwise(layer):
        groups = num_blocks(layer)
    return native.module.ConvSizes(
        P=P,
        Q=Q,
        N=B,
        O=O,
        H=H,
        W=W,
        C=C,
        R=R,
        S=S,
        stride=1 if layer is None else layer.stride,
        padding=0 if layer is None else layer.padding,
        side_H=side_H,
        side_W=side_W,
        D=D,
        side_stride=side_stride,
        input_grad=input_grad,
        groups=groups,
    )


def _convolve(
    source: Tensor | None,
    weight: Tensor | None,
    output: Tensor,
    layer: Conv | None,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    activation: Tensor | None = None,
    side: tuple[Tensor, Tensor, int] | None = None,
    relu: bool = False,
    input_grad: bool = False,
    winograd: bool = False,
) -> None:
    """Call the compiled convolution, see `conv_direct` in csrc/kernels.h.

    Without a layer, source and weight the side is all there is.

    Args:
        source: [H, W, B, C], or the gradient of the layer's output.
        weight: packed.
        output: [P, Q, B, O], written here.
        side: source, packed weight and stride of a 1x1 convolution that is added.
        winograd: the weight is packed for that algorithm.
    """
    beside, side_weight, side_stride = side or (None, None, 1)
    read = beside if source is None else source
    assert read is not None
    sizes = _conv_sizes(layer, read, output, beside, side_stride, input_grad=input_grad)
    convolve = native.module.conv_winograd if winograd else native.module.conv_direct
    convolve(
        source=_address(source),
        weight=_address(weight),
        side=_address(beside),
        side_weight=_address(side_weight),
        bias=_address(bias),
        addend=_address(addend),
        activation=_address(activation),
        output=output.data_ptr(),
        sizes=sizes,
        relu=relu,
        float32_output=output.dtype is torch.float32,
        dtype=FLOATS.index(read.dtype),
        num_threads=torch.get_num_threads(),
    )
