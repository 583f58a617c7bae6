"""Convolve E experts in one launch, and compute the gradient of their input.

    y[e] = relu?(conv(x[e], weight[e]) + bias[e] + residual[e] + conv1x1(side[e]))
    grad_x[e] = conv_transposed(grad[e], weight[e]) + skip[e] + conv1x1_transposed(side[e]),
                zero where a ReLU cut x

Activations are slabs [E, H, W, N, C]: the N rows of one pixel lie together, so that a filter tap of
a tile of images is a tile of whole rows at a shifted pixel (grouped_conv_tiles.py).

Axes: E experts; N images, rounded up to whole tiles; C H W channels and pixels of the input, O P Q
of the output, R S filter taps; D channels of the side input. One kernel computes both: the gradient
is the same sum with O and C, H W and P Q exchanged and the taps reversed.
"""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.arguments import check_floating, check_shapes, num_outputs
from moe_kernels.op import Op
from moe_kernels.ops.grouped_conv_tiles import Call, key, run

Shape = tuple[int, ...]


def conv_example(
    *,
    x: Shape,
    weight: Shape,
    bias: Shape,
    residual: Shape | None = None,
    side: Shape | None = None,
    side_weight: Shape | None = None,
    stride: int = 1,
    padding: int = 0,
    side_stride: int = 1,
    relu: bool = False,
) -> tuple[Any, ...]:
    """Shapes and numbers for the check of "grouped_conv", in the order of its arguments."""
    return x, weight, bias, residual, side, side_weight, stride, padding, side_stride, relu


def input_grad_example(
    *,
    grad: Shape,
    weight_t: Shape,
    skip: Shape | None = None,
    side: Shape | None = None,
    side_weight_t: Shape | None = None,
    activation: Shape | None = None,
    H: int,
    W: int,
    stride: int = 1,
    padding: int = 0,
    side_stride: int = 1,
) -> tuple[Any, ...]:
    """Shapes and numbers for the check of "grouped_conv_input_grad", in its arguments' order."""
    tensors = grad, weight_t, skip, side, side_weight_t, activation
    return *tensors, H, W, stride, padding, side_stride


conv_op = Op(
    "grouped_conv(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? side, "
    "Tensor? side_weight, int stride, int padding, int side_stride, bool relu) -> Tensor",
    body=reference.grouped_conv,
    fake=lambda *args: conv_call(*args).y,
    examples=[
        # The middle of a residual network; its first layer; a narrowing block; odd sizes.
        conv_example(
            x=(2, 3, 3, 64, 64),
            weight=(2, 64, 3, 3, 64),
            bias=(2, 64),
            residual=(2, 3, 3, 64, 64),
            padding=1,
            relu=True,
        ),
        conv_example(x=(1, 2, 2, 32, 64), weight=(3, 16, 1, 1, 64), bias=(3, 16), relu=True),
        conv_example(
            x=(2, 4, 4, 16, 32),
            weight=(2, 64, 3, 3, 32),
            bias=(2, 64),
            side=(2, 4, 4, 16, 32),
            side_weight=(2, 64, 32),
            stride=2,
            padding=1,
            side_stride=2,
            relu=True,
        ),
        conv_example(
            x=(2, 5, 4, 3, 5),
            weight=(2, 7, 3, 3, 5),
            bias=(2, 7),
            residual=(2, 3, 2, 3, 7),
            side=(2, 5, 4, 3, 3),
            side_weight=(2, 7, 3),
            stride=2,
            padding=1,
            side_stride=2,
        ),
    ],
    fixed_dtypes={"bias": torch.float32},
    key=key,
)
input_grad_op = Op(
    "grouped_conv_input_grad(Tensor grad, Tensor weight_t, Tensor? skip, Tensor? side, "
    "Tensor? side_weight_t, Tensor? activation, int H, int W, int stride, int padding, "
    "int side_stride) -> Tensor",
    body=reference.grouped_conv_input_grad,
    fake=lambda *args: input_grad_call(*args).y,
    examples=[
        input_grad_example(
            grad=(2, 3, 3, 64, 64),
            weight_t=(2, 64, 3, 3, 64),
            skip=(2, 3, 3, 64, 64),
            activation=(2, 3, 3, 64, 64),
            H=3,
            W=3,
            padding=1,
        ),
        input_grad_example(
            grad=(2, 2, 2, 16, 64),
            weight_t=(2, 32, 3, 3, 64),
            side=(2, 2, 2, 16, 64),
            side_weight_t=(2, 32, 64),
            activation=(2, 4, 4, 16, 32),
            H=4,
            W=4,
            stride=2,
            padding=1,
            side_stride=2,
        ),
        input_grad_example(
            grad=(2, 3, 2, 3, 7),
            weight_t=(2, 5, 3, 3, 7),
            skip=(2, 5, 4, 3, 5),
            side=(2, 3, 2, 3, 3),
            side_weight_t=(2, 5, 3),
            activation=(2, 5, 4, 3, 5),
            H=5,
            W=4,
            stride=2,
            padding=1,
            side_stride=2,
        ),
    ],
    key=key,
)


def conv_call(
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
) -> Call:
    """A call of "grouped_conv" with an empty output, in the words of the kernels."""
    _, H, W, N, _ = x.shape
    E, O, R, S, _ = weight.shape
    P, Q = num_outputs(H, R, stride, padding), num_outputs(W, S, stride, padding)
    return Call(
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        side=side,
        side_weight=side_weight,
        activation=None,
        y=x.new_empty(E, P, Q, N, O),
        stride=stride,
        padding=padding,
        side_stride=side_stride,
        relu=relu,
    )


def input_grad_call(
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
) -> Call:
    """A call of "grouped_conv_input_grad" with an empty output, in the words of the kernels."""
    return Call(
        x=grad,
        weight=weight_t,
        bias=None,
        residual=skip,
        side=side,
        side_weight=side_weight_t,
        activation=activation,
        y=grad.new_empty(weight_t.shape[0], H, W, grad.shape[3], weight_t.shape[1]),
        stride=stride,
        padding=padding,
        side_stride=side_stride,
        backward=True,
    )


@conv_op.implementation("triton", device="cuda")
def _conv_triton(*args: Any) -> Any:
    return run(conv_call(*args))


@input_grad_op.implementation("triton", device="cuda")
def _input_grad_triton(*args: Any) -> Any:
    return run(input_grad_call(*args))


def grouped_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    side_stride: int = 1,
    relu: bool = False,
) -> Tensor:
    """Convolve the slabs of E experts, with all that follows it in a residual block.

    Not differentiable: `grouped_conv_input_grad` is its derivative. Sums run in float32, or in
    float64 if x is float64, and are rounded once.

    Args:
        x: [E, H, W, N, C], floating; [1, H, W, N, C] if all experts read the same.
        weight: [E, O, R, S, C], the dtype of x; see there for the weights' other axes.
        bias: [E, O] float32.
        residual: [E, P, Q, N, O], added to the sum.
        side, side_weight: [E, side_H, side_W, N, D] and [E, O, D], a convolution with one tap and
            stride `side_stride` that is added to the sum.
        relu: cut the sum at zero.
    Returns:
        [E, P, Q, N, O] in the dtype of x.
    Raises:
        TypeError: for a dtype that is not floating.
        ValueError: for shapes or devices that do not fit.
    """
    spec = "weight [E, O, R, S, C], x [G, H, W, N, C], bias [E, O]"
    sizes = check_shapes(spec, weight, x, bias)
    if sizes["G"] not in (1, sizes["E"]):
        raise ValueError(f"x: expected 1 or {sizes['E']} experts, found {sizes['G']}")
    P = num_outputs(sizes["H"], sizes["R"], stride, padding)
    Q = num_outputs(sizes["W"], sizes["S"], stride, padding)
    if P < 1 or Q < 1:
        raise ValueError(
            f"x: expected at least {sizes['R']} x {sizes['S']} pixels with padding {padding} on "
            f"each side, found {sizes['H']} x {sizes['W']}"
        )
    spec = (
        "weight [E, O, R, S, C], residual [E, P, Q, N, O], side [E, side_H, side_W, N, D], "
        "side_weight [E, O, D]"
    )
    check_shapes(spec, weight, residual, side, side_weight, P=P, Q=Q, **sizes)
    if side is not None:
        _check_side(side_weight, read=side.shape[1:3], made=(P, Q), stride=side_stride)
    check_floating(x=x, weight=weight)
    y = conv_op(x, weight, bias, residual, side, side_weight, stride, padding, side_stride, relu)
    return cast(Tensor, y)


def grouped_conv_input_grad(
    grad: Tensor,
    weight_t: Tensor,
    skip: Tensor | None = None,
    side: Tensor | None = None,
    side_weight_t: Tensor | None = None,
    activation: Tensor | None = None,
    *,
    H: int,
    W: int,
    stride: int = 1,
    padding: int = 0,
    side_stride: int = 1,
) -> Tensor:
    """Gradient of the x of `grouped_conv`, with all that meets it at a residual block's input.

    Not differentiable. Sums run in float32, or in float64 if grad is float64, and are rounded once.

    Args:
        grad: [E, P, Q, N, O], the gradient of the sum: where a ReLU cut the output it is zero.
        weight_t: [E, C, R, S, O], the layer's weight with its channels exchanged.
        skip: [E, H, W, N, C], added to the gradient.
        side, side_weight_t: [E, side_H, side_W, N, D] and [E, C, D], the gradient of the sum of
            another layer that read x as its side input with stride `side_stride`.
        activation: [E, H, W, N, C], what a ReLU made; the gradient is zero where this is not
            positive.
        H, W: pixels of x.
        stride, padding: of the layer.
    Returns:
        [E, H, W, N, C] in the dtype of grad.
    Raises:
        TypeError: for a dtype that is not floating.
        ValueError: for shapes or devices that do not fit.
    """
    R, S = weight_t.shape[2:4] if weight_t.dim() == 5 else (0, 0)
    known = {
        "P": num_outputs(H, R, stride, padding),
        "Q": num_outputs(W, S, stride, padding),
        "H": H,
        "W": W,
    }
    spec = (
        "weight_t [E, C, R, S, O], grad [E, P, Q, N, O], skip [E, H, W, N, C], "
        "activation [E, H, W, N, C], side [E, side_H, side_W, N, D], side_weight_t [E, C, D]"
    )
    tensors = weight_t, grad, skip, activation, side, side_weight_t
    check_shapes(spec, *tensors, **known)
    if side is not None:
        _check_side(side_weight_t, read=(H, W), made=side.shape[1:3], stride=side_stride)
    check_floating(grad=grad, weight_t=weight_t)
    inputs = grad, weight_t, skip, side, side_weight_t, activation
    return cast(Tensor, input_grad_op(*inputs, H, W, stride, padding, side_stride))


def _check_side(
    weight: Tensor | None, *, read: Sequence[int], made: Sequence[int], stride: int
) -> None:
    if weight is None:
        raise ValueError("side: expected its weight as well, found None")
    expected = tuple(num_outputs(size, 1, stride, 0) for size in read)
    if expected != tuple(made):
        raise ValueError(
            f"side: {read[0]} x {read[1]} pixels with stride {stride} make {expected[0]} x "
            f"{expected[1]}, expected {made[0]} x {made[1]}"
        )
