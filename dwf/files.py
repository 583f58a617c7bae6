"""Write files that are either whole or absent, hash them, and lock a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwf.checks import CheckpointError


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, even after a crash, sees the old bytes or the new ones.

    Raises:
        CheckpointError: with the system's reason and, for a full disk, the room that is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
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


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise a CheckpointError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON, {error}") from error


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        stats = os.statvfs(path.parent)
        return f"{error.strerror or error} ({stats.f_bavail * stats.f_frsize:,} bytes free there)"
    return str(error.strerror or error)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time write to a run folder, which is made if it does not exist.

    The lock is the kernel's (flock), so it ends with its owner however that dies.

    Raises:
        CheckpointError: with the pid of the process that holds it, or why the folder is not
            writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"{folder}: not writable, {explain(error, folder)}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            raise CheckpointError(f"{folder}: another process (pid {owner}) is writing") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
