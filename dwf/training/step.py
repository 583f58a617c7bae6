"""Take one training step: attack the batch, add up gradients, change the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwf import distributed
from dwf.config import derive_seed
from dwf.data import Batch
from dwf.defenses import Crafter
from dwf.defenses.side_by_side import crafted_step
from dwf.training.recorder import StepNumbers
from dwf.training.run import Run
from dwf.training.stage import Stage


def train_step(run: Run, stage: Stage, batches: Sequence[Batch]) -> list[StepNumbers]:
    """One step of each phase of a stage on its batch.

    A step is one update of the weights, or several, each by the gradient of the whole batch. The
    batch may come in parts, of which only one is in memory. Returned are the numbers of the first
    update, by phase.
    """
    parts = stage.schedule.accumulation
    for active in stage.active:
        active.phase.module.train()
    numbers: list[list[StepNumbers]] = []  # by part, by phase
    for u in range(stage.num_updates):
        for active in stage.active:
            active.optimizer.zero_grad()
        for part, rows in enumerate(zip(*(batch.split(parts) for batch in batches), strict=True)):
            found = _add_gradients(run, stage, rows, u, part)
            if u == 0:
                numbers.append(found)
        for active in stage.active:
            active.optimizer.step(active.phase.updates[u].is_trained)
    return [StepNumbers.total(of_phase) for of_phase in zip(*numbers, strict=True)]


def _add_gradients(
    run: Run, stage: Stage, batches: Sequence[Batch], u: int, part: int
) -> list[StepNumbers]:
    """Add the gradient of update ``u`` on one part of each batch to what the parameters have."""
    parts, numbers = stage.schedule.accumulation, []
    seeds = [derive_seed(run.config.seed, x.phase.name, run.at.step) for x in stage.active]
    if stage.together is not None:
        with _precision(run):
            batches = stage.together.crafted(_crafter(run, stage, *seeds), batches)
    for active, seed, batch in zip(stage.active, seeds, batches, strict=True):
        # models that draw in their forward pass draw the same after a resume
        draw = (part, u) if u else (part,)
        torch.manual_seed(derive_seed(seed, "forward", distributed.rank(), *draw))
        step = active.phase.updates[u].step if stage.together is None else crafted_step
        with _exchange(active.forward, now=part == parts - 1):
            with _precision(run):
                result = step(
                    active.phase.module, active.forward, batch, _crafter(run, stage, seed)
                )
            (result.loss / parts).backward()  # type: ignore[no-untyped-call]
        numbers.append(StepNumbers.of(result, len(batch.images), parts))
    return numbers


def _exchange(forward: nn.Module, *, now: bool) -> contextlib.AbstractContextManager[None]:
    """Let processes exchange gradients inside, but only after the last part of a batch."""
    if now or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def _crafter(run: Run, stage: Stage, *seeds: int) -> Crafter:
    dtype = torch.float32 if run.config.precision == "fp32" else None
    epoch = run.at.step // stage.steps_per_epoch
    seed = seeds[0] if len(seeds) == 1 else seeds
    return Crafter(
        run.config.attack,
        seed,
        run.train_set.mean,
        run.train_set.std,
        dtype,
        epoch,
        trusted=run.at.step > 0,
    )


def _precision(run: Run) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16")
