"""What a run tells: metrics that survive a crash, and lines that say what they should."""

import csv
import io
import json
import os
import sys
import types

import pytest

from dwf.checks import CheckpointError
from dwf.progress import COLUMNS, LiveLine, Metrics, describe, duration, memory_gib, read_metrics


def row(step, **values):
    place = {"phase_index": 0, "epoch": 0, "step": step, "global_step": step}
    return {"kind": "train", "phase": "joint", **place, "loss": 1 / 3, **values}


def until(step):
    return lambda row: row["global_step"] <= step


@pytest.fixture
def metrics(tmp_path):
    opened = Metrics(tmp_path, keep=until(0), tensorboard=False)
    for step in (3, 6, 9):
        opened.write(row(step, clean_accuracy=None, robust_accuracy=0.5))
    opened.close()
    return opened


def read_csv(folder):
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def assert_files_agree(folder):
    """Every value of the JSON rows stands in the CSV, to the last digit."""
    for ours, theirs in zip(read_metrics(folder), read_csv(folder), strict=True):
        assert list(theirs) == list(COLUMNS)
        for name in COLUMNS:
            value = ours.get(name)
            assert theirs[name] == ("" if value is None else str(value))


class TestMetrics:
    def test_two_files_agree(self, metrics, tmp_path):
        assert [r["global_step"] for r in read_metrics(tmp_path)] == [3, 6, 9]
        assert read_metrics(tmp_path)[0]["loss"] == 1 / 3
        assert_files_agree(tmp_path)

    def test_before_the_first_row(self, tmp_path):
        assert read_metrics(tmp_path) == []

    @pytest.mark.parametrize(
        ("resume_at", "kept"), [(0, []), (6, [3, 6]), (8, [3, 6]), (99, [3, 6, 9])]
    )
    def test_a_resume_drops_what_it_will_write_again(self, resume_at, kept, metrics, tmp_path):
        Metrics(tmp_path, keep=until(resume_at), tensorboard=False).close()
        assert [r["global_step"] for r in read_metrics(tmp_path)] == kept
        assert_files_agree(tmp_path)

    @pytest.mark.parametrize("cut", [1, 10])
    def test_a_line_that_a_crash_cut_off(self, cut, metrics, tmp_path):
        for name in ("metrics.jsonl", "metrics.csv"):
            path = tmp_path / name
            path.write_bytes(path.read_bytes()[:-cut])
        # without its newline the last JSON row is whole; with less it is not
        expected = [3, 6, 9] if cut == 1 else [3, 6]
        assert [r["global_step"] for r in read_metrics(tmp_path)] == expected
        resumed = Metrics(tmp_path, keep=until(9), tensorboard=False)
        resumed.write(row(12))
        assert [r["global_step"] for r in read_metrics(tmp_path)] == [*expected, 12]
        assert_files_agree(tmp_path)

    @pytest.mark.parametrize(
        "line",
        [
            b'{"kind": "tr\xffin"}',
            b"[]",
            b"3",
            b"[" * 100_000,
            b'{"kind": "train", "phase": "joint", "step": "x"}',
            json.dumps(row(6, loss=10**400)).encode(),
            json.dumps(row(6, phase_index=-1)).encode(),
            json.dumps(row(6, epoch=None)).encode(),
            json.dumps({**row(6), "robustness": 1.0}).encode(),
        ],
    )
    def test_one_damaged_line(self, line, metrics, tmp_path, caplog):
        path = tmp_path / "metrics.jsonl"
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([lines[0], line, lines[2]]) + b"\n")
        assert [r["global_step"] for r in read_metrics(tmp_path)] == [3, 9]
        for _ in range(2):
            resumed = Metrics(tmp_path, keep=until(9), tensorboard=False)
        resumed.write(row(12))
        assert [r["global_step"] for r in read_metrics(tmp_path)] == [3, 9, 12]
        assert_files_agree(tmp_path)
        assert (tmp_path / "metrics.damaged").read_bytes() == line + b"\n"
        assert [r.message for r in caplog.records] == [
            f"{path}: 1 damaged lines, now in metrics.damaged"
        ]

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_no_file(self, make, tmp_path):
        make(tmp_path / "metrics.jsonl")
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: not readable"):
            Metrics(tmp_path, keep=until(0), tensorboard=False)

    def test_no_formula_in_the_table(self, metrics, tmp_path):
        metrics.write(row(12, message="=cmd|' /C calc'!A0"))
        assert read_csv(tmp_path)[-1]["message"].startswith("'=")
        assert read_metrics(tmp_path)[-1]["message"].startswith("=")

    def test_unknown_column(self, metrics):
        with pytest.raises(ValueError, match="robustness"):
            metrics.write(row(12, robustness=1.0))

    @pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
    def test_full_disk(self, name, metrics, tmp_path):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(
            CheckpointError, match=r"metrics\.jsonl: could not be written, No space"
        ):
            metrics.write(row(12))

    def test_tensorboard(self, tmp_path, monkeypatch):
        written = []

        class SummaryWriter:
            def __init__(self, folder):
                assert folder == str(tmp_path / "tensorboard")

            def add_scalar(self, *arguments):
                written.append(arguments)

            def close(self):
                written.append("closed")

        module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        metrics = Metrics(tmp_path, keep=until(0))
        metrics.write(row(3, clean_accuracy=None, robust_accuracy=0.5, learning_rate=0.1))
        metrics.close()
        assert written == [
            ("train/loss", 1 / 3, 3),
            ("train/robust_accuracy", 0.5, 3),
            ("train/learning_rate", 0.1, 3),
            "closed",
        ]

    def test_without_tensorboard(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        metrics = Metrics(tmp_path, keep=until(0))
        metrics.write(row(3))
        metrics.close()
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row(3)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestLiveLine:
    @pytest.fixture(autouse=True)
    def terminal(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")

    def test_a_terminal_gets_one_line_over_and_over(self):
        stream = Terminal()
        live = LiveLine(stream=stream)
        for number in range(100):  # in no time: only the first is shown
            live.show(f"step {number}")
        live.say("done")
        assert stream.getvalue() == "\r\x1b[2Kstep 0\r\x1b[2Kdone\n"

    def test_it_is_taken_back_before_something_else_is_printed(self):
        stream = Terminal()
        live = LiveLine(stream=stream)
        live.clear()
        live.show("step 0")
        live.clear()
        stream.write("a table")
        assert stream.getvalue() == "\r\x1b[2Kstep 0\r\x1b[2Ka table"

    @pytest.mark.parametrize("columns", [80, 24, 1])
    def test_no_line_wraps(self, columns, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        LiveLine(stream=stream).show("phase 1 of 10: joint" + 100 * "x")
        shown = stream.getvalue().removeprefix("\r\x1b[2K")
        assert len(shown) == max(columns - 1, 1)

    def test_a_dumb_terminal_gets_whole_lines_only(self, monkeypatch):
        monkeypatch.setenv("TERM", "dumb")
        stream = Terminal()
        live = LiveLine(stream=stream)
        live.show("step 0")
        live.say("done")
        assert stream.getvalue() == "done\n"

    def test_a_file_gets_whole_lines_only(self):
        stream = io.StringIO()
        live = LiveLine(stream=stream)
        live.show("step 0")
        live.say("done")
        assert stream.getvalue() == "done\n"

    @pytest.mark.parametrize("kind", [Terminal, io.StringIO])
    def test_quiet(self, kind):
        stream = kind()
        live = LiveLine(quiet=True, stream=stream)
        live.show("step 0")
        live.say("done")
        assert stream.getvalue() == ""


class TestDescribe:
    def test_everything(self):
        values = {
            "loss": 1.4249,
            "clean_accuracy": 0.612,
            "robust_accuracy": 0.38,
            "images_per_s": 9800.4,
        }
        line = describe("joint", (9, 10), 2, 30, 209, 391, values, 41.2)
        assert line.startswith(
            "phase 10 of 10: joint 3/30 | ETA 0:41 | 210/391 | loss 1.425 | clean 61.2 % | "
            "robust 38.0 % | 9,800 images/s | "
        )
        assert line.endswith(" GiB")

    def test_nothing_known_yet(self):
        values = {"loss": None, "clean_accuracy": None}
        line = describe("expert-0-benign", (0, 10), 0, 1, 0, 4, values, 0)
        assert line.startswith("phase 1 of 10: expert-0-benign 1/1 | ETA 0:00 | 1/4 | ")

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3599, "59:59"), (3723, "1:02:03")],
    )
    def test_duration(self, seconds, text):
        assert duration(seconds) == text

    def test_memory(self):
        assert 0.01 < memory_gib() < 1000
