"""Stand in for the streams, events and random generator of torch.cuda; work is never late.

The order between streams is not checked.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import torch

from rehearsal.events import note
from rehearsal.tensors import CUDA

generator = torch.Generator()
_numbers = itertools.count(1)
_local = threading.local()


def _wait(what: str) -> None:
    from rehearsal.graphs import forbid

    note("syncs", what)
    forbid(what)


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority, self.cuda_stream = CUDA, priority, 1000 * next(_numbers)

    def wait_stream(self, other: Stream) -> None:
        """Order the work; nothing waits."""

    def wait_event(self, event: Event) -> None:
        """Order the work; nothing waits."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event that marks the work so far."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait."""
        _wait("Stream.synchronize")

    def query(self) -> bool:
        """Whether the work is done: always."""
        return True


class Event:
    """As torch.cuda.Event; its times are the host's."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Mark the work so far."""
        self._at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Order the work; nothing waits."""

    def synchronize(self) -> None:
        """Let the host wait."""
        _wait("Event.synchronize")

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds, more than none."""
        return max(1e3 * (later._at - self._at), 1e-6)

    def query(self) -> bool:
        """Whether the work is done: always."""
        return True


DEFAULT = Stream()
DEFAULT.cuda_stream = 0


def current_stream(device: Any = None) -> Stream:
    """The stream that this thread launches on."""
    return getattr(_local, "stream", DEFAULT)


def set_stream(stream: Stream) -> None:
    """Launch on this stream from now on."""
    _local.stream = stream


class stream:
    """As torch.cuda.stream: launch on a stream inside the block; None changes nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = current_stream()
        if self._stream is not None:
            set_stream(self._stream)

    def __exit__(self, *error: Any) -> None:
        if self._stream is not None:
            set_stream(self._before)


def synchronize(device: Any = None) -> None:
    """Let the host wait."""
    _wait("torch.cuda.synchronize")
