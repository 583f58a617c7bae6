"""Register the compiled Hopper kernels, csrc/cuda/conv_sm90a.cu, for the ops of grouped_conv.py.

Two implementations: "native" in single blocks, and "clusters" in clusters of two blocks that read
once what both need, where the sizes allow; else they are the same. Whether clusters are faster is
a question to the clock for each shape, as with any two implementations (op.py).

Axes as there; the kernel's source is [E, H, W, N, C] and its output [E, P, Q, N, O], also where it
computes the gradient.
"""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.native import FLOATS
from moe_kernels.ops.grouped_conv import (
    conv_call,
    conv_example,
    conv_op,
    input_grad_call,
    input_grad_example,
    input_grad_op,
)
from moe_kernels.ops.grouped_conv_tiles import Call

# Builds for 90a have the kernel.
BUILT = native.has_cuda and hasattr(native.module, "conv_sm90a")
_CAPABILITY = (9, 0)
# Images and channels of the smallest tile, and the alignment of TMA.
_IMAGES, _CHANNELS, _BYTES = 128, 64, 16


# One per kernel (csrc: choose): each of the two for 64 channels; each tile of the others, on a GPU
# with about 132 multiprocessors, where a block has more than one tile; strides and side inputs.
EXAMPLES = [
    conv_example(
        x=(1, 5, 4, 128, 64),
        weight=(3, 64, 3, 3, 64),
        bias=(3, 64),
        residual=(3, 5, 4, 128, 64),
        padding=1,
        relu=True,
    ),
    conv_example(x=(2, 12, 12, 256, 64), weight=(2, 64, 3, 3, 64), bias=(2, 64), padding=1),
    conv_example(
        x=(2, 8, 8, 128, 64),
        weight=(2, 128, 3, 3, 64),
        bias=(2, 128),
        side=(2, 8, 8, 128, 192),
        side_weight=(2, 128, 192),
        stride=2,
        padding=1,
        side_stride=2,
        relu=True,
    ),
    conv_example(
        x=(4, 8, 8, 128, 128), weight=(4, 128, 3, 3, 128), bias=(4, 128), padding=1, relu=True
    ),
    conv_example(
        x=(4, 8, 8, 256, 64),
        weight=(4, 128, 3, 3, 64),
        bias=(4, 128),
        residual=(4, 8, 8, 256, 128),
        padding=1,
        relu=True,
    ),
    conv_example(x=(4, 8, 8, 128, 64), weight=(4, 256, 3, 3, 64), bias=(4, 256), padding=1),
]
GRAD_EXAMPLES = [
    input_grad_example(
        grad=(3, 5, 4, 128, 64),
        weight_t=(3, 64, 3, 3, 64),
        skip=(3, 5, 4, 128, 64),
        activation=(3, 5, 4, 128, 64),
        H=5,
        W=4,
        padding=1,
    ),
    input_grad_example(
        grad=(2, 4, 4, 128, 128),
        weight_t=(2, 64, 3, 3, 128),
        side=(2, 4, 4, 128, 128),
        side_weight_t=(2, 64, 128),
        activation=(2, 8, 8, 128, 64),
        H=8,
        W=8,
        stride=2,
        padding=1,
        side_stride=2,
    ),
    input_grad_example(grad=(4, 4, 4, 128, 256), weight_t=(4, 128, 1, 1, 256), H=8, W=8, stride=2),
    input_grad_example(
        grad=(4, 8, 8, 128, 64),
        weight_t=(4, 256, 3, 3, 64),
        activation=(4, 8, 8, 128, 256),
        H=8,
        W=8,
        padding=1,
    ),
]
# One per kind of cluster, on such a GPU as well: those that share filters, then images. Most have
# one tile for each cluster, which is least to check.
CLUSTER_EXAMPLES = [
    conv_example(
        x=(2, 6, 3, 256, 64),
        weight=(2, 256, 3, 3, 64),
        bias=(2, 256),
        residual=(2, 6, 3, 256, 256),
        padding=1,
        relu=True,
    ),
    conv_example(x=(2, 6, 3, 512, 64), weight=(2, 128, 3, 3, 64), bias=(2, 128), padding=1),
    conv_example(x=(2, 6, 3, 256, 64), weight=(2, 128, 3, 3, 64), bias=(2, 128), padding=1),
    conv_example(x=(3, 6, 6, 256, 704), weight=(3, 64, 1, 1, 704), bias=(3, 64)),
    conv_example(x=(2, 6, 3, 128, 64), weight=(2, 512, 3, 3, 64), bias=(2, 512), padding=1),
    conv_example(
        x=(2, 12, 6, 128, 64),
        weight=(2, 256, 3, 3, 64),
        bias=(2, 256),
        side=(2, 12, 6, 128, 64),
        side_weight=(2, 256, 64),
        stride=2,
        padding=1,
        side_stride=2,
        relu=True,
    ),
    conv_example(x=(1, 6, 6, 128, 64), weight=(4, 128, 3, 3, 64), bias=(4, 128), padding=1),
]
CLUSTER_GRAD_EXAMPLES = [
    input_grad_example(
        grad=(2, 3, 2, 256, 128),
        weight_t=(2, 128, 3, 3, 128),
        side=(2, 3, 2, 256, 128),
        side_weight_t=(2, 128, 128),
        activation=(2, 6, 3, 256, 128),
        H=6,
        W=3,
        stride=2,
        padding=1,
        side_stride=2,
    ),
    input_grad_example(
        grad=(2, 6, 3, 128, 64),
        weight_t=(2, 256, 3, 3, 64),
        skip=(2, 6, 3, 128, 256),
        activation=(2, 6, 3, 128, 256),
        H=6,
        W=3,
        padding=1,
    ),
]
_COMMON: dict[str, Any] = {
    "device": "cuda",
    "dtypes": [torch.bfloat16],
    "built": BUILT,
    "capability": _CAPABILITY,
    "isolated": True,
}


@conv_op.implementation("native", examples=EXAMPLES, **_COMMON)
def conv_native(*args: Any) -> Any:
    """The op "grouped_conv"; NotImplemented for sizes that the kernels do not take."""
    return run(conv_call(*args), clusters=False)


@conv_op.implementation("clusters", examples=CLUSTER_EXAMPLES, **_COMMON)
def conv_clusters(*args: Any) -> Any:
    """The op "grouped_conv", in clusters; NotImplemented likewise."""
    return run(conv_call(*args), clusters=True)


@input_grad_op.implementation("native", examples=GRAD_EXAMPLES, **_COMMON)
def input_grad_native(*args: Any) -> Any:
    """The op "grouped_conv_input_grad"; NotImplemented likewise."""
    return run(input_grad_call(*args), clusters=False)


@input_grad_op.implementation("clusters", examples=CLUSTER_GRAD_EXAMPLES, **_COMMON)
def input_grad_clusters(*args: Any) -> Any:
    """The op "grouped_conv_input_grad", in clusters; NotImplemented likewise."""
    return run(input_grad_call(*args), clusters=True)


def run(call: Call, *, clusters: bool) -> Any:
    """call.y, written by a kernel; or NotImplemented."""
    if not _fits(call):
        return NotImplemented
    _launch(call, clusters)
    return call.y


def _fits(call: Call) -> bool:
    """Whether the kernel takes these sizes and addresses."""
    given = [x for x in call if isinstance(x, Tensor)]
    channels = [x.shape[4] for x in (call.x, call.side, call.y) if x is not None]
    return (
        call.y.shape[3] % _IMAGES == 0
        and all(count % _CHANNELS == 0 for count in channels)
        and all(x.data_ptr() % _BYTES == 0 for x in given)
        # Rows and offsets are numbered in 32 bits.
        and all(x.numel() < 2**31 for x in given)
    )


def _launch(call: Call, clusters: bool) -> None:
    native.module.conv_sm90a(
        **kernel_arguments(call),
        clusters=clusters,
        dtype=FLOATS.index(call.x.dtype),
        stream=torch.cuda.current_stream().cuda_stream,
    )


def kernel_arguments(call: Call) -> dict[str, Any]:
    """Addresses, sizes and flags of csrc's conv_sm90a, which conv_by_schedule takes as well."""
    source_E, H, W, N, C = call.x.shape
    E, P, Q, _, O = call.y.shape
    R, S = call.weight.shape[2:4]
    side_H, side_W, D = (0, 0, 0)
    if call.side is not None:
        _, side_H, side_W, _, D = call.side.shape
    sizes = native.module.ConvSizes(
        E=E,
        P=P,
        Q=Q,
        N=N,
        O=O,
        source_E=source_E,
        H=H,
        W=W,
        C=C,
        R=R,
        S=S,
        stride=call.stride,
        padding=call.padding,
        side_H=side_H,
        side_W=side_W,
        D=D,
        side_stride=call.side_stride,
        input_grad=call.backward,
    )
    tensors = {
        "source": call.x,
        "weight": call.weight,
        "side": call.side,
        "side_weight": call.side_weight,
        "bias": call.bias,
        "addend": call.residual,
        "activation": call.activation,
        "output": call.y,
    }
    addresses = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
    return {**addresses, "sizes": sizes, "relu": call.relu}
