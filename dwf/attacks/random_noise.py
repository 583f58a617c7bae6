"""Try uniform points of the ball around an image: the least that an attack has to beat.

Where chance breaks an image that attacks do not, the attacks are blind (Carlini et al.,
arXiv:1902.06705). Draw number d of an image is noise stream d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwf.attacks.losses import Model
from dwf.attacks.norms import per_pixel, uniform_in_ball
from dwf.attacks.setup import Setup, first_verdict, packed
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
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Look at uniform points of the ball around each image, until one fools the model.

    Points are clamped to [0, 1]. An image that is wrong already is returned as it is; if no draw
    breaks it, the draw with the largest margin loss is returned. Where the model has a plan, the
    plan searches, and the model itself judges each draw that fools the plan.

    Args:
        norm: of the ball, "linf" or "l2".
        num_draws: points looked at for each image that stands.
        targets: [B], classes that the images are to be taken for; only these count as wrong.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    num_draws = check_count(num_draws, "num_draws")
    setup = packed(Setup, locals())
    with setup.opened() as (batch, source):
        best = batch.images.clone()
        if len(batch) == 0:
            return best
        best_loss = torch.full_like(batch.epsilon, -torch.inf)
        rows = (~batch.fooled(first_verdict(batch, source))).nonzero().flatten()
        standing, shape = batch.subset(rows), batch.images.shape[1:]
        for draw in range(num_draws):
            if len(rows) == 0:
                break
            delta = uniform_in_ball(seed, standing.sample_index, shape, norm, stream=draw)
            points = standing.images + delta * per_pixel(standing.epsilon)
            logits = source.logits(points.clamp_(standing.low, standing.high))
            loss = standing.margin(logits)
            better = loss > best_loss[rows]
            best[rows[better]] = points[better]
            best_loss[rows[better]] = loss[better]
            claimed = ((loss >= 0) | ~logits.isfinite().all(dim=1)).nonzero().flatten()
            if len(claimed) == 0:
                continue
            fooled = torch.zeros_like(better)
            fooled[claimed] = standing.subset(claimed).are_fooled(source, points[claimed])
            best[rows[fooled]] = points[fooled]
            rows, standing = rows[~fooled], standing.subset(~fooled)
        return setup.held(best)
