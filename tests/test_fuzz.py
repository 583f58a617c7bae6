"""Files that are anything: whatever is read is right, or one typed error says what is wrong.

Each target changes a good file at random and reads it: a few seconds each, or as many as the
variable DWF_FUZZ_SECONDS says. A failure prints the seed and keeps the file.
"""

import contextlib
import copy
import json
import os
import random
import signal
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from small_models import SmallNet
from small_runs import small_config
from stored_runs import make_evaluation, write_run
from test_sources import user_arrays

from dwf import checkpoint
from dwf.attacks.outcomes import Outcomes
from dwf.checks import DwfError
from dwf.config import apply_overrides, from_dict
from dwf.data import load
from dwf.evaluation import EvaluationRecord
from dwf.evaluation.result import Evaluation
from dwf.exported import load_program
from dwf.files import read_json, run_lock
from dwf.progress import Metrics, read_metrics
from dwf.training.run_folder import SavedState
from dwf.typed_json import Place, from_json

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("DWF_FUZZ_SECONDS", "2"))
# Longer than any good file takes to read, on a busy machine too.
HANG_S = 20
STRANGE = [
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "../../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "=1+1",
    "x" * 10_000,
    [],
    {},
    [[]],
    {"": None},
    [None] * 1000,
]


def paper_run(folder):
    evaluation, arrays = make_evaluation()
    return write_run(folder, evaluation, arrays, None)


class Hang(BaseException):
    """A file was read for longer than `HANG_S`."""


@contextlib.contextmanager
def no_hang():
    def raise_hang(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, raise_hang)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged(rng, data):
    """Bytes after one to four accidents."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, size = rng.randrange(len(data) + 1), rng.randint(1, 40)
        match rng.randrange(6):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + size]
            case 3:
                data[place:place] = rng.randbytes(size)
            case 4:
                data[place : place + size] = bytes(size)
            case 5:
                other = rng.randrange(len(data) + 1)
                data[place : place + size] = data[other : other + size]
    return bytes(data)


def edited(rng, value):
    """JSON after one to three replaced, removed, renamed or nested values."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        at, places = value, []
        while isinstance(at, (dict, list)) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            places.append((at, key))
            at = at[key]
        if not places:
            return copy.deepcopy(rng.choice(STRANGE))
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(rng.choice(STRANGE))] = holder.pop(key)
            case 2:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def text_of(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


def fuzz(name, path, read, *, is_json=False):
    """Change the file at ``path`` again and again; ``read`` may raise a DwfError and no other."""
    good = path.read_bytes()
    read()  # the good file is read without error
    end, cases, refused = time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < end:
        rng = random.Random(f"{name} {cases}")
        structural = is_json and rng.random() < 0.7
        data = text_of(edited(rng, json.loads(good))) if structural else damaged(rng, good)
        path.write_bytes(data)
        try:
            with no_hang(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
        except DwfError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"{name}, case {cases}: {path}: {type(error).__name__}: {error}")
        cases += 1
    path.write_bytes(good)
    print(f"{name}: {cases} cases, {refused} refused")
    assert cases > 5
    assert refused > 0


def test_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text_of(small_config().to_dict()))
    fuzz("config", path, lambda: from_dict(read_json(path)), is_json=True)


def test_overrides():
    """Not a file, but the same kind: texts of the command line."""
    names = ["seed", "joint.num_epochs", "attack.epsilon", "attack.num_steps", "data.name", "pre"]
    texts = ["1e400", "9" * 5000, "1/0", "nan", "-1", "", ",", "none", "\0", "0x1", "1_0", "true"]
    for name in names:
        for text in texts:
            with contextlib.suppress(DwfError):
                apply_overrides(small_config(), [f"{name}={text}"])


@pytest.fixture
def checkpoints(tmp_path):
    for step in (1, 2):
        tensors = {
            "model": {"w": torch.ones(2, 3)},
            "optimizer": {"momentum_buffer/w": torch.ones(3)},
        }
        progress = {"phase_index": 0, "step": step, "global_step": step, "best": -1.0}
        state = {
            "progress": {**progress, "num_phases": 1},
            "unwritten": {"joint": [[0.5, 1.0, 1.0, 16, 16, 16]]},
            "ema_updates": 0,
            "facts": {"image_shape": [1, 8, 8], "num_classes": 10, "mean": [0.5], "std": [0.5]},
        }
        checkpoint.point(tmp_path, "last", checkpoint.save(tmp_path, step, tensors, state))
    return tmp_path


def test_pointers(checkpoints):
    def read():
        checkpoint.load_newest(checkpoints)  # never refused: there is a whole one
        found = checkpoint.resolve(checkpoints, "last")
        assert found.resolve().parent == checkpoints.resolve()

    fuzz("pointers", checkpoints / "last.json", read, is_json=True)


def test_manifests(checkpoints):
    newest = checkpoints / "step-00000002"

    def read():
        assert checkpoint.load_newest(checkpoints)[0].parent == checkpoints
        checkpoint.load(newest)

    fuzz("manifests", newest / "manifest.json", read, is_json=True)


def test_states(checkpoints):
    path = checkpoints / "step-00000002" / "state.json"
    fuzz("states", path, lambda: from_json(SavedState, read_json(path), Place(path)), is_json=True)


def test_safetensors(checkpoints):
    path = checkpoints / "step-00000002" / "model.safetensors"
    fuzz("safetensors", path, lambda: checkpoint.read_tensors(path))


def test_safetensors_headers(checkpoints):
    path = checkpoints / "step-00000002" / "model.safetensors"
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header, cases = json.loads(good[8 : 8 + size]), 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        rng = random.Random(f"header {cases}")
        text = text_of(edited(rng, header))
        path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + size :])
        with contextlib.suppress(DwfError), no_hang():
            checkpoint.read_tensors(path)
        cases += 1


def test_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(tmp_path, keep=lambda row: True, tensorboard=False)
    place = {"kind": "train", "phase": "joint", "phase_index": 0, "epoch": 0}
    for step in range(20):
        metrics.write({**place, "step": step, "global_step": step, "loss": 0.5})
    good, cases = path.read_bytes(), 0
    lines = good.splitlines()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        rng = random.Random(f"metrics {cases}")
        number = rng.randrange(len(lines))
        line = damaged(rng, lines[number])
        if rng.random() < 0.7:
            line = text_of(edited(rng, json.loads(lines[number])))
        path.write_bytes(b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n")
        left = [row["step"] for row in read_metrics(tmp_path)]
        # whatever became of this line, no other is lost
        assert [s for s in left if s < number][:number] == list(range(number)), f"case {cases}"
        assert set(range(number + 1, len(lines))) <= set(left), f"case {cases}"
        Metrics(tmp_path, keep=lambda row: row["step"] < 99, tensorboard=False).close()
        cases += 1


def test_locks(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("1234\n")

    def read():
        with run_lock(tmp_path), run_lock(tmp_path, shared=True):
            pass

    with pytest.raises(DwfError):
        read()
    for content in (b"\xff" * 40, b"", b"9" * 40, b"-1", b"\0"):
        with run_lock(tmp_path, shared=True):
            path.write_bytes(content)
            with pytest.raises(DwfError, match="is writing"), run_lock(tmp_path):
                pass


def test_evaluations(tmp_path):
    folder = paper_run(tmp_path / "run")
    path = folder / "evaluations" / "paper.json"
    fuzz("evaluations", path, lambda: Evaluation.read(path), is_json=True)


def test_records(tmp_path):
    """Without the arrays, so that a number that contradicts them is not what is found."""
    path = paper_run(tmp_path / "run") / "evaluations" / "paper.json"
    record = lambda: EvaluationRecord.from_json(read_json(path), path)  # noqa: E731
    fuzz("records", path, record, is_json=True)


def test_arrays_of_evaluations(tmp_path):
    folder = paper_run(tmp_path / "run")
    path = folder / "evaluations" / "paper.json"
    fuzz("arrays", path.with_suffix(".npz"), lambda: Evaluation.read(path))


def test_partial_outcomes(tmp_path):
    path = tmp_path / "partial.safetensors"
    Outcomes(path, "k", torch.zeros(4, 2), 3, 40).write()
    fuzz("partial", path, lambda: Outcomes(path, "k", torch.zeros(4, 2), 3, 40, strict=True))


@pytest.mark.parametrize("compressed", [True, False])
def test_own_archives(compressed, tmp_path):
    path = tmp_path / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **user_arrays())
    fuzz("npz", path, lambda: [load(path, split=split) for split in ("train", "test")])


def test_headers_of_own_archives(tmp_path):
    """Checksums made anew: what is found is the header's doing."""
    path = tmp_path / "data.npz"
    np.savez(path, **user_arrays())
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    end, cases = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        rng = random.Random(f"npz header {cases}")
        name = rng.choice(list(files))
        changed = {**files, name: damaged(rng, files[name][:128]) + files[name][128:]}
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in changed.items():
                archive.writestr(member, data)
        with contextlib.suppress(DwfError), no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(path, split="test")
        cases += 1


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm"])
def test_images(suffix, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for k in range(2):
        (tmp_path / "train" / str(k)).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / str(k) / f"0.{suffix}")
    path = tmp_path / "train" / "1" / f"0.{suffix}"
    fuzz(f"images {suffix}", path, lambda: load(tmp_path, split="train"))


def test_exported_programs(tmp_path):
    path, images = tmp_path / "model.pt2", torch.rand(5, 3, 8, 8)
    torch.export.save(torch.export.export(SmallNet().eval(), (images,)), path)
    fuzz("exported", path, lambda: load_program(path))


def test_exported_graphs(tmp_path):
    path, images = tmp_path / "model.pt2", torch.rand(5, 3, 8, 8)
    torch.export.save(torch.export.export(SmallNet().eval(), (images,)), path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in files if name.endswith(".json")]
    end, cases = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        rng = random.Random(f"graph {cases}")
        name = rng.choice(names)
        changed = {**files, name: text_of(edited(rng, json.loads(files[name])))}
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in changed.items():
                archive.writestr(member, data)
        with contextlib.suppress(DwfError), no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_program(path)
        cases += 1


OBSTACLES = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_no_file_at_all(obstacle, suffix, tmp_path):
    path = paper_run(tmp_path / "run") / "evaluations" / "paper.json"
    path.with_suffix(f".{suffix}").unlink()
    OBSTACLES[obstacle](path.with_suffix(f".{suffix}"))
    with contextlib.suppress(DwfError), no_hang():
        Evaluation.read(path)
