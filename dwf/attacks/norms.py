"""Balls around images in the L-infinity and L2 norms: steps, projections and random points.

Each image is treated by itself: norms are of the flattened image, summed in float64, so that the
batch around it changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import moe_kernels

NORMS = ("linf", "l2")
BUDGET_TOLERANCE, L2_BUDGET_TOLERANCE = 1e-6, 1e-5  # the rounding of float32


def per_pixel(value: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return value.view(-1, 1, 1, 1)


def length(difference: Tensor, norm: str) -> Tensor:
    """Norm of each image's difference [B, C, H, W] as [B] float32."""
    flat = difference.flatten(1)
    order = torch.inf if norm == "linf" else 2
    found: Tensor = torch.linalg.vector_norm(flat, order, dim=1, dtype=torch.float64)
    return found.float()


def unit(difference: Tensor, norm: str) -> Tensor:
    """Each image's difference divided by its norm; zero stays zero."""
    size = per_pixel(length(difference, norm))
    return torch.where(size > 0, difference / size, 0.0)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The step of length 1 along which the loss grows most: sign, or gradient by its L2 norm.

    Where the gradient is zero or NaN there is no step, as in `moe_kernels.linf_step_`.
    """
    gradient = gradient.nan_to_num(0.0)
    return gradient.sign() if norm == "linf" else unit(gradient, "l2")


def shrink(difference: Tensor, epsilon: Tensor, norm: str) -> Tensor:
    """The nearest point of the ball of radius ``epsilon`` [B] around zero."""
    radius = per_pixel(epsilon)
    if norm == "linf":
        return difference.clamp(-radius, radius)
    size = per_pixel(length(difference, "l2"))
    return torch.where(size > radius, difference * (radius / size), difference)


def project(
    moved: Tensor, images: Tensor, epsilon: Tensor, norm: str, low: float, high: float
) -> Tensor:
    """The nearest point of the ball around each image, then clipped to [low, high]."""
    if norm == "linf":
        radius = per_pixel(epsilon)
        return moved.maximum(images - radius).minimum(images + radius).clamp(low, high)
    return (images + shrink(moved - images, epsilon, norm)).clamp(low, high)


def num_over_budget(
    images: Tensor, adversarial: Tensor, epsilon: float | Tensor, norm: str = "linf"
) -> int:
    """Attacked pixels outside epsilon or [0, 1]; in L2 an image outside epsilon counts as one.

    ``epsilon`` is a number, or [B].
    """
    outside = (adversarial < 0) | (adversarial > 1) | adversarial.isnan()
    delta = adversarial - images
    if norm == "l2":
        far = delta.flatten(1).norm(dim=1) > epsilon + L2_BUDGET_TOLERANCE
        return int(outside.sum()) + int(far.sum())
    radius = per_pixel(epsilon) if isinstance(epsilon, Tensor) else epsilon
    return int((outside | (delta.abs() > radius + BUDGET_TOLERANCE)).sum())


def normal_quantiles(noise: Tensor) -> Tensor:
    """Uniform noise in [0, 1) as standard normal noise; its grid ends 5 deviations out."""
    quantiles: Tensor = 2**0.5 * torch.erfinv((2 * noise - 1).clamp(-1 + 2e-7, 1 - 2e-7))
    return quantiles


def uniform_in_ball(
    seed: int, sample_index: Tensor, shape: Sequence[int], norm: str, *, stream: int
) -> Tensor:
    """A uniform point of the ball of radius 1 for each image, [B, *shape].

    L2: a direction from normals, and its length u^(1/d) from one more uniform number, in d
    dimensions.
    """
    if norm == "linf":
        return 2 * moe_kernels.uniform_noise(seed, sample_index, shape, restart=stream) - 1
    d = math.prod(shape)
    noise = moe_kernels.uniform_noise(seed, sample_index, (d + 1,), restart=stream)
    direction = normal_quantiles(noise[:, :-1]).view(-1, *shape)
    radius = noise[:, -1].double().pow(1 / max(d, 1)).float()
    return unit(direction, "l2") * per_pixel(radius)


def uniform_on_ball(
    seed: int, sample_index: Tensor, shape: Sequence[int], norm: str, *, stream: int
) -> Tensor:
    """A random point of norm 1 for each image, [B, *shape], as Auto-PGD starts with.

    L-inf: uniform noise in (-1, 1), scaled until it touches the ball. L2: uniform on the sphere.
    """
    noise = moe_kernels.uniform_noise(seed, sample_index, shape, restart=stream)
    return unit(2 * noise - 1 if norm == "linf" else normal_quantiles(noise), norm)
