"""Pool slabs over windows of pixels, and compute the gradient of what was pooled.

Axes: E experts; N rows of a slab, one for each image; C channels; H W pixels that are read, P Q
pixels that are made.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.arguments import check_floating, check_shapes, num_outputs
from moe_kernels.lang import launch, tl, triton
from moe_kernels.op import Op

# Elements of a program.
_BLOCK = 1024


@triton.jit(do_not_specialize=[*"HWPQ", "window", "stride", "padding"])  # type: ignore[untyped-decorator]
def _pool_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    H,
    W,
    P,
    Q,
    row,  # N * C, all that one pixel holds
    window,  # pixels of its side
    stride,
    padding,
    MAXIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0)
    q, p, e = pixel % Q, pixel // Q % P, pixel // (Q * P)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], -float("inf") if MAXIMUM else 0.0, tl.float32)
    for tap in range(window * window):
        h, w = p * stride + tap // window - padding, q * stride + tap % window - padding
        if (h >= 0) & (h < H) & (w >= 0) & (w < W):
            offsets = ((e * H + h) * W + w).to(tl.int64) * row + i
            x = tl.load(x_ptr + offsets, mask=i < row, other=0.0).to(tl.float32)
            if MAXIMUM:
                total = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += x
    if not MAXIMUM:
        total /= window * window
    tl.store(y_ptr + pixel.to(tl.int64) * row + i, total, mask=i < row)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[*"HWPQ", "window", "stride", "padding", "masked", "add_skip"]
)
def _pool_input_grad_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    skip_ptr,  # some other tensor if there is none
    grad_x_ptr,
    H,
    W,
    P,
    Q,
    row,
    window,  # pixels of its side
    stride,
    padding,
    masked,
    add_skip,
    MAXIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0)
    w, h, e = pixel % W, pixel // W % H, pixel // (W * H)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = pixel.to(tl.int64) * row + i
    x = tl.load(x_ptr + here, mask=i < row, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(window * window):
        shifted_h, shifted_w = h + padding - tap // window, w + padding - tap % window
        p, q = shifted_h // stride, shifted_w // stride
        meets = (shifted_h >= 0) & (p < P) & (p * stride == shifted_h)
        meets &= (shifted_w >= 0) & (q < Q) & (q * stride == shifted_w)
        if meets:
            offsets = ((e * P + p) * Q + q).to(tl.int64) * row + i
            grad = tl.load(grad_ptr + offsets, mask=i < row, other=0.0).to(tl.float32)
            if MAXIMUM:
                # All of it to the first maximum; a window with a NaN has none.
                for other in range(window * window):
                    other_h = p * stride + other // window - padding
                    other_w = q * stride + other % window - padding
                    if (other_h >= 0) & (other_h < H) & (other_w >= 0) & (other_w < W):
                        offsets = ((e * H + other_h) * W + other_w).to(tl.int64) * row + i
                        rival = tl.load(x_ptr + offsets, mask=i < row, other=0.0)
                        rival = rival.to(tl.float32)
                        wins = (rival < x) | ((rival == x) & (other >= tap))
                        grad = tl.where(wins, grad, 0.0)
            total += grad
    if not MAXIMUM:
        total /= window * window
    if add_skip:
        total += tl.load(skip_ptr + here, mask=i < row, other=0.0).to(tl.float32)
    if masked:
        total = tl.where(x > 0, total, 0.0)
    tl.store(grad_x_ptr + here, total, mask=i < row)


def _pool_like(x: Tensor, kernel: int, stride: int, padding: int, maximum: bool) -> Tensor:
    E, H, W, N, C = x.shape
    P, Q = (num_outputs(size, kernel, stride, padding) for size in (H, W))
    return x.new_empty(E, P, Q, N, C)


def _pool_input_grad_like(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    maximum: bool,
    masked: bool,
) -> Tensor:
    return grad.new_empty(x.shape)


_pool = Op(
    "pool(Tensor x, int kernel, int stride, int padding, bool maximum) -> Tensor",
    body=reference.pool,
    fake=_pool_like,
    examples=[
        ((2, 5, 4, 16, 8), 3, 2, 1, True),
        ((1, 4, 4, 16, 5), 2, 2, 0, False),
        ((2, 5, 6, 16, 5), 3, 1, 1, False),
    ],
)
_pool_input_grad = Op(
    "pool_input_grad(Tensor grad, Tensor x, Tensor? skip, int kernel, int stride, int padding, "
    "bool maximum, bool masked) -> Tensor",
    body=reference.pool_input_grad,
    fake=_pool_input_grad_like,
    examples=[
        ((2, 3, 2, 16, 8), (2, 5, 4, 16, 8), None, 3, 2, 1, True, True),
        ((1, 2, 2, 16, 5), (1, 4, 4, 16, 5), (1, 4, 4, 16, 5), 2, 2, 0, False, False),
        ((2, 5, 6, 16, 5), (2, 5, 6, 16, 5), None, 3, 1, 1, False, True),
    ],
)


@_pool.implementation("triton", device="cuda")
def _pool_triton(x: Tensor, kernel: int, stride: int, padding: int, maximum: bool) -> Tensor:
    y = _pool_like(x, kernel, stride, padding, maximum)
    E, H, W, N, C = x.shape
    _, P, Q, _, _ = y.shape
    if y.numel() > 0:  # CUDA rejects an empty grid
        launch(
            _pool_kernel,
            (E * P * Q, triton.cdiv(N * C, _BLOCK)),
            x_ptr=x,
            y_ptr=y,
            H=H,
            W=W,
            P=P,
            Q=Q,
            row=N * C,
            window=kernel,
            stride=stride,
            padding=padding,
            MAXIMUM=maximum,
            BLOCK=_BLOCK,
        )
    return y


@_pool_input_grad.implementation("triton", device="cuda")
def _pool_input_grad_triton(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    maximum: bool,
    masked: bool,
) -> Tensor:
    grad_x = torch.empty_like(x)
    E, H, W, N, C = x.shape
    _, P, Q, _, _ = grad.shape
    if x.numel() > 0:  # CUDA rejects an empty grid
        launch(
            _pool_input_grad_kernel,
            (E * H * W, triton.cdiv(N * C, _BLOCK)),
            grad_ptr=grad,
            x_ptr=x,
            skip_ptr=grad if skip is None else skip,
            grad_x_ptr=grad_x,
            H=H,
            W=W,
            P=P,
            Q=Q,
            row=N * C,
            window=kernel,
            stride=stride,
            padding=padding,
            MAXIMUM=maximum,
            masked=int(masked),
            add_skip=int(skip is not None),
            BLOCK=_BLOCK,
        )
    return grad_x


def pool(x: Tensor, *, kind: str, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """Maximum or mean over windows of pixels; padding counts as -inf, or as zeros.

    Not differentiable: `pool_input_grad` is its derivative.

    Args:
        x: [E, H, W, N, C], floating.
        kind: "max" or "mean".
    Returns:
        [E, P, Q, N, C] in the dtype of x.
    Raises:
        TypeError: for a dtype that is not floating.
        ValueError: for another kind, or sizes that do not fit.
    """
    check_shapes("x [E, H, W, N, C]", x)
    check_floating(x=x)
    _check_window(kind, kernel, padding, x)
    return cast(Tensor, _pool(x, kernel, stride, padding, kind == "max"))


def pool_input_grad(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None = None,
    *,
    kind: str,
    kernel: int,
    stride: int,
    padding: int = 0,
    masked: bool = False,
) -> Tensor:
    """Gradient of the x of `pool`; of several equal maxima the first gets it.

    Args:
        grad: [E, P, Q, N, C].
        skip: [E, H, W, N, C], added to the gradient.
        masked: zero where x is not positive, because a ReLU made it.
    Returns:
        [E, H, W, N, C] in the dtype of grad.
    Raises:
        TypeError, ValueError: as `pool`.
    """
    sizes = check_shapes("x [E, H, W, N, C], skip [E, H, W, N, C]", x, skip)
    check_floating(grad=grad, x=x)
    _check_window(kind, kernel, padding, x)
    P, Q = (num_outputs(sizes[axis], kernel, stride, padding) for axis in "HW")
    check_shapes("x [E, H, W, N, C], grad [E, P, Q, N, C]", x, grad, P=P, Q=Q)
    maximum = kind == "max"
    return cast(Tensor, _pool_input_grad(grad, x, skip, kernel, stride, padding, maximum, masked))


def _check_window(kind: str, kernel: int, padding: int, x: Tensor) -> None:
    if kind not in ("max", "mean"):
        raise ValueError(f"kind: expected 'max' or 'mean', found {kind!r}")
    if not 0 <= padding <= kernel // 2:
        raise ValueError(f"padding: expected at most half of kernel {kernel}, found {padding}")
    if min(x.shape[1:3]) + 2 * padding < kernel:
        raise ValueError(
            f"x: expected at least {kernel} x {kernel} pixels with padding {padding} on each "
            f"side, found {x.shape[1]} x {x.shape[2]}"
        )
