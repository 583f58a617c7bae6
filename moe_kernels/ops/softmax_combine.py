"""Combine expert logits with softmax weights, in one pass over the experts.

    logits[b, k] = sum_e softmax(gate_logits[b])[e] * expert_logits[e, b, k]

and the same with cross-entropy on top, which returns the loss and its gradients at once.

Axes: B images of the batch, E experts, K classes. Implementations sum in float32. Each Triton
program owns one image and holds all its [E, K] expert logits.
Source: eqs. (1)-(2) of arXiv:2512.20821.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from moe_kernels import native, reference
from moe_kernels.arguments import check_floating, check_integers, check_shapes
from moe_kernels.lang import launch, tl, triton
from moe_kernels.op import Op

# Above this a program would keep more than 16 values in each thread of its 16 warps and spill.
_MAX_TILE = 2**13
# Smaller numbers of experts or classes share a variant: a program has threads for so many anyway.
_MIN_BLOCK = 16
# The compiled CUDA kernels keep two floats per expert and warp in 48 KiB of shared memory.
_MAX_NATIVE_EXPERTS = 6144


@triton.jit
def gate_weights(gate_ptr, b, e, E):  # type: ignore[no-untyped-def]
    """Softmax weights [len(e)] float32 of one image, zero behind the last expert.

    gate_ptr points to gate_logits [B, E]; b is the image, e = arange over a power of two >= E.
    """
    gate = tl.load(gate_ptr + b * E + e, mask=e < E, other=-float("inf")).to(tl.float32)
    exps = tl.exp(gate - tl.max(gate, axis=0))
    return exps / tl.sum(exps, axis=0)


@triton.jit
def gate_gradient(weights, expert, grad):  # type: ignore[no-untyped-def]
    """Gradient [E] of one image's gate_logits, from the gradient `grad` [K] of its logits.

    `weights` [E] are its `gate_weights`, `expert` [E, K] its expert logits. The formula is that of
    `reference.softmax_combine_backward`.
    """
    scores = tl.sum(grad[None, :] * expert, axis=1)  # [E]
    return weights * (scores - tl.sum(weights * scores, axis=0))


@triton.jit(do_not_specialize=["B", "E", "K"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, expert_ptr, logits_ptr, B, E, K, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    weights = gate_weights(gate_ptr, b, e, E)
    offsets = (e[:, None] * B + b) * K + k[None, :]  # [E, K]
    mask = (e < E)[:, None] & (k < K)[None, :]
    expert = tl.load(expert_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    logits = tl.sum(weights[:, None] * expert, axis=0)  # [K]
    tl.store(logits_ptr + b * K + k, logits, mask=k < K)


@triton.jit(do_not_specialize=["B", "E", "K"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_logits_ptr,
    gate_ptr,
    expert_ptr,
    grad_gate_ptr,
    grad_expert_ptr,
    B,
    E,
    K,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    weights = gate_weights(gate_ptr, b, e, E)
    offsets = (e[:, None] * B + b) * K + k[None, :]  # [E, K]
    mask = (e < E)[:, None] & (k < K)[None, :]
    expert = tl.load(expert_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_logits_ptr + b * K + k, mask=k < K, other=0.0).to(tl.float32)
    # In this order: the other one needs more registers than there are.
    tl.store(grad_expert_ptr + offsets, weights[:, None] * grad[None, :], mask=mask)
    grad_gate = gate_gradient(weights, expert, grad)
    tl.store(grad_gate_ptr + b * E + e, grad_gate, mask=e < E)


@triton.jit(do_not_specialize=["B", "E", "K"])  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    expert_ptr,
    labels_ptr,
    loss_ptr,
    grad_gate_ptr,
    grad_expert_ptr,
    B,
    E,
    K,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    weights = gate_weights(gate_ptr, b, e, E)
    offsets = (e[:, None] * B + b) * K + k[None, :]  # [E, K]
    mask = (e < E)[:, None] & (k < K)[None, :]
    expert = tl.load(expert_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    logits = tl.where(k < K, tl.sum(weights[:, None] * expert, axis=0), -float("inf"))  # [K]
    label = tl.load(labels_ptr + b)
    shifted = logits - tl.max(logits, axis=0)
    exps = tl.exp(shifted)
    # A label that is no class makes the whole image NaN.
    total = tl.where((label >= 0) & (label < K), tl.sum(exps, axis=0), float("nan"))
    loss = tl.log(total) - tl.sum(tl.where(k == label, shifted, 0.0), axis=0)
    tl.store(loss_ptr + b, loss)
    grad = tl.where(k < K, exps / total - (k == label).to(tl.float32), 0.0)
    # In this order: the other one needs more registers than there are.
    tl.store(grad_expert_ptr + offsets, weights[:, None] * grad[None, :], mask=mask)
    grad_gate = gate_gradient(weights, expert, grad)
    tl.store(grad_gate_ptr + b * E + e, grad_gate, mask=e < E)


def _integers(high: int, size: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(high, (size,), generator=generator)


def _logits_like(gate_logits: Tensor, expert_logits: Tensor) -> Tensor:
    dtype = reference.combined_dtype(gate_logits, expert_logits)
    return expert_logits.new_empty(expert_logits.shape[1:], dtype=dtype)


def _gradients_like(
    grad_logits: Tensor, gate_logits: Tensor, expert_logits: Tensor
) -> tuple[Tensor, Tensor]:
    return gate_logits.new_empty(gate_logits.shape), expert_logits.new_empty(expert_logits.shape)


def _loss_and_gradients_like(
    gate_logits: Tensor, expert_logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(gate_logits, expert_logits)
    loss = gate_logits.new_empty(gate_logits.shape[0], dtype=dtype)
    return loss, *_gradients_like(loss, gate_logits, expert_logits)


_backward = Op(
    "softmax_combine_backward("
    "Tensor grad_logits, Tensor gate_logits, Tensor expert_logits) -> (Tensor, Tensor)",
    body=reference.softmax_combine_backward,
    fake=_gradients_like,
    examples=[
        ((8, 10), (8, 9), (9, 8, 10)),
        ((3, 7), (3, 5), (5, 3, 7)),
        ((1, 100), (1, 1), (1, 1, 100)),
    ],
)
_forward = Op(
    "softmax_combine(Tensor gate_logits, Tensor expert_logits) -> Tensor",
    body=reference.softmax_combine,
    fake=_logits_like,
    examples=[((8, 9), (9, 8, 10)), ((3, 5), (5, 3, 7)), ((1, 1), (1, 1, 100))],
    backward=_backward,
)
_cross_entropy = Op(
    "softmax_combine_cross_entropy("
    "Tensor gate_logits, Tensor expert_logits, Tensor labels) -> (Tensor, Tensor, Tensor)",
    body=reference.softmax_combine_cross_entropy,
    fake=_loss_and_gradients_like,
    examples=[
        ((8, 9), (9, 8, 10), _integers(10, 8)),
        ((3, 5), (5, 3, 7), _integers(7, 3)),
        ((1, 1), (1, 1, 100), _integers(100, 1)),
    ],
    fixed_dtypes={"labels": torch.int64},
)


def _launch(kernel, *tensors: Tensor, sizes: torch.Size) -> bool:  # type: ignore[no-untyped-def]
    """Start one program per image, or return False if it could not hold its experts."""
    E, B, K = sizes
    tile_e, tile_k = triton.next_power_of_2(E), max(triton.next_power_of_2(K), _MIN_BLOCK)
    if tile_e < _MIN_BLOCK and _MIN_BLOCK * tile_k <= _MAX_TILE:
        tile_e = _MIN_BLOCK
    if tile_e * tile_k > _MAX_TILE:
        return False
    if B > 0:  # CUDA rejects an empty grid
        num_warps = min(max(tile_e * tile_k // 256, 1), 16)
        blocks = {"BLOCK_E": tile_e, "BLOCK_K": tile_k}
        launch(kernel, (B,), *tensors, B, E, K, **blocks, num_warps=num_warps)
    return True


def _call_native(name: str, **tensors: Tensor) -> bool:
    """Call a compiled kernel, or return False if it could not hold its experts."""
    E, B, K = tensors["expert_logits"].shape
    gate_logits = tensors["gate_logits"]
    if gate_logits.is_cuda and E > _MAX_NATIVE_EXPERTS:
        return False
    native.call(name, tensors, dtype=gate_logits.dtype, B=B, E=E, K=K)
    return True


@_forward.implementation("triton", device="cuda")
def _forward_triton(gate_logits: Tensor, expert_logits: Tensor) -> Any:
    logits = expert_logits.new_empty(expert_logits.shape[1:])
    tensors = gate_logits, expert_logits, logits
    launched = _launch(_forward_kernel, *tensors, sizes=expert_logits.shape)
    return logits if launched else NotImplemented


@_forward.implementation("native", device="cuda", built=native.has_cuda)
@_forward.implementation("native", device="cpu", dtypes=[torch.float32], built=native.has_cpu)
def _forward_native(gate_logits: Tensor, expert_logits: Tensor) -> Any:
    logits = expert_logits.new_empty(expert_logits.shape[1:])
    called = _call_native(
        "softmax_combine", gate_logits=gate_logits, expert_logits=expert_logits, logits=logits
    )
    return logits if called else NotImplemented


@_backward.implementation("triton", device="cuda")
def _backward_triton(grad_logits: Tensor, gate_logits: Tensor, expert_logits: Tensor) -> Any:
    inputs = grad_logits, gate_logits, expert_logits
    grads = _gradients_like(*inputs)
    launched = _launch(_backward_kernel, *inputs, *grads, sizes=expert_logits.shape)
    return grads if launched else NotImplemented


@_backward.implementation("native", device="cuda", built=native.has_cuda)
@_backward.implementation("native", device="cpu", dtypes=[torch.float32], built=native.has_cpu)
def _backward_native(grad_logits: Tensor, gate_logits: Tensor, expert_logits: Tensor) -> Any:
    grads = _gradients_like(grad_logits, gate_logits, expert_logits)
    called = _call_native(
        "softmax_combine_backward",
        grad_logits=grad_logits,
        gate_logits=gate_logits,
        expert_logits=expert_logits,
        grad_gate_logits=grads[0],
        grad_expert_logits=grads[1],
    )
    return grads if called else NotImplemented


@_cross_entropy.implementation("triton", device="cuda")
def _cross_entropy_triton(gate_logits: Tensor, expert_logits: Tensor, labels: Tensor) -> Any:
    inputs = gate_logits, expert_logits, labels
    outputs = _loss_and_gradients_like(*inputs)
    launched = _launch(_cross_entropy_kernel, *inputs, *outputs, sizes=expert_logits.shape)
    return outputs if launched else NotImplemented


@_cross_entropy.implementation("native", device="cuda", built=native.has_cuda)
@_cross_entropy.implementation("native", device="cpu", dtypes=[torch.float32], built=native.has_cpu)
def _cross_entropy_native(gate_logits: Tensor, expert_logits: Tensor, labels: Tensor) -> Any:
    outputs = _loss_and_gradients_like(gate_logits, expert_logits, labels)
    called = _call_native(
        "softmax_combine_cross_entropy",
        gate_logits=gate_logits,
        expert_logits=expert_logits,
        labels=labels,
        loss=outputs[0],
        grad_gate_logits=outputs[1],
        grad_expert_logits=outputs[2],
    )
    return outputs if called else NotImplemented


def softmax_combine(gate_logits: Tensor, expert_logits: Tensor) -> Tensor:
    """Mix the experts' logits with softmax gate weights.

    Differentiable once. Sums run in float32, or in float64 if an input is float64.

    Args:
        gate_logits: [B, E], floating.
        expert_logits: [E, B, K], floating; on the same device.
    Returns:
        [B, K] in the dtype to which the two promote.
    Raises:
        TypeError: for a dtype that is not floating.
        ValueError: for shapes or devices that do not fit, or without an expert or a class.
    Source: eqs. (1)-(2) of arXiv:2512.20821.
    """
    _check(gate_logits, expert_logits)
    return cast(Tensor, _forward(gate_logits, expert_logits))


def softmax_combine_cross_entropy(
    gate_logits: Tensor, expert_logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the mixed logits and the gradients of its sum over the batch, in one pass.

    For attacks: the three results are numbers to use, a derivative through them raises. An image
    whose label is not in [0, K) gets NaN in all three; to look at the labels here would make the
    host wait for the GPU.

    Args:
        gate_logits: [B, E], floating.
        expert_logits: [E, B, K], floating; on the same device.
        labels: [B], any integer dtype; on the same device.
    Returns:
        loss [B] in float32 (float64 if an input is float64), and the gradients of gate_logits
        [B, E] and of expert_logits [E, B, K], each in the dtype of its tensor.
    Raises:
        TypeError: for logits that are not floating, or labels that are not integers.
        ValueError: for shapes or devices that do not fit, or without an expert or a class.
    """
    _check(gate_logits, expert_logits, labels)
    check_integers(labels=labels)
    outputs = _cross_entropy(gate_logits, expert_logits, labels.long())
    return cast(tuple[Tensor, Tensor, Tensor], outputs)


def _check(gate_logits: Tensor, expert_logits: Tensor, *labels: Tensor) -> None:
    spec = "gate_logits [B, E], expert_logits [E, B, K]" + (", labels [B]" if labels else "")
    sizes = check_shapes(spec, gate_logits, expert_logits, *labels)
    check_floating(gate_logits=gate_logits, expert_logits=expert_logits)
    if sizes["E"] == 0 or sizes["K"] == 0:
        raise ValueError(
            f"expert_logits: expected at least one expert and one class, found shape "
            f"{list(expert_logits.shape)} of [E, B, K]"
        )
