"""Find the smallest perturbation that fools a model: what FAB, DDN and CW share.

They walk near the decision boundary and keep the closest image that fools the model, in `Closest`.
With an epsilon, an image is done at the first one inside its ball; without, they tell how far the
boundary is, see :func:`minimum_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from dwf.checks import ConfigError, check_count, check_positive

_ON_THE_WAY = 8


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
    num_radii: int | None = None,
    largest: float | None = None,
    **settings: Any,
) -> NearestAdversarial:
    """The smallest perturbation that an attack finds, whatever its size.

    ``attack`` is :func:`dwf.attacks.fab`, :func:`dwf.attacks.ddn`, or another that takes
    ``epsilon=None``; ``norm`` and ``settings`` go to it. The distance is 0 where the model is wrong
    already. It is an upper bound: a better attack may find less. With ``targets`` only these count
    as wrong.

    Args:
        num_radii: for an attack that needs a radius, as :func:`dwf.attacks.apgd`: run it at so
            many, each halfway between the largest that failed and the closest image found.
        largest: the radius that the search begins with half of; by default 1 in L-inf, and in L2
            a quarter of the distance from black to white.
    """
    given = {"images": images, "labels": labels, "epsilon": 1.0, "norm": norm, **settings}
    setup = packed(Setup, {**given, "model": without_plan(model), "report": None})
    if num_radii is not None:
        return _bisected(
            attack, model, setup, check_count(num_radii, "num_radii"), largest, settings
        )
    if largest is not None:
        raise ConfigError("largest: goes with num_radii, the number of radii to be tried")
    found = attack(model, images, labels, epsilon=None, norm=norm, **settings)
    with setup.opened() as (batch, source):
        if len(batch) == 0:
            return NearestAdversarial(found, batch.epsilon)
        distance = length(found - batch.images, norm)
        # an image comes back as it is if nothing was found, and if there was nothing to look for
        nothing = (distance == 0) & ~batch.are_fooled(source, batch.images)
        return NearestAdversarial(found, distance.masked_fill(nothing, torch.inf))


def _bisected(
    attack: Callable[..., Tensor],
    model: Model | AttackTarget,
    setup: Setup,
    num_radii: int,
    largest: float | None,
    settings: Mapping[str, Any],
) -> NearestAdversarial:
    """The closest of what an attack finds at radii that close in on the boundary."""
    if largest is None:
        whole = math.sqrt(math.prod(setup.images.shape[1:]))
        largest = 1.0 if setup.norm == "linf" else whole / 4
    with setup.opened() as (batch, _):
        found, low = batch.images.clone(), torch.zeros_like(batch.epsilon)
    distance = torch.full_like(low, torch.inf)
    high = torch.full_like(low, check_positive(largest, "largest"))
    for _ in range(num_radii if len(found) else 0):
        radius = (low + high) / 2
        adversarial = attack(
            model, setup.images, setup.labels, epsilon=radius, norm=setup.norm, **settings
        )
        with setup.opened() as (batch, source):
            fooled = batch.are_fooled(source, adversarial)
            rows = fooled.nonzero()[:, 0]
            closer = _toward_the_image(batch.subset(rows), source, adversarial[rows])
            adversarial = adversarial.index_copy(0, rows, closer)
            far = length(adversarial - batch.images, setup.norm)
        nearer = fooled & (far < distance)
        found = torch.where(per_pixel(nearer), adversarial, found)
        distance = torch.where(nearer, far, distance)
        high = torch.where(fooled, torch.minimum(far, radius), high)
        # the closest one may lie within a radius that failed before
        low = torch.minimum(torch.where(fooled, low, radius), high)
    return NearestAdversarial(found, distance)


def _toward_the_image(batch: AttackBatch, source: GradientSource, found: Tensor) -> Tensor:
    """Of images [B, C, H, W] that fool the model, the closest seen on the way to the clean ones.

    A few passes save the radii that lie between.
    """
    if len(batch) == 0:
        return found
    low, high = torch.zeros_like(batch.epsilon), torch.ones_like(batch.epsilon)
    closest = found
    for _ in range(_ON_THE_WAY):
        share = (low + high) / 2
        asked = batch.images + per_pixel(share) * (found - batch.images)
        fooled = batch.are_fooled(source, asked)
        closest = torch.where(per_pixel(fooled), asked, closest)
        high, low = torch.where(fooled, share, high), torch.where(fooled, low, share)
    return closest


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
