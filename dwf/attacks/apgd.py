"""Auto-PGD: projected gradient ascent with momentum that finds its own step sizes.

    z     = P(x_k + step * s(g(x_k)))
    x_k+1 = P(x_k + a (z - x_k) + (1 - a) (x_k - x_k-1)),    a = 0.75, and 1 in the first step

P projects to the ball and clips to the range, s(g) is sign(g) or in L2 g / |g|_2. The step starts
as 2 epsilon. At each checkpoint an image halves its own, and goes back to its best point, if the
loss rose in at most 3/4 of the steps since the last one, or if there the step was not halved and
the best loss is still the same.

Source: algorithm 1 of Croce and Hein, arXiv:2003.01690.

| the paper says | its code does | we do |
|---|---|---|
| checkpoints ceil(p_j n) with p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06) | windows of int(0.22 n) steps, then int(0.03 n) fewer each, at least int(0.06 n) | as the code; the same at 100 steps |
| counts rises from the start on | compares the first iterate with a loss of zero | as the paper |
| "fewer than 3/4" | "at most 3/4" | as the code |
| | after going back, compares the next loss with the one left behind | as the code |
| | keeps the last iterate that is classified wrong | the one of highest margin since the last checkpoint, which the model in float32 has to confirm |
| | with EoT, the loss is that of the last sample | of the mean logits |

Random numbers: run r (of a restart, or of a target class and a restart) starts from stream
``STREAMS[loss] + r`` of `moe_kernels.uniform_noise`, so that no two attacks of a suite start alike.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dwf.attacks import norms
from dwf.attacks.losses import (
    LOSSES,
    TARGETED_DLR,
    Loss,
    Model,
    TargetLoss,
    check_loss,
    objective,
)
from dwf.attacks.setup import AttackBatch, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count

STREAMS = {"ce": 1 << 20, "dlr": 2 << 20, "margin": 3 << 20, TARGETED_DLR: 4 << 20}
STREAM_OF_ANOTHER_LOSS = 5 << 20
MOMENTUM = 0.75
RHO = 0.75  # the share of steps that have to raise the loss


def apgd(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    loss: str | Loss = "ce",
    targets: Tensor | None = None,
    num_target_classes: int | None = None,
    num_steps: int = 100,
    num_restarts: int = 1,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Attack by Auto-PGD, which has no step size to be tuned.

    Returns for each image a point that the model itself, in float32, gets wrong, and otherwise the
    point of highest loss. An image that is wrong already comes back as it is. A run takes
    ``num_steps + 1`` gradients of the images that are still right; those found leave at
    checkpoints, which changes nothing for the others.

    Args:
        norm: "linf" or "l2".
        loss: "ce"; "dlr", the difference of logits ratio; "margin"; ``loss(logits, labels)`` to
            [B]; or "dlr-targeted", toward a class, which "dlr" is too where there is one. With two
            classes "dlr" is the margin, with two or three the targeted one is z_t - z_y.
        targets: [B], classes that the images are to be taken for; only these count as wrong.
        num_target_classes: without targets, a run toward each of this many wrong classes, those
            that the clean image is nearest to; any wrong class counts. At most all classes but the
            label's are taken. None: no class is aimed at, and 9 by "dlr-targeted".
        num_restarts: runs from other random starts; with target classes, of each.

    Other arguments, result and errors are as in :func:`dwf.attacks.pgd`.
    """
    check_loss(loss)
    check_count(num_steps, "num_steps")
    check_count(num_restarts, "num_restarts")
    if targets is not None and num_target_classes is not None:
        raise ConfigError("num_target_classes: classes are chosen by targets already")
    if num_target_classes is None and targets is None and loss == TARGETED_DLR:
        num_target_classes = 9
    if num_target_classes is not None:
        check_count(num_target_classes, "num_target_classes")
    with packed(Setup, locals()).opened() as (batch, source):
        result = batch.images.clone()
        if len(batch) == 0:
            return result
        logits = first_verdict(batch, source)
        aims: list[Tensor | None] = [batch.targets]
        if num_target_classes is not None:
            nearest = nearest_classes(logits, batch.labels)[:, :num_target_classes]
            aims = list(nearest.unbind(dim=1))
        highest = torch.full_like(batch.epsilon, -torch.inf)
        is_open = ~batch.fooled(logits)
        for run in range(len(aims) * num_restarts):
            rows = is_open.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            part, aim = batch.subset(rows), aims[run // num_restarts]
            found, value, fooled = _ascend(
                source,
                part,
                objective(loss, part.labels, None if aim is None else aim[rows]),
                norm,
                num_steps,
                seed=seed,
                stream=_stream(loss) + run,
            )
            better = fooled | (value > highest[rows])
            result[rows[better]] = found[better]
            highest[rows[better]] = value[better]
            is_open[rows] = ~fooled
        return result


def nearest_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """All classes but the label, by falling logit, [B, K - 1]."""
    own = logits.scatter(1, labels.unsqueeze(1), torch.inf)
    return own.argsort(dim=1, descending=True, stable=True)[:, 1:]


def _stream(loss: str | Loss) -> int:
    """The noise stream of the first run with this loss, given by name or as a function."""
    names = {function: name for name, function in LOSSES.items()}
    name = loss if isinstance(loss, str) else names.get(loss, "")
    return STREAMS.get(name, STREAM_OF_ANOTHER_LOSS)


def windows(num_steps: int) -> list[int]:
    """Steps from each checkpoint to the next, as many as fit."""
    window, smallest = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
    less, left, found = max(int(0.03 * num_steps), 1), num_steps, []
    while window <= left:
        found.append(window)
        left -= window
        window = max(window - less, smallest)
    return found


@dataclass
class _State:
    """The images of a run that the model still gets right; tensors are [B] or [B, C, H, W]."""

    batch: AttackBatch
    loss: Loss
    rows: Tensor  # where each is in the whole run
    adversarial: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor  # the loss now
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    step: Tensor
    num_rises: Tensor
    checked_value: Tensor  # the best loss at the last checkpoint
    is_halved: Tensor  # whether the step was halved there
    candidate: Tensor
    candidate_margin: Tensor  # -inf where there is none

    def subset(self, keep: Tensor) -> _State:
        return _State(*(_subset(getattr(self, f.name), keep) for f in fields(self)))

    def move(self, norm: str, momentum: float) -> None:
        def project(moved: Tensor) -> Tensor:
            batch = self.batch
            return norms.project(moved, batch.images, batch.epsilon, norm, batch.low, batch.high)

        here = self.adversarial
        z = project(here + norms.per_pixel(self.step) * norms.ascent(self.gradient, norm))
        ahead = here + momentum * (z - here) + (1 - momentum) * (here - self.previous)
        self.adversarial, self.previous = project(ahead), here

    def look(self, source: GradientSource) -> None:
        """Loss and gradient here; the best points so far."""
        labels = self.batch.labels
        self.gradient, logits = source.gradient_and_logits(self.adversarial, labels, self.loss)
        value = self.loss(logits, labels).float()
        self.num_rises += value > self.value
        self.value = value
        better = value > self.best_value
        here = norms.per_pixel(better)
        self.best = torch.where(here, self.adversarial, self.best)
        self.best_gradient = torch.where(here, self.gradient, self.best_gradient)
        self.best_value = torch.where(better, value, self.best_value)
        # what is not finite counts as wrong, but only just: the model has to confirm it
        wrongness = self.batch.margin(logits).nan_to_num(0.0, 0.0, 0.0)
        wrong = self.batch.fooled(logits) & (wrongness > self.candidate_margin)
        self.candidate = torch.where(norms.per_pixel(wrong), self.adversarial, self.candidate)
        self.candidate_margin = torch.where(wrong, wrongness, self.candidate_margin)

    def adapt(self, window: int) -> None:
        """At a checkpoint: halve the step, and go back to the best point, where that is due."""
        halve = self.num_rises <= RHO * window
        halve |= ~self.is_halved & (self.checked_value >= self.best_value)
        back = norms.per_pixel(halve)
        self.step = torch.where(halve, self.step / 2, self.step)
        self.adversarial = torch.where(back, self.best, self.adversarial)
        self.gradient = torch.where(back, self.best_gradient, self.gradient)
        self.is_halved, self.checked_value = halve, self.best_value
        self.num_rises = torch.zeros_like(self.num_rises)


def _subset(value: Any, keep: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[keep]
    return value.subset(keep) if isinstance(value, AttackBatch | TargetLoss) else value


def _ascend(
    source: GradientSource,
    batch: AttackBatch,
    loss: Loss,
    norm: str,
    num_steps: int,
    *,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run: images [B, C, H, W], their losses [B], and which fool the model, [B] bool."""
    state = _start(source, batch, loss, norm, seed=seed, stream=stream)
    found, fooled = batch.images.clone(), torch.zeros_like(batch.labels, dtype=torch.bool)
    value = torch.full_like(batch.epsilon, -torch.inf)

    def let_go(state: _State) -> _State:
        """Show the candidates to the model; who fools it is done."""
        shown = (state.candidate_margin > -torch.inf).nonzero().squeeze(1)
        if len(shown) == 0:
            return state
        confirmed = torch.zeros_like(state.rows, dtype=torch.bool)
        confirmed[shown] = state.batch.subset(shown).are_fooled(source, state.candidate[shown])
        state.candidate_margin = torch.full_like(state.candidate_margin, -torch.inf)
        if not bool(confirmed.any()):
            return state
        rows = state.rows[confirmed]
        found[rows], fooled[rows] = state.candidate[confirmed], True
        return state.subset(~confirmed)

    left, next_windows = 0, iter(windows(num_steps))
    for k in range(num_steps):
        if left == 0:
            left = window = next(next_windows, num_steps)
        state.move(norm, MOMENTUM if k > 0 else 1.0)
        state.look(source)
        left -= 1
        if left == 0:
            state.adapt(window)
            state = let_go(state)
            if len(state.rows) == 0:
                return found, value, fooled
    state = let_go(state)
    # the search may have missed by rounding what the model itself gets wrong
    found[state.rows], value[state.rows] = state.best, state.best_value
    if len(state.rows) > 0:
        fooled[state.rows] = state.batch.are_fooled(source, state.best)
    return found, value, fooled


def _start(
    source: GradientSource, batch: AttackBatch, loss: Loss, norm: str, *, seed: int, stream: int
) -> _State:
    shape = tuple(batch.images.shape[1:])
    offset = norms.uniform_on_ball(seed, batch.sample_index, shape, norm, stream=stream)
    start = batch.images + norms.per_pixel(batch.epsilon) * offset
    start = start.clamp(batch.low, batch.high)
    nothing = torch.full_like(batch.epsilon, -torch.inf)
    state = _State(
        batch,
        loss,
        rows=torch.arange(len(batch), device=start.device),
        adversarial=start,
        previous=start,
        gradient=torch.zeros_like(start),
        value=nothing,
        best=start,
        best_gradient=torch.zeros_like(start),
        best_value=nothing,
        step=2 * batch.epsilon,
        num_rises=torch.zeros_like(batch.labels),
        checked_value=nothing,
        is_halved=torch.ones_like(batch.labels, dtype=torch.bool),
        candidate=start,
        candidate_margin=nothing,
    )
    state.look(source)
    state.num_rises = torch.zeros_like(batch.labels)
    state.checked_value = state.best_value
    return state
