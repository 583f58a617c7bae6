"""Which implementation was fastest, remembered on disk between processes.

One JSON object, key -> implementation name (or verdict, see isolation.py), in
`$MOE_KERNELS_CACHE_DIR` or else `~/.cache/moe_kernels`. What is remembered saves time only: a file
that cannot be read or written is reported once and otherwise ignored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger("moe_kernels")


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
        except (OSError, ValueError) as error:
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


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown" where the kernel module does not tell."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit()), "unknown")
