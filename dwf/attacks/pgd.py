"""FGSM and PGD in the L-infinity norm, with restarts and expectation over randomness.

    fgsm:  adversarial = clip(images + epsilon * sign(g(images)), 0, 1)
    pgd:   a_0 = images or a random point of the ball
           a_{k+1} = clip(a_k + step_size * sign(g(a_k)); images, epsilon), then clip to [0, 1]

g is the gradient of the summed loss. The state a_k is float32 whatever precision the model uses:
in bfloat16 a perturbation leaves its own ball.

Sources: Goodfellow et al., arXiv:1412.6572; Madry et al., arXiv:1706.06083; eqs. (4)-(5) of
arXiv:2512.20821, whose FGSM does not clip to [0, 1] (an attacked image has to be an image, so ours
does) and whose PGD takes no random start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks.losses import Loss, Model, TargetLoss, cross_entropy
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
    random_start: RandomStart = False,
    loss: Loss = cross_entropy,
    bn_mode: str = "eval",
    seed: Seed = 0,
    sample_index: Tensor | None = None,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Take one step of length epsilon along the sign of the gradient.

    PGD with one step of that length; arguments, result and errors are those of :func:`pgd`.
    """
    return pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=epsilon,
        num_steps=1,
        random_start=random_start,
        loss=loss,
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
    num_restarts: int = 1,
    eot_samples: int = 1,
    loss: Loss = cross_entropy,
    bn_mode: str = "eval",
    seed: Seed = 0,
    sample_index: Tensor | None = None,
    gradient: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Maximize a loss inside an L-inf ball around each image.

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
        step_size: length of a step, same units; float or [B].
        num_steps: int, or integers [B]: an image stops moving after its own number of steps.
        random_start: start from a uniform point of the ball instead of the image; or "normal": from
            the image with normal noise of standard deviation 0.001, in the ball (TRADES).
        eot_samples: passes averaged for each gradient of a randomized model.
        loss: ``loss(logits, labels)`` to [B].
        bn_mode: "eval", or "train" for batch statistics; running statistics never change.
        seed, sample_index: key and counter of the start noise; the index defaults to 0..B-1. The
            same pair gives the same noise in any batch, on any number of GPUs. Of several seeds
            each is for one of as many equal blocks of rows.
        gradient: the loss's gradient at ``images``, if already known: saves the first pass.
        allow_probabilities: accept a model whose outputs are probabilities.
        report: to be filled with what ran and how fast; on a GPU this waits for the result.
    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        ImageTypeError, ImageError, PixelRangeError, LabelError, ModelOutputError: with the first
            bad index, what was found and what is expected.
        ConfigError: for an impossible epsilon, step size or count.
    """
    check_count(num_restarts, "num_restarts")
    if num_restarts > 1 and not random_start:
        raise ConfigError("num_restarts > 1 needs random_start=True: all starts would be equal")
    if num_restarts > 1 and isinstance(loss, TargetLoss):
        raise ConfigError("num_restarts > 1: restarts drop rows, of which this loss needs all")
    _check_seed(seed, len(images), num_restarts)
    problem = _prepare(
        images, labels, model, epsilon, step_size, num_steps, random_start, sample_index, clamp
    )
    gradient = _known_gradient(gradient, images, random_start)
    source = _source(model, images, loss, bn_mode, eot_samples, allow_probabilities)
    with (
        undisturbed(source.model, images.device, bn_mode=bn_mode, seed=_seeds(seed)[0]),
        source.reported(report, images),
    ):
        if len(images) == 0:
            return problem.images.clone()
        if num_restarts == 1:
            return problem.solve(source, seed=seed, restart=0, gradient=gradient)
        return _best_of_restarts(problem, source, seed=seed, num_restarts=num_restarts)


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
    problem = _prepare(images, labels, model, epsilon, step_size, num_steps[-1], False, None, clamp)
    gradient = _known_gradient(gradient, images, random_start=False)
    source = _source(model, images, loss, bn_mode, eot_samples, allow_probabilities)
    with undisturbed(source.model, images.device, bn_mode=bn_mode, seed=seed):
        if len(images) == 0:
            return [problem.images.clone() for _ in num_steps]
        iterates = problem.iterates(source, problem.images.clone(), gradient)
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
    problem = _prepare(images, labels, model, 0.0, 1.0, 1, False, None, clamp)
    source = _source(model, images, loss, bn_mode, 1, allow_probabilities)
    with undisturbed(source.model, images.device, bn_mode=bn_mode, seed=_seeds(seed)[0]):
        if len(images) == 0:
            return torch.zeros_like(problem.images)
        return source(problem.images, problem.labels)


@dataclass
class _Problem:
    """A checked batch: images float32 contiguous, labels int64, everything else [B]."""

    images: Tensor
    labels: Tensor
    sample_index: Tensor
    epsilon: Tensor
    step_size: Tensor
    num_steps: Tensor
    random_start: RandomStart
    low: float
    high: float

    def subset(self, keep: Tensor) -> _Problem:
        return _Problem(
            self.images[keep],
            self.labels[keep],
            self.sample_index[keep],
            self.epsilon[keep],
            self.step_size[keep],
            self.num_steps[keep],
            self.random_start,
            self.low,
            self.high,
        )

    def start(self, seed: Seed, restart: int) -> Tensor:
        if not self.random_start:
            return self.images.clone()
        shape, device = tuple(self.images.shape[1:]), self.images.device
        seeds = _seeds(seed)
        blocks = zip(seeds, self.sample_index.chunk(len(seeds)), strict=True)
        noise = torch.cat(
            [
                moe_kernels.uniform_noise(own, index, shape, restart=restart, device=device)
                for own, index in blocks
            ]
        )
        radius = self.epsilon.view(-1, 1, 1, 1)
        if self.random_start == "normal":
            # the quantiles of uniform noise; their grid ends 5 standard deviations out
            normal = 2**0.5 * torch.erfinv((2 * noise - 1).clamp(-1 + 2e-7, 1 - 2e-7))
            ball = (0.001 * normal).clamp(-radius, radius)
        else:
            ball = (2 * noise - 1) * radius
        return (self.images + ball).clamp_(self.low, self.high)

    def iterates(
        self, source: GradientSource, adversarial: Tensor, gradient: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Step in place, yielding the state after each step."""
        shared = bool((self.num_steps == self.num_steps[0]).all())
        for k in range(int(self.num_steps.max())):
            # a step of length zero leaves an image exactly where it is
            step = self.step_size if shared else self.step_size * (k < self.num_steps)
            end = (self.epsilon, step, self.low, self.high)
            if k == 0 and gradient is not None:
                moe_kernels.linf_step_(adversarial, gradient, self.images, *end)
            else:
                source.linf_step(adversarial, self.images, self.labels, *end)
            yield adversarial

    def solve(
        self, source: GradientSource, *, seed: Seed, restart: int, gradient: Tensor | None = None
    ) -> Tensor:
        adversarial = self.start(seed, restart)
        for _ in self.iterates(source, adversarial, gradient):
            pass
        return adversarial


def _best_of_restarts(
    problem: _Problem, source: GradientSource, *, seed: Seed, num_restarts: int
) -> Tensor:
    best = problem.images.clone()
    best_loss = torch.full_like(problem.epsilon, -torch.inf)
    open_ = torch.arange(len(best), device=best.device)
    for restart in range(num_restarts):
        part = problem.subset(open_)
        found = part.solve(source, seed=seed, restart=restart)
        with torch.no_grad():
            logits = source.model(found)
            loss = source.loss(logits, part.labels)
        # NaN and infinity are failures of the model, not reasons to go on
        fooled = (logits.argmax(dim=1) != part.labels) | ~logits.isfinite().all(dim=1)
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


def _source(
    model: Model | AttackTarget,
    images: Tensor,
    loss: Loss,
    bn_mode: str,
    eot_samples: int,
    allow_probabilities: bool,
) -> GradientSource:
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


def _known_gradient(
    gradient: Tensor | None, images: Tensor, random_start: RandomStart
) -> Tensor | None:
    if gradient is None:
        return None
    if random_start:
        raise ConfigError("gradient: known at the images, but random_start=True starts elsewhere")
    if gradient.shape != images.shape or not gradient.is_floating_point():
        raise ImageError(
            f"gradient: expected floats in the shape of images {list(images.shape)}, "
            f"found {gradient.dtype} {list(gradient.shape)}"
        )
    return gradient.detach()


def _prepare(
    images: Tensor,
    labels: Tensor,
    model: Model | AttackTarget,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    random_start: RandomStart,
    sample_index: Tensor | None,
    clamp: str,
) -> _Problem:
    check_choice(clamp, list(CLAMPS), "clamp")
    if not isinstance(random_start, bool):
        check_choice(random_start, ("normal",), "random_start")
    check_image_tensor(images)
    labels = check_labels(labels, len(images))
    check_same_device(images, labels, model.model if isinstance(model, AttackTarget) else model)
    if clamp == "pixels":
        check_images(images)
        check_epsilon(epsilon)
    else:
        check_positive(epsilon, "epsilon", zero_allowed=True)
    # FGSM's step is its radius, and a radius may be zero
    check_positive(step_size, "step_size", zero_allowed=step_size is epsilon)
    if not isinstance(num_steps, Tensor):
        check_count(num_steps, "num_steps")
    elif num_steps.is_floating_point():
        raise ConfigError(f"num_steps: expected integers, found {num_steps.dtype}")
    else:
        check_positive(num_steps, "num_steps")
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
        return _Problem(
            fixed,
            labels.clone(),
            sample_index.to(images.device, torch.int64, copy=True),
            _per_image(epsilon, fixed, "epsilon", torch.float32),
            _per_image(step_size, fixed, "step_size", torch.float32),
            _per_image(num_steps, fixed, "num_steps", torch.int64),
            random_start,
            low,
            high,
        )


def _per_image(value: float | Tensor, images: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A number, or one for each image, as [B] on the images' device."""
    tensor = torch.as_tensor(value, dtype=dtype, device=images.device)
    if tensor.ndim == 0:
        return tensor.repeat(len(images))
    if list(tensor.shape) != [len(images)]:
        raise ConfigError(
            f"{name}: expected a number or one for each of {len(images)} images, "
            f"found shape {list(tensor.shape)}"
        )
    return tensor.clone()
