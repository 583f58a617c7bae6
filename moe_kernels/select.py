"""Select an implementation: say which ones can take a call, find and remember the fastest.

Choices are kept on disk between processes, in one JSON object, key -> implementation name (or
verdict, see isolation.py), in `$MOE_KERNELS_CACHE_DIR` or else `~/.cache/moe_kernels`. They save
time only: a file that cannot be read or written is reported once and otherwise ignored.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_kernels import lang, native, timing

log = logging.getLogger("moe_kernels")

# In the order in which the CPU and deterministic mode try them.
NAMES = ("native", "clusters", "triton", "reference")
Function = Callable[..., Any]

_named: ContextVar[str | None] = ContextVar(
    "implementation", default=os.environ.get("MOE_KERNELS_IMPLEMENTATION") or None
)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op; the arguments of `Op.implementation` say what each field is."""

    name: str
    device: str  # a type: "cpu" or "cuda"
    dtypes: tuple[torch.dtype, ...]
    built: bool
    function: Function
    capability: tuple[int, int] | None = None
    isolated: bool = False
    examples: tuple[tuple[Any, ...], ...] = ()

    @property
    def _interpreted(self) -> bool:
        return self.name == "triton" and lang.interpreted

    @property
    def runs_on(self) -> str:
        """The type of device that its tensors are on: Triton's interpreter takes CPU tensors."""
        return "cpu" if self._interpreted else self.device

    def available(self) -> str | None:
        """None, or the reason why this process cannot run it."""
        if self.name == "triton":
            if lang.missing or lang.interpreted:
                return lang.missing
        elif not self.built:
            return "not built, `python -m moe_kernels.info` says why"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def obstacle(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        """None, or the reason why it cannot take tensors of this dtype on this device.

        Args:
            dtype: None for tensors of several dtypes, or a strided one that the op changes.
        """
        if reason := self.available():
            return reason
        if device.type != self.runs_on:
            return f"it runs on {self.runs_on}, the tensors are on {device.type}"
        compiled = self.name in ("native", "clusters")
        if compiled and device.type == "cuda" and not _compiled_for(device):
            return "no kernels were compiled for this GPU"
        if device.type == "cuda" and self.capability is not None:
            has = torch.cuda.get_device_capability(device)
            if has != self.capability:
                wanted, found = (".".join(map(str, x)) for x in (self.capability, has))
                return f"it runs on GPUs of compute capability {wanted} alone, this one has {found}"
        # Triton's interpreter rounds everything but float32 wrongly.
        dtypes = (torch.float32,) if self._interpreted else self.dtypes
        if dtype not in dtypes:
            return f"it takes {', '.join(map(str, dtypes))} alone"
        return None


class Choices:
    """The remembered choices of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] | None = None
        self._reported = False

    def get(self, key: str) -> str | None:
        """The remembered implementation, or None."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, implementation: str) -> None:
        """Remember a choice, keeping what other processes wrote in the meantime."""
        self._known = {**self._read(), **(self._known or {}), key: implementation}
        temporary: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                json.dump(self._known, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            self._report(f"choices are not remembered: {error}")
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self.path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._report(f"ignoring unreadable {self.path}: {error}")
            return {}
        if not isinstance(known, dict):
            self._report(f"ignoring {self.path}: expected a JSON object, found {type(known)}")
            return {}
        return {key: name for key, name in known.items() if isinstance(name, str)}

    def _report(self, message: str) -> None:
        if not self._reported:
            log.warning(message)
            self._reported = True


def default_path() -> Path:
    """Where choices are kept on this machine."""
    folder = os.environ.get("MOE_KERNELS_CACHE_DIR")
    return Path(folder or Path.home() / ".cache" / "moe_kernels") / "choices.json"


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run every op inside the block by the implementation of this name, or raise.

    For debugging and benchmarks; this thread (or asyncio task) only. The environment variable
    MOE_KERNELS_IMPLEMENTATION does the same for a whole process.

    Args:
        name: "reference", "native", "triton", or "clusters" (grouped_conv_sm90a.py).
    Raises:
        ValueError: for another name; and at an op that has no such implementation for its tensors.
    """
    if name not in NAMES:
        raise ValueError(f"unknown implementation {name!r}, expected one of {', '.join(NAMES)}")
    with named(name):
        yield


def named_implementation() -> str | None:
    """The name that `implementation` or MOE_KERNELS_IMPLEMENTATION asks for here, or None."""
    return _named.get()


@contextlib.contextmanager
def named(name: str | None) -> Iterator[None]:
    """Ask for an implementation inside the block, unchecked; or, with None, for no one."""
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


@functools.cache
def choices() -> Choices:
    """The choices of this process."""
    return Choices(default_path())


def fastest(
    name: str,
    columns: Mapping[str, Function],
    inputs: Sequence[Any],
    device: torch.device,
    *facts: Hashable,
) -> str:
    """The name of the function that is fastest on these inputs, remembered or timed now.

    Args:
        name: says what the functions compute.
        columns: the functions by name.
        inputs: their arguments.
        device: a GPU.
        facts: everything else that a remembered answer depends on: dtype, shapes.
    """
    known = (
        name,
        torch.cuda.get_device_name(device),
        timing.driver_version(),
        torch.__version__,
        lang.missing or lang.triton.__version__,
        *facts,
        "/".join(columns),
    )
    remembered = " | ".join(map(str, known))
    answer = choices().get(remembered)
    if answer is None or answer not in columns:
        times = timing.compare(columns, inputs, min_samples=20, min_s=0.0)
        answer = min(times, key=lambda column: times[column].median_ms)
        choices().put(remembered, answer)
    return answer


@functools.cache
def _compiled_for(device: torch.device) -> bool:
    compiled = native.supports_device(torch.cuda.get_device_capability(device))
    if not compiled:
        log.warning(
            "the compiled kernels (%s) do not run on %s: reinstall on this machine, or with "
            "MOE_KERNELS_CUDA_ARCHS naming it",
            ", ".join(native.module.cuda_archs),
            torch.cuda.get_device_name(device),
        )
    return compiled
