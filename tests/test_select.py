"""The memory of choices on disk."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from moe_kernels.select import Choices, default_path
from moe_kernels.timing import driver_version


def test_remembered_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "choices.json"
    first = Choices(path)
    assert first.get("softmax_combine | H200") is None
    first.put("softmax_combine | H200", "triton")
    assert first.get("softmax_combine | H200") == "triton"
    assert Choices(path).get("softmax_combine | H200") == "triton"
    assert [x.name for x in path.parent.iterdir()] == ["choices.json"]


def test_two_processes_keep_each_others_choices(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    first, second = Choices(path), Choices(path)
    assert first.get("a") is second.get("b") is None
    first.put("a", "native")
    second.put("b", "triton")
    assert json.loads(path.read_text()) == {"a": "native", "b": "triton"}


def test_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    writers = [
        threading.Thread(target=lambda: [Choices(path).put(str(i), "native") for i in range(20)])
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert json.loads(path.read_text())
    for writer in writers:
        writer.join()


@pytest.mark.parametrize(
    "content", ["", "{", '["native"]', "\xff\xfe"], ids=["empty", "truncated", "list", "binary"]
)
def test_unreadable_file_is_ignored_with_one_line(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "choices.json"
    path.write_bytes(content.encode("latin-1"))
    choices = Choices(path)
    with caplog.at_level(logging.WARNING, logger="moe_kernels"):
        assert choices.get("a") is None
        choices.put("a", "native")
    assert len(caplog.records) == 1
    assert "ignoring" in caplog.text
    assert str(path) in caplog.text
    assert json.loads(path.read_text()) == {"a": "native"}


def test_entries_that_are_no_names_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text('{"a": 3, "b": "native"}')
    assert (Choices(path).get("a"), Choices(path).get("b")) == (None, "native")


def test_unwritable_folder_costs_memory_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    choices = Choices(tmp_path / "file" / "choices.json")
    choices.put("a", "native")
    choices.put("b", "native")
    assert choices.get("a") == "native"
    assert len(caplog.records) == 1


def test_full_disk_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    choices = Choices(tmp_path / "choices.json")
    choices.put("a", "native")
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_place_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS_CACHE_DIR", str(tmp_path))
    assert default_path() == tmp_path / "choices.json"
    monkeypatch.delenv("MOE_KERNELS_CACHE_DIR")
    assert default_path() == Path.home() / ".cache" / "moe_kernels" / "choices.json"


def test_driver_version_is_one_word() -> None:
    assert driver_version() == "unknown" or driver_version()[0].isdigit()
