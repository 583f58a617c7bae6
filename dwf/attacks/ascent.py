"""Climb a loss inside balls around images: the steps that FGSM, PGD, BIM and MIM share.

    setup = Setup(model=model, images=images, labels=labels, epsilon=8 / 255)
    adversarial = ascend(setup, Ascent(step_size=2 / 255, num_steps=10))
    after_10, after_50 = snapshots(setup, Ascent(step_size=2 / 255, num_steps=50), [10, 50])

Formulas, sources and random numbers are in `dwf.attacks.pgd`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks import norms
from dwf.attacks.losses import Loss, Objective, check_loss, objective, of_rows, parted
from dwf.attacks.setup import AttackBatch, Setup, per_image
from dwf.attacks.source import GradientSource
from dwf.checks import (
    ConfigError,
    ImageError,
    check_choice,
    check_count,
    check_epsilon,
    check_positive,
    make_plain,
)

# Where an attack starts: at the image, at a uniform point of the ball (True), or at the image with
# normal noise of standard deviation 0.001, as TRADES does.
RandomStart = bool | Literal["normal"]


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """How an attack climbs: arguments of :func:`dwf.attacks.pgd`, and two that it does not offer.

    Attributes:
        gradient: [B, C, H, W], the loss's gradient at the images, if known: saves the first pass.
        block_seeds: S seeds in place of the setup's one: the rows form S equal blocks, and block i
            draws its start from seed i.
        most_steps: no entry of ``num_steps`` is larger; on a GPU this saves waiting to see.
    """

    step_size: float | Tensor
    num_steps: int | Tensor
    random_start: RandomStart = False
    momentum: float = 0.0
    num_restarts: int = 1
    loss: str | Loss = "ce"
    start: Tensor | None = None
    gradient: Tensor | None = None
    block_seeds: Sequence[int] = ()
    most_steps: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)

    def check(self, setup: Setup) -> None:
        """Refuse impossible settings, and settings that contradict each other: ConfigError."""
        check_loss(self.loss)
        if not isinstance(self.random_start, bool):
            check_choice(self.random_start, ("normal",), "random_start")
        check_positive(self.momentum, "momentum", zero_allowed=True)
        # FGSM's step is its radius, and a radius may be zero
        zero_allowed = self.step_size is setup.epsilon
        check_positive(self.step_size, "step_size", zero_allowed=zero_allowed)
        if setup.norm == "linf" and setup.in_pixels and not zero_allowed:
            check_epsilon(self.step_size, "step_size")
        if not isinstance(self.num_steps, Tensor):
            check_count(self.num_steps, "num_steps")
        elif self.num_steps.is_floating_point():
            raise ConfigError(f"num_steps: expected integers, found {self.num_steps.dtype}")
        else:
            check_positive(self.num_steps, "num_steps")
        check_count(self.num_restarts, "num_restarts")
        if self.num_restarts > 1 and not self.random_start:
            raise ConfigError("num_restarts > 1 needs random_start=True: all starts would be equal")
        if self.start is not None and self.random_start:
            raise ConfigError("start: given, but random_start=True starts elsewhere")
        if self.gradient is not None and (self.random_start or self.start is not None):
            raise ConfigError(
                "gradient: known at the images, but a start or random_start=True starts elsewhere"
            )
        if self.block_seeds and self.num_restarts > 1:
            raise ConfigError("block_seeds need num_restarts=1: restarts mix the rows' blocks")


def ascend(setup: Setup, how: Ascent) -> Tensor:
    """The images after the last step, or the best of several restarts, [B, C, H, W] float32.

    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    with _opened(setup, how) as (climb, source):
        if len(climb.batch) == 0:
            return climb.batch.images
        if how.num_restarts == 1:
            return climb.solve(source, restart=0)
        return _best_of_restarts(climb, source, how.num_restarts)


def snapshots(setup: Setup, how: Ascent, steps: Sequence[int]) -> list[Tensor]:
    """Images after each of several numbers of steps, ascending, from one run.

    Element i equals a run of ``steps[i]`` steps bit for bit, because a shorter run is a prefix of a
    longer one; the cost is that of the longest. ``how.num_steps`` is ignored.
    """
    if not steps or list(steps) != sorted(set(steps)):
        raise ConfigError(f"steps: {list(steps)}, expected ascending step counts")
    for count in steps:
        check_count(count, "steps")
    with _opened(setup, replace(how, num_steps=steps[-1])) as (climb, source):
        if len(climb.batch) == 0:
            return [climb.batch.images.clone() for _ in steps]
        found = []

        def keep(number: int, adversarial: Tensor) -> None:
            if number in steps:
                found.append(setup.held(adversarial.clone()))

        climb.solve(source, restart=0, seen=keep)
        return found


def gradient_at_images(setup: Setup, loss: str | Loss = "ce") -> Tensor:
    """Gradient of the summed loss at the images, [B, C, H, W] float32, detached.

    The first step of every ascent that starts there needs it: pass it as ``Ascent.gradient``.
    """
    check_loss(loss)
    with setup.opened() as (batch, source):
        if len(batch) == 0:
            return torch.zeros_like(batch.images)
        function = objective(loss, batch.labels, batch.targets)
        return source.gradient_and_logits(batch.images, batch.labels, function)[0]


@contextlib.contextmanager
def _opened(setup: Setup, how: Ascent) -> Iterator[tuple[_Climb, GradientSource]]:
    if not setup.trusted:
        how.check(setup)
    if how.block_seeds and len(setup.images) % len(how.block_seeds):
        raise ConfigError(
            f"block_seeds: {len(setup.images)} images do not divide into {len(how.block_seeds)} "
            "equal blocks"
        )
    with setup.opened() as (batch, source):
        yield (
            _Climb(
                batch=batch,
                loss=objective(how.loss, batch.labels, batch.targets),
                step_size=per_image(how.step_size, batch.images, "step_size"),
                num_steps=per_image(how.num_steps, batch.images, "num_steps", torch.int64),
                random_start=how.random_start,
                norm=setup.norm,
                momentum=how.momentum,
                most_steps=how.num_steps if isinstance(how.num_steps, int) else how.most_steps,
                seeds=how.block_seeds or (setup.seed,),
                given_start=_shaped("start", how.start, batch.images),
                gradient=_shaped("gradient", how.gradient, batch.images),
            ),
            source,
        )


@dataclass(frozen=True)
class _Climb:
    """A batch and how it moves; step sizes and counts are [B]."""

    batch: AttackBatch
    loss: Loss
    step_size: Tensor
    num_steps: Tensor
    random_start: RandomStart
    norm: str
    momentum: float
    most_steps: int | None
    seeds: Sequence[int]
    given_start: Tensor | None
    gradient: Tensor | None

    def subset(self, keep: Tensor) -> _Climb:
        return replace(
            self,
            batch=self.batch.subset(keep),
            loss=of_rows(self.loss, keep),
            step_size=self.step_size[keep],
            num_steps=self.num_steps[keep],
            given_start=None if self.given_start is None else self.given_start[keep],
            gradient=None if self.gradient is None else self.gradient[keep],
        )

    def start(self, restart: int) -> Tensor:
        batch = self.batch
        if self.given_start is not None:
            given = self.given_start.float()
            return norms.project(
                given, batch.images, batch.epsilon, self.norm, batch.low, batch.high
            )
        if not self.random_start:
            return batch.images.clone()
        blocks = zip(self.seeds, batch.sample_index.chunk(len(self.seeds)), strict=True)
        offset = torch.cat([self._offset(seed, index, restart) for seed, index in blocks])
        if self.random_start == "normal":
            offset = norms.shrink(offset, batch.epsilon, self.norm)
        else:
            offset = offset * norms.per_pixel(batch.epsilon)
        return (batch.images + offset).clamp_(batch.low, batch.high)

    def _offset(self, seed: int, sample_index: Tensor, restart: int) -> Tensor:
        """Start noise of some rows: normal, or uniform in the ball of radius 1."""
        shape = tuple(self.batch.images.shape[1:])
        if self.random_start == "normal":
            noise = moe_kernels.uniform_noise(seed, sample_index, shape, restart=restart)
            return 0.001 * norms.normal_quantiles(noise)
        return norms.uniform_in_ball(seed, sample_index, shape, self.norm, stream=restart)

    def solve(
        self,
        source: GradientSource,
        *,
        restart: int,
        seen: Callable[[int, Tensor], object] = lambda number, adversarial: None,
    ) -> Tensor:
        """The images after the last step; ``seen(k, images)`` is called after step k = 1, 2, ..."""
        adversarial = self.start(restart)
        batch, (objective, rows) = self.batch, parted(self.loss, self.batch.labels)
        step = AscentStep(objective, self.norm, self.momentum, batch.low, batch.high)
        velocity = torch.zeros_like(adversarial) if self.momentum else adversarial.new_zeros(0)
        state = adversarial, velocity, self.num_steps.clone()
        given = batch.images, batch.epsilon, self.step_size, rows
        first = 1
        if self.gradient is not None:
            step.follow(self.gradient, *state, *given[:3])
            seen(first, adversarial)
            first = 2
        if self.most_steps is not None and adversarial.is_cuda:
            last = self.most_steps
        else:
            last = int(self.num_steps.max())
        with source.loop(step, state, given) as (take_step, (current, *_)):
            for number in range(first, last + 1):
                take_step()
                seen(number, current)
        return adversarial


@dataclass(frozen=True)
class AscentStep:
    """Move images along a gradient; see `dwf.attacks.source.Step`.

    Tensors: adversarial and velocity [B, C, H, W], the number of steps that each image has left
    [B]; then images [B, C, H, W], their radii and step sizes [B], and the rows of the loss.
    """

    objective: Objective
    norm: str
    momentum: float
    low: float
    high: float

    def __call__(self, source: GradientSource, *tensors: Tensor) -> None:
        adversarial, *_, rows = tensors
        gradient, _ = source.gradient_and_logits(adversarial, rows, self.objective.of(rows))
        self.follow(gradient, *tensors[:-1])

    def follow(
        self,
        gradient: Tensor,
        adversarial: Tensor,
        velocity: Tensor,
        num_left: Tensor,
        images: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
    ) -> None:
        """The step, along this gradient."""
        if self.momentum:
            gradient = velocity.mul_(self.momentum).add_(_normalized(gradient))
        # a step of length zero leaves an image exactly where it is
        length = step_size * (num_left > 0)
        num_left.sub_(1)
        if self.norm == "linf":
            moe_kernels.linf_step_(
                adversarial, gradient, images, epsilon, length, self.low, self.high
            )
            return
        far = norms.per_pixel(length)
        moved = adversarial + far * norms.ascent(gradient, self.norm)
        inside = norms.project(moved, images, epsilon, self.norm, self.low, self.high)
        adversarial.copy_(torch.where(far > 0, inside, adversarial))


def _normalized(gradient: Tensor) -> Tensor:
    """Divided by the mean of its absolute values; zero stays zero."""
    gradient = gradient.nan_to_num(0.0)
    size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    return torch.where(size > 0, gradient / size, 0.0)


def _best_of_restarts(climb: _Climb, source: GradientSource, num_restarts: int) -> Tensor:
    best = climb.batch.images.clone()
    best_loss = torch.full_like(climb.batch.epsilon, -torch.inf)
    open_ = torch.arange(len(best), device=best.device)
    for restart in range(num_restarts):
        part = climb.subset(open_)
        found = part.solve(source, restart=restart)
        logits = source.verdict_logits(found, part.batch.labels)
        loss = part.loss(logits, part.batch.labels)
        fooled = part.batch.fooled(logits)
        better = fooled | (loss > best_loss[open_])
        best[open_[better]] = found[better]
        best_loss[open_[better]] = loss[better].float()
        open_ = open_[~fooled]
        if len(open_) == 0:
            break
    return best


def _shaped(name: str, value: Tensor | None, images: Tensor) -> Tensor | None:
    """The value, detached, if it has the images' shape; else ImageError."""
    if value is None:
        return None
    if value.shape != images.shape or not value.is_floating_point():
        raise ImageError(
            f"{name}: expected floats in the shape of images {list(images.shape)}, "
            f"found {value.dtype} {list(value.shape)}"
        )
    return value.detach()
