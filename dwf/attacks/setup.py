"""What every attack does first: check a batch, make the model ready, promise to leave no trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dwf.attacks.losses import Loss, Model, cross_entropy
from dwf.attacks.norms import NORMS
from dwf.attacks.source import GradientSource, undisturbed
from dwf.attacks.target import AttackReport, AttackTarget, attack_target
from dwf.checks import (
    ConfigError,
    ImageError,
    check_choice,
    check_count,
    check_epsilon,
    check_image_tensor,
    check_images,
    check_labels,
    check_positive,
    check_same_device,
)

# What an attacked tensor is clamped to. "pixels" is the product: images in [0, 1], checked. The
# other two exist to reproduce published protocols (see views.NormalizedSpace): values are not
# checked, and results are clamped to [0, 1] ("unit") or not at all ("none").
CLAMPS = {"pixels": (0.0, 1.0), "unit": (0.0, 1.0), "none": (-torch.inf, torch.inf)}


@dataclass
class Batch:
    """A checked batch, copied: images [B, C, H, W] float32 contiguous, everything else [B]."""

    images: Tensor
    labels: Tensor  # int64
    sample_index: Tensor  # int64
    epsilon: Tensor  # float32
    low: float
    high: float

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, keep: Tensor) -> Batch:
        """The rows of a mask [B] or an index, copied, in its order."""
        return Batch(
            self.images[keep],
            self.labels[keep],
            self.sample_index[keep],
            self.epsilon[keep],
            self.low,
            self.high,
        )


@contextlib.contextmanager
def searching(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    loss: Loss = cross_entropy,
    bn_mode: str = "eval",
    eot_samples: int = 1,
    seed: int = 0,
    sample_index: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Iterator[tuple[Batch, GradientSource]]:
    """Check everything, then search inside the block: ``with searching(...) as (batch, source)``.

    Inside, gradients are enabled, the model is as `undisturbed` says, and time and passes go to
    ``report``. The batch may be empty. Arguments and errors are those of `dwf.attacks.pgd`; no
    pass through the model is made.
    """
    batch = checked_batch(
        model,
        images,
        labels,
        epsilon=epsilon,
        norm=norm,
        sample_index=sample_index,
        clamp=clamp,
    )
    source = gradient_source(
        model,
        images,
        loss=loss,
        bn_mode=bn_mode,
        eot_samples=eot_samples,
        allow_probabilities=allow_probabilities,
    )
    with (
        undisturbed(source.model, batch.images.device, bn_mode=bn_mode, seed=seed),
        source.reported(report, batch.images),
    ):
        yield batch, source


def checked_batch(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    sample_index: Tensor | None = None,
    clamp: str = "pixels",
) -> Batch:
    """A copy of what an attack was given, or an error that says what was wrong with it."""
    check_choice(clamp, list(CLAMPS), "clamp")
    check_choice(norm, NORMS, "norm")
    check_image_tensor(images)
    labels = check_labels(labels, len(images))
    check_same_device(images, labels, model.model if isinstance(model, AttackTarget) else model)
    if clamp == "pixels":
        check_images(images)
    if clamp == "pixels" and norm == "linf":
        check_epsilon(epsilon)
    else:
        check_positive(epsilon, "epsilon", zero_allowed=True)
    if clamp == "pixels" and norm == "l2":
        _check_l2_radius(epsilon, images)
    if sample_index is None:
        sample_index = torch.arange(len(images), device=images.device)
    if sample_index.shape != labels.shape or sample_index.is_floating_point():
        raise ImageError(
            f"sample_index: expected integers {list(labels.shape)}, one per image, "
            f"found {sample_index.dtype} {list(sample_index.shape)}"
        )
    low, high = CLAMPS[clamp]
    # cloned outside of autograd and inference mode: the caller's tensor may belong to either
    with torch.inference_mode(False), torch.no_grad():
        fixed = images.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return Batch(
            fixed,
            labels.clone(),
            sample_index.to(images.device, torch.int64, copy=True),
            per_image(epsilon, fixed, "epsilon"),
            low,
            high,
        )


def gradient_source(
    model: Model | AttackTarget,
    images: Tensor,
    *,
    loss: Loss = cross_entropy,
    bn_mode: str = "eval",
    eot_samples: int = 1,
    allow_probabilities: bool = False,
) -> GradientSource:
    """A model made ready for gradients at images of this size, by its plan where it offers one."""
    check_count(eot_samples, "eot_samples")
    target = attack_target(model, images.detach(), bn_mode=bn_mode)
    return GradientSource(
        target.model,
        loss,
        eot_samples,
        allow_probabilities=allow_probabilities,
        plan=target.plan,
        reason=target.reason,
    )


def per_image(
    value: float | Tensor, images: Tensor, name: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A number, or one for each image, as [B] on the images' device."""
    with torch.inference_mode(False), torch.no_grad():
        tensor = torch.as_tensor(value, dtype=dtype, device=images.device)
        if tensor.ndim == 0:
            return tensor.repeat(len(images))
        if list(tensor.shape) != [len(images)]:
            raise ConfigError(
                f"{name}: expected a number or one for each of {len(images)} images, "
                f"found shape {list(tensor.shape)}"
            )
        return tensor.clone()


def _check_l2_radius(epsilon: float | Tensor, images: Tensor) -> None:
    largest = float(torch.as_tensor(epsilon).max()) if torch.as_tensor(epsilon).numel() else 0.0
    diameter = math.sqrt(images.shape[1:].numel())
    if largest > max(diameter, 1.0) * (1 + 1e-6):  # the diameter itself may be rounded up
        raise ConfigError(
            f"epsilon: {largest:g} is larger than the L2 diameter {diameter:.4g} of images "
            f"{list(images.shape[1:])} in [0, 1]; did you mean {largest / 255:.4g}, in pixel units?"
        )
