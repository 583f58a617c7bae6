"""Run a suite's attacks in turn over a data set, and make a row of each.

`dwf.attacks` holds the table of attacks, the loop and the saved file; a mixture adds the attack
through its views.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dwf.attacks.ensemble import Turn, in_turn
from dwf.attacks.losses import Model
from dwf.attacks.outcomes import GIVEN_UP, NOT_ATTACKED, Outcomes, hash_of_weights, seed_of
from dwf.attacks.source import voted
from dwf.attacks.table import ATTACKS, AttackEntry
from dwf.attacks.target import AttackTarget
from dwf.data import ImageDataset
from dwf.data.batches import batch_at
from dwf.evaluation.record import GivenUp
from dwf.evaluation.result import Row
from dwf.evaluation.suites import AttackSpec
from dwf.evaluation.view_attacks import views_entry
from dwf.models.views import View
from dwf.version import __version__


def key_of(model: Model, dataset: ImageDataset, specs: Sequence[AttackSpec], seed: int) -> str:
    """A hash of everything that outcomes depend on, but for the code of the model."""
    # another version may attack otherwise
    facts: list[Any] = [__version__, [asdict(spec) for spec in specs]]
    facts += [dataset.digest, len(dataset), seed]
    facts.append(hash_of_weights(model))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def attack_in_turn(
    target: AttackTarget,
    dataset: ImageDataset,
    specs: Sequence[AttackSpec],
    outcomes: Outcomes,
    *,
    views: Sequence[View] = (),
    seed: int,
    batch_size: int,
    device: torch.device,
    num_votes: int = 1,
    allow_probabilities: bool = False,
    progress: Callable[[str], None] | None = None,
    shared: bool = False,
    to_the_end: bool = False,
) -> list[Row]:
    """Fill ``outcomes``; return a row for each attack, whose ``correct`` is what stands after it.

    Args:
        specs: they begin with "clean" and are ascending in epsilon.
        num_votes: passes whose mean logits judge a random model.
        shared: all processes of the group are here; each attacks some of the images.
        to_the_end: whoever was given up is searched to the end, see `dwf.attacks.ensemble`.

    The caller has put the model into eval mode, without gradients to weights.
    """
    table = {**ATTACKS, "views": views_entry(views, num_votes)}
    turns = [_turn(spec, table, seed, allow_probabilities) for spec in specs]

    def fetch(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return batch_at(dataset, places, device)

    in_turn(
        turns,
        outcomes,
        target=target,
        fetch=fetch,
        verdict=lambda images, labels: voted(target.model, images, num_votes),
        batch_size=batch_size,
        num_votes=num_votes,
        draws=lambda number, first: seed_of(seed, number, first),
        progress=progress,
        shared=shared,
        to_the_end=to_the_end,
    )
    return [
        _row(spec, turn, outcomes, number)
        for number, (spec, turn) in enumerate(zip(specs, turns, strict=True))
    ]


def _turn(
    spec: AttackSpec,
    table: Mapping[str, AttackEntry],
    seed: int,
    allow_probabilities: bool,
) -> Turn:
    if spec.kind == "clean":
        return Turn(spec.name, None, spec.epsilon, spec.norm)
    attack = table[spec.kind]
    options: dict[str, Any] = {
        "seed": seed + spec.stream,
        "eot_samples": spec.eot_samples,
        "allow_probabilities": allow_probabilities,
        attack.length: spec.num_steps,
    }
    if spec.gives_up:
        options["gives_up"] = True
    if spec.step_size is not None:
        options["step_size"] = spec.step_size
    return Turn(spec.name, attack, spec.epsilon, spec.norm, options)


def _row(spec: AttackSpec, turn: Turn, outcomes: Outcomes, number: int) -> Row:
    counts = outcomes.counts[number]
    return Row(
        spec,
        torch.from_numpy(outcomes.standing(number + 1)),
        num_non_finite=counts.num_non_finite,
        seconds=counts.seconds,
        num_forwards=counts.num_forwards,
        num_backwards=counts.num_backwards,
        num_attacked=int((outcomes.table[number] != NOT_ATTACKED).sum()),
        num_over_budget=counts.num_over_budget,
        num_disagree=counts.num_disagree,
        broken_by=outcomes.broken_by(number, turn.attack.parts if turn.attack else ()),
        given_up=_given_up(outcomes, number) if turn.gives_up else None,
    )


def _given_up(outcomes: Outcomes, number: int) -> GivenUp:
    return GivenUp(
        num_images=int(outcomes.left_early[number].sum()),
        num_controls=len(outcomes.controls(number)),
        num_fallen=outcomes.fallen_controls(number),
        num_left=int((outcomes.table[number] == GIVEN_UP).sum()),
    )
