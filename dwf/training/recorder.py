"""Turn the numbers of training steps into rows of metrics, the live line, and warnings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwf import distributed
from dwf.attacks.space import attack_space
from dwf.defenses import Phase, StepResult
from dwf.evaluation import clean_and_robust_accuracy
from dwf.progress import describe, duration, read_metrics
from dwf.training.monitors import catastrophic_overfitting
from dwf.training.run import Run, TrainingError

MEASURED = 10  # steps by which the time of a phase is estimated


@dataclass(frozen=True)
class StepNumbers:
    """What a step has to tell, of this process's rows.

    Attributes:
        sums: [3] float64: loss, clean and robust successes. They stay on the device until somebody
            reads them.
        num_clean, num_robust: rows that the successes count.
        num_images: images of the batch; rows may be more, or fewer.
    """

    sums: Tensor
    num_clean: int
    num_robust: int
    num_images: int

    @classmethod
    def of(cls, result: StepResult, num_images: int, parts: int) -> StepNumbers:
        """The numbers of one of ``parts`` equal parts of a batch, which has so many images."""
        correct = result.logits.argmax(dim=1) == result.labels
        clean, robust = correct[: result.num_clean].sum(), correct[result.num_clean :].sum()
        loss = result.loss.detach().double() / parts
        sums = torch.stack([loss, clean.double(), robust.double()])
        return cls(sums, result.num_clean, len(correct) - result.num_clean, num_images)

    @classmethod
    def total(cls, parts: Sequence[StepNumbers]) -> StepNumbers:
        """The numbers of a batch from those of its parts."""
        return cls(
            sum((part.sums for part in parts[1:]), parts[0].sums),
            sum(part.num_clean for part in parts),
            sum(part.num_robust for part in parts),
            sum(part.num_images for part in parts),
        )


class Recorder:
    """Writes the metrics of a phase while it trains.

    Rows are the same whether phases train one after another or side by side: a phase counts its
    steps after all steps of the phases before it, and takes an equal share of the stage's time.

    Args:
        place: how many phases of the same stage come before this one.
        num_steps: steps of the phase.
    """

    def __init__(self, run: Run, phase: Phase, place: int, num_steps: int) -> None:
        self._run = run
        self._phase = phase
        self._place = place
        self._num_steps = num_steps
        self._before = run.at.global_step - run.at.num_phases * run.at.step + place * num_steps
        self._unread: list[StepNumbers] = []
        self._num_images = 0  # since the last row, in this process's lifetime
        self._since = self._began = time.monotonic()
        self._first_step = run.at.step
        self._timed = self._began

    @property
    def global_step(self) -> int:
        """Steps of the run up to here, as if phases trained one after another."""
        return self._before + self._run.at.step

    def add(self, numbers: StepNumbers) -> None:
        """Take over the numbers of the newest step, without waiting for the device."""
        self._unread.append(numbers)
        self._num_images += numbers.num_images * distributed.world_size()

    def estimate(self) -> None:
        """Say how long the stage will take, once some steps of this process are measured.

        The first one is left out, because it compiles and verifies.
        """
        at = self._run.at
        taken = at.step - self._first_step
        if taken == 1:
            self.read()  # waits for the device
            self._timed = time.monotonic()
        elif taken == 1 + MEASURED and self._num_steps - at.step > MEASURED:
            self.read()
            step = (time.monotonic() - self._timed) / MEASURED
            left = self._num_steps - at.step
            later = len(self._run.phases) - at.phase_index - at.num_phases
            more = f"; {later} more phase{'s' * (later > 1)} after that" if later else ""
            self._run.live.say(
                f"{self._phase.name}: about {duration(step * left)} for its last {left:,} steps, "
                f"at {step:.3g} s a step without validation (by {MEASURED} steps){more}"
            )

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
        """Write one row for the steps since the last, if any, and show it on the live line."""
        self.read()
        steps = self._run.unwritten.pop(self._phase.name, [])
        if not steps:
            return
        loss, clean, robust, num_clean, num_robust, num_images = map(sum, zip(*steps, strict=True))
        at, now = self._run.at, time.monotonic()
        seconds = (now - self._since) / at.num_phases
        row = {
            "kind": "train",
            **self._where(epoch),
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
        to_do = at.num_phases * (self._num_steps - at.step) + self._steps_of_later_stages()
        eta = (now - self._began) / max(done, 1) * to_do / at.num_phases
        self._run.live.show(
            describe(
                self._phase.name,
                (at.phase_index + self._place, len(self._run.phases)),
                epoch,
                self._phase.schedule.num_epochs,
                (at.step - 1) % steps_per_epoch,
                steps_per_epoch,
                row,
                eta,
            )
        )

    def validate(self, epoch: int) -> float:
        """Judge the phase's module on held-out training images; return its robust accuracy.

        Rank 0 judges for all processes, and warns of catastrophic overfitting.

        Raises:
            TrainingError: there is a warning, and ``on_collapse`` is "stop".
        """
        run = self._run
        robust, warning = 0.0, None
        if distributed.rank() == 0:
            robust = self._write_validation(epoch, self._phase.module, "validation")
            warning = catastrophic_overfitting(read_metrics(run.folder), self._phase.name)
            if warning is not None:
                self._write({"kind": "warning", **self._where(epoch), "message": warning})
                run.live.say(f"{self._phase.name} epoch {epoch + 1}: {warning}")
        if distributed.any_process(warning is not None) and run.config.on_collapse == "stop":
            raise TrainingError(
                f"phase {self._phase.name}: {warning or 'rank 0 saw a collapse'}; on_collapse is "
                "'stop'; the checkpoints of before stand"
            )
        return float(distributed.total(torch.tensor(robust, dtype=torch.float64)))

    def validate_average(self, epoch: int, average: nn.Module) -> float:
        """Judge the average of the weights likewise; return its robust accuracy."""
        robust = 0.0
        if distributed.rank() == 0:
            robust = self._write_validation(epoch, average, "validation-average")
        return float(distributed.total(torch.tensor(robust, dtype=torch.float64)))

    def leave_out(self, seconds: float) -> None:
        """Count this time, which just went by, to no row of training."""
        self._since += seconds

    def _write_validation(self, epoch: int, model: nn.Module, kind: str) -> float:
        run, attack, started = self._run, self._run.config.attack, time.monotonic()
        clean, robust = clean_and_robust_accuracy(
            model,
            run.validation_set,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            norm=attack.norm,
            num_steps=run.config.validation_steps,
            batch_size=run.config.evaluation.batch_size,
            device=run.device,
            space=lambda model: attack_space(
                model, attack.protocol, attack.clamp, run.train_set.mean, run.train_set.std
            ),
        )
        self._write(
            {
                "kind": kind,
                **self._where(epoch),
                "clean_accuracy": clean,
                "robust_accuracy": robust,
                "num_images": len(run.validation_set),
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        run.live.say(
            f"{self._phase.name} epoch {epoch + 1}/{self._phase.schedule.num_epochs}: "
            f"{kind} clean {100 * clean:.1f} %, "
            f"PGD-{run.config.validation_steps} {100 * robust:.1f} %"
        )
        return robust

    def _steps_of_later_stages(self) -> int:
        """Steps of the phases that are still to begin; each takes about as long as one of this."""
        run, at = self._run, self._run.at
        schedules = [phase.schedule for phase in run.phases[at.phase_index + at.num_phases :]]
        return sum(len(run.train_set) // s.batch_size * s.num_epochs for s in schedules)

    def _where(self, epoch: int) -> dict[str, Any]:
        at = self._run.at
        return {
            "phase": self._phase.name,
            "phase_index": at.phase_index + self._place,
            "epoch": epoch,
            "step": at.step,
            "global_step": self.global_step,
        }

    def _write(self, row: dict[str, Any]) -> None:
        if self._run.metrics is not None:
            self._run.metrics.write(row)
