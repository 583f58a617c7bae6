"""Attacks in turn, each on the images that still stand, saved as it goes.

An image is broken for good: by an attack, or at a smaller radius, which lies inside the larger one.
So a later attack costs only what is left, and no accuracy rises with attacks or with epsilon.

What happened to each image under each attack is a number in a table, and an attack of an image
depends on the seed and the image's place in the data set only. So a killed evaluation continues
where the table has no number yet, to the same result.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwf import __version__
from dwf.attacks.ensemble import APGD_CE, APGD_T, FAB_T, SQUARE
from dwf.attacks.losses import Model
from dwf.attacks.source import judge, own_random_state, voted
from dwf.attacks.target import AttackReport, AttackTarget
from dwf.data import ImageDataset
from dwf.data.batches import batch_at
from dwf.evaluation.measures import logit_difference, num_over_budget
from dwf.evaluation.result import Row
from dwf.evaluation.suites import AttackSpec
from dwf.evaluation.view_attacks import RELAY, attack_through_views
from dwf.files import atomic_write_bytes
from dwf.models.views import View

log = logging.getLogger("dwf")

# What an attack did to an image; BROKEN + i is broken by its i-th part.
NOT_ATTACKED, STOOD, BROKEN = 0, 1, 2
MEMBERS = {"apgd-ce": APGD_CE, "apgd-t": APGD_T, "fab-t": FAB_T, "square": SQUARE}
# Share of the range of all logits: more than a GPU's choice of algorithm, less than another model.
SAME_MODEL = 1e-3
# Adversarial images; which part of the attack broke each, if it has any.
Crafted = tuple[Tensor, Tensor | None]
# What a damaged file, or one of another version, raises.
_UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


@dataclass
class Counts:
    """What an attack cost and showed, over all of its batches."""

    seconds: float = 0.0
    num_forwards: int = 0
    num_backwards: int = 0
    num_non_finite: int = 0
    num_over_budget: int = 0
    num_disagree: int = 0  # images whose search and verdict differ about who is fooled


class Saved:
    """The table of outcomes [attacks, N] and the counts of each attack, on disk or in memory.

    ``key`` and ``logits``, of some images, say what they belong to: a file of anything else is left
    behind with a log line.
    """

    def __init__(
        self, path: Path | None, key: str, logits: Tensor, num_attacks: int, num_images: int
    ) -> None:
        self.path, self.key, self.logits = path, key, logits
        self.outcome = np.zeros((num_attacks, num_images), dtype=np.uint8)
        self.counts = [Counts() for _ in range(num_attacks)]
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
                facts = json.loads(str(archive["facts"]))
                outcome, logits = archive["outcome"], torch.from_numpy(archive["logits"])
                key, counts = facts["key"], [Counts(**own) for own in facts["counts"]]
        except _UNREADABLE as error:
            log.warning(f"{path}: not readable, the evaluation begins anew ({error})")
            return
        same = key == self.key and outcome.shape == self.outcome.shape
        if not same or not of_one_model(logits, self.logits):
            log.warning(f"{path}: of another model, data set or suite; the evaluation begins anew")
            return
        self.outcome, self.counts = outcome, counts
        log.info(f"{path}: continues after {int((outcome != NOT_ATTACKED).sum())} attacked images")

    def write(self) -> None:
        if self.path is None:
            return
        facts = {"key": self.key, "counts": [asdict(counts) for counts in self.counts]}
        stream = io.BytesIO()
        np.savez_compressed(
            stream,
            outcome=self.outcome,
            logits=self.logits.numpy(),
            facts=np.array(json.dumps(facts)),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, stream.getvalue())


def key_of(model: Model, dataset: ImageDataset, specs: Sequence[AttackSpec], seed: int) -> str:
    """A hash of everything that outcomes depend on, but for the code of the model."""
    # another version may attack otherwise
    facts: list[Any] = [__version__, [asdict(spec) for spec in specs]]
    facts += [dataset.digest, len(dataset), seed]
    facts.append(hash_of_weights(model))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def of_one_model(logits: Tensor, others: Tensor) -> bool:
    """Whether logits [N, K] of the same images differ by no more than rounding.

    Weights do not say everything about a model, and a function has none.
    """
    return logits.shape == others.shape and logit_difference(logits, others) <= SAME_MODEL


def hash_of_weights(model: Model) -> str:
    """Of the names and bits of a module's state."""
    digest = hashlib.sha256()
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):  # there may be extra state
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(bits.numpy().data)
    return digest.hexdigest()


def attack_in_turn(
    target: AttackTarget,
    dataset: ImageDataset,
    specs: Sequence[AttackSpec],
    saved: Saved,
    *,
    views: Sequence[View] = (),
    seed: int,
    batch_size: int,
    device: torch.device,
    num_votes: int = 1,
    allow_probabilities: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Fill ``saved``; return a row for each attack, whose ``correct`` is what stands after it.

    ``specs`` begin with "clean" and are ascending in epsilon. ``num_votes``: passes whose mean
    logits judge a random model. The caller has put the model into eval mode, without gradients to
    weights.
    """
    standing = np.ones(len(dataset), dtype=bool)
    rows = []
    options = {"seed": seed, "allow_probabilities": allow_probabilities}
    for number, spec in enumerate(specs):
        outcome, counts = saved.outcome[number], saved.counts[number]
        todo = np.flatnonzero(standing & (outcome == NOT_ATTACKED))
        for start in range(0, len(todo), batch_size):
            part = todo[start : start + batch_size]
            if progress is not None:
                progress(f"{spec.name}: {start}/{len(todo)} images that stand")
            images, labels, index = batch_at(dataset, torch.from_numpy(part), device)
            started = time.perf_counter()
            # a random model's draws are those of this batch, however the run got here
            with own_random_state(device, seed_of(seed, number, int(part[0]))):
                adversarial, by = _craft(
                    spec, target, views, images, labels, index, counts, num_votes, options
                )
                logits = voted(target.model, adversarial, num_votes)
            correct, finite = judge(logits, labels)
            counts.num_forwards += num_votes * len(part)
            counts.num_non_finite += int((~finite).sum())
            counts.num_over_budget += num_over_budget(images, adversarial, spec.epsilon, spec.norm)
            # one pass of a random plan need not agree with the mean of several
            if target.plan is not None and target.plan.deterministic:
                searched = judge(target.plan(adversarial), labels)[0]
                counts.num_disagree += int((searched != correct).sum())
            counts.seconds += time.perf_counter() - started
            broken = BROKEN if by is None else BROKEN + by.cpu().numpy()
            outcome[part] = np.where(correct.cpu().numpy(), STOOD, broken)
            saved.write()
        standing &= outcome < BROKEN
        rows.append(_row(spec, standing, outcome, counts, [*(view.name for view in views), RELAY]))
    return rows


def seed_of(seed: int, *numbers: int) -> int:
    """Another seed for each of several numbers."""
    text = json.dumps([seed, *numbers])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _craft(
    spec: AttackSpec,
    target: AttackTarget,
    views: Sequence[View],
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    counts: Counts,
    num_votes: int,
    options: dict[str, Any],
) -> Crafted:
    """One attack on one batch; what it cost is added to ``counts``."""
    if spec.kind == "clean":
        return images, None
    report = AttackReport()
    settings: dict[str, Any] = {
        **options,
        "seed": options["seed"] + spec.stream,
        "epsilon": spec.epsilon,
        "norm": spec.norm,
        "sample_index": index,
        "report": report,
        "eot_samples": spec.eot_samples,
        "num_queries" if spec.kind == "square" else "num_steps": spec.num_steps,
    }
    by = None
    if spec.kind == "views":
        settings["step_size"] = spec.step_size
        adversarial, by = attack_through_views(
            target, views, images, labels, num_votes=num_votes, **settings
        )
    else:
        adversarial = MEMBERS[spec.kind](target, images, labels, **settings)
    counts.num_forwards += report.num_forwards
    counts.num_backwards += report.num_backwards
    return adversarial, by


def _row(
    spec: AttackSpec,
    standing: np.ndarray[Any, Any],
    outcome: np.ndarray[Any, Any],
    counts: Counts,
    parts: Sequence[str],
) -> Row:
    broken_by = {
        part: count
        for i, part in enumerate(parts)
        if (count := int((outcome == BROKEN + i).sum())) and spec.kind == "views"
    }
    return Row(
        spec,
        torch.from_numpy(standing.copy()),
        num_non_finite=counts.num_non_finite,
        seconds=counts.seconds,
        num_forwards=counts.num_forwards,
        num_backwards=counts.num_backwards,
        num_attacked=int((outcome != NOT_ATTACKED).sum()),
        num_over_budget=counts.num_over_budget,
        num_disagree=counts.num_disagree,
        broken_by=broken_by,
    )
