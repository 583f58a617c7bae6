"""Prepare a stage of training: one phase, or several side by side, each with its own optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dwf import checkpoint, distributed
from dwf.checks import ConfigError
from dwf.config import Config, PhaseConfig, derive_seed
from dwf.data import Batches, ImageDataset
from dwf.defenses import Phase, Phases, SideBySide
from dwf.training.optimizer import Optimizer
from dwf.training.recorder import Recorder
from dwf.training.run import Run
from moe_kernels import TrainMode

KEPT = "kept/"  # before names of tensors that a phase keeps from batch to batch


@dataclass
class ActivePhase:
    """A phase while it trains. ``forward`` is its module in a wrapper that calls it."""

    phase: Phase
    batches: Batches
    forward: nn.Module
    optimizer: Optimizer
    recorder: Recorder


@dataclass
class Stage:
    """Phases that train at the same time; all take equally many steps.

    Attributes:
        active: one phase, or several side by side.
        together: the SideBySide that crafts their images, if there are several; else None.
        is_last: whether the run ends with this stage; it has one phase then.
    """

    active: list[ActivePhase]
    together: SideBySide | None
    is_last: bool

    @property
    def schedule(self) -> PhaseConfig:
        """The schedule of each phase."""
        return self.active[0].phase.schedule

    @property
    def steps_per_epoch(self) -> int:
        """Steps of each phase in an epoch."""
        return self.active[0].batches.steps_per_epoch

    @property
    def num_steps(self) -> int:
        """Steps of each phase."""
        return self.schedule.num_epochs * self.steps_per_epoch

    @property
    def num_updates(self) -> int:
        """Updates that each batch makes; phases side by side make one."""
        return len(self.active[0].phase.updates)

    def state(self) -> checkpoint.Tensors:
        """State of the optimizers, and what phases keep from batch to batch, by name."""
        return {
            self._prefix(active) + name: value
            for active in self.active
            for name, value in {**active.optimizer.state(), **_kept(active.phase)}.items()
        }

    def load(self, state: checkpoint.Tensors, device: torch.device) -> None:
        """Take over what :meth:`state` gave; CheckpointError for a name that is unknown."""
        for active in self.active:
            prefix, kept = self._prefix(active), active.phase.state
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if kept is not None:
                for name in [name for name in own if name.startswith(KEPT)]:
                    kept[name.removeprefix(KEPT)] = own.pop(name).to(device)
            active.optimizer.load(own)

    def _prefix(self, active: ActivePhase) -> str:
        return f"{active.phase.name}/" if len(self.active) > 1 else ""


def _kept(phase: Phase) -> checkpoint.Tensors:
    return {KEPT + name: value for name, value in (phase.state or {}).items()}


def next_stage(run: Run) -> Stage:
    """The stage that a run starts or resumes; sets ``run.at.num_phases``."""
    at, first = run.at, run.at.phase_index
    if at.step == 0:  # a stage that is resumed keeps its number of phases
        at.num_phases = num_together(run.config, run.entries, first, run.device)
    count = at.num_phases
    entry, place = _entry(run.entries, first)
    together = entry.part(place, count) if count > 1 and isinstance(entry, SideBySide) else None
    active = [_active(run, first + i, i) for i in range(count)]
    return Stage(active, together, is_last=first + count == len(run.phases))


def num_together(config: Config, entries: Phases, index: int, device: torch.device) -> int:
    """How many phases train at the same time, from the one at ``index`` on."""
    entry, place = _entry(entries, index)
    wanted = config.pretrain_together
    if not isinstance(entry, SideBySide) or not entry.independent or wanted == "never":
        return 1
    if wanted == "auto" and device.type != "cuda":
        return 1
    # the run's last phase is alone: best checkpoint and average of the weights are about it
    left = len(entry.networks) - place - (entry is entries[-1])
    return max(left, 1)


def _entry(entries: Phases, index: int) -> tuple[Phase | SideBySide, int]:
    """The entry that holds phase ``index``, and the place of the phase in it."""
    for entry in entries:
        count = len(entry.networks) if isinstance(entry, SideBySide) else 1
        if index < count:
            return entry, index
        index -= count
    raise IndexError(f"phase {index} after the last")


def _active(run: Run, index: int, place: int) -> ActivePhase:
    """Phase ``index`` of the run, in a stage where ``place`` phases come before it."""
    phase = run.phases[index]
    batches = batches_of(run.config, phase, run.train_set, run.device, run.extra_set)
    num_steps = phase.schedule.num_epochs * batches.steps_per_epoch
    return ActivePhase(
        phase,
        batches,
        _forward(phase.module, run.device),
        Optimizer(phase, num_steps),
        Recorder(run, phase, place, num_steps),
    )


def _forward(module: nn.Module, device: torch.device) -> nn.Module:
    """What a step calls: the module by compiled kernels where they fit, or distributed."""
    if distributed.world_size() == 1 and device.type == "cpu":
        return TrainMode(module)
    return distributed.wrapped(module, device)


def batches_of(
    config: Config,
    phase: Phase,
    dataset: ImageDataset,
    device: torch.device,
    extra: ImageDataset | None = None,
) -> Batches:
    """The training batches of a phase, this process's share of each; ``extra`` as of `Batches`.

    Raises:
        ConfigError: the schedule does not fit the data set, or the number of processes.
    """
    schedule, world = phase.schedule, distributed.world_size()
    if phase.state is not None and (world > 1 or schedule.accumulation > 1):
        raise ConfigError(
            f"{config.defense} keeps tensors from batch to batch: one process and accumulation 1, "
            f"found {world} processes and accumulation {schedule.accumulation}"
        )
    if schedule.batch_size % (schedule.accumulation * world):
        raise ConfigError(
            f"batch_size: {schedule.batch_size} does not divide into accumulation "
            f"{schedule.accumulation} on each of {world} processes"
        )
    return Batches(
        dataset,
        schedule.batch_size,
        seed=derive_seed(config.seed, "data", phase.name),
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
        device=device,
        rank=distributed.rank(),
        world_size=world,
        num_parts=schedule.accumulation,
        label_smoothing=schedule.label_smoothing,
        augment=config.data.augment,
        cutmix=config.data.cutmix,
        extra=extra,
        extra_fraction=config.data.extra_fraction,
    )
