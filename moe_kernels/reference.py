"""Every op in plain torch: the definition that all implementations are held to.

Axes: B images of the batch, E experts, K classes. Backward formulas are written out, since an op's
body runs below autograd; the tests check each of them against autograd itself. Every function
computes in float32, in float64 if an input is float64, and rounds once at the end.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def combined_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that results where these tensors meet."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors])


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which sums over these tensors run: at least float32."""
    return torch.promote_types(combined_dtype(*tensors), torch.float32)


def softmax_combine(gate_logits: Tensor, expert_logits: Tensor) -> Tensor:
    """logits[b, k] = sum_e w[b, e] * expert_logits[e, b, k],  w = softmax of gate_logits over e.

    Source: eqs. (1)-(2) of arXiv:2512.20821.
    """
    wide = accumulation_dtype(gate_logits, expert_logits)
    weights = gate_logits.to(wide).softmax(dim=1)  # [B, E]
    logits = (weights.t().unsqueeze(2) * expert_logits.to(wide)).sum(dim=0)  # [B, K]
    return logits.to(combined_dtype(gate_logits, expert_logits))


def softmax_combine_backward(
    grad_logits: Tensor, gate_logits: Tensor, expert_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `softmax_combine`, with d = grad_logits [B, K].

    s[b, e] = sum_k d[b, k] * expert_logits[e, b, k]
    grad_gate_logits[b, e] = w[b, e] * (s[b, e] - sum_j w[b, j] * s[b, j])
    grad_expert_logits[e, b, k] = w[b, e] * d[b, k]
    """
    wide = accumulation_dtype(grad_logits, gate_logits, expert_logits)
    weights = gate_logits.to(wide).softmax(dim=1)  # [B, E]
    grad = grad_logits.to(wide)
    scores = (grad * expert_logits.to(wide)).sum(dim=2).t()  # [B, E]
    mean = (weights * scores).sum(dim=1, keepdim=True)  # [B, 1]
    grad_gate = weights * (scores - mean)
    grad_expert = weights.t().unsqueeze(2) * grad  # [E, B, K]
    return grad_gate.to(gate_logits.dtype), grad_expert.to(expert_logits.dtype)


def softmax_combine_cross_entropy(
    gate_logits: Tensor, expert_logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the combined logits, and the gradients of its sum over the batch.

    loss[b] = log sum_k exp(logits[b, k]) - logits[b, labels[b]]
    d[b, k] = softmax(logits[b])[k] - [k = labels[b]], and on as in `softmax_combine_backward`

    An image whose label is not in [0, K) gets NaN, in its loss and in both gradients.
    """
    wide = accumulation_dtype(gate_logits, expert_logits)
    gate, expert = gate_logits.to(wide), expert_logits.to(wide)
    classes = torch.arange(expert.shape[2], device=labels.device)
    is_label = labels.unsqueeze(1) == classes  # [B, K]
    log_probabilities = softmax_combine(gate, expert).log_softmax(dim=1)  # [B, K]
    log_probabilities = log_probabilities.where(is_label.any(dim=1, keepdim=True), torch.nan)
    loss = -log_probabilities.where(is_label | log_probabilities.isnan(), 0).sum(dim=1)
    grad_logits = log_probabilities.exp() - is_label.to(wide)
    grad_gate, grad_expert = softmax_combine_backward(grad_logits, gate, expert)
    return loss, grad_gate.to(gate_logits.dtype), grad_expert.to(expert_logits.dtype)


def linf_step_(
    adversarial: Tensor,
    grad: Tensor,
    images: Tensor,
    epsilon: Tensor,
    step_size: Tensor,
    low: float,
    high: float,
) -> None:
    """One step of projected gradient ascent, in place; epsilon and step_size are [B].

    moved = adversarial + step_size * sign(grad),  sign(0) = sign(NaN) = 0
    ball = min(max(moved, images - epsilon), images + epsilon)
    adversarial = min(max(ball, low), high)

    Source: eq. (5) of arXiv:2512.20821.
    """
    per_image = (-1, *[1] * (images.dim() - 1))
    epsilon, step_size = epsilon.view(per_image), step_size.view(per_image)
    # Two comparisons instead of torch.sign, which promises nothing about NaN.
    direction = (grad > 0).to(images.dtype) - (grad < 0).to(images.dtype)
    moved = adversarial + step_size * direction
    ball = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon)
    adversarial.copy_(ball.clamp(low, high))
