"""Put lower bounds beside an evaluation, and hold the two to each other.

A proof that an image cannot fall and an attack that broke it contradict each other: either the
attack left the ball, or the model was judged wrongly, or it computes something else than it shows.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from dwf.attacks.door import ask
from dwf.attacks.losses import margin
from dwf.data.batches import at_equal_distances, batch_at
from dwf.evaluation import findings
from dwf.evaluation.bounds import certified, looks
from dwf.evaluation.exact import settled
from dwf.evaluation.job import Job
from dwf.evaluation.measures import held, seen
from dwf.evaluation.record import Certified, Finding, score
from dwf.evaluation.smoothing import ALPHA, NUM_SAMPLES, smoothed

BOUNDS = "interval bounds, linear relaxation and integer programming"
# Images that attacks and bounds leave open, and that integer programming is asked about.
NUM_SETTLED = 16
# Images whose smoothed answer is certified, a thousand passes each.
NUM_SMOOTHED = 500


def certificates(
    job: Job, stands: Tensor, *, epsilon: float, norm: str, sigma: float | None
) -> tuple[list[Certified], list[Finding]]:
    """Bounds of the model, if it is of a kind that has them; of its smoothed version if asked for.

    Args:
        stands: [N] bool, what all attacks left.
        sigma: deviation of the noise that smooths the model, in units of pixels.
    """
    started, found, doubted = time.perf_counter(), [], []
    order = _surest_first(job) if isinstance(job.model, nn.Module) else torch.arange(len(stands))
    # batch by batch: few models have bounds, and few images fit into memory
    batches = (batch_at(job.dataset, places, job.device) for places in looks(order))
    first = certified(job.model, ((x, y) for x, y, _ in batches), epsilon=epsilon, norm=norm)
    if first is not None:
        proven = torch.empty_like(first).index_copy_(0, order, first)
        open_ = order[(stands.cpu() & ~proven)[order]][:NUM_SETTLED]
        if norm == "linf" and len(open_) and isinstance(job.model, nn.Module):
            images, labels, _ = batch_at(job.dataset, open_, job.device)
            proven[open_] = settled(job.model, images, labels, epsilon=epsilon)
        broken = seen(proven & ~stands.cpu(), torch.arange(len(stands)))
        doubted = held(findings.sandwich(broken))
        seconds = round(time.perf_counter() - started, 3)
        found.append(Certified(method=BOUNDS, epsilon=epsilon, seconds=seconds, **score(proven)))
    if sigma is not None:
        job.say("certifying the smoothed model")
        started = time.perf_counter()
        some = at_equal_distances(len(stands), NUM_SMOOTHED)
        images, labels, _ = batch_at(job.dataset, some, job.device)
        its = smoothed(job.model, images, labels, sigma=sigma, seed=job.seed)
        # the L2 ball that holds the L-inf ball
        radius = epsilon if norm == "l2" else epsilon * math.sqrt(images[0].numel())
        found.append(
            Certified(
                method=f"randomized smoothing, sigma {sigma:g}, {NUM_SAMPLES} samples, "
                f"alpha {ALPHA:g}",
                epsilon=epsilon,
                of="smoothed model",
                clean=float(its.correct.double().mean()),
                seconds=round(time.perf_counter() - started, 3),
                **score(its.correct & (its.radius >= radius)),
            )
        )
    return found, doubted


def _surest_first(job: Job) -> Tensor:
    """[N] int64: places of the images by falling margin, on the CPU."""
    margins = [
        -margin(ask(job.model, images).float(), labels) for images, labels, _ in job.batches()
    ]
    return torch.cat(margins).cpu().nan_to_num(-torch.inf).argsort(descending=True, stable=True)
