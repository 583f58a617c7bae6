"""Files: whole or absent, whatever fails in between."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dwf import files
from dwf.checks import CheckpointError
from dwf.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_json,
    remove_leftovers,
    require_run,
    run_lock,
    safe_cell,
    sha256,
)

NOBODY = 65534


@pytest.fixture
def read_only_folder():
    """A folder that this process cannot write to, also if the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text("old")
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestAtomicWrite:
    def test_content(self, tmp_path):
        atomic_write_bytes(tmp_path / "a", b"one")
        atomic_write_text(tmp_path / "a", "zwei: ä")
        assert (tmp_path / "a").read_bytes() == "zwei: ä".encode()
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_full_disk(self, call, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "a").write_text("old")
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(CheckpointError) as caught:
            atomic_write_bytes(tmp_path / "a", b"0" * 12345)
        # the file, what was needed, the system's reason, what there is
        for part in [str(tmp_path / "a"), "12,345 bytes", "No space left", "bytes free"]:
            assert part in str(caught.value)
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    def test_disk_that_is_really_full(self, tmp_path, monkeypatch):
        def full(path, mode):
            return open("/dev/full", "wb")

        (tmp_path / "a").write_text("old")
        monkeypatch.setattr(files, "open", full, raising=False)
        with pytest.raises(CheckpointError, match="No space left"):
            atomic_write_bytes(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_text() == "old"

    def test_many_at_once(self, tmp_path):
        def write(number):
            for _ in range(25):
                atomic_write_bytes(tmp_path / "a", bytes([number]) * 1000)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        assert len(set((tmp_path / "a").read_bytes())) == 1
        assert names(tmp_path) == ["a"]

    def test_leftovers_of_killed_processes(self, tmp_path):
        for name in (".a.0.tmp", ".b.1.tmp", "c.tmp", ".lock"):
            (tmp_path / name).touch()
        os.utime(tmp_path / ".a.0.tmp", (0, 0))
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [".b.1.tmp", ".lock", "c.tmp"]

    def test_read_only_folder(self, read_only_folder):
        with pytest.raises(CheckpointError, match=r"config\.json.*Permission denied"):
            atomic_write_text(read_only_folder / "config.json", "new")
        assert (read_only_folder / "config.json").read_text() == "old"

    def test_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="Not a directory"):
            atomic_write_text(tmp_path / "file" / "a", "new")

    def test_not_a_number_is_not_json(self, tmp_path):
        atomic_write_json(tmp_path / "a.json", {"loss": 1.0})
        with pytest.raises(ValueError, match="JSON"):
            atomic_write_json(tmp_path / "a.json", {"loss": float("nan")})
        assert read_json(tmp_path / "a.json") == {"loss": 1.0}


class TestReadJson:
    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"a\.json: not found"):
            read_json(tmp_path / "a.json")

    @pytest.mark.parametrize("content", [b"<html>404</html>", b"", b'{"a": ', b"\xff\xfe\x00"])
    def test_something_else(self, content, tmp_path):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.json: not readable JSON"):
            read_json(tmp_path / "a.json")

    @pytest.mark.parametrize(
        "text", ["[" * 200 + "]" * 200, "[" * 100_000, '{"a": "\\ud800"}', "9" * 5000]
    )
    def test_what_exhausts_or_cannot_be_written(self, text, tmp_path):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"a\.json: not readable JSON"):
            read_json(tmp_path / "a.json")

    def test_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="not readable JSON"):
            read_json(tmp_path)

    def test_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "a.json")
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_json(tmp_path / "a.json")


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


class TestRunLock:
    def test_makes_the_folder_and_can_be_taken_again(self, tmp_path):
        for _ in range(2):
            with run_lock(tmp_path / "runs" / "a"):
                assert names(tmp_path / "runs" / "a") == [".lock"]

    def test_names_the_process_that_holds_it(self, tmp_path):
        with (
            run_lock(tmp_path),
            pytest.raises(CheckpointError, match=rf"pid {os.getpid()}\) is writing"),
            run_lock(tmp_path),
        ):
            pass

    def test_ends_with_its_owner(self, tmp_path):
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import fcntl, os, sys, time\n"
                "lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
                "fcntl.flock(lock, fcntl.LOCK_EX)\n"
                "os.write(lock, str(os.getpid()).encode())\n"
                "print('held', flush=True)\n"
                "time.sleep(60)",
                str(tmp_path / ".lock"),
            ],
            stdout=subprocess.PIPE,
        )
        with holder:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(CheckpointError, match=f"pid {holder.pid}"), run_lock(tmp_path):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        with run_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"

    def test_read_only_folder(self, read_only_folder):
        for folder in (read_only_folder, read_only_folder / "new"):
            with pytest.raises(CheckpointError, match="not writable, Permission denied"):
                with run_lock(folder):
                    pass

    def test_shared(self, tmp_path):
        with run_lock(tmp_path, shared=True), run_lock(tmp_path, shared=True):
            with pytest.raises(CheckpointError, match="is writing"), run_lock(tmp_path):
                pass
        with run_lock(tmp_path), pytest.raises(CheckpointError, match=f"pid {os.getpid()}"):
            with run_lock(tmp_path, shared=True):
                pass

    @pytest.mark.parametrize("content", [b"\xff\xfe", b"99999999", b"", b"-1"])
    def test_owner_that_nobody_knows(self, content, tmp_path):
        with run_lock(tmp_path, shared=True):
            (tmp_path / ".lock").write_bytes(content)
            with pytest.raises(CheckpointError, match="pid unknown"), run_lock(tmp_path):
                pass

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_lock_that_is_no_file(self, make, tmp_path):
        make(tmp_path / ".lock")
        with pytest.raises(CheckpointError, match="lock"), run_lock(tmp_path):
            pass

    def test_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text(json.dumps({}))
        with pytest.raises(CheckpointError, match="not writable"), run_lock(tmp_path / "file"):
            pass


def test_cells_are_no_formulas():
    assert [safe_cell(x) for x in ("=1+1", "@A1", "+1", "-1")] == ["'=1+1", "'@A1", "'+1", "'-1"]
    assert [safe_cell(x) for x in (-1.5, None, "joint")] == [-1.5, None, "joint"]


def test_a_folder_of_runs_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a run folder, config.json not found$"):
        require_run(tmp_path / "nothing")
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"; name one in it, as {tmp_path}/a$"):
        require_run(tmp_path)
    require_run(tmp_path / "a")
