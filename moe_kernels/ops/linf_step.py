"""Take one step of projected gradient ascent in the L-inf ball, in place on float32 images.

    moved = adversarial + step_size * sign(grad),  sign(0) = sign(NaN) = 0
    ball = min(max(moved, images - epsilon), images + epsilon)
    adversarial = min(max(ball, low), high)

Axes: B images of the batch, P pixels of one image. Equal bits on every device and in every
implementation, so no fused multiply-add anywhere.
Source: eqs. (4)-(5) of arXiv:2512.20821; Madry et al., arXiv:1706.06083.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import native, reference
from moe_kernels.arguments import check_floating, check_shapes
from moe_kernels.lang import launch, tl, triton
from moe_kernels.op import Op

_BLOCK = 1024
# CUDA's limit for the second axis of a grid.
_MAX_BLOCKS = 65535


@triton.jit  # type: ignore[untyped-decorator]
def _step_kernel(  # type: ignore[no-untyped-def]
    adversarial_ptr,
    grad_ptr,
    images_ptr,
    epsilon_ptr,
    step_size_ptr,
    P,
    low,
    high,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = b * P + p
    mask = p < P
    adversarial = tl.load(adversarial_ptr + offsets, mask=mask)
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    image = tl.load(images_ptr + offsets, mask=mask)
    epsilon, step_size = tl.load(epsilon_ptr + b), tl.load(step_size_ptr + b)
    direction = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
    pixel = adversarial + step_size * direction
    # A NaN pixel stays NaN, as in torch; by default tl.maximum would hide it behind a bound.
    pixel = tl.maximum(pixel, image - epsilon, propagate_nan=tl.PropagateNan.ALL)
    pixel = tl.minimum(pixel, image + epsilon, propagate_nan=tl.PropagateNan.ALL)
    pixel = tl.maximum(pixel, low, propagate_nan=tl.PropagateNan.ALL)
    pixel = tl.minimum(pixel, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(adversarial_ptr + offsets, pixel, mask=mask)


def _uniform(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.rand(shape, generator=generator, dtype=torch.float32)


def _gradient(*shape: int) -> Callable[[torch.Generator], Tensor]:
    def make(generator: torch.Generator) -> Tensor:
        grad = torch.randn(shape, generator=generator, dtype=torch.float32)
        # Where implementations are most likely to differ.
        grad.view(-1)[:3] = torch.tensor([0.0, -0.0, torch.nan])
        return grad

    return make


_step = Op(
    "linf_step_(Tensor(a!) adversarial, Tensor grad, Tensor images, Tensor epsilon, "
    "Tensor step_size, float low, float high) -> ()",
    body=reference.linf_step_,
    fake=lambda adversarial, grad, images, epsilon, step_size, low, high: None,
    examples=[
        (_uniform(*shape), _gradient(*shape), _uniform(*shape), *[_uniform(shape[0])] * 2, 0.0, 1.0)
        for shape in [(4, 3, 8, 8), (3, 1, 5, 7), (2, 1100)]
    ],
    fixed_dtypes=dict.fromkeys(("adversarial", "images", "epsilon", "step_size"), torch.float32),
    exact=True,
)


@_step.implementation("triton", device="cuda")
def _step_triton(
    adversarial: Tensor,
    grad: Tensor,
    images: Tensor,
    epsilon: Tensor,
    step_size: Tensor,
    low: float,
    high: float,
) -> Any:
    B = adversarial.shape[0]
    P = math.prod(adversarial.shape[1:])
    num_blocks = triton.cdiv(P, _BLOCK)
    if num_blocks > _MAX_BLOCKS:
        return NotImplemented
    if B * P > 0:  # CUDA rejects an empty grid
        tensors = adversarial, grad, images, epsilon, step_size
        settings = {"BLOCK": _BLOCK, "enable_fp_fusion": False}
        launch(_step_kernel, (B, num_blocks), *tensors, P, low, high, **settings)
    return None


@_step.implementation("native", device="cuda", built=native.has_cuda)
@_step.implementation("native", device="cpu", dtypes=[torch.float32], built=native.has_cpu)
def _step_native(
    adversarial: Tensor,
    grad: Tensor,
    images: Tensor,
    epsilon: Tensor,
    step_size: Tensor,
    low: float,
    high: float,
) -> None:
    B = adversarial.shape[0]
    P = math.prod(adversarial.shape[1:])
    tensors = {
        "adversarial": adversarial,
        "grad": grad,
        "images": images,
        "epsilon": epsilon,
        "step_size": step_size,
    }
    native.call("linf_step", tensors, dtype=grad.dtype, B=B, P=P, low=low, high=high)


def linf_step_(
    adversarial: Tensor,
    grad: Tensor,
    images: Tensor,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Move `adversarial` along the sign of `grad`, back into the ball, and into [low, high].

    Changes `adversarial` in place; not differentiable. Where the gradient is zero or NaN the pixel
    does not move, and a NaN pixel stays NaN. Fastest on contiguous images, and with `epsilon` and
    `step_size` as tensors, which saves filling two at every call.

    Args:
        adversarial: [B, ...] float32, changed in place.
        grad: same shape, floating.
        images: same shape, float32; the centers of the balls.
        epsilon: radius in the images' unit, not negative; float or [B] float32, one per image.
        step_size: length of the step; same.
        low: least value of a pixel.
        high: largest value of a pixel.
    Returns:
        adversarial.
    Raises:
        TypeError: for another dtype.
        ValueError: for shapes or devices that do not fit, or an impossible number.
        RuntimeError: if a gradient is required of an input while gradients are recorded.
    Source: eqs. (4)-(5) of arXiv:2512.20821.
    """
    spec = "adversarial [B, ...], grad [B, ...], images [B, ...]"
    B = check_shapes(spec, adversarial, grad, images)["B"]
    for name, tensor in (("grad", grad), ("images", images)):
        if tensor.shape != adversarial.shape:
            raise ValueError(
                f"{name}: expected shape {list(adversarial.shape)} like adversarial, "
                f"found {list(tensor.shape)}"
            )
    check_floating(grad=grad)
    for name, tensor in (("adversarial", adversarial), ("images", images)):
        if tensor.dtype is not torch.float32:
            raise TypeError(f"{name}: expected torch.float32, found {tensor.dtype}")
    if adversarial is images:
        raise ValueError("adversarial: expected a copy of images, found images itself")
    if not low <= high:
        raise ValueError(f"low, high: expected low <= high, found {low} and {high}")
    epsilon = _per_image("epsilon", epsilon, B, adversarial.device)
    step_size = _per_image("step_size", step_size, B, adversarial.device)
    _step(adversarial, grad, images, epsilon, step_size, float(low), float(high))
    return adversarial


def _per_image(name: str, value: float | Tensor, B: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number >= 0, found {value}")
        return torch.full((B,), value, dtype=torch.float32, device=device)
    if value.shape != (B,) or value.device != device:
        raise ValueError(
            f"{name}: expected a number or shape [{B}] on {device}, "
            f"found {list(value.shape)} on {value.device}"
        )
    if value.dtype is not torch.float32:
        raise TypeError(f"{name}: expected torch.float32, found {value.dtype}")
    return value
