"""The training loop: phases in order, validation, checkpoints, and an exact resume.

Nothing random is drawn from a stream. Data order, augmentation, attack strengths and start noise
are functions of (seed, phase, epoch, step, sample index), and each step seeds torch for models that
draw in their forward pass. So the state of a run is its tensors and a few integers, and a run that
was killed continues to the same bits.

The loop trains a stage at a time: one phase, or several side by side. Those take their steps in
turn, each with its own data, draws, optimizer and rows; what they share is the attack, one for the
images of all. So they end with the weights that they would have had one after another.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dwf import checkpoint, distributed
from dwf.attacks.space import attack_space
from dwf.checks import CheckpointError, ConfigError, DwfError
from dwf.config import Config, PhaseConfig, derive_seed, from_dict
from dwf.data import Batches, ImageDataset, load, split_validation
from dwf.defenses import Batch, Crafter, ModelFacts, Phase, StepResult, get
from dwf.defenses.phase import Step
from dwf.evaluation import clean_and_robust_accuracy
from dwf.files import atomic_write_json, read_json, run_lock
from dwf.models import Group
from dwf.progress import LiveLine, Metrics, describe, read_metrics
from dwf.training.environment import environment
from dwf.training.monitors import catastrophic_overfitting
from dwf.training.optimizer import Optimizer, WeightAverage


class TrainingError(DwfError, RuntimeError):
    """Training cannot go on: the loss or the weights are not finite, or the model collapsed."""


class Stopped(DwfError, RuntimeError):
    """A signal asked the run to stop; everything is saved, the same command continues it."""


@dataclass
class Progress:
    """Where a run stands: the next step of a stage, all steps taken, the best validation so far.

    The stage that ``step`` counts in is ``num_phases`` from ``phase_index`` on; ``global_step``
    counts those of each. A run is complete when ``phase_index`` has passed its last phase.
    """

    phase_index: int = 0
    step: int = 0
    global_step: int = 0
    best: float = -1.0
    num_phases: int = 1

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a metrics row is about steps that have been taken."""
        index: int = row["phase_index"]
        in_stage = index < self.phase_index + self.num_phases and row["step"] <= self.step
        return index < self.phase_index or in_stage


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
    # by phase: loss, clean and robust successes, and what they count, of steps no row holds yet
    unwritten: dict[str, list[list[float]]] = field(default_factory=dict)
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
        TrainingError: a loss that is not finite, or a collapse at which the configuration says to
            stop; the last checkpoint stands.
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
    # copied once, not once for each phase
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    train_set = replace(train_set, images=images, labels=labels)
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
            run.metrics = Metrics(folder, keep=run.at.has)
            stack.callback(run.metrics.close)
        stop = stack.enter_context(_signals())
        while run.at.phase_index < len(phases):
            _train_stage(run, optimizer_state, stop)
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
        # settings that are younger than the run had their defaults
        differences = _differences(from_dict(read_json(path)).to_dict(), config.to_dict())
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
    if isinstance(run.unwritten, list):  # written before phases could train side by side
        run.unwritten = {run.phases[run.at.phase_index].name: run.unwritten}
    if "ema" in tensors:
        run.average = WeightAverage(run.model, run.config.ema_decay)
        run.average.load(tensors["ema"], state["ema_updates"], path / "ema.safetensors")
    run.live.say(f"resuming from {path.name}")
    return tensors.get("optimizer")


def _save(run: _Run, stage: _Stage | None, *pointers: str) -> None:
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
    if stage is not None:
        tensors["optimizer"] = stage.state()
    if run.average is not None:
        tensors["ema"] = run.average.state()
    state = {
        "progress": vars(run.at).copy(),
        # sorted, because a resumed run fills it in another order
        "unwritten": dict(sorted(run.unwritten.items())),
        "ema_updates": run.average.num_updates if run.average else 0,
        "facts": vars(run.facts),
    }
    name = checkpoint.save(run.checkpoints, run.at.global_step, tensors, state)
    for pointer in (*pointers, "last"):
        checkpoint.point(run.checkpoints, pointer, name)
    checkpoint.prune(run.checkpoints)


@dataclass
class _Member:
    """A phase while it trains, alone or with others."""

    phase: Phase
    batches: Batches
    forward: nn.Module
    optimizer: Optimizer
    recorder: _Recorder


@dataclass
class _Stage:
    """Phases that train side by side; all take equally many steps. ``target`` is what one attack
    on all of them sees."""

    members: list[_Member]
    target: nn.Module
    schedule: PhaseConfig
    steps_per_epoch: int

    @property
    def num_steps(self) -> int:
        return self.schedule.num_epochs * self.steps_per_epoch

    def state(self) -> checkpoint.Tensors:
        """Of the optimizers, and what phases keep from batch to batch."""
        return {
            self._prefix(member) + name: value
            for member in self.members
            for name, value in {**member.optimizer.state(), **_kept(member.phase)}.items()
        }

    def load(self, state: checkpoint.Tensors, device: torch.device) -> None:
        for member in self.members:
            prefix = self._prefix(member)
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            kept = [name for name in own if name.startswith(KEPT)]
            if member.phase.state is not None:
                member.phase.state.update(
                    {name.removeprefix(KEPT): own.pop(name).to(device) for name in kept}
                )
            member.optimizer.load(own)

    def _prefix(self, member: _Member) -> str:
        return f"{member.phase.name}/" if len(self.members) > 1 else ""


KEPT = "kept/"


def _kept(phase: Phase) -> checkpoint.Tensors:
    return {KEPT + name: value for name, value in (phase.state or {}).items()}


def _num_together(config: Config, phases: list[Phase], first: int, device: torch.device) -> int:
    """How many phases, from ``first`` on, make a stage."""
    head, together = phases[first], config.pretrain_together
    if head.craft is None or together == "never" or (together == "auto" and device.type != "cuda"):
        return 1
    num_phases, seen = 1, set(head.module.parameters())
    # not the last phase: the best checkpoint and the average of the weights are its alone
    for phase in phases[first + 1 : -1]:
        own = set(phase.module.parameters())
        if phase.craft is not head.craft or phase.schedule != head.schedule or own & seen:
            break
        num_phases, seen = num_phases + 1, seen | own
    return num_phases


def _make_stage(run: _Run) -> _Stage:
    """The stage that the run stands in, or at the beginning of."""
    config, at = run.config, run.at
    if at.step == 0:  # else it goes on with those it began with
        at.num_phases = _num_together(config, run.phases, at.phase_index, run.device)
    phases = run.phases[at.phase_index : at.phase_index + at.num_phases]
    schedule, modules = phases[0].schedule, [phase.module for phase in phases]
    members = []
    for e, phase in enumerate(phases):
        batches = _batches(config, phase, run.train_set, run.device)
        num_steps = schedule.num_epochs * batches.steps_per_epoch
        optimizer, recorder = Optimizer(phase, num_steps), _Recorder(run, phase, e, num_steps)
        forward = _distributed(phase.module, run.device)
        members.append(_Member(phase, batches, forward, optimizer, recorder))
    target = modules[0] if len(modules) == 1 else Group(modules)
    return _Stage(members, target, schedule, members[0].batches.steps_per_epoch)


def _train_stage(
    run: _Run, optimizer_state: checkpoint.Tensors | None, stop: threading.Event
) -> None:
    config, at = run.config, run.at
    stage = _make_stage(run)
    members, num_steps, steps_per_epoch = stage.members, stage.num_steps, stage.steps_per_epoch
    final = at.phase_index + len(members) == len(run.phases)
    if optimizer_state is not None:
        stage.load(optimizer_state, run.device)
    if final and run.average is None:
        run.average = WeightAverage(run.model, config.ema_decay)
    while at.step < num_steps:
        epoch, step_in_epoch = divmod(at.step, steps_per_epoch)
        rates = [member.optimizer.set_step(at.step) for member in members]
        batches = [Batch(*member.batches.batch(epoch, step_in_epoch)) for member in members]
        for member, numbers in zip(members, _train_step(run, stage, batches), strict=True):
            member.recorder.add(numbers)
        if final and run.average is not None:
            run.average.update(run.model)
        before = at.global_step
        at.step += 1
        at.global_step += len(members)
        end_of_epoch = at.step % steps_per_epoch == 0
        last = at.step == num_steps
        stopping = distributed.any_process(stop.is_set())
        every = config.checkpoint_every
        due = stopping or last or at.global_step // every > before // every
        for member, rate in zip(members, rates, strict=True):
            if last or member.recorder.global_step % config.log_every == 0:
                member.recorder.write(epoch, steps_per_epoch, rate)
        pointers = []
        if (
            end_of_epoch
            and config.validate_every
            and (last or (epoch + 1) % config.validate_every == 0)
        ):
            robust = _validate(members, epoch)
            if final and robust > at.best:
                at.best = robust
                pointers.append("best")
        if last:
            at.phase_index, at.step = at.phase_index + len(members), 0
            if config.joint is not None and at.phase_index == len(run.phases) - 1:
                pointers.append("pretrained")
        if due or pointers:
            for member in members:
                member.recorder.read()
            _save(run, None if last else stage, *pointers)
        if stopping and not last:
            raise Stopped(
                f"stopped at step {at.global_step}, saved; run the same command to continue"
            )
        if last:
            return


def _validate(members: list[_Member], epoch: int) -> float:
    """Judge each member; return the robust accuracy of the last."""
    started = time.monotonic()
    for member in members:
        robust = member.recorder.validate(epoch)
    for member in members:
        member.recorder.leave_out(time.monotonic() - started)
    return robust


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


def _train_step(run: _Run, stage: _Stage, batches: list[Batch]) -> list[_StepNumbers]:
    """One step of each member over its batch, in equal parts if the schedule says so."""
    members = stage.members
    seeds = [derive_seed(run.config.seed, x.phase.name, run.at.step) for x in members]
    for member in members:
        member.phase.module.train()
    numbers: list[_StepNumbers] = []
    # phases side by side have as many updates as the first: those that craft alike
    for u in range(len(members[0].phase.updates)):
        found = _update(run, stage, batches, seeds, u)
        numbers = numbers or found  # rows show the first update's
    return numbers


def _update(
    run: _Run, stage: _Stage, batches: list[Batch], seeds: list[int], u: int
) -> list[_StepNumbers]:
    """One optimizer step of each member."""
    members, parts = stage.members, stage.schedule.accumulation
    updates = [member.phase.updates[u] for member in members]
    for member in members:
        member.optimizer.zero_grad()
    numbers: list[_StepNumbers | None] = [None] * len(members)
    for i, part in enumerate(zip(*(_split(batch, parts) for batch in batches), strict=True)):
        crafted = _craft(run, stage, seeds, part)
        for e, (member, seed, batch) in enumerate(zip(members, seeds, crafted, strict=True)):
            draw = (i, u) if u else (i,)
            torch.manual_seed(derive_seed(seed, "forward", distributed.rank(), *draw))
            crafter = _crafter(run, stage, seed)
            result = _backward(run, member, updates[e].step, crafter, batch, part=i)
            numbers[e] = _add(numbers[e], result, parts, len(batch.images))
    for member, update in zip(members, updates, strict=True):
        member.optimizer.step(update.trains)
    return [x for x in numbers if x is not None]


def _split(batch: Batch, parts: int) -> list[Batch]:
    return [Batch(*part) for part in zip(*(rows.chunk(parts) for rows in batch), strict=True)]


def _craft(
    run: _Run, stage: _Stage, seeds: list[int], batches: tuple[Batch, ...]
) -> Sequence[Batch]:
    """Replace the members' images by attacked ones, in one attack, if their phases say so."""
    craft = stage.members[0].phase.craft
    if craft is None:
        return batches
    seed = seeds[0] if len(seeds) == 1 else tuple(seeds)
    together = Batch(*(torch.cat(rows) for rows in zip(*batches, strict=True)))
    with _precision(run):
        images = craft(_crafter(run, stage, seed), stage.target, together).chunk(len(batches))
    return [batch._replace(images=rows) for batch, rows in zip(batches, images, strict=True)]


def _backward(
    run: _Run, member: _Member, step: Step, crafter: Crafter, batch: Batch, *, part: int
) -> StepResult:
    """Add the gradient of one part of a member's batch."""
    phase, forward, parts = member.phase, member.forward, member.phase.schedule.accumulation
    wait = part < parts - 1 and isinstance(forward, DistributedDataParallel)
    with forward.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
        with _precision(run):
            result = step(phase.module, forward, batch, crafter)
        (result.loss / parts).backward()  # type: ignore[no-untyped-call]
    return result


def _crafter(run: _Run, stage: _Stage, seed: int | tuple[int, ...]) -> Crafter:
    dtype = torch.float32 if run.config.precision == "fp32" else None
    epoch = run.at.step // stage.steps_per_epoch
    return Crafter(run.config.attack, seed, run.train_set.mean, run.train_set.std, dtype, epoch)


def _precision(run: _Run) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16")


def _add(
    before: _StepNumbers | None, result: StepResult, parts: int, num_images: int
) -> _StepNumbers:
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
    """Turns step numbers of a phase into metrics rows and the live line.

    Rows are those of phases that train one after another, whichever way they train: a member of a
    stage counts its steps after all steps of the members before it, and takes an equal share of the
    stage's time.
    """

    def __init__(self, run: _Run, phase: Phase, place: int, num_steps: int) -> None:
        self._run = run
        self._phase = phase
        self._place_in_stage = place
        self._num_steps = num_steps
        self._before = run.at.global_step - run.at.num_phases * run.at.step + place * num_steps
        self._unread: list[_StepNumbers] = []
        self._num_images = 0  # since the last row, in this process's lifetime
        self._since = self._began = time.monotonic()
        self._first_step = run.at.step

    @property
    def global_step(self) -> int:
        return self._before + self._run.at.step

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
        world, last = distributed.world_size(), self.global_step
        unwritten = self._run.unwritten.setdefault(self._phase.name, [])
        sums = distributed.total(torch.stack([s.sums for s in steps])).tolist()
        for i, (step, (loss, clean, robust)) in enumerate(zip(steps, sums, strict=True)):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"phase {self._phase.name}: the loss of step {last - len(steps) + 1 + i} is "
                    f"{loss}; lower the learning rate; the last checkpoint stands"
                )
            counts = (step.num_clean, step.num_robust, step.num_images)
            unwritten.append([loss / world, clean, robust, *(world * n for n in counts)])

    def write(self, epoch: int, steps_per_epoch: int, rate: float) -> None:
        """One row for the steps since the last."""
        self.read()
        steps = self._run.unwritten.pop(self._phase.name)
        loss, clean, robust, num_clean, num_robust, num_images = map(sum, zip(*steps, strict=True))
        at, now = self._run.at, time.monotonic()
        seconds = (now - self._since) / at.num_phases
        row = {
            "kind": "train",
            **self._place(epoch),
            "loss": loss / len(steps),
            "clean_accuracy": clean / num_clean if num_clean else None,
            "robust_accuracy": robust / num_robust if num_robust else None,
            "learning_rate": rate,
            "num_images": num_images,
            "images_per_s": round(self._num_images / max(seconds, 1e-9), 2),
            "seconds": round(seconds, 3),
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
        robust, warning = 0.0, None
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
            warning = catastrophic_overfitting(read_metrics(run.folder), self._phase.name)
            if warning is not None:
                self._write({"kind": "warning", **self._place(epoch), "message": warning})
                run.live.say(f"{self._phase.name} epoch {epoch + 1}: {warning}")
        if distributed.any_process(warning is not None) and run.config.on_collapse == "stop":
            raise TrainingError(
                f"phase {self._phase.name}: {warning or 'rank 0 saw a collapse'}; on_collapse is "
                "'stop'; the checkpoints of before stand"
            )
        return float(distributed.total(torch.tensor(robust, dtype=torch.float64)))

    def leave_out(self, seconds: float) -> None:
        """Count this time, which just went by, to no row of training."""
        self._since += seconds

    def _place(self, epoch: int) -> dict[str, Any]:
        at = self._run.at
        return {
            "phase": self._phase.name,
            "phase_index": at.phase_index + self._place_in_stage,
            "epoch": epoch,
            "step": at.step,
            "global_step": self.global_step,
        }

    def _write(self, row: dict[str, Any]) -> None:
        if self._run.metrics is not None:
            self._run.metrics.write(row)
