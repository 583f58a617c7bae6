"""Checkpoints: damage is found, named and survivable; no crash leaves half of one."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from dwf import checkpoint
from dwf.checks import CheckpointError
from dwf.files import sha256

CALLS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


def content(step):
    weights = {"w": torch.full((2, 3), float(step)), "n": torch.tensor(step)}
    return {"model": weights, "optimizer": {"w": torch.ones(2, 3)}}, {"step": step}


def take(folder, step, *pointers):
    """What the training loop does at a checkpoint."""
    name = checkpoint.save(folder, step, *content(step))
    for pointer in (*pointers, "last"):
        checkpoint.point(folder, pointer, name)
    checkpoint.prune(folder)


def step_of(folder, pointer="last"):
    """The step of the checkpoint that a pointer names, after looking at all of it."""
    tensors, state = checkpoint.load(checkpoint.resolve(folder, pointer))
    expected, _ = content(state["step"])
    assert tensors.keys() == expected.keys()
    for stem, named in expected.items():
        assert tensors[stem].keys() == named.keys()
        assert all(torch.equal(tensors[stem][key], value) for key, value in named.items())
    return state["step"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        take(folder, step, *(["best"] if step == 1 else []))
    return folder


def newest(folder):
    return folder / "step-00000003"


def rewrite_manifest(path):
    """What an attacker would do after changing a file."""
    files = [p for p in path.iterdir() if p.name != "manifest.json"]
    value = {"format": checkpoint.FORMAT, "sha256": {p.name: sha256(p) for p in files}}
    (path / "manifest.json").write_text(json.dumps(value))


class TestSave:
    def test_round_trip(self, folder):
        assert step_of(folder) == 3
        assert step_of(folder, "best") == 1

    def test_keeps_the_newest_two_and_those_with_a_name(self, folder):
        for step in (4, 5, 6):
            take(folder, step)
        assert [p.name for p in checkpoint.checkpoints(folder)] == [
            "step-00000001",
            "step-00000005",
            "step-00000006",
        ]

    def test_tensors_that_share_memory_and_strides(self, tmp_path):
        tied = torch.arange(6.0).reshape(2, 3)
        tensors = {"model": {"a": tied, "b": tied, "c": tied.T, "d": torch.zeros(0)}}
        name = checkpoint.save(tmp_path, 1, tensors, {})
        found = checkpoint.load(tmp_path / name)[0]["model"]
        assert all(torch.equal(found[key], value) for key, value in tensors["model"].items())

    def test_again_with_the_same_bits(self, folder):
        before = {p: p.stat().st_mtime_ns for p in newest(folder).iterdir()}
        take(folder, 3)
        assert {p: p.stat().st_mtime_ns for p in newest(folder).iterdir()} == before

    def test_again_with_other_bits(self, folder):
        tensors, state = content(3)
        tensors["model"]["w"] += 1
        checkpoint.save(folder, 3, tensors, state)
        found, _ = checkpoint.load(newest(folder))
        assert torch.equal(found["model"]["w"], tensors["model"]["w"])

    @pytest.mark.parametrize("call", [c for c in CALLS if c not in ("unlink", "rmdir")])
    def test_full_disk(self, call, folder, monkeypatch):
        def fail(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(CheckpointError, match=r"step-00000004.*No space left"):
                take(folder, 4)
        assert step_of(folder) == 3
        assert step_of(folder, "best") == 1
        take(folder, 4)
        assert step_of(folder) == 4

    def test_folder_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="Not a directory"):
            checkpoint.save(tmp_path / "file", 1, *content(1))


@pytest.mark.slow
def test_crash_at_every_call(tmp_path, monkeypatch):
    """Whatever is the last thing a process does, what it leaves can be loaded and gone on from."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counts as a call, takes no time
    fresh, again = tmp_path / "fresh", tmp_path / "again"
    for step in (1, 2, 3):
        take(fresh, step, *(["best"] if step == 1 else []))
    shutil.copytree(fresh, again)  # of a run that was here before and goes on from 3
    checkpoint.save(again, 4, {"model": content(5)[0]["model"]}, {})
    crashes = 0
    for start in (fresh, again):
        for last_call in range(1000):
            folder = tmp_path / f"{start.name}-{last_call}"
            shutil.copytree(start, folder)
            survived = attempt(folder, last_call, monkeypatch)
            assert step_of(folder) in ([4] if survived else [3, 4])
            assert step_of(folder, "best") in ([4] if survived else [1, 4])
            for path in checkpoint.checkpoints(folder):
                checkpoint.load(path)  # none is offered that is not whole
            take(folder, 4, "best")
            take(folder, 5)
            assert (step_of(folder), step_of(folder, "best")) == (5, 4)
            assert not list(folder.glob(".step-*"))
            if survived:
                break
            crashes += 1
    assert crashes > 50


def attempt(folder, last_call, monkeypatch):
    """Take a checkpoint, but die at a call to the file system; return whether it came so far."""
    calls = 0

    def or_crash(call):
        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > last_call:
                raise Crash
            return call(*arguments, **options)

        return counted

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, or_crash(getattr(os, name)))
        try:
            take(folder, 4, "best")
        except Crash:
            return False
    return True


class Exploit:
    """A pickle of this runs a command wherever it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit flipped": lambda path: flip(path, len(path.read_bytes()) // 2),
    "header bit flipped": lambda path: flip(path, 9),
    "web page": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Exploit(path.parent / "owned"))),
}
NOT_SAFETENSORS = ["truncated", "empty", "header bit flipped", "web page", "pickle"]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


class TestDamage:
    @pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_found_and_the_previous_checkpoint_offered(self, damage, file, folder):
        path = newest(folder) / file
        DAMAGE[damage](path)
        with pytest.raises(CheckpointError) as caught:
            step_of(folder)
        assert file in str(caught.value) or damage == "folder"
        assert "step-00000003" in str(caught.value)
        assert "step-00000002" in str(caught.value)
        assert not (path.parent / "owned").exists()
        # the offer is good
        (folder / "last.json").write_text('{"checkpoint": "step-00000002"}')
        assert step_of(folder) == 2

    @pytest.mark.parametrize("damage", NOT_SAFETENSORS)
    def test_with_a_manifest_that_agrees(self, damage, folder):
        """Somebody changed the hashes too: still nothing is read but safetensors."""
        path = newest(folder) / "model.safetensors"
        DAMAGE[damage](path)
        rewrite_manifest(path.parent)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file"):
            checkpoint.load(path.parent)
        assert not (path.parent / "owned").exists()

    def test_file_that_the_manifest_does_not_know(self, folder):
        (newest(folder) / "ema.safetensors").write_bytes(pickle.dumps(Exploit("owned")))
        assert step_of(folder) == 3

    @pytest.mark.parametrize(
        ("manifest", "message"),
        [
            ('{"format": 2, "sha256": {}}', "format 2, this version reads 1"),
            ('{"sha256": {}}', "format None"),
            ("[]", "not a manifest"),
            ('{"format": 1, "sha256": 3}', "not a manifest"),
            ("<html>", "not readable JSON"),
        ],
    )
    def test_manifest(self, manifest, message, folder):
        (newest(folder) / "manifest.json").write_text(manifest)
        with pytest.raises(CheckpointError, match=message) as caught:
            step_of(folder)
        assert "manifest.json" in str(caught.value)
        assert "step-00000002" in str(caught.value)

    def test_nothing_older_to_offer(self, tmp_path):
        take(tmp_path, 1)
        (tmp_path / "step-00000001" / "state.json").unlink()
        with pytest.raises(CheckpointError, match=r"state\.json: not found$"):
            step_of(tmp_path)


class TestHealing:
    @pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_training_that_passes_rewrites_it(self, damage, file, folder):
        if (damage, file) == ("truncated", "manifest.json"):
            pytest.skip("JSON without its last newline is JSON")
        DAMAGE[damage](newest(folder) / file)
        path, _, state, wrong = checkpoint.load_newest(folder)
        assert path.name == "step-00000002"
        assert state == {"step": 2}
        assert "step-00000003" in wrong
        take(folder, 3)
        assert step_of(folder) == 3
        assert not list(folder.glob(".step-*"))

    @pytest.mark.parametrize("pointer", ["[]", "<html>", '{"checkpoint": "../step-00000003"}'])
    def test_damaged_pointer(self, pointer, folder):
        for name in ("last", "best"):
            (folder / f"{name}.json").write_text(pointer)
        path, _, state, wrong = checkpoint.load_newest(folder)
        assert (path, state) == (newest(folder), {"step": 3})
        assert "last.json" in wrong
        take(folder, 4)
        assert step_of(folder) == 4

    def test_nothing_is_whole(self, folder):
        for path in folder.glob("step-*"):
            (path / "manifest.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"step-00000003.*not a manifest"):
            checkpoint.load_newest(folder)

    def test_undamaged(self, folder):
        assert checkpoint.load_newest(folder)[3] == ""


class TestPathsStayInside:
    @pytest.mark.parametrize("name", ["../../x", "/etc", "step-00000003/..", "step-1\0", ""])
    def test_pointer(self, name, folder):
        (folder / "last.json").write_text(json.dumps({"checkpoint": name}))
        with pytest.raises(CheckpointError, match=r"last\.json: expected a key 'checkpoint'"):
            checkpoint.resolve(folder, "last")

    @pytest.mark.parametrize("name", ["../step-00000002/state.json", "/etc/passwd", "a\0.json"])
    def test_manifest(self, name, folder):
        path = newest(folder) / "manifest.json"
        value = json.loads(path.read_text())
        value["sha256"][name] = "0" * 64
        path.write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest"):
            checkpoint.load(newest(folder))

    def test_pipe_in_place_of_weights(self, folder):
        (newest(folder) / "model.safetensors").unlink()
        os.mkfifo(newest(folder) / "model.safetensors")
        with pytest.raises(CheckpointError, match="not a regular file"):
            checkpoint.load(newest(folder))


class TestPointers:
    def test_that_does_not_exist(self, folder):
        with pytest.raises(CheckpointError, match=r"pretrained\.json: not found.*best.*last"):
            checkpoint.resolve(folder, "pretrained")

    def test_before_the_first_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint yet"):
            checkpoint.resolve(tmp_path, "last")

    def test_to_nowhere(self, folder):
        checkpoint.point(folder, "last", "step-00000099")
        with pytest.raises(CheckpointError, match=r"step-00000099.*not found.*step-00000003"):
            step_of(folder)

    @pytest.mark.parametrize("value", ["[]", '"step-00000003"', '{"checkpoint": 3}', "{}"])
    def test_something_else(self, value, folder):
        (folder / "last.json").write_text(value)
        with pytest.raises(CheckpointError, match=r"last\.json: expected a key 'checkpoint'"):
            checkpoint.resolve(folder, "last")


class TestLoadWeights:
    def test_equal_architecture(self):
        ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
        checkpoint.load_weights(ours, theirs.state_dict(), "file")
        assert torch.equal(ours.weight, theirs.weight)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"weight": torch.zeros(2, 3)}, r"file: another architecture, missing \['bias'\]"),
            (
                {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(2)},
                r"unexpected \['scale'\] of 0 and 1 keys",
            ),
            (
                {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
                r"file: weight has shape \[2, 4\], the model's has \[2, 3\]",
            ),
        ],
    )
    def test_other_architecture_changes_nothing(self, weights, message):
        model = nn.Linear(3, 2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(model, weights, "file")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
