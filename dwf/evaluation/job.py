"""The inputs and the outcome of one suite, shared by the paper's grid and attacks in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dwf.attacks.losses import Model
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, evaluation_batches
from dwf.evaluation.mixture_record import Experts, Gate
from dwf.evaluation.record import AtRadius, Finding, WorstCase
from dwf.evaluation.result import Arrays, Row

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A model, the images it is judged on, and how.

    ``searched`` computes what the model computes, and offers attacks a plan where there can be one.
    ``say`` is called with a line of text now and then. ``shared`` says that all processes of the
    group are here, and attack some of the images each. ``untouched`` is a copy of the model from
    before its first pass; ``sources`` are other models to make images on.
    """

    model: Model
    searched: Model
    dataset: ImageDataset
    settings: EvaluationConfig
    seed: int
    device: torch.device
    allow_probabilities: bool
    say: Say
    shared: bool = False
    untouched: Model | None = None
    sources: Mapping[str, Model] = field(default_factory=dict)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All images in order: images [B, C, H, W] in [0, 1], labels [B], sample_index [B]."""
        return evaluation_batches(self.dataset, self.settings.batch_size, self.device)

    def first_images(self) -> Tensor:
        """The images of the first batch."""
        return next(self.batches())[0]

    @property
    def notes(self) -> Sequence[str]:
        """The model's attribute ``evaluation_notes``: what readers of its numbers must know."""
        notes: Sequence[str] = getattr(self.model, "evaluation_notes", ())
        return notes


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The outcome of a suite; names and types are those of the record."""

    rows: list[Row]
    worst_case: WorstCase
    worst_case_all: WorstCase
    findings: list[Finding]
    attack_path: str
    curve: list[WorstCase] = field(default_factory=list)
    doubts: list[AtRadius] = field(default_factory=list)
    gate: Gate | None = None
    experts: Experts | None = None
    examples: Arrays = field(default_factory=dict)
