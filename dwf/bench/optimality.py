"""How near an attack comes to the best of all attacks: AttackBench's optimality.

Source: Cina et al., arXiv:2404.19460.
"""

from __future__ import annotations

from torch import Tensor


def optimality(distance: Tensor, best: Tensor) -> float:
    """1 - (A - A*) / (A_0 - A*) for distances [N] of the closest images that fool a model.

    A is the area under the attack's curve of robust accuracy over epsilon, up to the largest of the
    best distances; A* that of the best distances, A_0 that of an attack that finds nothing. Such an
    area is a mean of distances, cut at the end of the best curve.

    Args:
        distance: of one attack; inf where it found nothing, 0 where the model is wrong already.
        best: of all attacks, each image's smallest.
    Raises:
        ValueError: an image has no best distance, or an attack is better than the best.
    """
    if not bool(best.isfinite().all()):
        raise ValueError(f"best: {int(best.isinf().sum())} images that no attack broke")
    if bool((distance < best).any()):
        raise ValueError("best: an attack found an image that is closer")
    end = float(best.max())
    area, least = float(distance.clamp(max=end).mean()), float(best.mean())
    nothing = end * float((best > 0).double().mean())
    return 1 - (area - least) / (nothing - least) if nothing > least else 1.0
