"""Choose the compiled layers of csrc/cpu, and call convolutions on tensors [H, W, B, C]."""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.native import FLOATS
from moe_kernels.plan.back_ends.simd_weights import is_depthwise, num_blocks
from moe_kernels.plan.layers import Conv

LINEAR = Conv("", 0, 0, 0, 0, (1, 1))  # of each pixel
# Rows that the compiled convolution takes at a time, and that share a load of the weights.
_UNIT_ROWS, _BLOCK_ROWS = 96, 6


# What a CPU needs, by set of instructions; the fastest set first.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_FEATURES: dict[str, dict[torch.dtype, tuple[str, ...]]] = {
    "avx512": {torch.float32: _AVX512, torch.bfloat16: (*_AVX512, "avx512bf16")},
    "avx2": {torch.float32: ("avx2", "fma")},
}
INSTRUCTIONS = tuple(_FEATURES)


def available(name: str, dtype: torch.dtype) -> str | None:
    """Why layers compiled for a set of instructions cannot run here, or None if they can."""
    features = _FEATURES[name]
    if dtype not in features:
        known = " or ".join(str(x).removeprefix("torch.") for x in features)
        return f"its layers are {known}, not {dtype}"
    if not native.has_cpu:
        return f"no compiled kernels: {native.missing}"
    if not hasattr(native.module, name):
        return f"no compiled convolutions for {platform.machine()}, or too old a compiler"
    missing = [x for x in features[dtype] if x not in native.module.cpu_features]
    return f"this CPU lacks {', '.join(missing)}" if missing else None


def instructions_for(dtype: torch.dtype) -> str:
    """The first set of instructions whose layers run here; if none does, the first."""
    return next((x for x in INSTRUCTIONS if available(x, dtype) is None), INSTRUCTIONS[0])


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
    side_shape = None if side is None else side.shape
    return _sizes(layer, source.shape, output.shape, side_shape, side_stride, input_grad)


@functools.lru_cache(maxsize=1 << 12)  # on few images, to make them takes as long as to convolve
def _sizes(
    layer: Conv | None,
    source: torch.Size,
    output: torch.Size,
    side: torch.Size | None,
    side_stride: int,
    input_grad: bool,
) -> Any:
    H, W, B, C = source
    P, Q, _, O = output  # noqa: E741  (the letter of an axis)
    R, S = (0, 0) if layer is None else layer.kernel
    side_H, side_W, D = (0, 0, 0) if side is None else (*side[:2], side[3])
    groups, channels, outputs = 1, 0, 0
    if layer is not None and layer.groups == 1:
        channels, outputs = layer.in_channels, layer.out_channels
        if input_grad:
            channels, outputs = outputs, channels
        elif layer.source == 0:
            channels = 0  # an image has no padding, but in bfloat16 two parts
    elif layer is not None and not is_depthwise(layer):
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
        channels=channels,
        outputs=outputs,
    )


def convolve(
    kernels: Any,
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
    """Call the compiled convolution, see `conv_direct` in csrc/cpu/layers.h.

    Without a layer, source and weight the side is all there is.

    Args:
        kernels: the functions compiled for a set of instructions.
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
    convolve = kernels.conv_winograd if winograd else kernels.conv_direct
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
    together = _pixels_together(H * W, B)
    return value.view(H * W // together, 1, B * together, C)


@functools.lru_cache(maxsize=1 << 12)
def _pixels_together(pixels: int, images: int) -> int:
    most = max(min(pixels, _UNIT_ROWS // max(images, 1)), 1)
    together = max(x for x in range(1, most + 1) if pixels % x == 0)
    return together if together * images >= _BLOCK_ROWS else max(pixels, 1)
