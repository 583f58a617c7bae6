"""Count what a GPU's host cannot help noticing, by file and line, and keep what went wrong.

Nothing is counted outside `counted`; problems are kept until `take_problems`.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

KINDS = ("syncs", "copies", "captures", "replays", "launches")
_PACKAGES = ("dwf", "moe_kernels")


class Counts:
    """What happened inside a `counted` block.

    Attributes:
        syncs: times that the host waited for the device, blocking copies included.
        copies: copies between host and device, blocking or not.
        captures: CUDA graphs captured.
        replays: CUDA graphs replayed.
        launches: kernels launched one by one, neither in a capture nor by a replay.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._names: Counter[str] = Counter()

    def __getattr__(self, kind: str) -> int:
        if kind not in KINDS:
            raise AttributeError(kind)
        return sum(n for (what, _), n in self._counts.items() if what == kind)

    def where(self, kind: str) -> dict[str, int]:
        """How often by "file:line what", most often first; a line of the two packages if any."""
        assert kind in KINDS
        found = [(place, n) for (what, place), n in self._counts.items() if what == kind]
        return dict(sorted(found, key=lambda x: -x[1]))

    @property
    def kernels(self) -> dict[str, int]:
        """Launched kernels by name: ops of aten, "native ..." and "triton ..."."""
        return dict(self._names.most_common())

    def add(self, kind: str, what: str, place: str) -> None:
        """Count one event."""
        self._counts[kind, f"{place} {what}" if kind in ("syncs", "copies") else place] += 1
        if kind == "launches":
            self._names[what] += 1

    def __repr__(self) -> str:
        return ", ".join(f"{getattr(self, kind)} {kind}" for kind in KINDS)


_listening: list[Counts] = []
_problems: list[str] = []


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count events inside the block, also those of autograd's threads; blocks may nest."""
    counts = Counts()
    _listening.append(counts)
    try:
        yield counts
    finally:
        _listening.remove(counts)


def note(kind: str, what: object = "") -> None:
    """Tell every open `counted` block of an event that happens now."""
    if _listening:
        place = here()
        for counts in _listening:
            counts.add(kind, str(what), place)


def problem(text: str) -> None:
    """Keep what a GPU would not report itself: the test that runs now has to fail."""
    _problems.append(f"{text}, at {here()}")


def take_problems() -> list[str]:
    """The problems since the last call."""
    taken = list(_problems)
    _problems.clear()
    return taken


def here() -> str:
    """ "file:line" of the innermost caller in dwf or moe_kernels, else outside torch and this."""
    frame = sys._getframe(1)
    other = None
    while frame is not None:
        name = frame.f_globals.get("__name__", "?")
        package = name.partition(".")[0]
        if package in _PACKAGES:
            return f"{name.replace('.', '/')}.py:{frame.f_lineno}"
        if other is None and package not in ("torch", "rehearsal", "contextlib"):
            other = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "?"
