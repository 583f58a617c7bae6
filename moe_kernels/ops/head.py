"""Classify slabs by the last layer of E experts: mean over pixels, classifier, and on to the loss.

    expert_logits[e, b] = weight[e] @ (mean of x[e, :, :, b] over pixels) + bias[e]

and with the gate, the cross-entropy of the mixture and both gradients in two launches. One would
need a program per image that reads all experts, and leave most of a GPU idle: the second launch has
a program for each expert and image, which combines the few logits anew.

Axes: E experts; B images, N rows of a slab; P Q pixels; C channels; K classes. Sums run in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.arguments import check_floating, check_integers, check_shapes
from moe_kernels.lang import launch, tl, triton
from moe_kernels.op import Op
from moe_kernels.ops.softmax_combine import gate_gradient, gate_weights

# Channels that a program holds at a time, and values of [K, channels] or [E, K]: above this it
# would spill.
_BLOCK_C = 128
_MAX_TILE = 2**14


@triton.jit(do_not_specialize=["pixels", "B", "N", "K"])  # type: ignore[untyped-decorator]
def _logits_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [E, pixels, N, C]
    weight_ptr,  # [E, K, C]
    bias_ptr,  # [E, K]
    logits_ptr,  # [E, B, K]
    pixels,
    B,
    N,
    C,
    K,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, e = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    logits = tl.load(bias_ptr + e * K + k, mask=k < K, other=0.0)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        features = tl.zeros([BLOCK_C], tl.float32)
        for p0 in range(0, pixels, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            rows = ((e * pixels + p) * N + b).to(tl.int64)
            mask = (p < pixels)[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
            features += tl.sum(x.to(tl.float32), axis=0)
        mask = (k < K)[:, None] & (c < C)[None, :]
        offsets = (e * K + k)[:, None] * C + c[None, :]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
        logits += tl.sum(weight * (features / pixels)[None, :], axis=1)
    tl.store(logits_ptr + (e * B + b) * K + k, logits, mask=k < K)


@triton.jit  # type: ignore[untyped-decorator]
def _store_input_grad(  # type: ignore[no-untyped-def]
    grad_logits,  # [K], zeros behind the classes
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    n,
    e,
    pixels,
    N,
    C,
    K,
    masked,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (k < K)[:, None] & (c < C)[None, :]
        offsets = (e * K + k)[:, None] * C + c[None, :]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
        grad = tl.sum(weight * grad_logits[:, None], axis=0) / pixels  # [C]
        for p0 in range(0, pixels, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            rows = ((e * pixels + p) * N + n).to(tl.int64)
            here = rows[:, None] * C + c[None, :]
            exists = (p < pixels)[:, None] & (c < C)[None, :]
            grads = tl.broadcast_to(grad[None, :], [BLOCK_P, BLOCK_C])
            if masked:
                x = tl.load(x_ptr + here, mask=exists, other=0.0)
                grads = tl.where(x.to(tl.float32) > 0, grads, 0.0)
            tl.store(grad_x_ptr + here, grads, mask=exists)


@triton.jit(do_not_specialize=["pixels", "B", "N", "K", "masked"])  # type: ignore[untyped-decorator]
def _input_grad_kernel(  # type: ignore[no-untyped-def]
    grad_logits_ptr,  # [E, B, K]
    x_ptr,
    weight_ptr,
    grad_x_ptr,  # [E, pixels, N, C]
    pixels,
    B,
    N,
    C,
    K,
    masked,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n, e = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    # Rows behind the images get zeros.
    num_k = tl.where(n < B, K, 0)
    grad_logits = tl.load(grad_logits_ptr + (e * B + n) * K + k, mask=k < num_k, other=0.0)
    _store_input_grad(
        grad_logits, x_ptr, weight_ptr, grad_x_ptr, n, e, pixels, N, C, K,
        masked, BLOCK_P, BLOCK_C, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "B", "N", "E", "K", "masked"])  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,  # [B, E]
    expert_ptr,  # [E, B, K]
    labels_ptr,
    x_ptr,
    weight_ptr,
    loss_ptr,
    logits_ptr,
    grad_gate_ptr,
    grad_x_ptr,
    pixels,
    B,
    N,
    C,
    E,
    K,
    masked,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n, own_e = tl.program_id(0), tl.program_id(1)
    # A row behind the images repeats the last one and drops its gradient.
    b = tl.minimum(n, B - 1)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    weights = gate_weights(gate_ptr, b, e, E)
    mask = (e < E)[:, None] & (k < K)[None, :]
    expert = tl.load(expert_ptr + (e[:, None] * B + b) * K + k[None, :], mask=mask, other=0.0)
    logits = tl.sum(weights[:, None] * expert, axis=0)  # [K]
    # One of the image's programs writes what they all have.
    writes = (own_e == 0) & (n < B)
    tl.store(logits_ptr + b * K + k, logits, mask=k < tl.where(writes, K, 0))
    logits = tl.where(k < K, logits, -float("inf"))
    label = tl.load(labels_ptr + b)
    shifted = logits - tl.max(logits, axis=0)
    exps = tl.exp(shifted)
    # A label that is no class makes the whole image NaN.
    total = tl.where((label >= 0) & (label < K), tl.sum(exps, axis=0), float("nan"))
    loss = tl.log(total) - tl.sum(tl.where(k == label, shifted, 0.0), axis=0)
    tl.store(loss_ptr + b, loss, mask=writes)
    grad = tl.where(k < K, exps / total - (k == label).to(tl.float32), 0.0)
    tl.store(
        grad_gate_ptr + b * E + e,
        gate_gradient(weights, expert, grad),
        mask=e < tl.where(writes, E, 0),
    )
    own_weight = tl.sum(tl.where(e == own_e, weights, 0.0), axis=0)
    grad = tl.where(n < B, own_weight * grad, 0.0)
    _store_input_grad(
        grad, x_ptr, weight_ptr, grad_x_ptr, n, own_e, pixels, N, C, K,
        masked, BLOCK_P, BLOCK_C, BLOCK_K,
    )  # fmt: skip


def _integers(high: int, size: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(high, (size,), generator=generator)


def _logits_like(x: Tensor, weight: Tensor, bias: Tensor, B: int) -> Tensor:
    E, K, _ = weight.shape
    return x.new_empty(E, B, K, dtype=reference.accumulation_dtype(x, weight))


def _input_grad_like(grad_logits: Tensor, weight: Tensor, x: Tensor, masked: bool) -> Tensor:
    return x.new_empty(x.shape)


def _cross_entropy_like(
    x: Tensor, weight: Tensor, bias: Tensor, gate_logits: Tensor, labels: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, E = gate_logits.shape
    shapes = (B,), (B, weight.shape[1]), (B, E)
    dtype = reference.accumulation_dtype(x, weight)
    loss, logits, grad_gate = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, logits, grad_gate, x.new_empty(x.shape)


_PARAMETERS = dict.fromkeys(("weight", "bias", "grad_logits", "gate_logits"), torch.float32)

_logits = Op(
    "pooled_logits(Tensor x, Tensor weight, Tensor bias, int B) -> Tensor",
    body=reference.pooled_logits,
    fake=_logits_like,
    examples=[
        ((3, 4, 4, 16, 192), (3, 10, 192), (3, 10), 9),
        ((2, 1, 3, 3, 5), (2, 7, 5), (2, 7), 3),
    ],
    fixed_dtypes=_PARAMETERS,
)
_input_grad = Op(
    "pooled_logits_input_grad(Tensor grad_logits, Tensor weight, Tensor x, bool masked) -> Tensor",
    body=reference.pooled_logits_input_grad,
    fake=_input_grad_like,
    examples=[
        ((3, 9, 10), (3, 10, 192), (3, 4, 4, 16, 192), True),
        ((2, 3, 7), (2, 7, 5), (2, 1, 3, 3, 5), False),
    ],
    fixed_dtypes=_PARAMETERS,
)
_cross_entropy = Op(
    "pooled_cross_entropy(Tensor x, Tensor weight, Tensor bias, Tensor gate_logits, Tensor labels, "
    "bool masked) -> (Tensor, Tensor, Tensor, Tensor)",
    body=reference.pooled_cross_entropy,
    fake=_cross_entropy_like,
    examples=[
        ((3, 4, 4, 16, 192), (3, 10, 192), (3, 10), (9, 3), _integers(10, 9), True),
        ((2, 1, 3, 3, 5), (2, 7, 5), (2, 7), (3, 2), _integers(7, 3), False),
    ],
    fixed_dtypes={**_PARAMETERS, "labels": torch.int64},
)


def _blocks(C: int, K: int) -> dict[str, int] | None:
    """How a program cuts up its image, or None if it could not hold its classes."""
    # Few channels, classes or pixels leave lanes idle, and share a variant.
    block_k = max(triton.next_power_of_2(K), 16)
    block_c = _BLOCK_C
    if block_k * block_c > _MAX_TILE:
        block_c = min(triton.next_power_of_2(C), _BLOCK_C)
        if block_k * block_c > _MAX_TILE:
            return None
    return {"BLOCK_P": 16, "BLOCK_C": block_c, "BLOCK_K": block_k}


def _num_warps(blocks: dict[str, int]) -> int:
    return min(max(blocks["BLOCK_K"] * blocks["BLOCK_C"] // 1024, 4), 16)


@_logits.implementation("triton", device="cuda")
def _logits_triton(x: Tensor, weight: Tensor, bias: Tensor, B: int) -> Any:
    E, P, Q, N, C = x.shape
    K = weight.shape[1]
    blocks = _blocks(C, K)
    if blocks is None:
        return NotImplemented
    logits = _logits_like(x, weight, bias, B)
    if logits.numel() > 0:  # CUDA rejects an empty grid
        launch(
            _logits_kernel,
            (B, E),
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            logits_ptr=logits,
            pixels=P * Q,
            B=B,
            N=N,
            C=C,
            K=K,
            **blocks,
            num_warps=_num_warps(blocks),
        )
    return logits


@_input_grad.implementation("triton", device="cuda")
def _input_grad_triton(grad_logits: Tensor, weight: Tensor, x: Tensor, masked: bool) -> Any:
    E, P, Q, N, C = x.shape
    _, B, K = grad_logits.shape
    blocks = _blocks(C, K)
    if blocks is None:
        return NotImplemented
    grad_x = torch.empty_like(x)
    if x.numel() > 0:  # CUDA rejects an empty grid
        launch(
            _input_grad_kernel,
            (N, E),
            grad_logits_ptr=grad_logits,
            x_ptr=x,
            weight_ptr=weight,
            grad_x_ptr=grad_x,
            pixels=P * Q,
            B=B,
            N=N,
            C=C,
            K=K,
            masked=int(masked),
            **blocks,
            num_warps=_num_warps(blocks),
        )
    return grad_x


@_cross_entropy.implementation("triton", device="cuda")
def _cross_entropy_triton(
    x: Tensor, weight: Tensor, bias: Tensor, gate_logits: Tensor, labels: Tensor, masked: bool
) -> Any:
    E, P, Q, N, C = x.shape
    B, K = len(labels), weight.shape[1]
    blocks = _blocks(C, K)
    block_e = max(triton.next_power_of_2(E), 16)
    if blocks is None or block_e * blocks["BLOCK_K"] > _MAX_TILE:
        return NotImplemented
    expert_logits = _logits_triton(x, weight, bias, B)
    outputs = _cross_entropy_like(x, weight, bias, gate_logits, labels, masked)
    loss, logits, grad_gate, grad_x = outputs
    if B == 0:  # the kernel repeats the last image
        grad_x.zero_()
    elif x.numel() > 0:
        launch(
            _cross_entropy_kernel,
            (N, E),
            gate_ptr=gate_logits,
            expert_ptr=expert_logits,
            labels_ptr=labels,
            x_ptr=x,
            weight_ptr=weight,
            loss_ptr=loss,
            logits_ptr=logits,
            grad_gate_ptr=grad_gate,
            grad_x_ptr=grad_x,
            pixels=P * Q,
            B=B,
            N=N,
            C=C,
            E=E,
            K=K,
            masked=int(masked),
            BLOCK_E=block_e,
            **blocks,
            num_warps=_num_warps(blocks),
        )
    return outputs


def pooled_logits(x: Tensor, weight: Tensor, bias: Tensor, *, B: int) -> Tensor:
    """Classify the mean over all pixels, by one linear classifier per expert.

    Not differentiable: `pooled_logits_input_grad` is its derivative.

    Args:
        x: [E, P, Q, N, C], floating; of the N rows the first B are images.
        weight: [E, K, C] float32.
        bias: [E, K] float32.
    Returns:
        [E, B, K] float32, or float64 if a tensor is float64.
    Raises:
        TypeError: for a dtype that is not floating.
        ValueError: for shapes or devices that do not fit.
    """
    sizes = check_shapes("x [E, P, Q, N, C], weight [E, K, C], bias [E, K]", x, weight, bias)
    check_floating(x=x, weight=weight, bias=bias)
    _check_rows(B, sizes["N"])
    return cast(Tensor, _logits(x, weight, bias, B))


def pooled_logits_input_grad(
    grad_logits: Tensor, weight: Tensor, x: Tensor, *, masked: bool = False
) -> Tensor:
    """Gradient of the x of `pooled_logits`.

    Args:
        grad_logits: [E, B, K] float32.
        weight: [E, K, C] float32.
        x: [E, P, Q, N, C]; its numbers matter only if masked.
        masked: zero where x is not positive, because a ReLU made it.
    Returns:
        [E, P, Q, N, C] in the dtype of x; zero in the rows from B to N.
    Raises:
        TypeError, ValueError: as `pooled_logits`.
    """
    spec = "grad_logits [E, B, K], weight [E, K, C], x [E, P, Q, N, C]"
    sizes = check_shapes(spec, grad_logits, weight, x)
    check_floating(grad_logits=grad_logits, weight=weight, x=x)
    _check_rows(sizes["B"], sizes["N"])
    return cast(Tensor, _input_grad(grad_logits, weight, x, masked))


def pooled_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_logits: Tensor,
    labels: Tensor,
    *,
    masked: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of the mixture, and the gradients of its sum over the batch.

    For attacks, as `softmax_combine_cross_entropy`: an image whose label is not in [0, K) gets NaN
    in its loss and in both gradients, and nothing here is differentiable.

    Args:
        x, weight, bias, masked: as in `pooled_logits` and `pooled_logits_input_grad`.
        gate_logits: [B, E] float32.
        labels: [B], any integer dtype.
    Returns:
        loss [B], the combined logits [B, K] and the gradient of gate_logits [B, E], all float32
        (float64 if a tensor is); the gradient of x [E, P, Q, N, C] in the dtype of x.
    Raises:
        TypeError: for a dtype that is not floating, or labels that are not integers.
        ValueError: for shapes or devices that do not fit.
    """
    spec = "x [E, P, Q, N, C], weight [E, K, C], bias [E, K], gate_logits [B, E], labels [B]"
    sizes = check_shapes(spec, x, weight, bias, gate_logits, labels)
    check_floating(x=x, weight=weight, bias=bias, gate_logits=gate_logits)
    check_integers(labels=labels)
    _check_rows(sizes["B"], sizes["N"])
    outputs = _cross_entropy(x, weight, bias, gate_logits, labels.long(), masked)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], outputs)


def _check_rows(B: int, N: int) -> None:
    if not 0 <= B <= N:
        raise ValueError(f"x: expected at least {B} rows, one for each image, found {N}")
