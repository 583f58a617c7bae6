"""Write files that are either whole or absent, read what may be anything, and lock a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dwf.checks import CheckpointError

# Deeper JSON than this is no file of ours, and would exhaust the stack of whatever walks over it.
MAX_DEPTH = 100
MAX_JSON = 1 << 28
# A temporary file as old as this belongs to a process that was killed.
LEFTOVER_S = 3600.0


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, even after a crash, sees the old bytes or the new ones.

    Several processes may write the same file: the last one's bytes stay.

    Raises:
        CheckpointError: with the system's reason and, for a full disk, the room that is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: {len(data):,} bytes could not be written, {explain(error, path)}"
        ) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused, because JSON has none."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it, if it does not exist.

    Raises:
        CheckpointError: with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: not writable, {error}") from error


def require_run(folder: Path) -> None:
    """Require that a folder is a run folder.

    Raises:
        CheckpointError: it is none; if it holds run folders, the first is named.
    """
    if (folder / "config.json").exists():
        return
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    hint = f"; name one in it, as {inside[0]}" if inside else ""
    raise CheckpointError(f"{folder}: not a run folder, config.json not found{hint}")


def require_writable(folder: Path, room: int = 0) -> None:
    """Require that a folder can be written to, and that its disk has so many bytes free.

    Raises:
        CheckpointError: with the system's reason.
    """
    try:
        free = free_bytes(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: not writable, {explain(error, folder)}") from error
    if free < room:
        raise CheckpointError(f"{folder}: {free:,} bytes free there, {room:,} may be needed")
    probe = folder / f".{uuid.uuid4().hex}.probe"
    atomic_write_bytes(probe, b"probe")
    probe.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may be quicker
            if time.time() - path.stat().st_mtime > LEFTOVER_S:
                path.unlink()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device: reading one of these may
            never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file; OSError as from `open_regular`."""
    with open_regular(path) as stream:
        return stream.read()


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise a CheckpointError that names it."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: not readable JSON, more than {MAX_JSON:,} bytes")
        return parse_json(read_bytes(path), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: not readable JSON, {error}") from error


def parse_json(text: str | bytes, source: Path) -> Any:
    """Parse JSON from a file, or raise a CheckpointError that names the file."""
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
        _require_sane(value)
    except RecursionError as error:
        raise CheckpointError(f"{source}: not readable JSON, nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{source}: not readable JSON, {error}") from error
    return value


def _require_sane(value: Any) -> None:
    """Raise ValueError for JSON that is nested deeply, or holds text that cannot be written."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                part.encode()  # half a surrogate pair is no text
            elif isinstance(part, dict):
                below += part.keys()
                below += part.values()
            elif isinstance(part, list):
                below += part
        level, depth = below, depth + 1


def sha256(path: Path) -> str:
    """Hash of a regular file's bytes."""
    with open_regular(path) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_hashes(folder: Path, hashes: Mapping[str, Any]) -> None:
    """Compare files of a folder with the sha256 that a manifest has of each.

    Raises:
        CheckpointError: naming the first file that is missing, no regular file, or another.
    """
    for name, expected in hashes.items():
        path = folder / name
        try:
            found = sha256(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: not found") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read, {error.strerror}") from error
        if found != expected:
            raise CheckpointError(
                f"{path}: damaged or changed, sha256 {found[:16]}..., expected {expected!s:.16}..."
            )


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain(error: OSError, path: Path) -> str:
    """Say what the system said, and for a full disk how much room is left."""
    with contextlib.suppress(OSError):
        return f"{error.strerror or error} ({free_bytes(path.parent):,} bytes free there)"
    return str(error.strerror or error)


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def safe_cell(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula; numbers stay what they are."""
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


@contextlib.contextmanager
def run_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Let one process at a time train into a run folder, which is made if it does not exist.

    With ``shared`` several processes may hold the lock, all shared: evaluations do not disturb
    each other. The lock is the kernel's (flock), so it ends with its owner however that dies.

    Raises:
        CheckpointError: with the pid of the process that holds it, or why the folder is not
            writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise CheckpointError(f"{folder}: not writable, {explain(error, folder)}") from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not shared:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder}: another process (pid {_owner(descriptor)}) is writing"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{folder / '.lock'}: could not be locked, {explain(error, folder)}"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    """The pid in a lock file, if it is that of a process that lives."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        pid = int(os.pread(descriptor, 32, 0))
        if pid > 0:
            os.kill(pid, 0)
            return str(pid)
    return "unknown"
