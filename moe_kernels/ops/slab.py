"""Turn images into slabs, and the gradient behind the first convolution into that of the images.

A slab is [E, H, W, N, C]: the N rows of one pixel, one for each image, lie together. The first
convolution reads the image as columns, one for each filter tap and channel, so that it becomes a
matrix product; narrow columns carry the rounding error of the image in a second set, which makes
their sum exact to 16 bits of bfloat16. Its input gradient is the way back: a matrix product summed
over the experts, then for each pixel a sum over the taps that read it, in fixed order.

Axes: G sets of images, one per expert (1 if all see the same); E experts; B images, N rows;
C H W channels and pixels that are read, O P Q those that are made; R S filter taps; K columns.
"""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.arguments import check_floating, check_shapes, num_outputs
from moe_kernels.lang import launch, tl, triton
from moe_kernels.op import Op
from moe_kernels.ops.grouped_conv_tiles import load_tile

# Elements of a program that computes each by itself.
_BLOCK = 1024


@triton.jit(do_not_specialize=[*"BCHWPQNRS", "stride", "padding"])  # type: ignore[untyped-decorator]
def _columns_kernel(  # type: ignore[no-untyped-def]
    columns_ptr,
    images_ptr,
    B,
    C,
    H,
    W,
    P,
    Q,
    N,
    K,
    R,
    S,
    stride,
    padding,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixel = tl.program_id(0)
    q, p, g = pixel % Q, pixel // Q % P, pixel // (Q * P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    taps = R * S * C
    column = k % taps
    c, s, r = column % C, column // C % S, column // (C * S)
    h, w = p * stride + r - padding, q * stride + s - padding
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offsets = (((g * B + n) * C + c).to(tl.int64) * H + h) * W + w
    used = (n < B) & inside & (k < taps * (1 + SPLIT))
    pixels = tl.load(images_ptr + offsets, mask=used, other=0.0)  # [N, K]
    if SPLIT:
        high = pixels.to(columns_ptr.dtype.element_ty).to(tl.float32)
        pixels = tl.where(k < taps, high, pixels - high)
    offsets = (pixel * N + n).to(tl.int64) * K + k
    tl.store(columns_ptr + offsets, pixels, mask=(n < N) & (k < K))


@triton.jit(do_not_specialize=["rows", "experts"])  # type: ignore[untyped-decorator]
def _column_grad_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [E, rows, O]
    weight_ptr,  # [E, K, O]
    columns_ptr,  # [G, rows, K]
    rows,
    experts,
    O,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    row, k0, g = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K, tl.program_id(2)
    chunks = tl.cdiv(O, BLOCK_O)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # One expert if each has its own images, else all.
    for i in tl.range(0, experts * chunks):
        e, o0 = g + i // chunks, i % chunks * BLOCK_O
        grad = load_tile(
            grad_ptr + e.to(tl.int64) * rows * O, row, o0, rows - row, O - o0, O,
            BLOCK_N, BLOCK_O, False,
        )  # fmt: skip
        weight = load_tile(weight_ptr, e * K + k0, o0, K - k0, O - o0, O, BLOCK_K, BLOCK_O, False)
        total = tl.dot(grad, weight.T, total, input_precision="ieee")
    n, k = row + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    offsets = (g.to(tl.int64) * rows + n)[:, None] * K + k[None, :]
    tl.store(columns_ptr + offsets, total, mask=(n < rows)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=[*"BCHPQNRS", "stride", "padding"])  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    columns_ptr,  # [G, P, Q, N, R * S * C]
    grad_ptr,  # [G, B, C, H, W]
    B,
    C,
    H,
    W,
    P,
    Q,
    N,
    R,
    S,
    stride,
    padding,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    h, g = tl.program_id(0) % H, tl.program_id(0) // H
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)[None, None, :]
    exists = (b < B) & (c < C) & (w < W)
    grad = tl.zeros([BLOCK_B, BLOCK_C, BLOCK_W], tl.float32)
    for tap in range(R * S):
        shifted_h, shifted_w = h + padding - tap // S, w + padding - tap % S
        p, q = shifted_h // stride, shifted_w // stride
        if (shifted_h >= 0) & (p < P) & (p * stride == shifted_h):
            meets = (shifted_w >= 0) & (q < Q) & (q * stride == shifted_w)
            rows = (((g * P + p) * Q + q) * N + b).to(tl.int64)
            offsets = rows * (R * S * C) + (tap * C + c)
            grad += tl.load(columns_ptr + offsets, mask=exists & meets, other=0.0)
    offsets = (((g * B + b) * C + c).to(tl.int64) * H + h) * W + w
    tl.store(grad_ptr + offsets, grad, mask=exists)


def _stem_input_grad_like(
    grad: Tensor, weight_t: Tensor, B: int, H: int, W: int, stride: int, padding: int, shared: bool
) -> Tensor:
    G = 1 if shared else grad.shape[0]
    dtype = reference.accumulation_dtype(grad)
    return grad.new_empty(G, B, weight_t.shape[3], H, W, dtype=dtype)


_columns = Op(
    "image_columns_(Tensor(a!) columns, Tensor images, int R, int S, int stride, int padding) "
    "-> ()",
    body=reference.image_columns_,
    fake=lambda columns, images, R, S, stride, padding: None,
    examples=[
        ((1, 4, 4, 16, 64), (1, 9, 3, 4, 4), 3, 3, 1, 1),
        ((2, 3, 3, 16, 48), (2, 3, 2, 5, 6), 3, 4, 2, 1),
    ],
    fixed_dtypes={"images": torch.float32},
    exact=True,
)
_stem_input_grad = Op(
    "stem_input_grad(Tensor grad, Tensor weight_t, int B, int H, int W, int stride, int padding, "
    "bool shared) -> Tensor",
    body=reference.stem_input_grad,
    fake=_stem_input_grad_like,
    examples=[
        ((3, 4, 4, 16, 64), (3, 3, 3, 3, 64), 9, 4, 4, 1, 1, True),
        ((2, 3, 3, 16, 5), (2, 3, 4, 2, 5), 3, 5, 6, 2, 1, False),
    ],
)


@_columns.implementation("triton", device="cuda")
def _columns_triton(
    columns: Tensor, images: Tensor, R: int, S: int, stride: int, padding: int
) -> None:
    G, P, Q, N, K = columns.shape
    _, B, C, H, W = images.shape
    block_n, block_k = (32 if N <= 32 else 64), 64
    grid = G * P * Q, triton.cdiv(N, block_n), triton.cdiv(K, block_k)
    if columns.numel() > 0:  # CUDA rejects an empty grid
        launch(
            _columns_kernel,
            grid,
            columns_ptr=columns,
            images_ptr=images,
            B=B,
            C=C,
            H=H,
            W=W,
            P=P,
            Q=Q,
            N=N,
            K=K,
            R=R,
            S=S,
            stride=stride,
            padding=padding,
            SPLIT=columns.dtype is not torch.float32,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )


@_stem_input_grad.implementation("triton", device="cuda")
def _stem_input_grad_triton(
    grad: Tensor, weight_t: Tensor, B: int, H: int, W: int, stride: int, padding: int, shared: bool
) -> Tensor:
    image_grad = _stem_input_grad_like(grad, weight_t, B, H, W, stride, padding, shared)
    E, P, Q, N, O = grad.shape
    _, R, S, C, _ = weight_t.shape
    G, experts = (1, E) if shared else (E, 1)
    K, rows = R * S * C, P * Q * N
    if image_grad.numel() == 0 or rows == 0:  # CUDA rejects an empty grid
        return image_grad.zero_()
    columns = grad.new_empty(G, rows, K, dtype=torch.float32)
    # Exact products of float32 run without tensor cores, on smaller tiles.
    block_n, block_o = (64, 16) if grad.dtype is torch.float32 else (128, 64)
    block_k = 32 if K <= 32 else 64
    launch(
        _column_grad_kernel,
        (triton.cdiv(rows, block_n), triton.cdiv(K, block_k), G),
        grad_ptr=grad,
        weight_ptr=weight_t,
        columns_ptr=columns,
        rows=rows,
        experts=experts,
        O=O,
        K=K,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_O=16 if O <= 16 else block_o,
        num_warps=4,
        num_stages=4,
    )
    block_c, block_w = max(triton.next_power_of_2(C), 4), (8 if W <= 8 else 32)
    block_b = max(_BLOCK // (block_c * block_w), 1)
    launch(
        _gather_kernel,
        (G * H, triton.cdiv(B, block_b), triton.cdiv(W, block_w)),
        columns_ptr=columns,
        grad_ptr=image_grad,
        B=B,
        C=C,
        H=H,
        W=W,
        P=P,
        Q=Q,
        N=N,
        R=R,
        S=S,
        stride=stride,
        padding=padding,
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        BLOCK_W=block_w,
    )
    return image_grad


def num_rows(B: int) -> int:
    """N of B images: whole tiles of the convolution, at most doubling a small batch."""
    for rows in (16, 32):
        if B <= rows:
            return rows
    return -(-B // 64) * 64


def num_sets(dtype: torch.dtype) -> int:
    """How many sets of columns carry an image: narrow ones a second for the rounding error."""
    return 1 if dtype in (torch.float32, torch.float64) else 2


def num_columns(taps: int, dtype: torch.dtype) -> int:
    """K for R * S * C taps in columns of this dtype: all sets, rounded up to whole tiles."""
    return -(-num_sets(dtype) * taps // 16) * 16


def image_columns(
    images: Tensor, *, kernel: tuple[int, int], stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """Lay out the images as columns: the pixels that each tap of the first convolution reads.

    Not differentiable: `stem_input_grad` is the way back from behind the convolution.

    Args:
        images: [G, B, C, H, W] float32, normalized; float64 only for columns in float64.
        kernel: taps R, S of the convolution.
        dtype: of the columns.
    Returns:
        [G, P, Q, N, K]: column (r * S + s) * C + c is the channel c under the tap (r, s), and the
        rounding error follows R * S * C columns later if there are two sets. N is `num_rows(B)`, K
        is `num_columns(R * S * C, dtype)`, and what is beyond the images is zero.
    Raises:
        TypeError: for another dtype.
        ValueError: for shapes that do not fit.
    """
    sizes = check_shapes("images [G, B, C, H, W]", images)
    if images.dtype is not torch.promote_types(dtype, torch.float32):
        expected = torch.promote_types(dtype, torch.float32)
        raise TypeError(f"images: expected {expected} for columns in {dtype}, found {images.dtype}")
    R, S = kernel
    P, Q = (num_outputs(sizes[axis], taps, stride, padding) for axis, taps in (("H", R), ("W", S)))
    if P < 1 or Q < 1:
        raise ValueError(
            f"images: expected at least {R} x {S} pixels with padding {padding} on each side, "
            f"found {sizes['H']} x {sizes['W']}"
        )
    K = num_columns(R * S * sizes["C"], dtype)
    columns = images.new_empty(sizes["G"], P, Q, num_rows(sizes["B"]), K, dtype=dtype)
    _columns(columns, images, R, S, stride, padding)
    return columns


def stem_input_grad(
    grad: Tensor,
    weight_t: Tensor,
    *,
    image_shape: tuple[int, int, int],
    stride: int,
    padding: int,
    shared: bool,
) -> Tensor:
    """Gradient of the images from that of the first convolution.

    Not differentiable. Sums over outputs, taps and experts in fixed order, in float32.

    Args:
        grad: [E, P, Q, N, O], the gradient of the convolution's sum: zero where a ReLU cut it.
        weight_t: [E, R, S, C, O].
        image_shape: B, H, W.
        shared: all experts saw the same images: sum over the experts.
    Returns:
        [E, B, C, H, W], or [1, B, C, H, W] if shared; float32, or float64 if grad is float64.
    Raises:
        TypeError: for a dtype that is not floating.
        ValueError: for shapes that do not fit.
    """
    B, H, W = image_shape
    R, S = weight_t.shape[1:3] if weight_t.dim() == 5 else (0, 0)
    P, Q = num_outputs(H, R, stride, padding), num_outputs(W, S, stride, padding)
    spec = "weight_t [E, R, S, C, O], grad [E, P, Q, N, O]"
    sizes = check_shapes(spec, weight_t, grad, P=P, Q=Q)
    if sizes["N"] < B:
        raise ValueError(
            f"grad: expected at least {B} rows, one for each image, found {sizes['N']}"
        )
    check_floating(grad=grad, weight_t=weight_t)
    return cast(Tensor, _stem_input_grad(grad, weight_t, B, H, W, stride, padding, shared))
