"""Train what a configuration describes: stages in order, validation, checkpoints, exact resume.

Nothing random is drawn from a stream. Data order, augmentation, attack strengths and start noise
are functions of (seed, phase, epoch, step, sample index), and each step seeds torch for models that
draw in their forward pass. So the state of a run is its tensors and a few integers, and a run that
was killed continues to the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwf import checkpoint, distributed
from dwf.checks import ConfigError
from dwf.config import Config, derive_seed
from dwf.data import Batch, ImageDataset, load, split_validation
from dwf.defenses import Crafter, ModelFacts, get
from dwf.defenses.side_by_side import crafted_step
from dwf.models.known_faults import check_convolutions
from dwf.progress import LiveLine, Metrics
from dwf.training.average import WeightAverage
from dwf.training.recorder import StepNumbers
from dwf.training.run import Run, Stopped
from dwf.training.run_folder import opened, report_weights, resume, save
from dwf.training.stage import Stage, batches_of, next_stage

log = logging.getLogger("dwf")


def train(
    config: Config,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    argv: list[str] | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Train what a configuration describes, into a run folder; return the model.

    If the folder holds a run of the same configuration, it continues where that stopped, to the
    same bits as if it had never stopped (on a CPU, with the same number of threads). Under torchrun
    each process takes its share of every batch.

    Args:
        out: the run folder; see the README for what it holds.
        model: train this module instead of building one; it has to suit the defense (a Mixture
            for "dwf").
        argv: the command to record, for a reader who wants to repeat it.
        quiet: print nothing.
    Raises:
        ConfigError, DataError: before the folder exists.
        CheckpointError: the folder is in use, damaged, or of another configuration.
        TrainingError: a loss that is not finite, or a collapse at which the configuration says to
            stop; the last checkpoint stands.
        Stopped: after SIGTERM or SIGUSR1, with everything saved.
        ProcessLostError: another process of a torchrun is gone.
    """
    run = _prepare(config, Path(out), model, quiet=quiet)
    main = distributed.rank() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.naming_lost())
        if main:
            stack.enter_context(opened(run.folder, config, argv or []))
        distributed.barrier()
        optimizer = resume(run)
        if main:
            run.metrics = Metrics(run.folder, keep=run.at.has)
            stack.callback(run.metrics.close)
        stop = stack.enter_context(_signals())
        while run.at.phase_index < len(run.phases):
            _train_stage(run, optimizer, stop)
            optimizer = None
        if distributed.any_process(stop.is_set()):  # after the last step was saved
            _stop(run)
    report_weights(run)
    return run.model.eval()


def _prepare(config: Config, folder: Path, model: nn.Module | None, *, quiet: bool) -> Run:
    """Load the data, build the model unless there is one, and check all settings."""
    device = distributed.init(config.device)
    defense = get(config.defense)
    train_set, validation_set = _data(config)
    facts = ModelFacts(train_set.image_shape, train_set.num_classes, train_set.mean, train_set.std)
    if model is None:
        model = defense.build(config, facts)
    model.to(device)
    check_convolutions(model, device)
    distributed.use_global_batch_norm(model)
    run = Run(
        config,
        folder,
        model,
        defense.phases(model, config),
        facts,
        _on(train_set, device),
        validation_set,
        device,
        LiveLine(quiet=quiet or distributed.rank() > 0),
        extra_set=_on(load(config.data.extra), device) if config.data.extra else None,
    )
    if config.precision == "bf16" and not run.reduced:
        log.info("precision: %s multiplies float32 faster than bfloat16, and trains in it", device)
    for phase in run.phases:  # settings that do not fit the data set fail here, before any work
        batches_of(config, phase, run.train_set, device, run.extra_set)
    return run


def _on(dataset: ImageDataset, device: torch.device) -> ImageDataset:
    """The data set with its tensors on a device, copied once, not once for each phase."""
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    return replace(dataset, images=images, labels=labels)


def _data(config: Config) -> tuple[ImageDataset, ImageDataset]:
    """The images to train on, and those of the training set that are held out to validate."""
    whole = load(config.data.name, root=config.data.root, split="train")
    rest, validation = split_validation(whole, config.data.num_validation, config.seed)
    if config.data.num_train is not None:
        if config.data.num_train > len(rest):
            raise ConfigError(
                f"data.num_train: {config.data.num_train} is more than the {len(rest)} images "
                "left after validation"
            )
        rest = rest.subset(torch.arange(config.data.num_train))
    return rest, validation


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR1 set, so that the loop can save before it stops."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    previous = {n: signal.signal(n, lambda *_: stop.set()) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _train_stage(run: Run, optimizer: checkpoint.Tensors | None, stop: threading.Event) -> None:
    """Train the stage that is due to its end; ``optimizer`` is what `resume` gave.

    Raises:
        Stopped: ``stop`` is set on some process.
    """
    config, at = run.config, run.at
    stage = next_stage(run)
    if optimizer is not None:
        stage.load(optimizer, run.device)
    if stage.is_last and run.average is None:
        run.average = WeightAverage(run.model, config)
    while at.step < stage.num_steps:
        epoch, step_in_epoch = divmod(at.step, stage.steps_per_epoch)
        rates = [active.optimizer.set_step(at.step) for active in stage.active]
        batches = [active.batches.batch(epoch, step_in_epoch) for active in stage.active]
        for active, numbers in zip(stage.active, train_step(run, stage, batches), strict=True):
            active.recorder.add(numbers)
        before = at.global_step
        at.step += 1
        at.global_step += len(stage.active)
        stage.active[0].recorder.estimate()
        if stage.is_last and run.average is not None:
            run.average.update(run.model, at.step, stage.num_steps, stage.steps_per_epoch)
        done = at.step == stage.num_steps
        for active, rate in zip(stage.active, rates, strict=True):
            if done or active.recorder.global_step % config.log_every == 0:
                active.recorder.write(epoch, stage.steps_per_epoch, rate)
        pointers = _validate(run, stage, epoch) if _is_validated(config, stage, at.step) else []
        if not done and 0 < config.patience <= at.num_stale:
            done = True
            stage.active[0].recorder.write(epoch, stage.steps_per_epoch, rates[0])
        if done:
            at.phase_index, at.step = at.phase_index + len(stage.active), 0
            if config.joint is not None and at.phase_index == len(run.phases) - 1:
                pointers.append("pretrained")
        # after the validation, which may be what the signal interrupted
        stopping = distributed.any_process(stop.is_set())
        every = config.checkpoint_every
        due = at.global_step // every > before // every
        if due or done or stopping or pointers:
            for active in stage.active:
                active.recorder.read()
            save(run, None if done else stage.state(), *pointers)
        if stopping:
            _stop(run)
        if done:
            return


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
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.reduced)


def _stop(run: Run) -> NoReturn:
    step = run.at.global_step
    raise Stopped(f"stopped at step {step}, saved; run the same command to continue")


def _is_validated(config: Config, stage: Stage, step: int) -> bool:
    """Whether an epoch whose end is validated has just ended."""
    epoch, rest = divmod(step, stage.steps_per_epoch)
    if rest or not config.validate_every:
        return False
    return step == stage.num_steps or epoch % config.validate_every == 0


def _validate(run: Run, stage: Stage, epoch: int) -> list[str]:
    """Judge each phase; return the pointers to what has never been as robust as now."""
    started, at, pointers = time.monotonic(), run.at, []
    robust = [active.recorder.validate(epoch) for active in stage.active][-1]
    if stage.is_last:
        averaged = run.average is not None and run.config.weights.endswith("ema")
        if robust > at.best:
            at.best = robust
            pointers.append("best")
        if averaged and run.average is not None:
            robust = stage.active[0].recorder.validate_average(epoch, run.average.model)
            if robust > at.best_average:
                at.best_average = robust
                pointers.append("best-ema")
        at.num_stale = 0 if ("best-ema" if averaged else "best") in pointers else at.num_stale + 1
    for active in stage.active:
        active.recorder.leave_out(time.monotonic() - started)
    return pointers
