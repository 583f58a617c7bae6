"""Hold the state of a run: what it trains, how far it has come, and what it has yet to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwf.checks import DwfError
from dwf.config import Config
from dwf.data import ImageDataset
from dwf.defenses import ModelFacts, Phase, Phases
from dwf.defenses.side_by_side import one_by_one
from dwf.progress import LiveLine, Metrics
from dwf.training.average import WeightAverage
from moe_kernels.processor import bfloat16_is_fast


class TrainingError(DwfError, RuntimeError):
    """Training cannot go on: the loss or the weights are not finite, or the model collapsed."""


class Stopped(DwfError, RuntimeError):
    """A signal asked the run to stop; everything is saved, the same command continues it."""


@dataclass
class Position:
    """Where a run stands, as its checkpoints record it.

    Attributes:
        phase_index: the first phase of the stage that is due; the run is complete when this has
            passed its last phase.
        step: steps taken in that stage.
        global_step: optimizer steps taken since the run began, over all phases.
        best: highest robust validation accuracy of the last phase; -1 before there is one.
        best_average: likewise, of the average of the weights.
        num_stale: validations since the reported weights were at their best.
        num_phases: how many phases train side by side in that stage.
    """

    phase_index: int = 0
    step: int = 0
    global_step: int = 0
    best: float = -1.0
    num_phases: int = 1
    best_average: float = -1.0
    num_stale: int = 0

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row of metrics is about steps that have been taken."""
        index: int = row["phase_index"]
        in_stage = index < self.phase_index + self.num_phases and row["step"] <= self.step
        return index < self.phase_index or in_stage


@dataclass
class Run:
    """A run in this process.

    Attributes:
        entries: what the defense trains; ``phases`` are the same, one by one.
        train_set: its images and labels lie on ``device``, as do those of the extra set.
        average: of the last phase's weights; None before it begins.
        unwritten: by phase, what the steps since its last row of metrics summed up to; see
            `dwf.training.recorder`.
        metrics: on rank 0 only.
        reduced: whether products are in bfloat16: it is wanted, and no slower here than float32.
    """

    config: Config
    folder: Path
    model: nn.Module
    entries: Phases
    facts: ModelFacts
    train_set: ImageDataset
    validation_set: ImageDataset
    device: torch.device
    live: LiveLine
    at: Position = field(default_factory=Position)
    extra_set: ImageDataset | None = None
    average: WeightAverage | None = None
    unwritten: dict[str, list[list[float]]] = field(default_factory=dict)
    metrics: Metrics | None = None

    def __post_init__(self) -> None:
        self.phases: list[Phase] = one_by_one(self.entries)
        self.reduced = self.config.precision == "bf16" and bfloat16_is_fast(self.device)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"
