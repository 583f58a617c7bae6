"""Run commands with a time limit each, and keep what they say and write, whatever they do."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Between asking a process to stop and killing it: training saves a checkpoint when asked.
GRACE_S = 8.0
# A stage that says more than this is cut in the middle.
MAX_LOG_BYTES = 2**20
# Between two copies of the files that a running stage writes.
COPY_EVERY_S = 5.0

Command = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that run one after the other until one fails, within `limit_s` altogether.

    `estimate_s` is what they are believed to take on an H200; None is all the time that is left.
    `skipped` is the reason not to run; `stop` asks it to end when the time is up. `keep` names
    files that are copied while it runs. `extra` stages run only when they are named.
    """

    name: str
    commands: Sequence[Command] = ()
    limit_s: float = 60.0
    estimate_s: float | None = 30.0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: str | None = None
    stop: signal.Signals = signal.SIGTERM
    keep: Mapping[Path, Path] = dataclasses.field(default_factory=dict)
    extra: bool = False
    # Takes the stage's output and keeps what matters; what it returns replaces the last line.
    after: Callable[[str], str | None] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a stage: "ok", "failed", "timed out" or "skipped"; `last` is its last line."""

    name: str
    status: str
    seconds: float
    last: str

    def __str__(self) -> str:
        return f"{self.name:<18} {self.status:<10} {self.seconds:6.1f} s  {self.last[:110]}"


def run_stage(stage: Stage, log: Path, seconds: float) -> Outcome:
    """Run a stage within `seconds`, its output appended to the log; never raises for its faults."""
    if stage.skipped:
        append(log, f"\n=== {stage.name}: skipped, {stage.skipped}\n")
        return Outcome(stage.name, "skipped", 0.0, stage.skipped)
    began = time.monotonic()
    limit_s = min(stage.limit_s, seconds)
    append(log, f"\n=== {stage.name}, at most {limit_s:.0f} s\n")
    offset = log.stat().st_size
    status = "ok"
    for command in stage.commands:
        append(log, f"$ {' '.join(command)}\n")
        left = limit_s - (time.monotonic() - began)
        code = _run(command, stage, log, left) if left > 0 else None
        if code != 0:
            status = "timed out" if code is None else "failed"
            append(log, f"=== {stage.name} {status}" + (f", exit code {code}\n" if code else "\n"))
            break
    output = _text(log, offset)
    _shorten(log, offset)
    last = None
    if stage.after is not None:
        try:
            last = stage.after(output)
        except Exception as error:
            # Also what a stage printed is beyond this program's control.
            status = "failed" if status == "ok" else status
            append(log, f"=== {stage.name}: its output is no use: {error!r}\n")
    if last is None:
        told = [x.strip() for x in output.splitlines() if not x.startswith(("=== ", "$ "))]
        last = next((x.strip("= ") for x in reversed(told) if x), "")
    return Outcome(stage.name, status, time.monotonic() - began, last)


def _run(command: Command, stage: Stage, log: Path, limit_s: float) -> int | None:
    """Exit code, or None if the time was up; leaves no process behind."""
    with log.open("ab") as stream:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **stage.environment},
                start_new_session=True,  # a group of its own, to end with all its children
                preexec_fn=_listen_to_interrupts,
            )
        except OSError as error:
            stream.write(f"{error}\n".encode())
            return 127
        try:
            return _wait(process, stage, limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, stage.stop)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            _copy(stage)


def _wait(process: subprocess.Popen[bytes], stage: Stage, limit_s: float) -> int:
    """Exit code; raises TimeoutExpired. Meanwhile the files to keep are copied again and again."""
    end = time.monotonic() + limit_s
    while True:
        left = end - time.monotonic()
        try:
            return process.wait(max(min(left, COPY_EVERY_S), 0.0) if stage.keep else max(left, 0.0))
        except subprocess.TimeoutExpired:
            _copy(stage)
            if time.monotonic() >= end:
                raise


def _copy(stage: Stage) -> None:
    for source, target in stage.keep.items():
        with contextlib.suppress(OSError):  # it is not there yet
            shutil.copyfile(source, target)


def _listen_to_interrupts() -> None:
    """A shell's background job ignores them, and so would whatever it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)


def _shorten(log: Path, offset: int) -> None:
    """Leave of what follows the offset the beginning and the end."""
    with log.open("r+b") as stream:
        stream.seek(offset)
        text = stream.read()
        if len(text) > MAX_LOG_BYTES:
            half = MAX_LOG_BYTES // 2
            stream.seek(offset)
            stream.write(text[:half] + b"\n... cut ...\n" + text[-half:])
            stream.truncate()


def _text(log: Path, offset: int) -> str:
    with log.open("rb") as stream:
        stream.seek(offset)
        return stream.read().decode(errors="replace")
