"""Downloads against a small server: interrupted, wrong, moved, absent."""

import contextlib
import errno
import socket
import threading
import time
import urllib.request
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from test_sources import expect, flip_bit, user_arrays, write_cifar, write_npz, write_svhn

from dwf.checks import DataError
from dwf.data import check, download, get, listing, load
from dwf.data.named import NAMED_SETS, RemoteFile

ARCHIVE = "cifar-10-python.tar.gz"


class Server:
    """Serves files from memory; what it does wrong is set on it."""

    def __init__(self):
        self.files = {}
        self.requests = []  # (path, value of the Range header or None)
        self.ranges = True
        self.cut_after = None  # bytes of a body after which the connection ends
        self.content_type = "application/octet-stream"
        self.says_length = True
        self.pause_s = 0.0  # before each byte of a body
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        body = self.files.get(request.path.lstrip("/"))
        if body is None:
            request.send_error(404)
            return
        start = 0
        if wanted and self.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                request.send_error(416)
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        request.send_header("Content-Type", self.content_type)
        if self.says_length:
            request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        body = body[start:][: self.cut_after]
        if not self.pause_s:
            request.wfile.write(body)
            return
        with contextlib.suppress(OSError):  # the client gave up
            for byte in body:
                request.wfile.write(bytes([byte]))
                time.sleep(self.pause_s)

    def close(self):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DWF_DATA_MIRROR", raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cifar(tmp_path_factory, monkeypatch, server):
    """A small CIFAR-10 archive on the server, and the only address of it; returns its bytes."""
    folder = tmp_path_factory.mktemp("published")
    write_cifar(folder, monkeypatch)
    content = (folder / ARCHIVE).read_bytes()
    server.files[ARCHIVE] = content
    addresses(monkeypatch, content, server.address)
    return content


def addresses(monkeypatch, content, *bases):
    urls = tuple(f"{base}/{ARCHIVE}" for base in bases)
    expect(monkeypatch, "cifar10", RemoteFile(ARCHIVE, md5(content).hexdigest(), urls))


def part_of(folder):
    return folder / f"{ARCHIVE}.part"


def failure(folder):
    with pytest.raises(DataError) as caught:
        get("cifar10", folder)
    return str(caught.value)


class TestGet:
    def test_from_nothing(self, tmp_path, cifar, server):
        seen = []
        lines = get("cifar10", tmp_path / "new/folder", lambda *row: seen.append(row))
        assert seen[-1] == (ARCHIVE, len(cifar), len(cifar))
        assert [size for _, size, _ in seen] == sorted(size for _, size, _ in seen)
        assert any(line.startswith("train: 100 images [3, 32, 32]") for line in lines)
        assert len(load("cifar10", tmp_path / "new/folder", "test")) == 20
        names = sorted(path.name for path in (tmp_path / "new/folder").iterdir())
        assert names == ["cifar-10-batches-py", ARCHIVE]

    def test_two_files_without_archive(self, tmp_path, monkeypatch, server):
        published = tmp_path / "published"
        published.mkdir()
        write_svhn(published, monkeypatch)
        for file in NAMED_SETS["svhn"].files:
            server.files[file.name] = (published / file.name).read_bytes()
        monkeypatch.setenv("DWF_DATA_MIRROR", server.address)
        get("svhn", tmp_path)
        assert len(load("svhn", tmp_path)) == 30

    def test_nothing_is_fetched_twice(self, tmp_path, cifar, server, monkeypatch):
        get("cifar10", tmp_path)
        server.requests.clear()
        get("cifar10", tmp_path)
        (tmp_path / ARCHIVE).unlink()  # the unpacked files suffice
        get("cifar10", tmp_path)
        assert server.requests == []

    def test_damaged_member_comes_from_the_archive(self, tmp_path, cifar, server):
        get("cifar10", tmp_path)
        server.requests.clear()
        flip_bit(tmp_path / "cifar-10-batches-py/data_batch_3")
        get("cifar10", tmp_path)
        assert server.requests == []

    def test_damaged_archive_is_replaced(self, tmp_path, cifar):
        (tmp_path / ARCHIVE).write_bytes(b"half an archive")
        get("cifar10", tmp_path)
        assert (tmp_path / ARCHIVE).read_bytes() == cifar

    def test_digits_need_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(urllib.request, "urlopen", None)
        assert get("digits", tmp_path)[0] == "digits: bundled with scikit-learn"

    def test_unknown_name(self, tmp_path):
        with pytest.raises(DataError, match="expected one of digits, cifar10"):
            get("imagenet", tmp_path)


class TestResume:
    def test_goes_on_where_it_stopped(self, tmp_path, cifar, server):
        part_of(tmp_path).write_bytes(cifar[:1000])
        get("cifar10", tmp_path)
        assert server.requests == [(f"/{ARCHIVE}", "bytes=1000-")]
        assert (tmp_path / ARCHIVE).read_bytes() == cifar
        assert not part_of(tmp_path).exists()

    def test_broken_connections(self, tmp_path, cifar, server):
        server.cut_after = len(cifar) // 4
        get("cifar10", tmp_path)
        starts = [wanted for _, wanted in server.requests]
        assert starts[:2] == [None, f"bytes={len(cifar) // 4}-"]
        assert len(starts) >= 4

    def test_too_many_broken_connections(self, tmp_path, cifar, server, monkeypatch):
        monkeypatch.setattr(download, "MAX_RESUMPTIONS", 3)
        server.cut_after = 10
        message = failure(tmp_path)
        assert "the connection broke 3 times" in message
        assert f"30 bytes are kept in {part_of(tmp_path)}, run again to go on" in message
        assert part_of(tmp_path).read_bytes() == cifar[:30]
        server.cut_after = None
        get("cifar10", tmp_path)

    def test_server_without_ranges_starts_over(self, tmp_path, cifar, server):
        server.ranges = False
        part_of(tmp_path).write_bytes(b"x" * 1000)
        get("cifar10", tmp_path)
        assert (tmp_path / ARCHIVE).read_bytes() == cifar

    def test_wrong_part_is_thrown_away(self, tmp_path, cifar, server):
        part_of(tmp_path).write_bytes(b"x" * 1000)
        get("cifar10", tmp_path)
        assert [wanted for _, wanted in server.requests] == ["bytes=1000-", None]

    @pytest.mark.parametrize("extra", [b"", b"too long"], ids=["complete", "too long"])
    def test_part_that_needs_no_more(self, tmp_path, cifar, server, extra):
        part_of(tmp_path).write_bytes(cifar + extra)
        get("cifar10", tmp_path)
        assert (tmp_path / ARCHIVE).read_bytes() == cifar


class TestMirrors:
    def test_the_next_address_is_tried(self, tmp_path, cifar, server, monkeypatch):
        server.files[f"wrong/{ARCHIVE}"] = b"other bytes"
        bases = ("http://127.0.0.1:9", f"{server.address}/absent", f"{server.address}/wrong")
        addresses(monkeypatch, cifar, *bases, server.address)
        get("cifar10", tmp_path)
        paths = [path for path, _ in server.requests]
        assert paths == [f"/absent/{ARCHIVE}", f"/wrong/{ARCHIVE}", f"/{ARCHIVE}"]

    @pytest.mark.parametrize("says_length", [True, False])
    def test_too_large(self, says_length, tmp_path, cifar, server, monkeypatch):
        server.says_length = says_length
        monkeypatch.setattr(download, "MAX_BYTES", 3000)
        assert len(cifar) > 3000
        assert "3,000" in failure(tmp_path)
        assert not part_of(tmp_path).exists()
        assert len(server.requests) == 1

    def test_dripping(self, tmp_path, cifar, server, monkeypatch):
        server.pause_s = 0.02
        monkeypatch.setattr(download, "WINDOW_S", 0.2)
        started = time.monotonic()
        assert "too slow" in failure(tmp_path)
        assert time.monotonic() - started < 5
        assert len(server.requests) == 1
        server.pause_s = 0.0
        get("cifar10", tmp_path)

    def test_dripping_header(self, tmp_path, cifar, monkeypatch):
        monkeypatch.setattr(download, "WINDOW_S", 0.3)
        done = threading.Event()

        def drip(listener):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not done.wait(0.05):
                    connection.sendall(b"x")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=drip, args=(listener,))
            thread.start()
            addresses(monkeypatch, cifar, f"http://127.0.0.1:{listener.getsockname()[1]}")
            assert "no answer in" in failure(tmp_path)
            done.set()
            thread.join()

    def test_two_at_once(self, tmp_path, cifar, server):
        threads = [threading.Thread(target=get, args=("cifar10", tmp_path)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.requests) == 1
        check("cifar10", tmp_path)

    def test_wrong_hash_everywhere(self, tmp_path, cifar, server):
        server.files[ARCHIVE] = b"other bytes"
        message = failure(tmp_path)
        assert f"md5 {md5(b'other bytes').hexdigest()}" in message
        assert f"expected {md5(cifar).hexdigest()}" in message
        assert list(tmp_path.iterdir()) == []

    def test_web_page_does_not_cost_the_part(self, tmp_path, cifar, server):
        server.ranges, server.content_type = False, "text/html; charset=utf-8"
        part_of(tmp_path).write_bytes(cifar[:1000])
        assert "answered with a web page" in failure(tmp_path)
        assert part_of(tmp_path).read_bytes() == cifar[:1000]

    def test_offline(self, tmp_path, cifar, monkeypatch):
        bases = ("http://127.0.0.1:9", "http://127.0.0.1:9/copy")
        addresses(monkeypatch, cifar, *bases)
        start = time.perf_counter()
        message = failure(tmp_path)
        assert time.perf_counter() - start < 1.0
        assert all(f"{base}/{ARCHIVE}: " in message for base in bases)
        assert "refused" in message
        assert "DWF_DATA_MIRROR" in message
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", ["folder", "address"])
    def test_own_mirror_comes_first(self, tmp_path, cifar, server, monkeypatch, kind):
        published = tmp_path / "a folder"
        published.mkdir()
        (published / ARCHIVE).write_bytes(cifar)
        server.files[f"own/{ARCHIVE}"] = cifar
        mirror = {"folder": str(published), "address": f"{server.address}/own/"}[kind]
        monkeypatch.setenv("DWF_DATA_MIRROR", mirror)
        get("cifar10", tmp_path)
        expected = {"folder": [], "address": [f"/own/{ARCHIVE}"]}[kind]
        assert [path for path, _ in server.requests] == expected


class TestDisk:
    def test_full_disk(self, tmp_path, cifar, server):
        part_of(tmp_path).symlink_to("/dev/full")
        message = failure(tmp_path)
        assert f"{part_of(tmp_path)}: could not be written, No space left" in message
        assert "bytes free there" in message
        assert len(server.requests) == 1  # another address would not help

    def test_folder_that_cannot_be_made(self, tmp_path, cifar):
        (tmp_path / "file").write_text("in the way")
        assert "could not be written" in failure(tmp_path / "file")

    def test_disk_full_while_unpacking(self, tmp_path, cifar, monkeypatch):
        def no_space(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        (tmp_path / ARCHIVE).write_bytes(cifar)
        monkeypatch.setattr("os.fsync", no_space)
        assert "data_batch_1: could not be written, No space left" in failure(tmp_path)
        assert list((tmp_path / "cifar-10-batches-py").iterdir()) == []


class TestCheck:
    def test_named(self, tmp_path, cifar):
        (tmp_path / ARCHIVE).write_bytes(cifar)
        lines = check("cifar10", tmp_path)
        assert sum(": md5 " in line for line in lines) == 7
        assert lines[-1].startswith("test: 20 images [3, 32, 32] uint8, 10 classes of ")

    def test_broken(self, tmp_path, cifar):
        get("cifar10", tmp_path)
        flip_bit(tmp_path / "cifar-10-batches-py/batches.meta")
        with pytest.raises(DataError, match=r"batches\.meta: md5"):
            check("cifar10", tmp_path)

    def test_own_data(self, tmp_path):
        arrays = dict(user_arrays(), exact_test=np.arange(12) > 0)
        lines = check(str(write_npz(tmp_path, arrays)))
        assert lines[0].startswith("train: 40 images [3, 8, 6] uint8, 4 classes of 10 to 10")
        assert lines[2] == "test: 1 of 12 images of x_test left out: exact_test is False"
        only = {"images": arrays["x_train"], "labels": arrays["y_train"]}
        assert check(str(write_npz(tmp_path, only)))[-1] == "test: none"

    def test_listing(self, tmp_path, cifar):
        states = dict(line.split(maxsplit=1) for line in listing(tmp_path))
        assert states["digits"] == "bundled with scikit-learn"
        assert states["cifar10"].endswith(f"run `dwf data get cifar10 --root {tmp_path}`")
        (tmp_path / ARCHIVE).write_bytes(cifar)
        states = dict(line.split(maxsplit=1) for line in listing(tmp_path))
        assert states["cifar10"] == f"in {tmp_path}, to be unpacked at first use"
        get("cifar10", tmp_path)
        states = dict(line.split(maxsplit=1) for line in listing(tmp_path))
        assert states["cifar10"] == f"in {tmp_path}"
