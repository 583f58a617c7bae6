"""Define every op in plain torch; all implementations are held to these definitions.

Axes: B images of the batch, E experts, K classes; C H W channels and pixels of a layer's input, O P
Q of its output, R S taps of its filters. A slab is [E, H, W, N, C], where N is B rounded up.
Backward formulas are written out, since an op's body runs below autograd; the tests check each of
them against autograd itself. Every function computes in float32, in float64 if an input is float64,
and rounds once at the end.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, max_pool2d, pad, unfold


def combined_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to which these tensors promote."""
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


def grouped_conv(
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
) -> Tensor:
    """y[e] = relu?(conv(x[e], weight[e]) + bias[e] + residual[e] + conv1x1(side[e])), slabs.

    x is [E, H, W, N, C] or [1, H, W, N, C], weight [E, O, R, S, C]; the side convolution has the
    weight [E, O, D] and reads every side_stride-th pixel of side [E, H2, W2, N, D].
    """
    wide = accumulation_dtype(x)
    sums = []
    for e in range(weight.shape[0]):
        filters = weight[e].permute(0, 3, 1, 2).to(wide)  # [O, C, R, S]
        source = _images(x[e % x.shape[0]]).to(wide)
        total = conv2d(source, filters, bias[e].to(wide), stride, padding)
        if side is not None and side_weight is not None:
            filters = side_weight[e, :, :, None, None].to(wide)
            total = total + conv2d(_images(side[e]).to(wide), filters, stride=side_stride)
        sums.append(_slab(total))
    y = torch.stack(sums)
    if residual is not None:
        y = y + residual.to(wide)
    return (y.relu() if relu else y).to(x.dtype)


def grouped_conv_input_grad(
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
) -> Tensor:
    """Gradient of the x of `grouped_conv` from the gradient of its sum, [E, P, Q, N, O].

    weight_t is [E, C, R, S, O]. Adds skip, and side [E, H2, W2, N, D] through the side convolution
    of another layer that read x, with side_weight_t [E, C, D]; zero where activation <= 0.
    """
    wide = accumulation_dtype(grad)
    sums = []
    for e in range(weight_t.shape[0]):
        filters = weight_t[e].permute(3, 0, 1, 2).to(wide)  # [O, C, R, S]
        total = _conv2d_input_grad(_images(grad[e]).to(wide), filters, H, W, stride, padding)
        if side is not None and side_weight_t is not None:
            filters = side_weight_t[e].t()[:, :, None, None].to(wide)
            beside = _images(side[e]).to(wide)
            total = total + _conv2d_input_grad(beside, filters, H, W, side_stride)
        sums.append(_slab(total))
    return _finished(torch.stack(sums), skip, activation).to(grad.dtype)


def image_columns_(
    columns: Tensor, images: Tensor, R: int, S: int, stride: int, padding: int
) -> None:
    """columns[g, p, q, b, (r * S + s) * C + c] = images[g, b, c, p * stride + r - padding, ...].

    Where columns [G, P, Q, N, K] are narrower than the images, the rounding error follows in the
    R * S * C columns after these. All other columns, and the rows from B to N, are zero.
    """
    G, P, Q, _, _ = columns.shape
    B, C = images.shape[1:3]
    patches = unfold(images.flatten(0, 1), (R, S), padding=padding, stride=stride)
    patches = patches.view(G, B, C, R * S, P, Q).permute(0, 4, 5, 1, 3, 2).flatten(4)
    high = patches.to(columns.dtype)
    taps = R * S * C
    columns.zero_()
    columns[..., :B, :taps] = high
    if _is_narrower(columns, images):
        columns[..., :B, taps : 2 * taps] = (patches - high.to(images.dtype)).to(columns.dtype)


def stem_input_grad(
    grad: Tensor, weight_t: Tensor, B: int, H: int, W: int, stride: int, padding: int, shared: bool
) -> Tensor:
    """Gradient of the images, [E, B, C, H, W], from that of the first convolution's sum.

    grad is [E, P, Q, N, O], weight_t [E, R, S, C, O]. Summed over the experts, [1, B, C, H, W], if
    they share the images. At least float32.
    """
    wide = accumulation_dtype(grad)
    sums = []
    for e in range(grad.shape[0]):
        filters = weight_t[e].permute(3, 2, 0, 1).to(wide)  # [O, C, R, S]
        images_grad = _images(grad[e, :, :, :B]).to(wide)
        sums.append(_conv2d_input_grad(images_grad, filters, H, W, stride, padding))
    total = torch.stack(sums)
    return total.sum(dim=0, keepdim=True) if shared else total


def pool(x: Tensor, kernel: int, stride: int, padding: int, maximum: bool) -> Tensor:
    """Maximum (padding counts as -inf) or mean (as zero) over windows of slabs [E, H, W, N, C]."""
    images = _images(x).to(accumulation_dtype(x))
    function = max_pool2d if maximum else avg_pool2d
    return _slab(function(images, kernel, stride, padding), like=x).to(x.dtype)


def pool_input_grad(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    maximum: bool,
    masked: bool,
) -> Tensor:
    """Gradient of the x of `pool`: all of it to a window's first maximum, or equal shares.

    Adds skip; zero where x <= 0 if masked.
    """
    wide = accumulation_dtype(x)
    images, outer = _images(x).to(wide), _images(grad).to(wide)
    window = [kernel, kernel], [stride, stride], [padding, padding]
    if maximum:
        _, indices = max_pool2d(images, kernel, stride, padding, return_indices=True)
        inner = torch.ops.aten.max_pool2d_with_indices_backward(
            outer, images, *window, [1, 1], False, indices
        )
    else:
        inner = torch.ops.aten.avg_pool2d_backward(outer, images, *window, False, True, None)
    return _finished(_slab(inner, like=x), skip, x if masked else None).to(grad.dtype)


def pooled_logits(x: Tensor, weight: Tensor, bias: Tensor, B: int) -> Tensor:
    """logits[e, b] = weight[e] @ (mean of x[e, :, :, b] over pixels) + bias[e], at least float32.

    x is [E, P, Q, N, C], weight [E, K, C].
    """
    wide = accumulation_dtype(x, weight)
    features = x[:, :, :, :B].to(wide).mean(dim=(1, 2))  # [E, B, C]
    return features @ weight.to(wide).mT + bias.to(wide).unsqueeze(1)


def pooled_logits_input_grad(
    grad_logits: Tensor, weight: Tensor, x: Tensor, masked: bool
) -> Tensor:
    """Gradient of the x of `pooled_logits`, zero in the rows from B to N.

    Zero where x <= 0 as well, if masked.
    """
    wide = accumulation_dtype(x, weight)
    _, P, Q, N, _ = x.shape
    grad = grad_logits.to(wide) @ weight.to(wide) / (P * Q)  # [E, B, C]
    grad = pad(grad, (0, 0, 0, N - grad.shape[1]))[:, None, None].expand(x.shape)
    return _finished(grad, None, x if masked else None).to(x.dtype)


def pooled_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, gate_logits: Tensor, labels: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pooled_logits`, `softmax_combine_cross_entropy` and both gradients, all of one batch.

    Returns loss [B], the combined logits [B, K], and the gradients of the summed loss with respect
    to gate_logits [B, E] and to x.
    """
    expert_logits = pooled_logits(x, weight, bias, len(labels))
    gate_logits = gate_logits.to(expert_logits.dtype)
    loss, grad_gate, grad_expert = softmax_combine_cross_entropy(gate_logits, expert_logits, labels)
    logits = softmax_combine(gate_logits, expert_logits)
    return loss, logits, grad_gate, pooled_logits_input_grad(grad_expert, weight, x, masked)


def _conv2d_input_grad(
    grad: Tensor, filters: Tensor, H: int, W: int, stride: int, padding: int = 0
) -> Tensor:
    """Gradient of images [N, C, H, W] from that of conv2d(images, filters [O, C, R, S])."""
    R, S = filters.shape[2:]
    P, Q = grad.shape[2:]
    # Pixels behind the last window, which a stride leaves out.
    beyond = [
        size - ((outputs - 1) * stride - 2 * padding + taps)
        for size, outputs, taps in ((H, P, R), (W, Q, S))
    ]
    return conv_transpose2d(grad, filters, None, stride, padding, beyond)


def _images(slab: Tensor) -> Tensor:
    """[N, C, H, W] of one expert's slab [H, W, N, C]; experts one after the other if several."""
    if slab.dim() == 5:
        return slab.permute(0, 3, 4, 1, 2).flatten(0, 1)
    return slab.permute(2, 3, 0, 1)


def _slab(images: Tensor, like: Tensor | None = None) -> Tensor:
    """The way back from `_images`, to as many experts as `like` has."""
    if like is not None:
        E, _, _, N, _ = like.shape
        return images.view(E, N, *images.shape[1:]).permute(0, 3, 4, 1, 2)
    return images.permute(2, 3, 0, 1)


def _finished(grad: Tensor, skip: Tensor | None, activation: Tensor | None) -> Tensor:
    if skip is not None:
        grad = grad + skip.to(grad.dtype)
    return grad if activation is None else grad.where(activation > 0, 0)


def _is_narrower(a: Tensor, b: Tensor) -> bool:
    return torch.finfo(a.dtype).eps > torch.finfo(b.dtype).eps
