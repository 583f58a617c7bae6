"""Describe the problem that an attack solves, check it, and prepare the model.

A public attack packs its arguments into a `Setup`, and opens it to search:

    with packed(Setup, locals()).opened() as (batch, source):
        grad, logits = source.gradient_and_logits(batch.images, batch.labels, loss)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dwf.attacks.door import undisturbed
from dwf.attacks.losses import Model, cross_entropy, margin
from dwf.attacks.norms import NORMS, per_pixel
from dwf.attacks.source import GradientSource, judge
from dwf.attacks.space import CLAMPS, AttackSpace
from dwf.attacks.target import AttackReport, AttackTarget, attack_target
from dwf.checks import (
    ConfigError,
    ImageError,
    check_choice,
    check_count,
    check_image_tensor,
    check_images,
    check_labels,
    check_positive,
    check_radius,
    check_same_device,
    check_seed,
    check_targets,
    make_plain,
)

T = TypeVar("T")

# In L2, relative to the radius: the rounding of all pixels together, and of whoever adds them up.
_L2_ROUNDING = 1e-6


def packed(cls: type[T], arguments: Mapping[str, Any]) -> T:
    """A dataclass from a function's arguments of the same names: ``packed(Setup, locals())``."""
    names = [f.name for f in fields(cls) if f.name in arguments]  # type: ignore[arg-type]
    return cls(**{name: arguments[name] for name in names})


@dataclass(frozen=True)
class AttackBatch:
    """Checked images with their balls: [B, C, H, W] float32 contiguous; everything else [B].

    ``targets`` are the classes to be reached, or None where any wrong class will do. ``low`` and
    ``high`` bound every value of an attacked image.
    """

    images: Tensor
    labels: Tensor  # int64
    sample_index: Tensor  # int64
    epsilon: Tensor  # float32
    low: float
    high: float
    targets: Tensor | None = None  # int64

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, keep: Tensor) -> AttackBatch:
        """A copy of the rows that a mask [B] or an index selects, in the order of the index."""
        return replace(
            self,
            images=self.images[keep],
            labels=self.labels[keep],
            sample_index=self.sample_index[keep],
            epsilon=self.epsilon[keep],
            targets=None if self.targets is None else self.targets[keep],
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, labels, radii and targets, or labels where there are none: for `Frame.batch`."""
        targets = self.labels if self.targets is None else self.targets
        return self.images, self.labels, self.epsilon, targets

    @property
    def frame(self) -> Frame:
        """What is not in `tensors`."""
        return Frame(self.low, self.high, self.targets is not None)

    def fooled(self, logits: Tensor) -> Tensor:
        """[B] bool: the argmax of logits [B, K] is not the label, or with targets is the target.

        Logits that are not finite count as fooled.
        """
        if self.targets is None:
            return ~judge(logits, self.labels)[0]
        reached, finite = judge(logits, self.targets)
        return reached | ~finite

    def margin(self, logits: Tensor) -> Tensor:
        """[B]: by how much the model is fooled, in logits; negative where it is not."""
        if self.targets is None:
            return margin(logits, self.labels)
        return -margin(logits, self.targets)

    def searched_margin(self, source: GradientSource, images: Tensor) -> Tensor:
        """`margin` by the logits that the search sees, [B]; inf where they are not finite."""
        logits = source.logits(images)
        return self.margin(logits).where(logits.isfinite().all(dim=1), torch.inf)

    def are_fooled(self, source: GradientSource, adversarial: Tensor) -> Tensor:
        """[B] bool: whether ``adversarial`` [B, C, H, W] fool the model itself, in float32."""
        return self.fooled(source.verdict_logits(adversarial, self.labels))


@dataclass(frozen=True)
class Frame:
    """An `AttackBatch` without its tensors, so that equal ones are equal: part of a `Step`."""

    low: float
    high: float
    has_targets: bool

    def batch(
        self, images: Tensor, labels: Tensor, epsilon: Tensor, targets: Tensor
    ) -> AttackBatch:
        """The batch of these tensors, without sample indices."""
        aims = targets if self.has_targets else None
        return AttackBatch(images, labels, labels, epsilon, self.low, self.high, aims)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The problem that an attack solves: the model, the ball around each image, and the judge.

    Fields are arguments of :func:`dwf.attacks.pgd`; all attacks share them. A model may be an
    `AttackSpace`: then ``images`` and ``epsilon`` are in its units.

    Attributes:
        trusted: an equal setup was checked before, so no value on the device is looked at: on a GPU
            each look waits for all work before it.
    """

    model: Model | AttackTarget
    images: Tensor
    labels: Tensor
    epsilon: float | Tensor = 0.0
    norm: str = "linf"
    targets: Tensor | None = None
    eot_samples: int = 1
    bn_mode: str = "eval"
    seed: int = 0
    sample_index: Tensor | None = None
    allow_probabilities: bool = False
    report: AttackReport | None = None
    trusted: bool = False

    def __post_init__(self) -> None:
        make_plain(self)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[AttackBatch, GradientSource]]:
        """Check all arguments, then yield the batch and the source of gradients for the search.

        Inside the block the model is in the state that `undisturbed` describes, and ``report``
        counts time and passes. The batch may be empty. No pass through the model is made here.

        Raises:
            ImageTypeError, ImageError, PixelRangeError, LabelError, ConfigError.
        """
        batch = self.checked()
        source = self._source()
        with (
            undisturbed(
                source.model,
                batch.images.device,
                bn_mode=self.bn_mode,
                seed=self.seed,
                trusted=self.trusted,
                called=getattr(source.plan, "called", None),
            ),
            source.reported(self.report, batch.images),
        ):
            yield batch, source

    def checked(self) -> AttackBatch:
        """Checked copies of the tensors; raises the errors that `opened` lists."""
        model, clamp = self._inside()
        images = check_image_tensor(self.images)
        check_choice(self.norm, NORMS, "norm")
        labels = check_labels(self.labels, len(images))
        check_same_device(images, labels, model.model if isinstance(model, AttackTarget) else model)
        if not self.trusted:
            if clamp == "pixels":
                check_images(images)
            self._check_radius(clamp)
        check_seed(self.seed)
        index = self.sample_index
        if index is None:
            index = torch.arange(len(images), device=images.device)
        if index.shape != labels.shape or index.is_floating_point():
            raise ImageError(
                f"sample_index: expected integers {list(labels.shape)}, one per image, "
                f"found {index.dtype} {list(index.shape)}"
            )
        targets = self.targets
        if targets is not None and not self.trusted:
            targets = check_targets(targets, labels)
        low, high = CLAMPS[clamp]
        # cloned outside of autograd and inference mode: the caller's tensor may belong to either
        with torch.inference_mode(False), torch.no_grad():
            return AttackBatch(
                images=images.detach().to(
                    torch.float32, memory_format=torch.contiguous_format, copy=True
                ),
                labels=labels.clone(),
                sample_index=index.to(images.device, torch.int64, copy=True),
                epsilon=per_image(self.epsilon, images, "epsilon"),
                low=low,
                high=high,
                targets=None if targets is None else targets.long().clone(),
            )

    @property
    def in_pixels(self) -> bool:
        """Whether lengths are in pixel units of [0, 1]."""
        return self._inside()[1] == "pixels"

    def _inside(self) -> tuple[Model | AttackTarget, str]:
        """The model, and the clamp of the space it is attacked in."""
        if isinstance(self.model, AttackSpace):
            check_choice(self.model.clamp, list(CLAMPS), "clamp")
            return self.model.model, self.model.clamp
        return self.model, "pixels"

    def _source(self) -> GradientSource:
        check_count(self.eot_samples, "eot_samples")
        target = attack_target(self._inside()[0], self.images.detach(), bn_mode=self.bn_mode)
        return GradientSource(
            target.model,
            cross_entropy,
            self.eot_samples,
            allow_probabilities=self.allow_probabilities,
            plan=target.plan,
            reason=target.reason,
            dtype=target.dtype,
            checked=self.trusted,
        )

    def held(self, adversarial: Tensor) -> Tensor:
        """The images, moved by a rounding where they need it, to be inside as float32 computes it.

        Then ``(adversarial - images).abs().max() <= epsilon``; in L2 the norm of each image. In
        normalized space the images are as given.
        """
        if not self.in_pixels or len(adversarial) == 0:
            return adversarial
        images, radius = (
            self.images.detach().float().contiguous(),
            per_image(self.epsilon, self.images, "epsilon"),
        )
        delta = adversarial - images
        if self.norm == "linf":
            over = delta.abs() > per_pixel(radius)
            return torch.where(over, torch.nextafter(adversarial, images), adversarial)
        size = delta.flatten(1).norm(dim=1)
        nearer = images + delta * per_pixel(radius / size * (1 - _L2_ROUNDING))
        return torch.where(per_pixel(size > radius), nearer, adversarial)

    def _check_radius(self, clamp: str) -> None:
        if clamp == "pixels":
            check_radius(self.epsilon, self.norm, self.images.shape[1:])
        else:
            check_positive(self.epsilon, "epsilon", zero_allowed=True)


def first_verdict(batch: AttackBatch, source: GradientSource) -> Tensor:
    """Logits [B, K] of the images by the model itself, in float32.

    As the first pass of an attack it checks that the model returns logits, and that labels and
    targets name classes: ModelOutputError, LabelError.
    """
    logits = source.verdict_logits(batch.images, batch.labels)
    if batch.targets is not None:
        check_labels(batch.targets, len(batch), logits.shape[1], "targets")
    return logits


def per_image(
    value: float | Tensor, images: Tensor, name: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A number, or one for each image, as [B] on the images' device; ConfigError if neither."""
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(value, int | float):  # filled on the device: a copy would wait for it
            return torch.full((len(images),), value, dtype=dtype, device=images.device)
        tensor = torch.as_tensor(value, dtype=dtype, device=images.device)
        if tensor.ndim == 0:
            return tensor.repeat(len(images))
        if list(tensor.shape) != [len(images)]:
            raise ConfigError(
                f"{name}: expected a number or one for each of {len(images)} images, "
                f"found shape {list(tensor.shape)}"
            )
        return tensor.clone()
