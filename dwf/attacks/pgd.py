"""FGSM, PGD, BIM and MIM in the L-infinity and L2 norms, with restarts, targets and EoT.

    fgsm:  adversarial = clip(images + epsilon * sign(g(images)), 0, 1)
    pgd:   a_0 = images or a random point of the ball
           a_{k+1} = clip(a_k + step_size * sign(g(a_k)); images, epsilon), then clip to [0, 1]
    bim:   pgd from the image
    mim:   pgd along m_{k+1} = decay * m_k + g(a_k) / mean(|g(a_k)|) instead of g(a_k)

g is the gradient of the summed loss; in L2, g / |g|_2 stands for its sign. The state a_k is float32
whatever precision the model uses: in bfloat16 a perturbation leaves its own ball.

Sources: Goodfellow et al., arXiv:1412.6572; Kurakin et al., arXiv:1607.02533; Madry et al.,
arXiv:1706.06083; Dong et al., arXiv:1710.06081, whose L1 norm of g is a mean here: in the same
direction; eqs. (4)-(5) of arXiv:2512.20821, whose FGSM does not clip to [0, 1] (an attacked image
has to be an image, so ours does) and whose PGD takes no random start.

Random numbers: the start of restart r takes stream r of `moe_kernels.uniform_noise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks import norms
from dwf.attacks.losses import Loss, Model, TargetLoss, cross_entropy, toward
from dwf.attacks.setup import Batch, checked_batch, gradient_source, per_image
from dwf.attacks.source import GradientSource, judge, undisturbed
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import (
    ConfigError,
    ImageError,
    check_choice,
    check_count,
    check_labels,
    check_positive,
)

Seed = int | Sequence[int]
# Where an attack starts: at the image, at a uniform point of the ball (True), or at the image with
# normal noise of standard deviation 0.001, as TRADES does.
RandomStart = bool | Literal["normal"]


def fgsm(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    random_start: RandomStart = False,
    eot_samples: int = 1,
    loss: Loss = cross_entropy,
    targets: Tensor | None = None,
    bn_mode: str = "eval",
    seed: Seed = 0,
    sample_index: Tensor | None = None,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Take one step of length epsilon along the sign of the gradient, or in L2 along itself.

    PGD with one step of that length; arguments, result and errors are those of :func:`pgd`.
    """
    return pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=epsilon,
        num_steps=1,
        norm=norm,
        random_start=random_start,
        eot_samples=eot_samples,
        loss=loss,
        targets=targets,
        bn_mode=bn_mode,
        seed=seed,
        sample_index=sample_index,
        gradient=gradient,
        clamp=clamp,
        allow_probabilities=allow_probabilities,
        report=report,
    )


def pgd(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    random_start: RandomStart,
    norm: str = "linf",
    momentum: float = 0.0,
    num_restarts: int = 1,
    eot_samples: int = 1,
    loss: Loss = cross_entropy,
    targets: Tensor | None = None,
    bn_mode: str = "eval",
    seed: Seed = 0,
    sample_index: Tensor | None = None,
    start: Tensor | None = None,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Maximize a loss inside a ball around each image.

    Takes exactly ``num_steps`` gradients and returns the image after the last one. With restarts,
    an image is done at the first start that fools the model, and otherwise keeps the start of
    highest loss, so "robust under restarts" means robust under each of them. Works under
    ``no_grad`` and autocast. The model and all random states are as before, even if it raises.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits [B, K]; or an AttackTarget, made of one for
            several attacks.
        images: [B, C, H, W] float in [0, 1]; any strides.
        labels: [B], any integer dtype.
        epsilon: radius in pixel units of [0, 1] (8/255, not 8); float or [B], one per image.
        step_size: length of a step, same units and norm; float or [B].
        num_steps: int, or integers [B]: an image stops moving after its own number of steps.
        random_start: start from a uniform point of the ball instead of the image; or "normal": from
            the image with normal noise of standard deviation 0.001, in the ball (TRADES).
        norm: "linf" or "l2", of the ball and of a step.
        momentum: decay of the sum of gradients that steps follow, see :func:`mim`; 0 for none.
        eot_samples: passes averaged for each gradient and verdict of a randomized model.
        loss: ``loss(logits, labels)`` to [B].
        targets: [B], classes that the images are to be taken for: the attack minimizes the loss
            toward them instead, and an image is done when the model gives its target.
        bn_mode: "eval", or "train" for batch statistics; running statistics never change.
        seed, sample_index: key and counter of the start noise; the index defaults to 0..B-1. The
            same pair gives the same noise in any batch, on any number of GPUs. Of several seeds
            each is for one of as many equal blocks of rows.
        start: [B, C, H, W], to go on from in place of a random start; moved into the ball.
        gradient: the loss's gradient at ``images``, if already known: saves the first pass.
        allow_probabilities: accept a model whose outputs are probabilities.
        report: to be filled with what ran and how fast; on a GPU this waits for the result.
    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        ImageTypeError, ImageError, PixelRangeError, LabelError, ModelOutputError: with the first
            bad index, what was found and what is expected.
        ConfigError: for an impossible epsilon, step size, norm or count.
    """
    check_count(num_restarts, "num_restarts")
    if num_restarts > 1 and not random_start:
        raise ConfigError("num_restarts > 1 needs random_start=True: all starts would be equal")
    if start is not None and random_start:
        raise ConfigError("start: known, but random_start=True starts elsewhere")
    check_positive(momentum, "momentum", zero_allowed=True)
    _check_seed(seed, len(images), num_restarts)
    batch = checked_batch(
        model, images, labels, epsilon=epsilon, norm=norm, sample_index=sample_index, clamp=clamp
    )
    if targets is not None:
        targets = check_labels(targets, len(images), name="targets").to(images.device)
        loss = toward(loss, targets)
    ascent = _ascent(
        batch,
        loss,
        step_size,
        num_steps,
        random_start,
        norm,
        momentum,
        start=_known("start", start, images),
        is_fgsm=step_size is epsilon,
    )
    gradient = _known("gradient", gradient, images)
    if gradient is not None and (random_start or start is not None):
        raise ConfigError(
            "gradient: known at the images, but a start or random_start=True starts elsewhere"
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
        undisturbed(source.model, images.device, bn_mode=bn_mode, seed=_seeds(seed)[0]),
        source.reported(report, images),
    ):
        if len(images) == 0:
            return batch.images.clone()
        if num_restarts == 1:
            return ascent.solve(source, seed=seed, restart=0, gradient=gradient)
        return _best_of_restarts(
            ascent, source, targeted=targets is not None, seed=seed, num_restarts=num_restarts
        )


def bim(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    norm: str = "linf",
    eot_samples: int = 1,
    loss: Loss = cross_entropy,
    targets: Tensor | None = None,
    bn_mode: str = "eval",
    seed: Seed = 0,
    sample_index: Tensor | None = None,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """The basic iterative method: PGD that starts from the image.

    Arguments, result and errors are those of :func:`pgd`.
    """
    return pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=step_size,
        num_steps=num_steps,
        norm=norm,
        random_start=False,
        eot_samples=eot_samples,
        loss=loss,
        targets=targets,
        bn_mode=bn_mode,
        seed=seed,
        sample_index=sample_index,
        gradient=gradient,
        clamp=clamp,
        allow_probabilities=allow_probabilities,
        report=report,
    )


def mim(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    norm: str = "linf",
    decay: float = 1.0,
    eot_samples: int = 1,
    loss: Loss = cross_entropy,
    targets: Tensor | None = None,
    bn_mode: str = "eval",
    seed: Seed = 0,
    sample_index: Tensor | None = None,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """The momentum iterative method: steps along a running sum of the gradients.

    Each gradient counts divided by the mean of its absolute values, and ``decay`` times as much
    with every further step; 0 is the basic iterative method. Arguments, result and errors are
    otherwise those of :func:`pgd`.
    """
    return pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=step_size,
        num_steps=num_steps,
        norm=norm,
        random_start=False,
        momentum=decay,
        eot_samples=eot_samples,
        loss=loss,
        targets=targets,
        bn_mode=bn_mode,
        seed=seed,
        sample_index=sample_index,
        gradient=gradient,
        clamp=clamp,
        allow_probabilities=allow_probabilities,
        report=report,
    )


def pgd_snapshots(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: Sequence[int],
    eot_samples: int = 1,
    loss: Loss = cross_entropy,
    bn_mode: str = "eval",
    seed: int = 0,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
) -> list[Tensor]:
    """Run PGD once without random start, and keep the image at each of several step counts.

    Element i equals ``pgd(..., num_steps=num_steps[i], random_start=False)`` bit for bit, since a
    shorter run is a prefix of a longer one; the cost is that of the longest alone.

    Args, Raises: as :func:`pgd`; ``num_steps`` ascending.
    """
    if not num_steps or list(num_steps) != sorted(set(num_steps)):
        raise ConfigError(f"num_steps: {list(num_steps)}, expected ascending step counts")
    for steps in num_steps:
        check_count(steps, "num_steps")
    batch = checked_batch(model, images, labels, epsilon=epsilon, clamp=clamp)
    ascent = _ascent(batch, loss, step_size, num_steps[-1], is_fgsm=step_size is epsilon)
    gradient = _known("gradient", gradient, images)
    source = gradient_source(
        model,
        images,
        loss=loss,
        bn_mode=bn_mode,
        eot_samples=eot_samples,
        allow_probabilities=allow_probabilities,
    )
    with undisturbed(source.model, images.device, bn_mode=bn_mode, seed=seed):
        if len(images) == 0:
            return [batch.images.clone() for _ in num_steps]
        iterates = ascent.iterates(source, batch.images.clone(), gradient)
        return [a.clone() for k, a in enumerate(iterates, start=1) if k in num_steps]


def input_gradient(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Loss = cross_entropy,
    bn_mode: str = "eval",
    seed: Seed = 0,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
) -> Tensor:
    """Gradient of the summed loss at the images, [B, C, H, W] float32, leaving no trace.

    FGSM and the first step of PGD without random start both use it, so a caller who wants both
    computes it once and passes it as ``gradient=``; this is exact.
    """
    batch = checked_batch(model, images, labels, epsilon=0.0, clamp=clamp)
    source = gradient_source(
        model, images, loss=loss, bn_mode=bn_mode, allow_probabilities=allow_probabilities
    )
    with undisturbed(source.model, images.device, bn_mode=bn_mode, seed=_seeds(seed)[0]):
        if len(images) == 0:
            return torch.zeros_like(batch.images)
        return source(batch.images, batch.labels)


@dataclass
class _Ascent:
    """A batch and how PGD moves through its balls; step sizes and counts are [B]."""

    batch: Batch
    loss: Loss
    step_size: Tensor
    num_steps: Tensor
    random_start: RandomStart
    norm: str
    momentum: float
    known_start: Tensor | None = None

    def subset(self, keep: Tensor) -> _Ascent:
        loss = self.loss.subset(keep) if isinstance(self.loss, TargetLoss) else self.loss
        return replace(
            self,
            batch=self.batch.subset(keep),
            loss=loss,
            step_size=self.step_size[keep],
            num_steps=self.num_steps[keep],
            known_start=None if self.known_start is None else self.known_start[keep],
        )

    def start(self, seed: Seed, restart: int) -> Tensor:
        batch = self.batch
        if self.known_start is not None:
            ends = (batch.epsilon, self.norm, batch.low, batch.high)
            return norms.project(self.known_start.float(), batch.images, *ends)
        if not self.random_start:
            return batch.images.clone()
        shape = tuple(batch.images.shape[1:])
        seeds = _seeds(seed)
        blocks = zip(seeds, batch.sample_index.chunk(len(seeds)), strict=True)
        if self.random_start == "normal":
            noise = torch.cat(
                [moe_kernels.uniform_noise(own, i, shape, restart=restart) for own, i in blocks]
            )
            offset = norms.shrink(0.001 * norms.normal_quantiles(noise), batch.epsilon, self.norm)
        else:
            ball = [
                norms.uniform_in_ball(own, i, shape, self.norm, stream=restart) for own, i in blocks
            ]
            offset = torch.cat(ball) * norms.per_pixel(batch.epsilon)
        return (batch.images + offset).clamp_(batch.low, batch.high)

    def iterates(
        self, source: GradientSource, adversarial: Tensor, gradient: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Step in place, yielding the state after each step."""
        batch, velocity = self.batch, None
        fused = self.norm == "linf" and self.momentum == 0
        shared = bool((self.num_steps == self.num_steps[0]).all())
        for k in range(int(self.num_steps.max())):
            # a step of length zero leaves an image exactly where it is
            step = self.step_size if shared else self.step_size * (k < self.num_steps)
            known = gradient if k == 0 else None
            if fused and known is None:
                end = (batch.epsilon, step, batch.low, batch.high)
                source.linf_step(adversarial, batch.images, batch.labels, *end, loss=self.loss)
            else:
                if known is None:
                    known, _ = source.gradient_and_logits(adversarial, batch.labels, self.loss)
                if self.momentum:
                    known = velocity = _accumulated(velocity, known, self.momentum)
                self._step(adversarial, known, step)
            yield adversarial

    def _step(self, adversarial: Tensor, direction: Tensor, step: Tensor) -> None:
        batch = self.batch
        if self.norm == "linf":
            end = (batch.epsilon, step, batch.low, batch.high)
            moe_kernels.linf_step_(adversarial, direction, batch.images, *end)
            return
        length = norms.per_pixel(step)
        moved = adversarial + length * norms.ascent(direction, self.norm)
        inside = norms.project(moved, batch.images, batch.epsilon, self.norm, batch.low, batch.high)
        adversarial.copy_(torch.where(length > 0, inside, adversarial))

    def solve(
        self, source: GradientSource, *, seed: Seed, restart: int, gradient: Tensor | None = None
    ) -> Tensor:
        adversarial = self.start(seed, restart)
        for _ in self.iterates(source, adversarial, gradient):
            pass
        return adversarial


def _accumulated(velocity: Tensor | None, gradient: Tensor, decay: float) -> Tensor:
    gradient = gradient.nan_to_num(0.0)
    size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    normal = torch.where(size > 0, gradient / size, 0.0)
    return normal if velocity is None else decay * velocity + normal


def _best_of_restarts(
    ascent: _Ascent, source: GradientSource, *, targeted: bool, seed: Seed, num_restarts: int
) -> Tensor:
    best = ascent.batch.images.clone()
    best_loss = torch.full_like(ascent.batch.epsilon, -torch.inf)
    open_ = torch.arange(len(best), device=best.device)
    for restart in range(num_restarts):
        part = ascent.subset(open_)
        found = part.solve(source, seed=seed, restart=restart)
        logits = source.verdict_logits(found, part.batch.labels)
        loss = part.loss(logits, part.batch.labels)
        if isinstance(part.loss, TargetLoss) and targeted:
            reached, finite = judge(logits, part.loss.targets)
            fooled = reached | ~finite
        else:
            fooled = ~judge(logits, part.batch.labels)[0]
        better = fooled | (loss > best_loss[open_])
        best[open_[better]] = found[better]
        best_loss[open_[better]] = loss[better].float()
        open_ = open_[~fooled]
        if len(open_) == 0:
            break
    return best


def _seeds(seed: Seed) -> Sequence[int]:
    return seed if isinstance(seed, Sequence) else (seed,)


def _check_seed(seed: Seed, num_images: int, num_restarts: int) -> None:
    seeds = _seeds(seed)
    if not seeds or num_images % len(seeds):
        raise ConfigError(f"seed: {num_images} images do not divide among {len(seeds)} seeds")
    if len(seeds) > 1 and num_restarts > 1:
        raise ConfigError("seed: several seeds need num_restarts=1: restarts mix the rows' blocks")


def _known(name: str, value: Tensor | None, images: Tensor) -> Tensor | None:
    """Something in the shape of the images that the caller knows already."""
    if value is None:
        return None
    if value.shape != images.shape or not value.is_floating_point():
        raise ImageError(
            f"{name}: expected floats in the shape of images {list(images.shape)}, "
            f"found {value.dtype} {list(value.shape)}"
        )
    return value.detach()


def _ascent(
    batch: Batch,
    loss: Loss,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    random_start: RandomStart = False,
    norm: str = "linf",
    momentum: float = 0.0,
    start: Tensor | None = None,
    *,
    is_fgsm: bool,
) -> _Ascent:
    """Settings checked and made one for each image."""
    if not isinstance(random_start, bool):
        check_choice(random_start, ("normal",), "random_start")
    # FGSM's step is its radius, and a radius may be zero
    check_positive(step_size, "step_size", zero_allowed=is_fgsm)
    if not isinstance(num_steps, Tensor):
        check_count(num_steps, "num_steps")
    elif num_steps.is_floating_point():
        raise ConfigError(f"num_steps: expected integers, found {num_steps.dtype}")
    else:
        check_positive(num_steps, "num_steps")
    return _Ascent(
        batch,
        loss,
        per_image(step_size, batch.images, "step_size"),
        per_image(num_steps, batch.images, "num_steps", torch.int64),
        random_start,
        norm,
        momentum,
        start,
    )
