"""Call the compiled convolutions of csrc/cpu on tensors [H, W, B, C]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.native import FLOATS
from moe_kernels.plan.back_ends.avx512_weights import is_depthwise, num_blocks
from moe_kernels.plan.layers import Conv

LINEAR = Conv("", 0, 0, 0, 0, (1, 1))  # of each pixel
# Rows that the compiled convolution takes at a time, and that share a load of the weights.
_UNIT_ROWS, _BLOCK_ROWS = 96, 6


def address(tensor: Tensor | None) -> int:
    """Where it begins, null of None."""
    return 0 if tensor is None else tensor.data_ptr()


def conv_sizes(
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


def convolve(
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
    if layer is not None and side is None and _is_product(layer):
        read, output = _in_longer_rows(read), _in_longer_rows(output)
    sizes = conv_sizes(layer, read, output, beside, side_stride, input_grad=input_grad)
    convolve = native.module.conv_winograd if winograd else native.module.conv_direct
    convolve(
        source=address(source),
        weight=address(weight),
        side=address(beside),
        side_weight=address(side_weight),
        bias=address(bias),
        addend=address(addend),
        activation=address(activation),
        output=output.data_ptr(),
        sizes=sizes,
        relu=relu,
        float32_output=output.dtype is torch.float32,
        dtype=FLOATS.index(read.dtype),
        num_threads=torch.get_num_threads(),
    )


def _is_product(layer: Conv) -> bool:
    """Whether it multiplies each pixel of each image by one matrix."""
    return (layer.kernel, layer.stride, layer.padding, layer.groups) == ((1, 1), 1, 0, 1)


def _in_longer_rows(value: Tensor) -> Tensor:
    """A value [H, W, B, C] of few images with neighboring pixels as if they were more images.

    The compiled convolution multiplies the images of one pixel at a time.
    """
    H, W, B, C = value.shape
    most = max(min(H * W, _UNIT_ROWS // max(B, 1)), 1)
    together = max(x for x in range(1, most + 1) if H * W % x == 0)
    if together * B < _BLOCK_ROWS:
        together = max(H * W, 1)
    return value.view(H * W // together, 1, B * together, C)
