"""Keep what each attack did to each image, in memory or in a file to continue from.

A file belongs to one model, one set of images and one list of attacks: it holds a key, a hash of
all that, and logits of some images, because weights do not say everything about a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from dwf import distributed
from dwf.attacks.losses import Model
from dwf.checks import CheckpointError
from dwf.files import atomic_write_bytes, make_folder

log = logging.getLogger("dwf")

# What an attack did to an image; BROKEN + i is broken by its i-th part. GIVEN_UP stands as well,
# but was not searched to the end. What becomes of an image later is a larger number.
NOT_ATTACKED, GIVEN_UP, STOOD, BROKEN = 0, 1, 2, 3
# What reading a damaged file may raise.
DAMAGE = (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError)
# Of the images that an attack gave up, one of so many is a control, and no fewer than this.
ONE_OF, FEWEST_CONTROLS = 8, 4
# Share of the range of all logits: more than a GPU's choice of algorithm, less than another model.
SAME_MODEL = 1e-3


@dataclass
class Counts:
    """Costs and observations of one attack, summed over its batches."""

    seconds: float = 0.0
    num_forwards: int = 0
    num_backwards: int = 0
    num_non_finite: int = 0
    num_over_budget: int = 0
    num_disagree: int = 0  # images whose search and verdict differ about who is fooled


class Outcomes:
    """Outcomes [attacks, N] uint8 and the counts of each attack.

    ``left_early`` [attacks, N] bool: images that an attack gave up at first, whatever it did to
    them afterwards; see `dwf.attacks.prospect`.

    Args:
        path: a file to continue from if it exists, or None for memory alone.
        key: hash of everything that outcomes depend on, but for the model's code.
        logits: [M, K] of some images, by which the model is known again.
        num_attacks: rows of the table.
        num_images: columns of the table.
        images: [N, C, H, W], to keep the adversarial image of each broken one in.
        seed: draws the controls of attacks that give images up.
        keep_all: keep also the adversarial images that break nothing.
        strict: raise CheckpointError for a file that is damaged or of something else; by default
            it is left behind with a warning, and all begins anew.
    """

    def __init__(
        self,
        path: Path | None,
        key: str,
        logits: Tensor,
        num_attacks: int,
        num_images: int,
        *,
        images: Tensor | None = None,
        seed: int = 0,
        keep_all: bool = False,
        strict: bool = False,
    ) -> None:
        self.path, self.key, self.logits = path, key, logits.cpu()
        self.table = np.zeros((num_attacks, num_images), dtype=np.uint8)
        self.left_early = np.zeros((num_attacks, num_images), dtype=np.bool_)
        self.counts = [Counts() for _ in range(num_attacks)]
        self.images = None if images is None else images.detach().float().clone()
        self.keep_all, self.seed = keep_all, seed
        self._strict, self._warned = strict, False
        if path is None or not path.exists():
            return
        try:
            self._read(path)
        except CheckpointError as error:
            if strict:
                raise
            log.warning(f"{error}; the evaluation begins anew")

    def standing(self, number: int) -> np.ndarray[Any, Any]:
        """[N] bool: what the attacks before this number have left."""
        left: np.ndarray[Any, Any] = np.all(self.table[:number] < BROKEN, axis=0)
        return left

    def todo(self, number: int) -> np.ndarray[Any, Any]:
        """Places of the images that this attack has yet to see."""
        return np.flatnonzero(self.standing(number) & (self.table[number] == NOT_ATTACKED))

    def given_up(self, number: int) -> np.ndarray[Any, Any]:
        """[N] bool: what stands all attacks so far, and was given up by this one."""
        left: np.ndarray[Any, Any] = self.table[number] == GIVEN_UP
        left &= self.standing(len(self.table))
        return left

    def controls(self, number: int) -> np.ndarray[Any, Any]:
        """Places of the images that this attack gave up and has to search to the end all the same.

        They are drawn by the seed and the attack, so that they depend on no batch, and on no stop.
        """
        places = np.flatnonzero(self.left_early[number]).tolist()
        count = max(-(-len(places) // ONE_OF), FEWEST_CONTROLS)
        drawn = sorted(places, key=lambda place: seed_of(self.seed, number, place))[:count]
        return np.array(sorted(drawn), dtype=np.int64)

    def fallen_controls(self, number: int) -> int:
        """How many controls of this attack were broken by it."""
        return int((self.table[number, self.controls(number)] >= BROKEN).sum())

    def add(
        self,
        number: int,
        places: np.ndarray[Any, Any],
        adversarial: Tensor,
        correct: Tensor,
        part: Tensor | None = None,
        given_up: Tensor | None = None,
    ) -> None:
        """Record an attack on the images at ``places``: who withstood it, and who did not."""
        broken = BROKEN if part is None else BROKEN + part.cpu().numpy()
        left = np.zeros_like(places, dtype=np.bool_)
        if given_up is not None:
            left = (given_up & correct).cpu().numpy()
        self.left_early[number, places] |= left
        stood = np.where(left, GIVEN_UP, STOOD)
        self.table[number, places] = np.where(correct.cpu().numpy(), stood, broken)
        if self.images is not None:
            keep = torch.ones_like(correct) if self.keep_all else ~correct
            kept = torch.from_numpy(places)[keep.cpu()]
            self.images[kept] = adversarial[keep].to(self.images)

    def broken_by(self, number: int, parts: Sequence[str]) -> dict[str, int]:
        """Number of images that each named part of an attack broke, where it is not zero."""
        counts = {
            name: int((self.table[number] == BROKEN + i).sum()) for i, name in enumerate(parts)
        }
        return {name: count for name, count in counts.items() if count}

    def take_over(self) -> None:
        """Let all processes of a group begin with what rank 0 has, and rank 0 alone write."""
        table = torch.from_numpy(self.table).int()
        self.table = distributed.total(table * (distributed.rank() == 0)).byte().numpy()
        early = torch.from_numpy(self.left_early).int()
        self.left_early = distributed.total(early * (distributed.rank() == 0)).bool().numpy()
        if distributed.rank() > 0:
            self.path = None
            self.counts = [Counts() for _ in self.counts]

    def exchange(self, number: int) -> None:
        """Let all processes know what each of them did in a turn; rank 0 has the counts."""
        row = torch.from_numpy(self.table[number]).int()
        self.table[number] = distributed.largest(row).byte().numpy()
        early = torch.from_numpy(self.left_early[number]).int()
        self.left_early[number] = distributed.largest(early).bool().numpy()
        counts = torch.tensor(list(asdict(self.counts[number]).values()), dtype=torch.float64)
        seconds, *numbers = distributed.total(counts).tolist()
        mine = distributed.rank() == 0
        self.counts[number] = Counts(seconds, *map(int, numbers)) if mine else Counts()

    def write(self) -> None:
        """Write the file, if there is one, atomically.

        Raises:
            CheckpointError: it cannot be written and ``strict`` is set; without, a first failure is
                a warning, and the outcomes stay in memory.
        """
        if self.path is None:
            return
        counts = json.dumps([asdict(counts) for counts in self.counts])
        tensors = {
            "outcome": torch.from_numpy(self.table),
            "left_early": torch.from_numpy(self.left_early),
            "logits": self.logits.contiguous(),
        }
        if self.images is not None:
            tensors["images"] = self.images.cpu().contiguous()
        facts = {"key": self.key, "counts": counts, "sha256": _hash_of(tensors, counts)}
        try:
            make_folder(self.path.parent)
            atomic_write_bytes(self.path, to_safetensors(tensors, facts))
        except CheckpointError as error:
            if self._strict:
                raise
            if not self._warned:
                log.warning(f"{error}; attacks go on, but could not continue after a stop")
            self._warned = True

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if facts["sha256"] != _hash_of(tensors, facts["counts"]):
                raise ValueError("its sha256 is another")
            table, logits = tensors["outcome"].numpy(), tensors["logits"]
            left_early = tensors["left_early"].numpy()
            images = None if self.images is None else tensors["images"]
            counts = [Counts(**own) for own in json.loads(facts["counts"])]
        except DAMAGE as error:
            raise CheckpointError(f"{path}: not readable as saved outcomes, {error}") from error
        same = facts.get("key") == self.key
        same &= table.shape == left_early.shape == self.table.shape
        if not same or not of_one_model(logits, self.logits):
            raise CheckpointError(f"{path}: of another model, other images or other settings")
        self.table, self.left_early, self.counts = table.copy(), left_early.copy(), counts
        if self.images is not None and images is not None:
            self.images = images.to(self.images)
        num_done = int((table != NOT_ATTACKED).sum())
        log.info(f"{path}: continues after {num_done} attacked images")


def _hash_of(tensors: Mapping[str, Tensor], counts: str) -> str:
    """Hash of what a file holds: safetensors has no checksum, and a flipped bit is a result."""
    digest = hashlib.sha256(counts.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_one_model(logits: Tensor, others: Tensor) -> bool:
    """Whether logits [N, K] of the same images differ by no more than rounding.

    Weights do not say everything about a model, and a function has none.
    """
    return logits.shape == others.shape and logit_difference(logits, others) <= SAME_MODEL


def logit_difference(first: Tensor, again: Tensor) -> float:
    """Largest difference of two passes [B, K], as a share of the range of the first.

    Rows that are finite in neither are left out, they are a finding of their own; in one of them
    alone is an infinite difference.
    """
    finite, others = first.isfinite().all(dim=1), again.isfinite().all(dim=1)
    if not torch.equal(finite, others):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    first, again = first[finite].double(), again[finite].double()
    span = float(first.max() - first.min())
    return float((first - again).abs().max()) / max(span, torch.finfo(torch.float32).tiny)


def hash_of_weights(model: Model) -> str:
    """Hash of the names and bits of a module's state; of nothing for another callable."""
    digest = hashlib.sha256()
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):  # there may be extra state
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(bits.numpy().data)
    return digest.hexdigest()


def seed_of(seed: int, *numbers: int) -> int:
    """A seed derived from another and some numbers: 64 bits."""
    text = json.dumps([seed, *numbers])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
