"""Download the published files of a data set, check them, and list what is on disk.

A file arrives as ``<name>.part``, is continued where it stopped, and gets its final name only after
its hash was found right. Addresses are tried in turn, and one that is endless or too slow is given
up; DWF_DATA_MIRROR (an address or a folder that holds the files under their published names) comes
first.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dwf.checks import DataError
from dwf.data.named import (
    NAMED_SETS,
    RemoteFile,
    data_root,
    expected_files,
    md5_of,
    repair_command,
    require_files,
    unpack,
)
from dwf.data.sources import available_splits, load
from dwf.files import explain

log = logging.getLogger("dwf")

Progress = Callable[[str, int, "int | None"], None]

TIMEOUT_S = 20.0
# a broken connection is picked up again this often, as long as every try brings something
MAX_RESUMPTIONS = 20
BLOCK = 1 << 16
# No file of a named set is larger; an address slower than 5 kB/s for a minute is given up.
MAX_BYTES = 1 << 30
WINDOW_S, MIN_BYTES_IN_WINDOW = 60.0, 300_000


class GivenUpError(ConnectionError):
    """An address that sends too much or too slowly; it is not asked again."""


def get(
    name: str, root: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> list[str]:
    """Download what is missing or damaged of a named data set, unpack it, check it.

    Args:
        root: as in ``load``.
        progress: called with (file, bytes so far, bytes in all or None) after every block.

    Returns:
        What ``check`` returns.

    Raises:
        DataError: if no address delivered a file, with the reason of each. What has arrived stays
            in ``<name>.part``, and the same command goes on from there.
    """
    if name not in NAMED_SETS:
        raise DataError(f"{name}: nothing to download; expected one of {', '.join(NAMED_SETS)}")
    folder = data_root(root)
    if not _is_complete(name, folder):
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            for file in NAMED_SETS[name].files:
                target = folder / file.name
                if not target.is_file() or md5_of(target) != file.md5:
                    _download(file, folder, progress or _silent)
        if set(expected_files(name)) != {file.name for file in NAMED_SETS[name].files}:
            unpack(name, folder)
    return check(name, folder)


def check(name: str, root: str | os.PathLike[str] | None = None) -> list[str]:
    """Read a data set whole and describe it, one line per finding.

    Hashes of all files, then per split the counts, shape, label range, digest and notes.

    Args:
        name: as in ``load``.
        root: as in ``load``.

    Raises:
        DataError: at the first thing that is wrong, with the command that repairs it.
    """
    lines = [] if name != "digits" else ["digits: bundled with scikit-learn"]
    if name in NAMED_SETS and name != "digits":
        folder = data_root(root)
        require_files(name, folder)
        lines += [f"{folder / file}: md5 {md5}" for file, md5 in expected_files(name).items()]
    splits = available_splits(name)
    for split in splits:
        dataset = load(name, root, split)
        per_class = dataset.labels.bincount(minlength=dataset.num_classes)
        lines.append(
            f"{split}: {len(dataset):,} images {list(dataset.image_shape)} uint8, "
            f"{dataset.num_classes} classes of {int(per_class.min()):,} to "
            f"{int(per_class.max()):,}, labels {int(dataset.labels.min())} to "
            f"{int(dataset.labels.max())}, sha256 {dataset.digest[:16]}"
        )
        lines += [f"{split}: {note}" for note in dataset.notes]
    if "test" not in splits:
        lines.append("test: none")
    return lines


def listing(root: str | os.PathLike[str] | None = None) -> list[str]:
    """Say of every named data set whether it is at hand, one line each; nothing is hashed."""
    folder = data_root(root)
    lines = []
    for name, known in NAMED_SETS.items():
        archives = [folder / file.name for file in known.files]
        if not known.files:
            state = "bundled with scikit-learn"
        elif _is_there(name, folder):
            state = f"in {folder}"
        elif all(archive.is_file() for archive in archives):
            state = f"in {folder}, to be unpacked at first use"
        else:
            state = f"not in {folder}; {repair_command(name, folder)}"
        lines.append(f"{name:<9} {state}")
    return lines


def _is_there(name: str, folder: Path) -> bool:
    """Whether a set's files are there; unknown, so no, where torchvision, who names them, fails."""
    try:
        return all((folder / file).is_file() for file in expected_files(name))
    except DataError as error:
        log.warning("%s: %s", name, error)
        return False


def _is_complete(name: str, folder: Path) -> bool:
    return all(
        (folder / file).is_file() and md5_of(folder / file) == md5
        for file, md5 in expected_files(name).items()
    )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process downloads into a folder: two would write the same part."""
    with _writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _silent(file: str, size: int, total: int | None) -> None:
    """Ignore progress."""


def _addresses(file: RemoteFile) -> list[str]:
    mirror = os.environ.get("DWF_DATA_MIRROR", "").rstrip("/")
    if not mirror:
        return list(file.urls)
    if "://" not in mirror:
        mirror = Path(mirror).expanduser().resolve().as_uri()
    return [f"{mirror}/{file.name}", *file.urls]


def _download(file: RemoteFile, folder: Path, progress: Progress) -> None:
    target, part = folder / file.name, folder / f"{file.name}.part"
    reasons = []
    for url in _addresses(file):
        resumed = True
        while resumed:  # once more from nothing, if what was continued turns out wrong
            resumed = _size(part) > 0
            try:
                _fetch(url, part, progress)
            except DataError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons.append(f"{url}: {error or type(error).__name__}")
                break
            found = md5_of(part)
            if found == file.md5:
                os.replace(part, target)
                return
            reasons.append(f"{url}: md5 {found}, expected {file.md5}")
            part.unlink()
    kept = f"; {_size(part):,} bytes are kept in {part}, run again to go on" if _size(part) else ""
    raise DataError(
        f"{target}: no address delivered it{kept}; put the file there yourself, or set "
        "DWF_DATA_MIRROR to an address that has it" + "".join(f"\n  {line}" for line in reasons)
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch(url: str, part: Path, progress: Progress) -> None:
    for _ in range(MAX_RESUMPTIONS):
        size = _size(part)
        try:
            return _fetch_rest(url, part, progress)
        except (DataError, GivenUpError):
            raise
        except (OSError, http.client.HTTPException):
            if _size(part) <= size:
                raise
    raise ConnectionError(f"the connection broke {MAX_RESUMPTIONS} times")


def _fetch_rest(url: str, part: Path, progress: Progress) -> None:
    start = _size(part)
    headers = {"User-Agent": "dwf"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = _opened(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # nothing follows what we have: its hash decides
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ConnectionError("answered with a web page instead of the file")
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        size = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else size + int(length)
        if total is not None and total > MAX_BYTES:
            raise GivenUpError(f"sends {total:,} bytes, expected at most {MAX_BYTES:,}")
        with _writing(part):
            stream = open(part, "ab" if resumed else "wb")
        since, size_then = time.monotonic(), size
        # read1, because read waits for a whole block however slowly it drips
        with stream:
            while block := response.read1(BLOCK):
                with _writing(part):
                    stream.write(block)
                    stream.flush()  # a full disk shows here, and a kill loses nothing
                size += len(block)
                progress(part.stem, size, total)
                if size > MAX_BYTES:
                    part.unlink()
                    raise GivenUpError(f"sends more than {MAX_BYTES:,} bytes")
                if (now := time.monotonic()) - since > WINDOW_S:
                    if size - size_then < MIN_BYTES_IN_WINDOW:
                        raise GivenUpError(
                            f"{size - size_then:,} bytes in {WINDOW_S:.0f} s, too slow"
                        )
                    since, size_then = now, size
            os.fsync(stream.fileno())
    if total is not None and size < total:
        raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")


def _opened(request: urllib.request.Request) -> Any:
    """The answer to a request. A timeout is of each byte, so a thread watches the header."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=WINDOW_S)
    except queue.Empty:
        raise GivenUpError(f"no answer in {WINDOW_S:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Report an error of the disk at once; an error of the network tries the next address."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: could not be written, {explain(error, path)}") from error
