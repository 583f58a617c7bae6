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

import torch
from torch import Tensor

from dwf.attacks import norms
from dwf.attacks.losses import (
    LOSSES,
    TARGETED_DLR,
    Loss,
    Model,
    Objective,
    check_loss,
    objective,
    of_rows,
    parted,
)
from dwf.attacks.prospect import is_hopeless
from dwf.attacks.setup import AttackBatch, Frame, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource, with_company
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import ConfigError, check_count

STREAMS = {"ce": 1 << 20, "dlr": 2 << 20, "margin": 3 << 20, TARGETED_DLR: 4 << 20}
STREAM_OF_ANOTHER_LOSS = 5 << 20
MOMENTUM = 0.75
RHO = 0.75  # the share of steps that have to raise the loss
CROSSING = ("dlr", "margin", TARGETED_DLR)  # zero where the answer changes


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
    gives_up: bool = False,
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
        gives_up: an image leaves a run on logits' differences at the checkpoint where its progress
            says that the run would not get there; see :mod:`dwf.attacks.prospect`.

    Other arguments, result and errors are as in :func:`dwf.attacks.pgd`.
    """
    check_loss(loss)
    num_steps = check_count(num_steps, "num_steps")
    num_restarts = check_count(num_restarts, "num_restarts")
    if targets is not None and num_target_classes is not None:
        raise ConfigError("num_target_classes: classes are chosen by targets already")
    if num_target_classes is None and targets is None and loss == TARGETED_DLR:
        num_target_classes = 9
    if num_target_classes is not None:
        num_target_classes = check_count(num_target_classes, "num_target_classes")
    setup = packed(Setup, locals())
    with setup.opened() as (batch, source):
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
        given_up = torch.zeros_like(is_open)
        for run in range(len(aims) * num_restarts):
            rows = is_open.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            part, aim = batch.subset(rows), aims[run // num_restarts]
            found, value, fooled, left = _ascend(
                source,
                part,
                objective(loss, part.labels, None if aim is None else aim[rows]),
                norm,
                num_steps,
                seed=seed,
                stream=_stream(loss) + run,
                gives_up=gives_up and loss in CROSSING,
            )
            better = fooled | (value > highest[rows])
            result[rows[better]] = found[better]
            highest[rows[better]] = value[better]
            is_open[rows] = ~fooled
            given_up[rows] |= left
        if report is not None and gives_up:
            report.given_up = given_up & is_open
        return setup.held(result)


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
    """What a step changes; [B] or [B, C, H, W]."""

    adversarial: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor  # the loss now
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    num_rises: Tensor
    candidate: Tensor
    candidate_margin: Tensor  # -inf where there is none
    momentum: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass
class _Run:
    """A run on the images that are still attacked; tensors are [B]."""

    batch: AttackBatch
    loss: Loss
    rows: Tensor  # where each is in the whole run
    step: Tensor
    first_value: Tensor  # the loss at the start
    checked_value: Tensor  # the best loss at the last checkpoint
    is_halved: Tensor  # whether the step was halved there
    at: _State

    def subset(self, keep: Tensor) -> _Run:
        return _Run(
            self.batch.subset(keep),
            of_rows(self.loss, keep),
            self.rows[keep],
            self.step[keep],
            self.first_value[keep],
            self.checked_value[keep],
            self.is_halved[keep],
            _State(*(x[keep] for x in self.at.tensors)),
        )

    def take(self, source: GradientSource, norm: str, num_steps: int) -> None:
        """Take so many steps."""
        move, given = self._move(norm)
        with source.loop(move, self.at.tensors, given) as (take_step, _):
            for _ in range(num_steps):
                take_step()

    def begin(self, source: GradientSource, norm: str) -> None:
        """Loss and gradient at the start."""
        move, given = self._move(norm)
        move.look(source, *self.at.tensors, *given)
        self.at.num_rises.zero_()
        self.first_value = self.at.best_value.clone()
        self.checked_value = self.first_value.clone()

    def _move(self, norm: str) -> tuple[_Move, tuple[Tensor, ...]]:
        batch, (objective, rows) = self.batch, parted(self.loss, self.batch.labels)
        return _Move(objective, norm, batch.frame), (*batch.tensors, self.step, rows)

    def adapt(self, window: int) -> None:
        """At a checkpoint: halve the step, and go back to the best point, where that is due."""
        at = self.at
        halve = at.num_rises <= RHO * window
        halve |= ~self.is_halved & (self.checked_value >= at.best_value)
        back = norms.per_pixel(halve)
        self.step = torch.where(halve, self.step / 2, self.step)
        at.adversarial = torch.where(back, at.best, at.adversarial)
        at.gradient = torch.where(back, at.best_gradient, at.gradient)
        self.is_halved, self.checked_value = halve, at.best_value.clone()
        at.num_rises = torch.zeros_like(at.num_rises)


@dataclass(frozen=True)
class _Move:
    """A step of Auto-PGD on the tensors of a `_State`; see `dwf.attacks.source.Step`."""

    objective: Objective
    norm: str
    frame: Frame

    def __call__(self, source: GradientSource, *tensors: Tensor) -> None:
        self.move(*tensors)
        self.look(source, *tensors)

    def move(self, *tensors: Tensor) -> None:
        """Along the gradient, and on in the direction of the last step."""
        at, (images, _, epsilon, _, length, _) = _State(*tensors[:_SIZE]), tensors[_SIZE:]
        low, high = self.frame.low, self.frame.high

        def project(moved: Tensor) -> Tensor:
            return norms.project(moved, images, epsilon, self.norm, low, high)

        here, momentum = at.adversarial.clone(), norms.per_pixel(at.momentum)
        z = project(here + norms.per_pixel(length) * norms.ascent(at.gradient, self.norm))
        ahead = here + momentum * (z - here) + (1 - momentum) * (here - at.previous)
        at.adversarial.copy_(project(ahead))
        at.previous.copy_(here)
        at.momentum.fill_(MOMENTUM)

    def look(self, source: GradientSource, *tensors: Tensor) -> None:
        """Loss and gradient here; the best points so far."""
        at, (*of_batch, _, rows) = _State(*tensors[:_SIZE]), tensors[_SIZE:]
        loss = self.objective.of(rows)
        gradient, logits = source.gradient_and_logits(at.adversarial, rows, loss)
        at.gradient.copy_(gradient)
        value = loss(logits, rows).float()
        at.num_rises += value > at.value
        at.value.copy_(value)
        better = value > at.best_value
        _put(at.best, better, at.adversarial)
        _put(at.best_gradient, better, gradient)
        _put(at.best_value, better, value)
        # what is not finite counts as wrong, but only just: the model has to confirm it
        batch = self.frame.batch(*of_batch)
        wrongness = batch.margin(logits).nan_to_num(0.0, 0.0, 0.0)
        wrong = batch.fooled(logits) & (wrongness > at.candidate_margin)
        _put(at.candidate, wrong, at.adversarial)
        _put(at.candidate_margin, wrong, wrongness)


_SIZE = len(fields(_State))


def _put(kept: Tensor, where: Tensor, new: Tensor) -> None:
    """Take over the rows [B] of ``new`` into ``kept``, in place."""
    mask = where if kept.dim() == 1 else norms.per_pixel(where)
    kept.copy_(torch.where(mask, new, kept))


def _ascend(
    source: GradientSource,
    batch: AttackBatch,
    loss: Loss,
    norm: str,
    num_steps: int,
    *,
    seed: int,
    stream: int,
    gives_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One run: images [B, C, H, W], their losses [B], who fools the model, and who was given up."""
    run = _start(source, batch, loss, norm, seed=seed, stream=stream)
    found, fooled = batch.images.clone(), torch.zeros_like(batch.labels, dtype=torch.bool)
    value, done = torch.full_like(batch.epsilon, -torch.inf), fooled.clone()
    given_up = fooled.clone()

    def let_go(run: _Run) -> _Run:
        """Show the candidates to the model; who fools it is done."""
        at = run.at
        shown = ((at.candidate_margin > -torch.inf) & ~done[run.rows]).nonzero().squeeze(1)
        if len(shown) == 0:
            return run
        confirmed = torch.zeros_like(run.rows, dtype=torch.bool)
        confirmed[shown] = run.batch.subset(shown).are_fooled(source, at.candidate[shown])
        at.candidate_margin = torch.full_like(at.candidate_margin, -torch.inf)
        if not bool(confirmed.any()):
            return run
        rows = run.rows[confirmed]
        found[rows], fooled[rows], done[rows] = at.candidate[confirmed], True, True
        return run.subset(with_company(~done[run.rows]))

    def give_up(run: _Run) -> _Run:
        """Leave who will not get there, with its best image so far."""
        at = run.at
        hopeless = is_hopeless(-run.first_value, -at.best_value) & ~done[run.rows]
        if not bool(hopeless.any()):
            return run
        rows = run.rows[hopeless]
        found[rows], value[rows] = at.best[hopeless], at.best_value[hopeless]
        given_up[rows], done[rows] = True, True
        return run.subset(with_company(~done[run.rows]))

    checkpoints = windows(num_steps)
    for window in checkpoints:
        run.take(source, norm, window)
        run.adapt(window)
        run = let_go(run)
        if gives_up:
            run = give_up(run)
        if len(run.rows) == 0:
            return found, value, fooled, given_up
    run.take(source, norm, num_steps - sum(checkpoints))
    run = let_go(run)
    left = run.subset(~done[run.rows])
    # the search may have missed by rounding what the model itself gets wrong
    found[left.rows], value[left.rows] = left.at.best, left.at.best_value
    if len(left.rows) > 0:
        fooled[left.rows] = left.batch.are_fooled(source, left.at.best)
    return found, value, fooled, given_up


def _start(
    source: GradientSource, batch: AttackBatch, loss: Loss, norm: str, *, seed: int, stream: int
) -> _Run:
    shape = tuple(batch.images.shape[1:])
    offset = norms.uniform_on_ball(seed, batch.sample_index, shape, norm, stream=stream)
    start = batch.images + norms.per_pixel(batch.epsilon) * offset
    start = start.clamp(batch.low, batch.high)
    nothing = torch.full_like(batch.epsilon, -torch.inf)
    at = _State(
        adversarial=start,
        previous=start.clone(),
        gradient=torch.zeros_like(start),
        value=nothing.clone(),
        best=start.clone(),
        best_gradient=torch.zeros_like(start),
        best_value=nothing.clone(),
        num_rises=torch.zeros_like(batch.labels),
        candidate=start.clone(),
        candidate_margin=nothing.clone(),
        momentum=torch.ones_like(batch.epsilon),  # the first step goes all the way
    )
    run = _Run(
        batch,
        loss,
        rows=torch.arange(len(batch), device=start.device),
        step=2 * batch.epsilon,
        first_value=nothing,
        checked_value=nothing,
        is_halved=torch.ones_like(batch.labels, dtype=torch.bool),
        at=at,
    )
    run.begin(source, norm)
    return run
