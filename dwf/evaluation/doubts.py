"""Doubts: cheap attacks that should find nothing which a suite has not found.

:func:`doubts` tries random noise, a single step, a short PGD at several radii, a search by labels
alone, and images made on another model. What breaks within epsilon is tried on all images that a
suite left, labels alone on some of them; what only asks how the model behaves, on one of four. It
only measures; ``findings`` say which measurements are reasons to doubt. A thousand images are
enough.

Source: the checklist of Carlini et al., arXiv:1902.06705.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Loss, Model, cross_entropy, margin
from dwf.attacks.pgd import input_gradient, pgd
from dwf.attacks.random_noise import random_noise
from dwf.attacks.rays import rays
from dwf.attacks.source import float32_verdicts, judge, voted
from dwf.attacks.surrogate import through_surrogate
from dwf.attacks.target import AttackTarget, attack_target
from dwf.checks import check_count, check_images, check_labels, check_logits
from dwf.data.batches import at_equal_distances
from dwf.evaluation import findings
from dwf.evaluation.contracts import BATCH_SIZE
from dwf.evaluation.measures import Seen, held, known_places, largest_entry, parts, seen
from dwf.evaluation.record import Finding

LOSSES: tuple[Loss, ...] = (cross_entropy, margin)
NUM_STEPS, NUM_DRAWS = 20, 25
# Step size as a share of epsilon: 20 steps can then cross the ball twice.
STEP = 0.2
# Images at which the model's behaviour is looked at: gradients, other radii. One of so many, and no
# fewer than this.
LOOKED_AT = (4, 24)
# The same of the images that are left, for a search by labels alone; and how long it is.
BY_LABELS, NUM_QUERIES = (8, 4), 200
# A radius just outside the ball, where a memory of the ball ends; a share of epsilon.
BEYOND = 1.1


@dataclass(frozen=True, eq=False)
class Doubts:
    """What cheap attacks found after a suite. Masks are [N] bool on the CPU.

    Attributes:
        looked_at: the images that all but the masks of broken ones are about.
        zero_cross_entropy, zero_margin: images at which that loss has a gradient of exactly zero.
        epsilons, accuracy: one PGD at half of epsilon, epsilon, twice epsilon and the distance
            of black to white, as far as these are no larger, and what it leaves of them.
        stands_unbounded: images that it leaves at the last of these.
        pgd, noise, single_step: images broken by it within epsilon, by random draws, by one step,
            and not by the suite.
        rays: images broken by a search along rays, which asks for labels alone.
        beyond: images that stand all of this and fall to PGD at 1.1 epsilon.
        clean: images right without an attack.
        transfer: for each source the images broken only by what was made on it.
    """

    sample_index: Tensor
    num_classes: int
    epsilon: float
    looked_at: Tensor
    zero_cross_entropy: Tensor
    zero_margin: Tensor
    epsilons: list[float]
    accuracy: list[float]
    stands_unbounded: Tensor
    pgd: Tensor
    noise: Tensor
    single_step: Tensor
    rays: Tensor
    beyond: Tensor
    clean: Tensor
    transfer: dict[str, Tensor] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """The reasons to doubt the suite."""
        index = self.sample_index
        both = self.zero_cross_entropy & self.zero_margin
        alone = self.zero_cross_entropy & ~self.zero_margin
        few = self.looked_at

        def some(mask: Tensor) -> Seen:
            return seen(mask[few], index[few])

        found = held(
            findings.zero_gradient(some(both)),
            findings.vanishing_gradient(some(alone)),
            findings.unbounded(some(self.stands_unbounded), self.num_classes),
            findings.epsilon_helps(self.epsilons, self.accuracy, int(few.sum())),
            findings.pgd_wins(seen(self.pgd, index)),
            findings.noise_wins(seen(self.noise, index)),
            findings.single_step_wins(seen(self.single_step, index)),
            findings.falls_beyond(some(self.beyond)),
            findings.flat(
                self.epsilons,
                self.accuracy,
                self.epsilon,
                _share(self.clean, few),
                1 / self.num_classes,
            ),
        )
        if self.transfer:
            only, source = _union(self.transfer)
            found += held(findings.transfer_wins(seen(only, index), source=source))
        return found


def doubts(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    correct: Tensor,
    epsilon: float,
    norm: str = "linf",
    sources: Mapping[str, Model] | None = None,
    num_steps: int = NUM_STEPS,
    num_draws: int = NUM_DRAWS,
    eot_samples: int = 1,
    num_votes: int = 1,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
) -> Doubts:
    """Try what should be weaker than a suite on the images that the suite left.

    Args:
        correct: [N] bool, what the suite left.
        sources: other models that images are made on, such as an undefended twin.
        num_votes: passes whose mean logits judge a random model.
    """
    labels = check_labels(labels, len(images))
    trial = _Trial(
        model=model,
        images=images,
        labels=labels,
        sample_index=known_places(sample_index, images),
        norm=norm,
        num_steps=num_steps,
        eot_samples=eot_samples,
        num_votes=num_votes,
        batch_size=batch_size,
        seed=seed,
        allow_probabilities=allow_probabilities,
    )
    with trial.judging() as num_classes:
        every = torch.ones(len(images), dtype=torch.bool, device=images.device)
        clean = trial.stands(lambda x, y, index: x, every)
        left = correct.to(images.device) & clean
        few = trial.some_of(every, *LOOKED_AT)
        zero_cross_entropy, zero_margin = (trial.zero_gradient(loss, few) for loss in LOSSES)
        # where any image may become any other: from black to white
        whole = 1.0 if norm == "linf" else math.sqrt(images[0].numel()) if len(images) else epsilon
        radii = sorted({min(r, whole) for r in (epsilon / 2, epsilon, 2 * epsilon, whole)})
        among = {
            radius: clean & few | left if radius == epsilon else clean & few for radius in radii
        }
        standing = [trial.stands_pgd(model, radius, some) for radius, some in among.items()]
        fell = [some & ~mask for some, mask in zip(among.values(), standing, strict=True)]
        within = [mask for radius, mask in zip(radii, fell, strict=True) if radius <= epsilon]
        again = left & torch.stack(within).any(dim=0)
        noise = left & ~trial.stands_noise(epsilon, num_draws, left)
        step = left & ~trial.stands_single_step(epsilon, left)
        elsewhere = {
            name: left & ~trial.stands_elsewhere(source, epsilon, left)
            for name, source in (sources or {}).items()
        }
        by_labels = trial.some_of(left & ~again & ~noise & ~step, *BY_LABELS)
        by_labels &= ~trial.stands_rays(epsilon, by_labels)
        stands = left & ~again & ~noise & ~step & ~by_labels
        further = min(BEYOND * epsilon, whole)
        beyond = few & stands
        beyond &= ~trial.stands_pgd(model, further, beyond)
        return Doubts(
            sample_index=trial.sample_index.cpu(),
            num_classes=num_classes,
            epsilon=epsilon,
            looked_at=few.cpu(),
            zero_cross_entropy=zero_cross_entropy.cpu(),
            zero_margin=zero_margin.cpu(),
            epsilons=radii,
            accuracy=[_share(mask, few) for mask in standing],
            stands_unbounded=(few & standing[-1]).cpu(),
            pgd=again.cpu(),
            noise=noise.cpu(),
            single_step=step.cpu(),
            rays=by_labels.cpu(),
            beyond=beyond.cpu(),
            clean=clean.cpu(),
            transfer={name: mask.cpu() for name, mask in elsewhere.items()},
        )


Attack = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, labels, index to adversarial


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model, images [N, C, H, W] with labels [N], and the settings of every cheap attack."""

    model: Model
    images: Tensor
    labels: Tensor
    sample_index: Tensor
    norm: str
    num_steps: int
    eot_samples: int
    num_votes: int
    batch_size: int
    seed: int
    allow_probabilities: bool

    @contextlib.contextmanager
    def judging(self) -> Iterator[int]:
        """Check the arguments and set the model up to be judged; yields the number of classes.

        The model is in eval mode inside, without gradients to weights, in float32 and with random
        states of its own; all of that is undone at the end.
        """
        check_images(self.images)
        for value, name in ((self.batch_size, "batch_size"), (self.num_votes, "num_votes")):
            check_count(value, name)
        device = self.images.device
        with (
            # not the attacks' own draws: those have been attacked
            undisturbed(self.model, device, seed=self.seed + 1),
            float32_verdicts(device),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            # a finding of its own
            warnings.filterwarnings("ignore", message="the model's output does not depend")
            logits = ask(self.model, self.images[:1].float())
            check_logits(logits, min(len(self.images), 1), allow_probabilities=True)
            check_labels(self.labels, len(self.labels), logits.shape[1])
            yield logits.shape[1]

    def stands(self, attack: Attack, among: Tensor) -> Tensor:
        """[N] bool: the images of ``among`` that the model still gets right."""

        def search(rows: Tensor) -> Tensor:
            found = attack(self.images[rows], self.labels[rows], self.sample_index[rows])
            return rows[self._is_right(found, rows)]

        return self._left(search, among)

    def _left(self, search: Callable[[Tensor], Tensor], among: Tensor) -> Tensor:
        """[N] bool: those of ``among`` that a search returns of the rows that it gets."""
        standing = torch.zeros_like(among)
        for rows in parts(torch.nonzero(among)[:, 0], self.batch_size):
            standing[search(rows)] = True
        return standing

    def _is_right(self, adversarial: Tensor, rows: Tensor) -> Tensor:
        """[B] bool: what the model decides about images made of these rows."""
        logits = voted(self.model, adversarial, self.num_votes)
        return judge(logits, self.labels[rows])[0]

    def stands_pgd(self, source: Model, epsilon: float, among: Tensor) -> Tensor:
        """[N] bool: what PGD on ``source`` leaves of ``among``, one loss after the other."""
        for loss in LOSSES:
            among = self._left(partial(self._after_pgd, source, epsilon, loss), among)
        return among

    def _after_pgd(self, source: Model, epsilon: float, loss: Loss, rows: Tensor) -> Tensor:
        """The rows that PGD leaves: what falls in the first half of the steps is done."""
        # votes of a random model are taken once, so that none falls by a second chance
        first = self.num_steps // 2 if self.num_votes == 1 else self.num_steps
        start = None
        for num_steps in (first, self.num_steps - first):
            if num_steps == 0 or len(rows) == 0:
                continue
            found = self._pgd(source, rows, epsilon, loss, STEP * epsilon, num_steps, start)
            right = self._is_right(found, rows)
            rows, start = rows[right], found[right]
        return rows

    def stands_elsewhere(self, source: Model, epsilon: float, among: Tensor) -> Tensor:
        """[N] bool: what images made on another model leave of ``among``; the model judges each."""

        def attack(x: Tensor, y: Tensor, index: Tensor, loss: str = "margin") -> Tensor:
            return through_surrogate(
                self.model,
                x,
                y,
                surrogate=source,
                epsilon=epsilon,
                norm=self.norm,
                num_steps=2 * self.num_steps,
                num_restarts=2,
                loss=loss,
                eot_samples=self.eot_samples,
                seed=self.seed,
                sample_index=index,
                allow_probabilities=True,
            )

        for loss in ("margin", "ce"):
            among = self.stands(partial(attack, loss=loss), among)
        return among

    def some_of(self, among: Tensor, one_of: int, fewest: int) -> Tensor:
        """[N] bool: one of so many of ``among``, at least ``fewest`` if there are so many.

        At equal distances in the data set, whatever their order here.
        """
        rows = torch.nonzero(among)[:, 0]
        rows = rows[self.sample_index[rows].argsort()]
        count = min(len(rows), max(len(rows) // one_of, fewest))
        few = torch.zeros_like(among)
        few[rows[at_equal_distances(len(rows), count).to(rows.device)]] = True
        return few

    def stands_rays(self, epsilon: float, among: Tensor) -> Tensor:
        """[N] bool: what a search by labels alone leaves of ``among``."""

        def attack(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            return rays(
                self.model,
                x,
                y,
                epsilon=epsilon,
                norm=self.norm,
                num_queries=NUM_QUERIES,
                eot_samples=self.num_votes,
                seed=self.seed,
                sample_index=index,
            )

        return self.stands(attack, among)

    def stands_single_step(self, epsilon: float, among: Tensor) -> Tensor:
        """[N] bool: what one step of length epsilon leaves of ``among``, by either loss."""

        def search(loss: Loss, rows: Tensor) -> Tensor:
            found = self._pgd(self.model, rows, epsilon, loss, epsilon, 1, self.images[rows])
            return rows[self._is_right(found, rows)]

        for loss in LOSSES:
            among = self._left(partial(search, loss), among)
        return among

    def stands_noise(self, epsilon: float, num_draws: int, among: Tensor) -> Tensor:
        """[N] bool: what random draws leave of ``among``."""

        def attack(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            return random_noise(
                self.model,
                x,
                y,
                epsilon=epsilon,
                norm=self.norm,
                num_draws=num_draws,
                eot_samples=self.num_votes,
                seed=self.seed,
                sample_index=index,
                allow_probabilities=self.allow_probabilities,
            )

        return self.stands(attack, among)

    def zero_gradient(self, loss: Loss, among: Tensor) -> Tensor:
        """[N] bool: images of ``among`` at which the loss has a gradient of exactly zero.

        The model itself is differentiated, since a plan may round.
        """
        exact = AttackTarget(self.model, reason="its gradient is looked at")

        def search(part: Tensor) -> Tensor:
            gradient = input_gradient(
                exact,
                self.images[part],
                self.labels[part],
                loss=loss,
                seed=self.seed,
                allow_probabilities=self.allow_probabilities,
            )
            return part[largest_entry(gradient) == 0]

        return self._left(search, among)

    def _pgd(
        self,
        source: Model,
        rows: Tensor,
        epsilon: float,
        loss: Loss,
        step_size: float,
        num_steps: int,
        start: Tensor | None,
    ) -> Tensor:
        """PGD on these rows, from a random start unless one is given."""
        images = self.images[rows]
        return pgd(
            attack_target(source, images),
            images,
            self.labels[rows],
            epsilon=epsilon,
            step_size=step_size,
            num_steps=num_steps,
            random_start=start is None,
            start=start,
            norm=self.norm,
            eot_samples=self.eot_samples,
            loss=loss,
            seed=self.seed,
            sample_index=self.sample_index[rows],
            allow_probabilities=self.allow_probabilities,
        )


def _share(mask: Tensor, among: Tensor) -> float:
    """Of the images ``among``, the share that the mask holds; 0 without images."""
    return float(mask[among].double().mean()) if bool(among.any()) else 0.0


def _union(masks: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    """Images of any mask, and the name of the mask that has most."""
    best = max(masks, key=lambda name: int(masks[name].sum()))
    return torch.stack(list(masks.values())).any(dim=0), best
