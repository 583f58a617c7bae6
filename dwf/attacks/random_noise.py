"""Uniform draws from the ball: what a real attack has to beat.

Draw number d of an image is noise stream d. Where chance breaks what attacks do not, the attacks
are blind (Carlini et al., arXiv:1902.06705).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwf.attacks.losses import Model, margin
from dwf.attacks.norms import per_pixel, uniform_in_ball
from dwf.attacks.setup import searching
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.checks import check_count


def random_noise(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    num_draws: int = 200,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    clamp: str = "pixels",
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Look at uniform points of the ball around each image, until one fools the model.

    Points are clamped to [0, 1]. An image that is wrong already is returned as it is; one that no
    draw breaks becomes the draw with the largest margin loss. A model with a plan is searched by
    it; the model itself judges each draw that fools the plan.

    Args:
        norm: of the ball, "linf" or "l2".
        num_draws: points looked at for each image that stands.
        model, images, labels, epsilon, ...: as for :func:`dwf.attacks.pgd`.
    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    check_count(num_draws, "num_draws")
    with searching(
        model,
        images,
        labels,
        epsilon=epsilon,
        norm=norm,
        loss=margin,
        bn_mode=bn_mode,
        eot_samples=eot_samples,
        seed=seed,
        sample_index=sample_index,
        clamp=clamp,
        allow_probabilities=allow_probabilities,
        report=report,
    ) as (batch, source):
        best = batch.images.clone()
        if len(batch) == 0:
            return best
        best_loss = torch.full_like(batch.epsilon, -torch.inf)
        rows = (~source.fooled(batch.images, batch.labels)).nonzero().flatten()
        standing, shape = batch.subset(rows), batch.images.shape[1:]
        for draw in range(num_draws):
            if len(rows) == 0:
                break
            delta = uniform_in_ball(seed, standing.sample_index, shape, norm, stream=draw)
            points = standing.images + delta * per_pixel(standing.epsilon)
            logits = source.logits(points.clamp_(standing.low, standing.high))
            loss = margin(logits, standing.labels)
            better = loss > best_loss[rows]
            best[rows[better]] = points[better]
            best_loss[rows[better]] = loss[better]
            claimed = ((loss >= 0) | ~logits.isfinite().all(dim=1)).nonzero().flatten()
            if len(claimed) == 0:
                continue
            fooled = torch.zeros_like(better)
            fooled[claimed] = source.fooled(points[claimed], standing.labels[claimed])
            best[rows[fooled]] = points[fooled]
            rows, standing = rows[~fooled], standing.subset(~fooled)
        return best
