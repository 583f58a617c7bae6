"""The training loop: phases in order, validation, checkpoints, and an exact resume.

Nothing random is drawn from a stream. Data order, augmentation, attack strengths and start noise
are functions of (seed, phase, epoch, step, sample index), and each step seeds torch for models that
draw in their forward pass. So the state of a run is its tensors and three integers, and a run that
was killed continues to the same bits.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dwf import checkpoint, distributed
from dwf.attacks.views import attack_space
from dwf.checks import CheckpointError, ConfigError, DwfError
from dwf.config import Config, derive_seed
from dwf.data import Batches, ImageDataset, load, split_validation
from dwf.defenses import Batch, Crafter, ModelFacts, Phase, get
from dwf.evaluation import clean_and_robust_accuracy
from dwf.files import atomic_write_json, read_json, run_lock
from dwf.progress import LiveLine, Metrics, describe
from dwf.training.environment import environment
from dwf.training.optimizer import Optimizer, WeightAverage


class TrainingError(DwfError, RuntimeError):
    """Training cannot go on: the loss or the weights are not finite."""


class Stopped(DwfError, RuntimeError):
    """A signal asked the run to stop; everything is saved, the same command continues it."""


@dataclass
class Progress:
    """Where a run stands: the next step of a phase, all steps taken, the best validation so far.

    A run is complete when ``phase_index`` has passed its last phase.
    """

    phase_index: int = 0
    step: int = 0
    global_step: int = 0
    best: float = -1.0


@dataclass
class _Run:
    config: Config
    folder: Path
    model: nn.Module
    phases: list[Phase]
    facts: ModelFacts
    train_set: ImageDataset
    validation_set: ImageDataset
    device: torch.device
    live: LiveLine
    at: Progress = field(default_factory=Progress)
    average: WeightAverage | None = None
    # loss, clean and robust successes, and what they count, of steps that no row holds yet
    unwritten: list[list[float]] = field(default_factory=list)
    metrics: Metrics | None = None  # on rank 0 only

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


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
    Raises:
        ConfigError, DataError: before the folder exists.
        CheckpointError: the folder is in use, damaged, or of another configuration.
        TrainingError: a loss that is not finite; the last checkpoint stands.
        Stopped: after SIGTERM or SIGUSR1, with everything saved.
    """
    folder = Path(out)
    device = distributed.init(config.device)
    defense = get(config.defense)
    train_set, validation_set = _data(config)
    facts = ModelFacts(train_set.image_shape, train_set.num_classes, train_set.mean, train_set.std)
    if model is None:
        model = defense.build(config, facts)
    model.to(device)
    distributed.use_global_batch_norm(model)
    phases = defense.phases(model, config)
    for phase in phases:  # settings that do not fit the data set fail here, before any work
        _batches(config, phase, train_set, device)
    main = distributed.rank() == 0
    live = LiveLine(quiet=quiet or not main)
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(_opened(folder, config, argv or []))
        distributed.barrier()
        run = _Run(config, folder, model, phases, facts, train_set, validation_set, device, live)
        optimizer_state = _resume(run)
        if main:
            run.metrics = Metrics(folder, resume_at=run.at.global_step)
            stack.callback(run.metrics.close)
        stop = stack.enter_context(_signals())
        while run.at.phase_index < len(phases):
            _train_phase(run, optimizer_state, stop)
            optimizer_state = None
        model.eval()
        return model


def _data(config: Config) -> tuple[ImageDataset, ImageDataset]:
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


def _batches(config: Config, phase: Phase, dataset: ImageDataset, device: torch.device) -> Batches:
    schedule, world = phase.schedule, distributed.world_size()
    if schedule.batch_size % (schedule.accumulation * world):
        raise ConfigError(
            f"batch_size: {schedule.batch_size} does not divide into accumulation "
            f"{schedule.accumulation} on each of {world} processes"
        )
    return Batches(
        dataset,
        phase.schedule.batch_size,
        seed=derive_seed(config.seed, "data", phase.name),
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
        device=device,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


@contextlib.contextmanager
def _opened(folder: Path, config: Config, argv: list[str]) -> Iterator[None]:
    """Hold the lock of a run folder that is new, or belongs to this configuration."""
    _check_owner(folder, config)
    with run_lock(folder):
        _check_owner(folder, config)  # again, because another process may have been quicker
        if not (folder / "config.json").exists():
            atomic_write_json(folder / "config.json", config.to_dict())
        if not (folder / "environment.json").exists():
            atomic_write_json(folder / "environment.json", environment(argv))
        (folder / "checkpoints").mkdir(exist_ok=True)
        yield


def _check_owner(folder: Path, config: Config) -> None:
    path = folder / "config.json"
    if path.exists():
        differences = _differences(read_json(path), config.to_dict())
        if differences:
            raise CheckpointError(
                f"{folder}: holds a run of another configuration ({'; '.join(differences[:3])}); "
                "choose another folder, or repeat the command that made it"
            )
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise CheckpointError(f"{folder}: not empty and not a run folder; choose another")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(new, tuple):
        new = list(new)
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


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


def _resume(run: _Run) -> checkpoint.Tensors | None:
    """Load the last checkpoint, if there is one; return the optimizer's state."""
    if not (run.checkpoints / "last.json").exists():
        return None
    path = checkpoint.resolve(run.checkpoints, "last")
    tensors, state = checkpoint.load(path)
    checkpoint.load_weights(run.model, tensors["model"], path / "model.safetensors")
    run.at = Progress(**state["progress"])
    run.unwritten = state["unwritten"]
    if "ema" in tensors:
        run.average = WeightAverage(run.model, run.config.ema_decay)
        run.average.load(tensors["ema"], state["ema_updates"], path / "ema.safetensors")
    run.live.say(f"resuming from {path.name}")
    return tensors.get("optimizer")


def _save(run: _Run, optimizer: Optimizer | None, *pointers: str) -> None:
    """Write a checkpoint of this moment, and let ``last`` and other pointers name it."""
    for name, value in run.model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingError(
                f"{name} is not finite after step {run.at.global_step}; lower the learning rate; "
                "the last checkpoint stands"
            )
    if distributed.rank() > 0:
        return
    tensors = {"model": dict(run.model.state_dict())}
    if optimizer is not None:
        tensors["optimizer"] = optimizer.state()
    if run.average is not None:
        tensors["ema"] = run.average.state()
    state = {
        "progress": vars(run.at).copy(),
        "unwritten": run.unwritten,
        "ema_updates": run.average.num_updates if run.average else 0,
        "facts": vars(run.facts),
    }
    name = checkpoint.save(run.checkpoints, run.at.global_step, tensors, state)
    for pointer in (*pointers, "last"):
        checkpoint.point(run.checkpoints, pointer, name)
    checkpoint.prune(run.checkpoints)


def _train_phase(
    run: _Run, optimizer_state: checkpoint.Tensors | None, stop: threading.Event
) -> None:
    config, at = run.config, run.at
    phase = run.phases[at.phase_index]
    final = at.phase_index == len(run.phases) - 1
    batches = _batches(config, phase, run.train_set, run.device)
    steps_per_epoch = batches.steps_per_epoch
    num_steps = phase.schedule.num_epochs * steps_per_epoch
    optimizer = Optimizer(phase, num_steps)
    if optimizer_state is not None:
        optimizer.load(optimizer_state)
    if final and run.average is None:
        run.average = WeightAverage(run.model, config.ema_decay)
    forward = _distributed(phase.module, run.device)
    recorder = _Recorder(run, phase, num_steps)
    while at.step < num_steps:
        epoch, step_in_epoch = divmod(at.step, steps_per_epoch)
        rate = optimizer.set_step(at.step)
        batch = Batch(*batches.batch(epoch, step_in_epoch))
        recorder.add(_train_step(run, phase, forward, optimizer, batch))
        if final and run.average is not None:
            run.average.update(run.model)
        at.step += 1
        at.global_step += 1
        end_of_epoch = at.step % steps_per_epoch == 0
        last = at.step == num_steps
        stopping = distributed.any_process(stop.is_set())
        due = stopping or last or at.global_step % config.checkpoint_every == 0
        if last or at.global_step % config.log_every == 0:
            recorder.write(epoch, steps_per_epoch, rate)
        pointers = []
        if (
            end_of_epoch
            and config.validate_every
            and (last or (epoch + 1) % config.validate_every == 0)
        ):
            robust = recorder.validate(epoch)
            if final and robust > at.best:
                at.best = robust
                pointers.append("best")
        if last:
            at.phase_index, at.step = at.phase_index + 1, 0
            if config.joint is not None and at.phase_index == len(run.phases) - 1:
                pointers.append("pretrained")
        if due or pointers:
            recorder.read()
            _save(run, None if last else optimizer, *pointers)
        if stopping and not last:
            raise Stopped(
                f"stopped at step {at.global_step}, saved; run the same command to continue"
            )
        if last:
            return


def _distributed(module: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return module
    # the option's name before torch 2.15; drop once that is required
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync: False}  # BatchNorm statistics are global already
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        **options,
    )


@dataclass
class _StepNumbers:
    """``sums`` [3] float64: loss, clean and robust successes of this process's rows.

    They stay on the device until somebody reads them.
    """

    sums: Tensor
    num_clean: int
    num_robust: int
    num_images: int


def _train_step(
    run: _Run, phase: Phase, forward: nn.Module, optimizer: Optimizer, batch: Batch
) -> _StepNumbers:
    """One optimizer step over a batch, in equal parts if the schedule says so."""
    config, at = run.config, run.at
    seed = derive_seed(config.seed, phase.name, at.step)
    crafter = Crafter(config.attack, seed, run.train_set.mean, run.train_set.std)
    torch.manual_seed(derive_seed(seed, "forward", distributed.rank()))
    optimizer.zero_grad()
    phase.module.train()
    parts = phase.schedule.accumulation
    numbers = None
    for i, part in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True)):
        wait = i < parts - 1 and isinstance(forward, DistributedDataParallel)
        with forward.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(
                run.device.type, torch.bfloat16, enabled=config.precision == "bf16"
            ):
                result = phase.step(phase.module, forward, Batch(*part), crafter)
            (result.loss / parts).backward()  # type: ignore[no-untyped-call]
        numbers = _add(numbers, result, parts, len(part[0]))
    optimizer.step()
    assert numbers is not None
    return numbers


def _add(before: _StepNumbers | None, result: Any, parts: int, num_images: int) -> _StepNumbers:
    correct = result.logits.argmax(dim=1) == result.labels
    clean, robust = correct[: result.num_clean].sum(), correct[result.num_clean :].sum()
    now = _StepNumbers(
        torch.stack([result.loss.detach().double() / parts, clean.double(), robust.double()]),
        result.num_clean,
        len(correct) - result.num_clean,
        num_images,
    )
    if before is None:
        return now
    return _StepNumbers(*(getattr(before, k) + getattr(now, k) for k in vars(now)))


class _Recorder:
    """Turns step numbers into metrics rows and the live line."""

    def __init__(self, run: _Run, phase: Phase, num_steps: int) -> None:
        self._run = run
        self._phase = phase
        self._num_steps = num_steps
        self._unread: list[_StepNumbers] = []
        self._num_images = 0  # since the last row, in this process's lifetime
        self._since = self._began = time.monotonic()
        self._first_step = run.at.step

    def add(self, numbers: _StepNumbers) -> None:
        self._unread.append(numbers)
        self._num_images += numbers.num_images * distributed.world_size()

    def read(self) -> None:
        """Sum the newest steps over all processes; the only place where training waits for them.

        Raises:
            TrainingError: a loss is not finite.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        world, last = distributed.world_size(), self._run.at.global_step
        sums = distributed.total(torch.stack([s.sums for s in steps])).tolist()
        for i, (step, (loss, clean, robust)) in enumerate(zip(steps, sums, strict=True)):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"phase {self._phase.name}: the loss of step {last - len(steps) + 1 + i} is "
                    f"{loss}; lower the learning rate; the last checkpoint stands"
                )
            counts = (step.num_clean, step.num_robust, step.num_images)
            self._run.unwritten.append([loss / world, clean, robust, *(world * n for n in counts)])

    def write(self, epoch: int, steps_per_epoch: int, rate: float) -> None:
        """One row for the steps since the last."""
        self.read()
        steps, self._run.unwritten = self._run.unwritten, []
        loss, clean, robust, num_clean, num_robust, num_images = map(sum, zip(*steps, strict=True))
        at, now = self._run.at, time.monotonic()
        row = {
            "kind": "train",
            **self._place(epoch),
            "loss": loss / len(steps),
            "clean_accuracy": clean / num_clean if num_clean else None,
            "robust_accuracy": robust / num_robust if num_robust else None,
            "learning_rate": rate,
            "num_images": num_images,
            "images_per_s": round(self._num_images / max(now - self._since, 1e-9), 2),
            "seconds": round(now - self._since, 3),
        }
        self._num_images = 0
        self._since = now
        self._write(row)
        done = at.step - self._first_step
        eta = (now - self._began) / max(done, 1) * (self._num_steps - at.step)
        self._run.live.show(
            describe(
                self._phase.name,
                epoch,
                self._phase.schedule.num_epochs,
                (at.step - 1) % steps_per_epoch,
                steps_per_epoch,
                row,
                eta,
            )
        )

    def validate(self, epoch: int) -> float:
        """Accuracy on held-out training images, clean and under PGD; rank 0 decides for all."""
        run = self._run
        robust = 0.0
        if distributed.rank() == 0:
            attack, started = run.config.attack, time.monotonic()
            clean, robust = clean_and_robust_accuracy(
                self._phase.module,
                run.validation_set,
                epsilon=attack.epsilon,
                step_size=attack.step_size,
                num_steps=run.config.validation_steps,
                batch_size=run.config.evaluation.batch_size,
                device=run.device,
                space=lambda model: attack_space(
                    model, attack.protocol, attack.clamp, run.train_set.mean, run.train_set.std
                ),
            )
            seconds = time.monotonic() - started
            row = {
                "kind": "validation",
                **self._place(epoch),
                "clean_accuracy": clean,
                "robust_accuracy": robust,
                "num_images": len(run.validation_set),
                "seconds": round(seconds, 3),
            }
            self._write(row)
            run.live.say(
                f"{self._phase.name} epoch {epoch + 1}/{self._phase.schedule.num_epochs}: "
                f"validation clean {100 * clean:.1f} %, "
                f"PGD-{run.config.validation_steps} {100 * robust:.1f} %"
            )
        distributed.barrier()
        self._since = time.monotonic()
        return float(distributed.total(torch.tensor(robust, dtype=torch.float64)))

    def _place(self, epoch: int) -> dict[str, Any]:
        at = self._run.at
        return {
            "phase": self._phase.name,
            "phase_index": at.phase_index,
            "epoch": epoch,
            "step": at.step,
            "global_step": at.global_step,
        }

    def _write(self, row: dict[str, Any]) -> None:
        if self._run.metrics is not None:
            self._run.metrics.write(row)
