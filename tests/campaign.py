"""Commands that are killed, run out of disk or get a signal at random: nothing may be lost.

    python tests/campaign.py --kills 200 --full-disks 50 --signals 50 [--seed 0]

A case takes one command (training, an evaluation, a report) with the run folder as it is before it,
disturbs it several times, and lets it end. Then the folder must hold the bits of a run that nobody
disturbed. In between a command may end with a typed error in one line, never with a traceback.
Full disks need the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from small_runs import assert_same_run, small_config

from dwf import checkpoint
from dwf.cli import main
from dwf.evaluation.result import Evaluation

KINDS = ("kills", "full-disks", "signals")
COMMANDS = ("train", "eval", "report")
WEIGHTS = (8, 2, 3)  # how often each is taken: evaluations are slow
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
DISTURBANCES = 8  # of one case
# An evaluation wants 64 MiB to begin; half of the disks fill up after that.
DISK = 128 << 20
# A checkpoint of each step: one that a stop saves would push out an older one, which the
# undisturbed run still has.
SETTINGS = "pretrain.num_epochs=2 joint.num_epochs=2 evaluation.num_images=12 checkpoint_every=1"
# what the clock decides
TIMES = {"seconds", "environment", "sha256", "seconds_per_image"}
# by then a command that still runs hangs
HANG_S = 300.0


class Campaign:
    """Disturbs commands inside ``folder``; ``disk`` says to mount a small one there."""

    def __init__(self, folder: Path, seed: int, *, disk: bool) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(small_config(*SETTINGS.split()).to_dict()))
        self.log = folder / "log"
        self.counts: collections.Counter[str] = collections.Counter()
        self.before: dict[str, Path | None] = {}
        self.seconds: dict[str, float] = {}
        self.disk = folder / "disk"
        self.disk.mkdir()
        if disk:
            options = ["-t", "tmpfs", "-o", f"size={DISK}", "tmpfs"]
            subprocess.run(["mount", *options, str(self.disk)], check=True)
        done: Path | None = None
        for command in (COMMANDS[0], *COMMANDS):  # the first run warms up what forks inherit
            if command == "train":
                done = None
            self.before[command] = done
            run = self._fresh(command, self.folder / command / "run")
            began = time.monotonic()
            code = self._run(command, run, None)
            self.seconds[command] = time.monotonic() - began
            assert code in (0, 3, 4), self.log.read_text()
            done = run
        assert done is not None

    def close(self) -> None:
        """Unmount the disk."""
        if os.path.ismount(self.disk):
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

    def run(self, kind: str, number: int) -> None:
        """Disturb commands ``number`` times in this way."""
        while self.counts[kind] < number:
            command = self.rng.choices(COMMANDS, WEIGHTS)[0]
            with self._place(kind) as place:
                run = self._fresh(command, place / "run")
                for _ in range(min(DISTURBANCES, number - self.counts[kind])):
                    code = self._disturb(kind, command, run)
                    self.counts[kind] += 1
                    self.counts[f"{kind}, {command} ended with {code}"] += 1
                code = self._run(command, run, None)
                assert code in (0, 3, 4), f"{command} ended with {code}: {self.log.read_text()}"
                self._compare(command, run)
                print(f"{kind}: {self.counts[kind]} of {number}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _place(self, kind: str) -> Iterator[Path]:
        place = self.disk if kind == "full-disks" else Path(tempfile.mkdtemp(dir=self.folder))
        yield place
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _fresh(self, command: str, run: Path) -> Path:
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(exist_ok=True)
        before = self.before[command]
        if before is not None:
            shutil.copytree(before, run)
        return run

    def _disturb(self, kind: str, command: str, run: Path) -> int:
        """Start a command and disturb it once; its exit code, or minus a signal's number."""
        if kind == "full-disks":
            room = self.rng.choice([0, 1 << 16, 1 << 20, 2 << 20])
            if self.rng.random() < 0.5:
                self._fill(room)
                code = self._run(command, run, None)
            else:
                code = self._run(command, run, lambda child: self._fill(room))
            (self.disk / "filler").unlink(missing_ok=True)
            allowed = {0, 2, 3, 4}
        else:
            number = signal.SIGKILL if kind == "kills" else self.rng.choice(SIGNALS)
            code = self._run(command, run, lambda child: os.kill(child, number))
            # 75: training saved; 130: interrupted; minus: the signal's default
            allowed = {0, 3, 4, -number, *([75, 130] if kind == "signals" else [])}
        text = self.log.read_text(errors="replace")
        assert code in allowed, f"{kind}, {command}: ended with {code}: {text}"
        assert "Traceback" not in text, f"{kind}, {command}: {text}"
        if code == 2:
            assert re.match(r"dwf: (\w+Error|NotStored): ", text.strip().splitlines()[-1]), text
        saved = run / "checkpoints"
        if (saved / "last.json").exists():
            checkpoint.load(checkpoint.resolve(saved, "last"))
        return code

    def _fill(self, room: int) -> None:
        """Leave so many bytes of the disk."""
        with open(self.disk / "filler", "wb") as stream, contextlib.suppress(OSError):
            size = shutil.disk_usage(self.disk).free - room
            os.posix_fallocate(stream.fileno(), 0, max(size, 1))

    def _run(self, command: str, run: Path, disturb: Callable[[int], None] | None) -> int:
        """Run a command in a child; ``disturb`` gets its pid at some time. Its exit code."""
        argv = {
            "train": ["train", "--config", str(self.config), "--out", str(run), "--no-eval"],
            "eval": ["eval", str(run), "--suite", "quick"],
            "report": ["report", str(run)],
        }[command]
        # a signal that comes while the child is being made would end it outside of `main`
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            _child(argv, self.log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if disturb is not None:
            time.sleep(self.rng.uniform(0, self.seconds[command]))
            disturb(child)
        end = time.monotonic() + HANG_S
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError(f"{command} hangs")
            time.sleep(0.01)

    def _compare(self, command: str, run: Path) -> None:
        expected = self.folder / command / "run"
        assert_same_run(run, expected)
        for path in sorted((expected / "evaluations").glob("*.json")):
            found, right = (
                Evaluation.read(folder / "evaluations" / path.name) for folder in (run, expected)
            )
            assert not (lines := differences(found.to_json(), right.to_json())), lines
            assert found.arrays.keys() == right.arrays.keys()
            for name, values in right.arrays.items():
                assert np.array_equal(
                    found.arrays[name], values, equal_nan=values.dtype.kind == "f"
                )
        for path in sorted((expected / "figures").glob("*")):
            same = (run / "figures" / path.name).read_bytes() == path.read_bytes()
            assert same or path.name.startswith("training"), path.name
        if (expected / "report.html").exists():
            assert (run / "report.html").read_text().rstrip().endswith("</html>")
        left = [p for p in run.rglob("*.tmp") if time.time() - p.stat().st_mtime > HANG_S]
        assert not left


def differences(found: object, right: object, place: str = "") -> list[str]:
    """Where two values of JSON differ, but for what the clock decides."""
    if isinstance(found, dict) and isinstance(right, dict):
        keys = sorted((found.keys() | right.keys()) - TIMES)
        pairs = [(f"{place}.{key}", found.get(key), right.get(key)) for key in keys]
    elif isinstance(found, list) and isinstance(right, list) and len(found) == len(right):
        pairs = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(found, right, strict=True))]
    else:
        return [] if found == right else [f"{place}: {found!r}, expected {right!r}"]
    return [line for name, *pair in pairs for line in differences(*pair, name)]


def _child(argv: list[str], log: Path) -> None:
    """What `dwf` does with these arguments, in a process that ends here."""
    code = 1
    try:
        with open(log, "wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            code = main(argv)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    options = vars(arguments())
    torch.set_num_threads(1)  # forks inherit no threads
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(Path(name), options["seed"], disk=options["full_disks"] > 0)
        try:
            for kind in KINDS:
                campaign.run(kind, options[kind.replace("-", "_")])
        finally:
            campaign.close()
            for what, count in sorted(campaign.counts.items()):
                print(f"{count:4d} {what}", flush=True)
