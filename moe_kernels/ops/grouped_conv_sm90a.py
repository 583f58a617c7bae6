"""The ops of grouped_conv.py on Hopper GPUs, by the compiled kernel of csrc/cuda/conv_sm90a.cu.

Importing this module registers it. Axes as there; in the words of the kernel its output is
[E, P, Q, N, O] and its source [E, H, W, N, C], also where it computes the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.op import call_native
from moe_kernels.ops.grouped_conv import _conv, _input_grad, num_outputs

# Builds for 90a have the kernel.
_BUILT = native.has_cuda and hasattr(native.module, "grouped_conv_cuda")
_CAPABILITY = (9, 0)
# Images and channels of the smallest tile, and the alignment of TMA.
_IMAGES, _CHANNELS, _BYTES = 128, 64, 16

_NONE = None, None
# One per kernel (csrc: choose): each of the two for 64 channels; each tile of the others, on a GPU
# with about 132 multiprocessors, where a block has more than one tile; strides and side inputs.
_EXAMPLES = [
    ((1, 5, 4, 128, 64), (3, 64, 3, 3, 64), (3, 64), (3, 5, 4, 128, 64), *_NONE, 1, 1, 1, True),
    ((2, 12, 12, 256, 64), (2, 64, 3, 3, 64), (2, 64), None, *_NONE, 1, 1, 1, False),
    (
        *((2, 8, 8, 128, 64), (2, 128, 3, 3, 64), (2, 128), None),
        *((2, 8, 8, 128, 192), (2, 128, 192), 2, 1, 2, True),
    ),
    ((4, 8, 8, 128, 128), (4, 128, 3, 3, 128), (4, 128), None, *_NONE, 1, 1, 1, True),
    ((4, 8, 8, 256, 64), (4, 128, 3, 3, 64), (4, 128), (4, 8, 8, 256, 128), *_NONE, 1, 1, 1, True),
    ((4, 8, 8, 128, 64), (4, 256, 3, 3, 64), (4, 256), None, *_NONE, 1, 1, 1, False),
]
_GRAD_EXAMPLES = [
    (
        *((3, 5, 4, 128, 64), (3, 64, 3, 3, 64), (3, 5, 4, 128, 64), *_NONE),
        *((3, 5, 4, 128, 64), 5, 4, 1, 1, 1),
    ),
    (
        *((2, 4, 4, 128, 128), (2, 64, 3, 3, 128), None, (2, 4, 4, 128, 128), (2, 64, 128)),
        *((2, 8, 8, 128, 64), 8, 8, 2, 1, 2),
    ),
    ((4, 4, 4, 128, 256), (4, 128, 1, 1, 256), None, *_NONE, None, 8, 8, 2, 0, 1),
    ((4, 8, 8, 128, 64), (4, 256, 3, 3, 64), None, *_NONE, (4, 8, 8, 128, 256), 8, 8, 1, 1, 1),
]


@_conv.implementation(
    "native",
    device="cuda",
    dtypes=[torch.bfloat16],
    built=_BUILT,
    capability=_CAPABILITY,
    isolated=True,
    examples=_EXAMPLES,
)
def _conv_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    side: Tensor | None,
    side_weight: Tensor | None,
    stride: int,
    padding: int,
    side_stride: int,
    relu: bool,
) -> Any:
    _, H, W, N, _ = x.shape
    R, S = weight.shape[2:4]
    pixels = num_outputs(H, R, stride, padding), num_outputs(W, S, stride, padding)
    output = x.new_empty(weight.shape[0], *pixels, N, weight.shape[1])
    tensors = x, weight, side, side_weight, bias, residual, None, output
    return _call(tensors, stride, padding, side_stride, input_grad=False, relu=relu)


@_input_grad.implementation(
    "native",
    device="cuda",
    dtypes=[torch.bfloat16],
    built=_BUILT,
    capability=_CAPABILITY,
    isolated=True,
    examples=_GRAD_EXAMPLES,
)
def _input_grad_native(
    grad: Tensor,
    weight_t: Tensor,
    skip: Tensor | None,
    side: Tensor | None,
    side_weight_t: Tensor | None,
    activation: Tensor | None,
    H: int,
    W: int,
    stride: int,
    padding: int,
    side_stride: int,
) -> Any:
    output = grad.new_empty(weight_t.shape[0], H, W, grad.shape[3], weight_t.shape[1])
    tensors = grad, weight_t, side, side_weight_t, None, skip, activation, output
    return _call(tensors, stride, padding, side_stride, input_grad=True, relu=False)


def _call(
    tensors: tuple[Any, ...],
    stride: int,
    padding: int,
    side_stride: int,
    *,
    input_grad: bool,
    relu: bool,
) -> Any:
    """The output, last of the kernel's tensors, or NotImplemented."""
    if not _fits(tensors):
        return NotImplemented
    sizes = kernel_sizes(tensors, stride, padding, side_stride)
    call_native("grouped_conv", tensors, *sizes, input_grad, relu, dtype=tensors[0].dtype)
    return tensors[-1]


def kernel_sizes(
    tensors: tuple[Any, ...], stride: int, padding: int, side_stride: int
) -> tuple[int, ...]:
    """The numbers that the kernel takes after its tensors, up to `side_stride`."""
    source, weight, side, *_, output = tensors
    side_H, side_W, _, D = (0, 0, 0, 0) if side is None else side.shape[1:]
    sizes = *output.shape, *source.shape[:3], source.shape[4], *weight.shape[2:4]
    return *sizes, stride, padding, side_H, side_W, D, side_stride


def _fits(tensors: tuple[Any, ...]) -> bool:
    source, _, side, *_, output = tensors
    given = [x for x in tensors if x is not None]
    return (
        output.shape[3] % _IMAGES == 0
        and all(x.shape[4] % _CHANNELS == 0 for x in (source, side, output) if x is not None)
        and all(x.data_ptr() % _BYTES == 0 for x in given)
        # Rows and offsets are numbered in 32 bits.
        and all(x.numel() < 2**31 for x in given)
    )
