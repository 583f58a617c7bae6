"""Measure how near attacks come to the closest adversarial images that any of them finds.

    python benchmarks/attack_bench.py RUN ... [--images 100] [--autoattack CLONE] [--only NAME ...]

AttackBench's protocol (Cina et al., arXiv:2404.19460) on models trained here: every attack may
propagate an image 2,000 times, forward or backward; what counts is the closest image that was asked
on the way and that the model got wrong. `dwf.bench.optimality` compares an attack with the best of
all; `docs/make_results.py` prints it.

Our attacks and those of torchattacks, foolbox, ART, adv-lib and the original AutoAttack, as far as
they are installed, run through autograd in float32 on the same images. Appends a row with all
distances for each run, norm and attack to results/attack_bench_<device>_<date>.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attack_bench_contenders import contenders
from rows import append
from torch import Tensor, nn

import dwf
from dwf.config import from_dict
from dwf.data.batches import to_unit_range
from dwf.files import read_json

NUM_PROPAGATIONS = 2000
# Pixels that far outside of [0, 1] are rounding.
ROUNDING = 1e-6


class Tally:
    """What a counted model was asked about images [N, C, H, W].

    A query belongs to the image that it is nearest to: attacks drop, repeat and reorder images. To
    whatever image it is counted, it is a failure if the model does not give that image's label.

    Attributes:
        propagations: [N] int64, forward and backward.
        distance: [N] float64, of the closest query that was wrong; 0 if the image itself is.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, norm: str, limit: int = NUM_PROPAGATIONS
    ) -> None:
        self._images, self._labels = images.flatten(1), labels
        self._norm, self._limit = norm, limit
        self.propagations = torch.zeros_like(labels)
        self.distance = torch.full(labels.shape, torch.inf, dtype=torch.float64)

    @torch.no_grad()
    def note(self, images: Tensor, logits: Tensor) -> Tensor:
        """Take a query into account; whose it is, [B]."""
        asked = images.detach().flatten(1)
        owner = torch.cdist(asked, self._images).argmin(dim=1)
        self.count(owner)
        delta = asked.double() - self._images[owner].double()
        far = delta.abs().amax(dim=1) if self._norm == "linf" else delta.norm(dim=1)
        wrong = logits.argmax(dim=1) != self._labels[owner]
        wrong &= (asked >= -ROUNDING).all(dim=1) & (asked <= 1 + ROUNDING).all(dim=1)
        wrong &= self.propagations[owner] <= self._limit
        self.distance.scatter_reduce_(0, owner[wrong], far[wrong], "amin")
        return owner

    @property
    def is_used_up(self) -> bool:
        """Whether nothing that is asked from now on can count."""
        return bool(((self.propagations >= self._limit) | (self.distance == 0)).all())

    def count(self, owner: Tensor) -> None:
        """One more propagation of these images."""
        self.propagations.index_add_(0, owner, torch.ones_like(owner))


class UsedUp(Exception):
    """No image has a propagation left."""


class Counted(nn.Module):
    """A model whose propagations go into a tally, and that ends an attack which has none left."""

    def __init__(self, model: nn.Module, tally: Tally) -> None:
        super().__init__()
        self.model, self.tally = model, tally

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        if self.tally.is_used_up:
            raise UsedUp
        logits: Tensor = self.model(images)
        owner = self.tally.note(images, logits)
        if logits.requires_grad:
            logits = logits.clone()
            logits.register_hook(lambda grad: self.tally.count(owner[(grad != 0).any(dim=1)]))
        return logits


class Found(NamedTuple):
    """What an attack found: [N] each."""

    distance: Tensor
    propagations: Tensor
    seconds: float


def measure(
    attack: Callable[[nn.Module, Tensor, Tensor], Any],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
) -> Found:
    """Run one attack on images [N, C, H, W], counted."""
    tally = Tally(images, labels, norm)
    counted = Counted(model, tally).eval()
    with torch.no_grad():
        tally.note(images, model(images))  # what is wrong already is at no distance
    tally.propagations.zero_()
    torch.manual_seed(0)
    started = time.perf_counter()
    try:
        attack(counted, images.clone(), labels.clone())
    except Exception:  # a library may wrap what a model raises
        if not tally.is_used_up:
            raise
    seconds = time.perf_counter() - started
    return Found(tally.distance, tally.propagations, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--autoattack", type=Path, help="a clone of the original's repository")
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these attacks only")
    options = parser.parse_args()
    if options.autoattack:
        sys.path.insert(0, str(options.autoattack))
    for run in options.runs:
        model = dwf.load(run).eval().requires_grad_(False)
        config = from_dict(read_json(run / "config.json"))
        test_set = dwf.data.load(config.data.name, root=config.data.root, split="test")
        images = to_unit_range(test_set.images[: options.images])
        labels = test_set.labels[: options.images].long()
        for norm in options.norms:
            for contender in contenders(norm):
                if options.only and contender.name not in options.only:
                    continue
                its = measure(contender.attack, model, images, labels, norm)
                row = {
                    "bench": "attack_bench",
                    "case": f"{config.preset}, {norm}, {contender.name}",
                    "model": config.preset,
                    "norm": norm,
                    "library": contender.library,
                    "attack": contender.name,
                    "num_images": len(images),
                    "limit": NUM_PROPAGATIONS,
                    "propagations": round(float(its.propagations.double().mean()), 1),
                    "seconds": round(its.seconds, 1),
                    # null: none found
                    "distances": [
                        round(d, 7) if d < math.inf else None for d in its.distance.tolist()
                    ],
                }
                append(row, torch.device("cpu"))
                told = {key: row[key] for key in ("case", "propagations", "seconds")}
                print(told, f"median {float(its.distance.median()):.5f}", flush=True)


if __name__ == "__main__":
    main()
