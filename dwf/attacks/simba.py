"""SimBA: change one pixel of one channel at a time, and keep what raises the margin.

    order: a random permutation of all values of an image, for each image its own
    query: the next value less step_size, inside the ball; if that does not help, more step_size

It needs logits and no gradient. Ours against the paper: the score is the margin between logits, not
the label's probability, which saturates; steps are projected into the ball. After the last value of
the order comes the first again. The order is noise stream 0.

Source: Guo et al., arXiv:1905.07121, algorithm 1, in the pixel basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks.losses import Model
from dwf.attacks.norms import per_pixel, project
from dwf.attacks.setup import AttackBatch, Frame, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource, with_company
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import check_count, check_positive

# Queries between two verdicts.
_CHUNK = 64


def simba(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    num_queries: int = 5000,
    step_size: float = 0.2,
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Search the ball around each image one value at a time, by queries alone.

    Searches by the plan if ``model`` offers one; the model itself judges, every 64 queries. An
    image that fools it comes back, and costs nothing from then on; the others keep all changes that
    raised the margin.

    Args:
        norm: of the ball, "linf" or "l2".
        num_queries: logits of each image, that of the image itself included.
        step_size: by how much a value changes; in L-inf no more than epsilon counts.
        targets: [B], classes that the images are to be taken for; only these count as wrong.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    num_queries = check_count(num_queries, "num_queries")
    step_size = float(check_positive(step_size, "step_size"))
    setup = packed(Setup, locals())
    with setup.opened() as (batch, source):
        found = batch.images.clone()
        if len(batch) == 0:
            return found
        done = batch.fooled(first_verdict(batch, source))
        step = _Query(norm, step_size, batch.frame)
        rows = torch.nonzero(with_company(~done))[:, 0]
        if len(rows) == 0:
            return found
        state = _beginning(source, batch.subset(rows))
        given = _given(batch.subset(rows), seed)
        for first in range(1, num_queries, _CHUNK):
            with source.loop(step, state, given) as (take_step, _):
                for _ in range(first, min(first + _CHUNK, num_queries)):
                    take_step()
            best, margin = state[:2]
            open_ = ~done[rows]
            found[rows[open_]] = best[open_]
            claimed = torch.nonzero(open_ & (margin > 0))[:, 0]
            if len(claimed) == 0:
                continue
            at = rows[claimed]
            fooled = batch.subset(at).are_fooled(source, best[claimed])
            done[at[fooled]] = True
            # a plan that overflows where the model does not: nothing could ever improve on that
            margin[claimed[~fooled & margin[claimed].isinf()]] = -torch.inf
            if bool(done.all()):
                break
            keep = with_company(~done[rows])
            rows = rows[keep]
            state, given = (tuple(x[keep] for x in tensors) for tensors in (state, given))
        return setup.held(found)


def _beginning(source: GradientSource, batch: AttackBatch) -> tuple[Tensor, ...]:
    """What a query changes: images, their margins, place in the order, and the sign to try."""
    margin = batch.searched_margin(source, batch.images)
    sign = torch.full_like(batch.epsilon, -1.0)
    return batch.images.clone(), margin, torch.zeros_like(batch.labels), sign


def _given(batch: AttackBatch, seed: int) -> tuple[Tensor, ...]:
    """What a query reads; the order is [B, C * H * W]."""
    num_values = batch.images[0].numel()
    noise = moe_kernels.uniform_noise(seed, batch.sample_index, (num_values,))
    order = noise.argsort(dim=1, stable=True)
    return *batch.tensors, order


@dataclass(frozen=True)
class _Query:
    """One query, and the change it keeps; see `dwf.attacks.source.Step`."""

    norm: str
    step_size: float
    frame: Frame

    def __call__(
        self,
        source: GradientSource,
        best: Tensor,
        margin: Tensor,
        place: Tensor,
        sign: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        targets: Tensor,
        order: Tensor,
    ) -> None:
        batch = self.frame.batch(images, labels, epsilon, targets)
        at = order.gather(1, (place % order.shape[1]).unsqueeze(1))
        change = (sign * self.step_size).unsqueeze(1)
        moved = best.flatten(1).scatter_add(1, at, change).view_as(best)
        tried = project(moved, images, epsilon, self.norm, batch.low, batch.high)
        tried_margin = batch.searched_margin(source, tried)
        better = tried_margin > margin
        best.copy_(tried.where(per_pixel(better), best))
        margin.copy_(tried_margin.where(better, margin))
        to_next = better | (sign > 0)
        place.add_(to_next)
        sign.copy_(torch.where(to_next, -1.0, -sign))
