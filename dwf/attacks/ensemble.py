"""Run several attacks in turn, each on the images that still stand.

    standard   APGD-CE, targeted APGD-DLR, targeted FAB, Square          (100 steps, 5,000 queries)
    plus       APGD-CE x5, APGD-DLR x5, FAB x5, Square, targeted APGD-DLR, targeted FAB
    rand       APGD-CE and APGD-DLR, each gradient the mean over 20 passes of a random model

Attacks, order, steps and restarts are as in AutoAttack; `dwf.attacks.table` lists them. A
model without the classes that a loss needs is attacked by what that attack falls back to.

An image is broken for good: by an attack, or at a smaller radius, which lies inside the larger one.
So a later attack costs only what is left, and no accuracy rises with attacks or with epsilon. An
attack of an image depends on the seed and the image's place only, so a run that was killed
continues from its saved `Outcomes` to the same result.

An attack that gives images up (``gives_up``) then searches some of them to the end, its controls,
and all of them if a control falls; see `dwf.attacks.prospect`.

Source: Croce and Hein, arXiv:2003.01690.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwf import distributed
from dwf.attacks.door import own_random_state
from dwf.attacks.losses import Model
from dwf.attacks.norms import num_over_budget
from dwf.attacks.outcomes import Counts, Outcomes
from dwf.attacks.setup import Setup, packed, per_image
from dwf.attacks.source import judge
from dwf.attacks.table import VERSIONS, AttackEntry, CraftedInParts
from dwf.attacks.target import AttackReport, AttackTarget, attack_target
from dwf.checks import check_choice

Places = np.ndarray[Any, Any]  # int64 [B], where images are in the whole set
# Places to images [B, C, H, W], labels [B] and sample_index [B] on the model's device.
Fetch = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Turn:
    """One attack of an ensemble at one radius.

    Attributes:
        name: for progress.
        attack: a row of the table; None looks at the images as they are.
        epsilon: radius, or [N] for all images.
        norm: of the radius.
        options: further arguments of the attack.
    """

    name: str
    attack: AttackEntry | None
    epsilon: float | Tensor = 0.0
    norm: str = "linf"
    options: Mapping[str, Any] = field(default_factory=dict)

    def craft(
        self,
        target: AttackTarget,
        batch: tuple[Tensor, Tensor, Tensor],
        places: Places,
        counts: Counts,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attack one batch: images; the part of the attack that made each, if it has any; who of
        them was given up, if anybody was."""
        images, labels, sample_index = batch
        if self.attack is None:
            return images, None, None
        report = AttackReport()
        crafted = self.attack(
            target,
            images,
            labels,
            epsilon=self._radius(places),
            norm=self.norm,
            sample_index=sample_index,
            report=report,
            **self.options,
        )
        counts.num_forwards += report.num_forwards
        counts.num_backwards += report.num_backwards
        if isinstance(crafted, CraftedInParts):
            return crafted.images, crafted.part, report.given_up
        return crafted, None, report.given_up

    @property
    def gives_up(self) -> bool:
        """Whether images leave its searches early."""
        return bool(self.options.get("gives_up", False))

    @property
    def to_the_end(self) -> Turn:
        """The same attack without giving up."""
        return replace(self, options={**self.options, "gives_up": False})

    def over_budget(self, images: Tensor, adversarial: Tensor, places: Places) -> int:
        """Number of adversarial pixels outside the ball or [0, 1]; see `num_over_budget`."""
        return num_over_budget(images, adversarial, self._radius(places), self.norm)

    def _radius(self, places: Places) -> float | Tensor:
        if not isinstance(self.epsilon, Tensor):
            return self.epsilon
        return self.epsilon[torch.from_numpy(places).to(self.epsilon.device)]


def in_turn(
    turns: Sequence[Turn],
    outcomes: Outcomes,
    *,
    target: AttackTarget,
    fetch: Fetch,
    verdict: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
    num_votes: int = 1,
    draws: Callable[[int, int], int | None] | None = None,
    progress: Callable[[str], None] | None = None,
    after: Callable[[int], None] | None = None,
    shared: bool = False,
    to_the_end: bool = False,
) -> None:
    """Fill ``outcomes``: each turn attacks the images that the turns before it have left.

    Args:
        turns: ascending in epsilon; the first usually looks at the images as they are.
        target: what is attacked. The caller has put it into eval mode without gradients to weights.
        fetch: places of images to a batch of them.
        verdict: (images, labels) to the float32 logits [B, K] that decide who is fooled.
        num_votes: passes that a verdict takes, for the counts.
        draws: (number of the turn, place of its batch's first image) to the seed of a random
            model's draws; None leaves the random state as it is.
        progress: called with a line of text before each batch.
        after: called with the number of each turn that is done.
        shared: every process of the group is here, with the same arguments. Each attacks some of
            the batches; the batches are those that one process would make.
        to_the_end: whoever was given up and stands all turns is searched to the end.
    """
    rank, world = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    if world > 1:
        outcomes.take_over()

    def attack(number: int, turn: Turn, todo: Places) -> None:
        counts = outcomes.counts[number]
        for start in range(rank * batch_size, len(todo), world * batch_size):
            places = todo[start : start + batch_size]
            if progress is not None:
                progress(f"{turn.name}: {start}/{len(todo)} images that stand")
            images, labels, sample_index = fetch(torch.from_numpy(places))
            started = time.perf_counter()
            # seeded for this batch: a random model draws the same, however the run got here
            seed = None if draws is None else draws(number, int(places[0]))
            with (
                contextlib.nullcontext() if seed is None else own_random_state(images.device, seed)
            ):
                adversarial, part, given_up = turn.craft(
                    target, (images, labels, sample_index), places, counts
                )
                logits = verdict(adversarial, labels)
            correct, finite = judge(logits, labels)
            counts.num_forwards += num_votes * len(places)
            counts.num_non_finite += int((~finite).sum())
            counts.num_over_budget += turn.over_budget(images, adversarial, places)
            counts.num_disagree += _num_disagree(target, adversarial, labels, correct)
            counts.seconds += time.perf_counter() - started
            outcomes.add(number, places, adversarial, correct, part, given_up)
            # with images the file is large: once a turn
            if outcomes.images is None or start + batch_size >= len(todo):
                outcomes.write()
        if world > 1:
            outcomes.exchange(number)
            outcomes.write()

    for number, turn in enumerate(turns):
        attack(number, turn, outcomes.todo(number))
        if turn.gives_up:
            drawn = outcomes.controls(number)
            attack(number, turn.to_the_end, drawn[outcomes.given_up(number)[drawn]])
            if to_the_end or outcomes.fallen_controls(number) > 0:
                rest = np.flatnonzero(outcomes.given_up(number))
                attack(number, turn.to_the_end, rest)
        if after is not None:
            after(number)


def _num_disagree(
    target: AttackTarget, adversarial: Tensor, labels: Tensor, correct: Tensor
) -> int:
    """Images about which the plan and the verdict differ; 0 without a plan."""
    # one pass of a random plan need not agree with the mean of several
    if target.plan is None or not target.plan.deterministic:
        return 0
    with torch.no_grad():
        searched = judge(target.plan(adversarial), labels)[0]
    return int((searched != correct).sum())


def autoattack(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    version: str = "standard",
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Attack images by the standard ensemble, each attack on those that the others left.

    Args:
        norm: "linf" or "l2".
        version: "standard", "plus", or "rand" for random models.

    Other arguments are as in :func:`dwf.attacks.pgd`.

    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``: for each image the first that
        the model in float32 gets wrong, else the image itself.
    Raises:
        As :func:`dwf.attacks.pgd`.
    """
    check_choice(version, list(VERSIONS), "version")
    attacks = VERSIONS[version]
    # a random model is judged as it is attacked
    eot_samples = max(attack.settings.get("eot_samples", 1) for attack in attacks)
    with packed(Setup, locals()).opened() as (batch, source):
        options = {"bn_mode": bn_mode, "seed": seed, "allow_probabilities": allow_probabilities}
        radius = per_image(epsilon, batch.images, "epsilon")
        turns = [Turn("clean", None, radius, norm)]
        turns += [Turn(attack.name, attack, radius, norm, options) for attack in attacks]
        nothing = batch.images.new_zeros(0, 0)
        outcomes = Outcomes(None, "", nothing, len(turns), len(batch), images=batch.images)

        def fetch(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            part = batch.subset(places.to(batch.labels.device))
            return part.images, part.labels, part.sample_index

        in_turn(
            turns,
            outcomes,
            target=attack_target(model, batch.images, bn_mode=bn_mode),
            fetch=fetch,
            verdict=source.verdict_logits,
            batch_size=max(len(batch), 1),
            num_votes=0,  # the source counts verdicts
        )
    if report is not None:  # verdicts are in it; the searches are added
        report.num_forwards += sum(counts.num_forwards for counts in outcomes.counts)
        report.num_backwards += sum(counts.num_backwards for counts in outcomes.counts)
        report.passes = report.num_backwards
    assert outcomes.images is not None
    return outcomes.images
