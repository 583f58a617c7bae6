"""Find the smallest perturbation that fools a model: what FAB and Carlini-Wagner share.

Both walk near the decision boundary and keep the closest image that fools the model, in `Closest`.
With an epsilon, an image is done at the first one inside its ball; without, they tell how far the
boundary is, see :func:`minimum_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwf.attacks.losses import Model
from dwf.attacks.norms import length
from dwf.attacks.setup import AttackBatch, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource
from dwf.attacks.space import AttackSpace
from dwf.attacks.target import AttackTarget, inner_model
from dwf.checks import LabelError


class NearestAdversarial(NamedTuple):
    """Images [B, C, H, W] that fool a model and their distances [B], inf where none was found."""

    images: Tensor
    distance: Tensor


def minimum_norm(
    attack: Callable[..., Tensor],
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    **settings: Any,
) -> NearestAdversarial:
    """The smallest perturbation that an attack finds, whatever its size.

    ``attack`` is :func:`dwf.attacks.fab`, :func:`dwf.attacks.carlini_wagner`, or another that takes
    ``epsilon=None``; ``norm`` and ``settings`` go to it. The distance is 0 where the model is wrong
    already. It is an upper bound: a better attack may find less. With ``targets`` only these count
    as wrong.
    """
    found = attack(model, images, labels, epsilon=None, norm=norm, **settings)
    given = {"images": images, "labels": labels, "epsilon": 1.0, "norm": norm, **settings}
    setup = packed(Setup, {**given, "model": _without_plan(model), "report": None})
    with setup.opened() as (batch, source):
        if len(batch) == 0:
            return NearestAdversarial(found, batch.epsilon)
        distance = length(found - batch.images, norm)
        # an image comes back as it is if nothing was found, and if there was nothing to look for
        nothing = (distance == 0) & ~batch.are_fooled(source, batch.images)
        return NearestAdversarial(found, distance.masked_fill(nothing, torch.inf))


def _without_plan(model: Model | AttackTarget) -> Model | AttackTarget:
    """The same model, in its space if it has one, with no plan made for it."""
    if isinstance(model, AttackSpace):
        return replace(model, model=_without_plan(model.model))
    inner = model.model if isinstance(model, AttackTarget) else inner_model(model)
    return AttackTarget(inner, reason="the model itself is the judge")


class Closest:
    """The closest image known to fool the model, for each image of a batch, and its distance.

    Attributes:
        images: [B, C, H, W], the batch's own where none is known.
        distance: [B] float32, inf where none is known; 0 where the image itself fools the model.
        bounded: only images within the batch's epsilon count, and the first of these is enough.
    """

    def __init__(
        self, batch: AttackBatch, source: GradientSource, norm: str, *, bounded: bool
    ) -> None:
        self.batch = batch
        self.source = source
        self.norm = norm
        self.bounded = bounded
        self.images = batch.images.clone()
        self.distance = torch.full_like(batch.epsilon, torch.inf)
        if len(batch) == 0:
            return
        logits = first_verdict(batch, source)
        if batch.targets is not None and bool((batch.targets == batch.labels).any()):
            raise LabelError("targets: expected classes other than the labels")
        self.distance[batch.fooled(logits)] = 0.0

    def is_open(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Whether there is something left to find, [R] for these rows."""
        if self.bounded:
            return self.distance[rows] > self.batch.epsilon[rows]
        return self.distance[rows] > 0

    def offer(self, rows: Tensor, found: Tensor, fooled: Tensor) -> Tensor:
        """Keep what is closer and fools the model; true where nothing speaks against ``fooled``.

        The search says who is fooled, [R] for the rows; only what would be kept is worth asking the
        model itself.
        """
        distance = length(found - self.batch.images[rows], self.norm)
        closer = fooled & (distance < self.distance[rows])
        if self.bounded:
            closer &= distance <= self.batch.epsilon[rows]
        asked = torch.nonzero(closer)[:, 0]
        if len(asked) == 0:
            return fooled
        at = rows[asked]
        wrong = self.batch.subset(at).are_fooled(self.source, found[asked])
        self.images[at[wrong]] = found[asked[wrong]]
        self.distance[at[wrong]] = distance[asked[wrong]]
        return fooled.index_fill(0, asked[~wrong], False)
