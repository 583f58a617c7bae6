"""Find the smallest perturbation that fools a model: what FAB and Carlini-Wagner share.

Both walk near the decision boundary and keep the closest image that fools the model, in `Closest`.
With an epsilon, an image is done at the first one inside its ball; without, they tell how far the
boundary is, see :func:`minimum_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwf.attacks.losses import Model
from dwf.attacks.norms import length, per_pixel
from dwf.attacks.setup import AttackBatch, Setup, first_verdict, packed
from dwf.attacks.source import GradientSource
from dwf.attacks.space import AttackSpace
from dwf.attacks.target import AttackTarget, inner_model


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
    setup = packed(Setup, {**given, "model": without_plan(model), "report": None})
    with setup.opened() as (batch, source):
        if len(batch) == 0:
            return NearestAdversarial(found, batch.epsilon)
        distance = length(found - batch.images, norm)
        # an image comes back as it is if nothing was found, and if there was nothing to look for
        nothing = (distance == 0) & ~batch.are_fooled(source, batch.images)
        return NearestAdversarial(found, distance.masked_fill(nothing, torch.inf))


def without_plan(model: Model | AttackTarget) -> Model | AttackTarget:
    """The same model, in its space if it has one, with no plan made for it."""
    if isinstance(model, AttackSpace):
        return replace(model, model=without_plan(model.model))
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
        self.distance[batch.fooled(logits)] = 0.0

    def is_open(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Whether there is something left to find, [R] for these rows."""
        if self.bounded:
            return self.distance[rows] > self.batch.epsilon[rows]
        return self.distance[rows] > 0

    def nothing_seen(self, rows: Tensor) -> Seen:
        """The beginning of a search from these rows."""
        images, known = self.batch.images[rows], self.distance[rows]
        limit = self.batch.epsilon[rows] if self.bounded else torch.full_like(known, torch.inf)
        return Seen(
            nearest=images,
            distance=known.clone(),
            surest=images.clone(),
            margin=torch.full_like(known, -torch.inf),
            known=known,
            limit=limit,
        )

    def ask(self, rows: Tensor, seen: Seen) -> Tensor:
        """Show the model what a search has seen, and keep what is closer and fools it.

        Returns:
            [R] bool: the rows whose model is fooled by nothing of it, against what was claimed.
        """
        refuted = seen.distance < seen.known
        for found in (seen.nearest, seen.surest):
            asked = torch.nonzero(refuted)[:, 0]
            if len(asked) == 0:
                break
            at = rows[asked]
            wrong = self.batch.subset(at).are_fooled(self.source, found[asked])
            at, new = at[wrong], found[asked[wrong]]
            self.images[at] = new
            self.distance[at] = length(new - self.batch.images[at], self.norm)
            refuted[asked[wrong]] = False
        return refuted


@dataclass
class Seen:
    """Images that a search takes for fooled and closer than what was known, one row each.

    The plan that searches may be fooled where the model is not, so beside the nearest one there is
    the surest one, of the largest margin.

    Attributes:
        nearest, surest: [R, C, H, W].
        distance: [R], of the nearest one; ``known`` where there is none.
        margin: [R], of the surest one; -inf where there is none.
        known: [R], the distance before.
        limit: [R], the largest distance that counts.
    """

    nearest: Tensor
    distance: Tensor
    surest: Tensor
    margin: Tensor
    known: Tensor
    limit: Tensor

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `note` changes, in the order of the fields."""
        return self.nearest, self.distance, self.surest, self.margin

    def note(self, x: Tensor, distance: Tensor, fooled: Tensor, margin: Tensor) -> None:
        """Take over, in place, what is nearer or surer.

        Args:
            x: [R, C, H, W], where the search is now, at ``distance`` [R].
            fooled: [R], what the search says about x; by ``margin`` [R].
        """
        fooled = fooled & (distance <= self.limit)
        nearer = fooled & (distance < self.distance)
        surer = fooled & (distance < self.known) & (margin > self.margin)
        self.nearest.copy_(torch.where(per_pixel(nearer), x, self.nearest))
        self.distance.copy_(torch.where(nearer, distance, self.distance))
        self.surest.copy_(torch.where(per_pixel(surer), x, self.surest))
        self.margin.copy_(torch.where(surer, margin, self.margin))
