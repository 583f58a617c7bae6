"""Data sets: what is read equals what was written, and nothing broken gets through."""

import io
import os
import pickle
import tarfile
import time
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from dwf.checks import ConfigError, DataError
from dwf.data import load, split_validation
from dwf.data.dataset import SPLITS, channel_statistics, content_digest
from dwf.data.named import NAMED_SETS, RemoteFile, expected_files

# of the fixed digits split: it has to stay as it is, or results cease to compare
TRAIN_DIGEST = "f84495b83a3bb6cd"
TEST_DIGEST = "f8b0dd0e854efde4"

CIFAR_FILES = {
    "cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    "cifar100": ["train", "test"],
}


def write_cifar(folder, monkeypatch, name="cifar10", packed=True):
    """Write a small CIFAR in the published format and make its hashes the expected ones.

    Returns {"train" | "test": (images [N, 3, 32, 32] uint8, labels [N])}.
    """
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    num_classes = NAMED_SETS[name].num_classes
    rng = np.random.default_rng(0)
    written, parts = {}, {"train": [], "test": []}
    for file in CIFAR_FILES[name]:
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = rng.integers(0, num_classes, 20).tolist()
        key = "labels" if name == "cifar10" else "fine_labels"
        pickled = pickle.dumps({"data": images, key: labels}, protocol=2)
        # as in 2009: dtype("u1", 0, 1) for what is dtype("u1", False, True) today
        written[file] = pickled.replace(b"\x89\x88\x87", b"K\x00K\x01\x87", 1)
        assert written[file] != pickled
        parts["test" if "test" in file else "train"].append((images, labels))
    class_names = [f"class-{k}" for k in range(num_classes)]
    written[reader.meta["filename"]] = pickle.dumps({reader.meta["key"]: class_names}, protocol=2)
    hashes = {file: md5(content).hexdigest() for file, content in written.items()}
    lists = {split: [[f, hashes[f]] for f in CIFAR_FILES[name]] for split in parts}
    monkeypatch.setattr(
        reader, "train_list", [row for row in lists["train"] if "test" not in row[0]]
    )
    monkeypatch.setattr(reader, "test_list", [row for row in lists["test"] if "test" in row[0]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": hashes[reader.meta["filename"]]})

    members = {f"{reader.base_folder}/{file}": content for file, content in written.items()}
    if packed:
        write_archive(folder, monkeypatch, name, members)
    else:
        for file, content in members.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
    return {
        split: (
            np.concatenate([images for images, _ in rows]).reshape(-1, 3, 32, 32),
            np.concatenate([labels for _, labels in rows]),
        )
        for split, rows in parts.items()
    }


def write_archive(folder, monkeypatch, name, members):
    """Write a .tar.gz of {path: bytes or TarInfo} and make its hash the expected one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    file = NAMED_SETS[name].files[0]
    (folder / file.name).write_bytes(buffer.getvalue())
    expect(monkeypatch, name, RemoteFile(file.name, md5(buffer.getvalue()).hexdigest(), file.urls))


def expect(monkeypatch, name, *files):
    monkeypatch.setitem(NAMED_SETS, name, replace(NAMED_SETS[name], files=files))


def write_svhn(folder, monkeypatch):
    """Write a small SVHN; returns {split: (images [N, 3, 32, 32], labels 1..10 as in the file)}."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    parts, files, table = {}, [], {}
    for split, size in (("train", 30), ("test", 15)):
        images = rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(size) % 10 + 1
        name = f"{split}_32x32.mat"
        savemat(folder / name, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})
        digest = md5((folder / name).read_bytes()).hexdigest()
        files.append(RemoteFile(name, digest, (f"http://127.0.0.1:9/{name}",)))
        table[split] = ["", name, digest]
        parts[split] = (images, labels)
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    expect(monkeypatch, "svhn", *files)
    return parts


def refused(name, root=None, split="train"):
    """Return the message of the DataError, after checking that it came at once."""
    start = time.perf_counter()
    with pytest.raises(DataError) as caught:
        load(name, root, split)
    assert time.perf_counter() - start < 1.0
    return str(caught.value)


class TestDigits:
    def test_split_is_fixed(self):
        train, test = load("digits"), load("digits", split="test")
        assert (len(train), len(test)) == (1297, 500)
        assert train.image_shape == (1, 8, 8)
        assert (train.digest[:16], test.digest[:16]) == (TRAIN_DIGEST, TEST_DIGEST)
        assert train.images.is_contiguous()
        assert train.images.dtype == torch.uint8

    def test_every_image_is_in_one_split(self):
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = [[round(v * 255 / 16) for v in image.flatten()] for image in bunch.images]
        everything = sorted(map(tuple, np.column_stack([pixels, bunch.target]).tolist()))
        rows = []
        for split in ("train", "test"):
            data = load("digits", split=split)
            rows.append(np.column_stack([data.images.flatten(1), data.labels]))
        assert sorted(map(tuple, np.concatenate(rows).tolist())) == everything

    def test_classes_have_their_share(self):
        train, test = load("digits"), load("digits", split="test")
        sizes = (train.labels.bincount() + test.labels.bincount()).double()
        assert ((test.labels.bincount() - sizes * 500 / 1797).abs() < 1).all()

    def test_constants_are_those_of_the_training_images(self):
        train = load("digits")
        mean, std = channel_statistics(train.images)
        assert mean == pytest.approx(train.mean, abs=5e-6)
        assert std == pytest.approx(train.std, abs=5e-6)


class TestCifar:
    @pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_images_and_labels(self, tmp_path, monkeypatch, name, packed):
        written = write_cifar(tmp_path, monkeypatch, name, packed)
        for split in ("train", "test"):
            data = load(name, tmp_path, split)
            images, labels = written[split]
            assert torch.equal(data.images, torch.from_numpy(images))
            assert data.labels.tolist() == labels.tolist()
            assert data.labels.dtype == torch.int64
            assert data.class_names[3] == "class-3"
            assert data.num_classes == len(data.class_names) == NAMED_SETS[name].num_classes
            assert data.digest == content_digest(data.images, data.labels)
            assert data.split == split

    def test_tables_are_those_of_torchvision(self):
        for name, reader in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
            (file,) = NAMED_SETS[name].files
            assert (file.name, file.md5) == (reader.filename, reader.tgz_md5)
            assert reader.url in file.urls
        for file, split in zip(NAMED_SETS["svhn"].files, ("train", "test"), strict=True):
            url, *rest = datasets.SVHN.split_list[split]
            assert [file.name, file.md5] == rest
            assert url in file.urls

    def test_nothing_there(self, tmp_path):
        message = refused("cifar10", tmp_path)
        assert "cifar-10-batches-py/data_batch_1: not found" in message
        assert "nor is cifar-10-python.tar.gz" in message
        assert f"`dwf data get cifar10 --root {tmp_path}`" in message

    def test_tampered_file_is_not_unpickled(self, tmp_path, monkeypatch):
        write_cifar(tmp_path, monkeypatch, packed=False)
        path = tmp_path / "cifar-10-batches-py/data_batch_2"
        expected = md5(path.read_bytes()).hexdigest()
        witness = tmp_path / "executed"
        path.write_bytes(pickle.dumps(Bomb(witness)))
        message = refused("cifar10", tmp_path)
        assert not witness.exists()
        assert str(path) in message
        assert expected in message
        assert md5(path.read_bytes()).hexdigest() in message
        assert "dwf data get cifar10" in message

    def test_flipped_bit_in_the_other_split(self, tmp_path, monkeypatch):
        write_cifar(tmp_path, monkeypatch, packed=False)
        flip_bit(tmp_path / "cifar-10-batches-py/test_batch")
        assert "test_batch: md5" in refused("cifar10", tmp_path, "train")

    @pytest.mark.parametrize("damage", ["truncated", "flipped"])
    def test_damaged_archive(self, tmp_path, monkeypatch, damage):
        write_cifar(tmp_path, monkeypatch)
        path = tmp_path / "cifar-10-python.tar.gz"
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:1000])
        else:
            flip_bit(path)
        assert f"{path}: md5" in refused("cifar10", tmp_path)
        assert not (tmp_path / "cifar-10-batches-py").exists()

    def test_foreign_files(self, tmp_path):
        # the real hashes: files of the right name with other content are refused
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        for file in ("train", "test", "meta"):
            (folder / file).write_bytes(b"not CIFAR-100")
        assert "expected 16019d7e3df5f24257cddd939b257f8d" in refused("cifar100", tmp_path)

    def test_hostile_archive(self, tmp_path, monkeypatch):
        write_cifar(tmp_path, monkeypatch)
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        write_archive(tmp_path, monkeypatch, "cifar10", {"../outside": b"x", "link": link})
        assert "damaged" in refused("cifar10", tmp_path)
        assert not (tmp_path.parent / "outside").exists()
        assert not (tmp_path / "cifar-10-batches-py").exists()

    def test_label_out_of_range(self, tmp_path, monkeypatch):
        write_cifar(tmp_path, monkeypatch)
        monkeypatch.setitem(NAMED_SETS, "cifar10", replace(NAMED_SETS["cifar10"], num_classes=4))
        assert "expected 0 to 3" in refused("cifar10", tmp_path)

    def test_root_from_the_environment(self, tmp_path, monkeypatch):
        write_cifar(tmp_path, monkeypatch)
        monkeypatch.setenv("DWF_DATA_ROOT", str(tmp_path))
        assert len(load("cifar10")) == 100
        empty = tmp_path / "an empty folder"
        assert f"--root '{empty}'" in refused("cifar10", empty)


class TestSvhn:
    def test_images_and_labels(self, tmp_path, monkeypatch):
        written = write_svhn(tmp_path, monkeypatch)
        for split, (images, labels) in written.items():
            data = load("svhn", tmp_path, split)
            assert torch.equal(data.images, torch.from_numpy(images))
            assert data.labels.tolist() == (labels % 10).tolist()  # 10 stands for the digit 0
            assert data.class_names[0] == "0"

    def test_truncated(self, tmp_path, monkeypatch):
        write_svhn(tmp_path, monkeypatch)
        path = tmp_path / "test_32x32.mat"
        path.write_bytes(path.read_bytes()[:-7])
        message = refused("svhn", tmp_path, "train")
        assert f"{path}: md5" in message
        assert "dwf data get svhn" in message


class TestNpz:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_layouts(self, tmp_path, channels):
        arrays = user_arrays(channels=channels)
        data = load(write_npz(tmp_path, arrays))
        last = dict(arrays, x_train=arrays["x_train"].transpose(0, 2, 3, 1))
        assert load(write_npz(tmp_path, last)).digest == data.digest
        if channels == 1:
            flat = dict(arrays, x_train=arrays["x_train"][:, 0])
            assert load(write_npz(tmp_path, flat)).digest == data.digest
        assert data.image_shape == (channels, 8, 6)
        assert torch.equal(data.images, torch.from_numpy(arrays["x_train"]))
        assert (data.mean, data.std) == channel_statistics(data.images)
        assert data.num_classes == 4
        assert data.name == "data.npz"

    def test_test_split_has_the_statistics_of_training(self, tmp_path):
        path = write_npz(tmp_path, user_arrays())
        train, test = load(path), load(path, split="test")
        assert (test.mean, test.std, test.num_classes) == (train.mean, train.std, 4)
        assert len(test) == 12
        assert test.split == "test"

    def test_images_and_labels_only(self, tmp_path):
        arrays = user_arrays()
        path = write_npz(tmp_path, {"images": arrays["x_train"], "labels": arrays["y_train"]})
        assert len(load(path)) == 40
        assert "has no test split; add x_test and y_test" in refused(path, split="test")

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64"])
    def test_any_integer_labels(self, tmp_path, dtype):
        arrays = user_arrays()
        arrays["y_train"] = arrays["y_train"].astype(dtype)
        assert load(write_npz(tmp_path, arrays)).labels.dtype == torch.int64

    def test_inexact_images_are_left_out(self, tmp_path):
        arrays = user_arrays(num_train=3000)
        arrays["exact_train"] = np.random.default_rng(1).random(3000) < 0.7
        data = load(write_npz(tmp_path, arrays))
        kept = arrays["exact_train"]
        assert torch.equal(data.images, torch.from_numpy(arrays["x_train"][kept]))
        assert data.labels.tolist() == arrays["y_train"][kept].tolist()
        (note,) = data.notes
        assert note.startswith(f"{int((~kept).sum())} of 3000 images of x_train left out")

    def test_absent_class_is_noted(self, tmp_path):
        arrays = user_arrays()
        arrays["y_train"] = arrays["y_train"] + 1  # counted from one
        assert load(write_npz(tmp_path, arrays)).notes == ("no training image has label 0",)

    @pytest.mark.parametrize(
        ("changes", "split", "words"),
        [
            ({"x_train": np.zeros((40, 3, 8, 6), np.float32)}, "train", "x_train is float32"),
            ({"x_train": np.zeros((40, 48), np.uint8)}, "train", "x_train is [40, 48]"),
            ({"x_train": np.zeros((40, 9, 8, 6), np.uint8)}, "train", "1 to 4 channels"),
            ({"x_train": np.zeros((39, 3, 8, 6), np.uint8)}, "train", "39 images, y_train 40"),
            ({"x_train": np.array([None] * 40)}, "train", "x_train is object"),
            ({"x_test": np.zeros((12, 3, 8, 8), np.uint8)}, "test", "test images are [3, 8, 8]"),
            ({"y_train": np.zeros((40, 1), int)}, "train", "expected integers [N]"),
            ({"y_train": np.zeros(40)}, "train", "y_train is float64"),
            ({"y_train": np.zeros(0, int)}, "train", "y_train is int64 [0]"),
            ({"y_train": np.array([None] * 40)}, "train", "y_train is object"),
            ({"y_train": np.array([0, 1, -1, 3] * 10)}, "train", "-1 at [2]"),
            ({"y_train": np.full(40, 1000)}, "train", "y_train reaches 1000 in 40"),
            ({"y_test": np.array([0, 4, 4] * 4)}, "test", "4 at [1], expected 0 to 3; 8 labels"),
            ({"exact_train": np.ones(40)}, "train", "exact_train is float64"),
            ({"exact_train": np.ones(39, bool)}, "train", "expected bool [40]"),
            ({"exact_train": np.zeros(40, bool)}, "train", "leaves no image"),
            ({"x_train": None}, "train", "expected x_train, y_train"),
            ({"y_test": None}, "test", "has no test split"),
        ],
    )
    def test_wrong_content(self, tmp_path, changes, split, words):
        arrays = {**user_arrays(), **changes}
        arrays = {key: value for key, value in arrays.items() if value is not None}
        path = write_npz(tmp_path, arrays)
        message = refused(path, split=split)
        assert str(path) in message
        assert words in message

    def test_objects_are_never_unpickled(self, tmp_path):
        witness = tmp_path / "executed"
        arrays = dict(user_arrays(), exact_train=np.array([Bomb(witness)] * 40, dtype=object))
        path = write_npz(tmp_path, arrays)
        assert "exact_train is object" in refused(path)
        assert not witness.exists()

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda data: b"<!DOCTYPE html><html>404", "not an .npz archive"),
            (lambda data: b"", "not an .npz archive"),
            (lambda data: data[: len(data) // 2], "damaged"),
            (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "damaged"),
            (lambda data: data.replace(b"(40, 3, 8, 6)", b"(40, 3, 8, 4)"), "longer than its"),
        ],
        ids=["web page", "empty", "truncated", "flipped bit", "flipped shape"],
    )
    def test_damaged_file(self, tmp_path, damage, words):
        path = write_npz(tmp_path, user_arrays())
        path.write_bytes(damage(path.read_bytes()))
        message = refused(path)
        assert str(path) in message
        assert words in message

    def test_missing_file(self, tmp_path):
        assert "absent.npz: not found" in refused(tmp_path / "absent.npz")


class TestFolder:
    def test_images_and_labels(self, tmp_path):
        images = write_folder(tmp_path)
        for split in ("train", "test"):
            data = load(tmp_path, split=split)
            assert data.class_names == ("cat", "dog")
            assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
            assert torch.equal(data.images, torch.from_numpy(images[split]).permute(0, 3, 1, 2))
            assert data.mean == channel_statistics(load(tmp_path).images)[0]
            assert data.name == tmp_path.name

    def test_sizes_differ(self, tmp_path):
        write_folder(tmp_path)
        odd = tmp_path / "train/dog/9.png"
        Image.new("RGB", (7, 8)).save(odd)
        assert f"{odd}: 8x7 pixels, expected 8x8" in refused(tmp_path)

    def test_broken_image(self, tmp_path):
        write_folder(tmp_path)
        path = tmp_path / "train/cat/1.png"
        path.write_bytes(path.read_bytes()[:60])
        assert f"{path}: not a readable image" in refused(tmp_path)

    def test_test_sizes_differ(self, tmp_path):
        write_folder(tmp_path)
        for path in (tmp_path / "test").glob("*/*.png"):
            Image.new("RGB", (4, 4)).save(path)
        assert "test images are [3, 4, 4]" in refused(tmp_path, split="test")

    def test_class_folders_differ(self, tmp_path):
        write_folder(tmp_path)
        (tmp_path / "test/dog").rename(tmp_path / "test/frog")
        assert "['dog', 'frog']" in refused(tmp_path, split="test")

    def test_empty_class(self, tmp_path):
        write_folder(tmp_path)
        (tmp_path / "train/bird").mkdir()
        assert "bird" in refused(tmp_path)

    def test_no_such_split(self, tmp_path):
        assert f"{tmp_path / 'train'}: not found" in refused(tmp_path)


class TestNames:
    def test_unknown_name_gets_a_suggestion(self):
        assert "did you mean cifar10?" in refused("cifar_10")

    def test_unknown_split(self):
        with pytest.raises(ConfigError, match="did you mean 'test'"):
            load("digits", split="tests")


class TestSplitValidation:
    def test_a_stratified_partition(self):
        whole = load("digits")
        train, validation = split_validation(whole, 200, seed=0)
        assert (len(train), len(validation)) == (1097, 200)
        assert (train.split, validation.split) == ("train", "validation")
        shares = whole.labels.bincount().double() * 200 / 1297
        assert ((validation.labels.bincount() - shares).abs() < 1).all()
        rows = [np.column_stack([d.images.flatten(1), d.labels]) for d in (train, validation)]
        together = sorted(map(tuple, np.concatenate(rows).tolist()))
        expected = np.column_stack([whole.images.flatten(1), whole.labels]).tolist()
        assert together == sorted(map(tuple, expected))
        assert train.digest == content_digest(train.images, train.labels)

    def test_fixed_by_the_seed(self):
        whole = load("digits")
        digests = [split_validation(whole, 200, seed)[1].digest for seed in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]

    @pytest.mark.parametrize("num_validation", [1, 7, 1296])
    def test_any_size_that_fits(self, num_validation):
        train, validation = split_validation(load("digits"), num_validation, seed=0)
        assert (len(train), len(validation)) == (1297 - num_validation, num_validation)

    @pytest.mark.parametrize("num_validation", [0, -1, 1297, 5000])
    def test_what_does_not_fit(self, num_validation):
        with pytest.raises(ConfigError, match="num_validation"):
            split_validation(load("digits"), num_validation, seed=0)

    def test_never_the_test_split(self):
        with pytest.raises(ConfigError, match="not the test split"):
            split_validation(load("digits", split="test"), 100, seed=0)


def test_subset_keeps_order_and_counts_anew():
    data = load("digits")
    few = data.subset(torch.tensor([5, 2, 9]))
    assert torch.equal(few.images, data.images[[5, 2, 9]])
    assert few.digest == content_digest(few.images, few.labels) != data.digest


def test_channel_statistics():
    images = torch.randint(0, 256, (1500, 2, 3, 5), dtype=torch.uint8)
    images[:, 1] = 51
    mean, std = channel_statistics(images)
    values = images[:, 0].double() / 255
    assert mean == pytest.approx((float(values.mean()), 0.2))
    assert std == pytest.approx((float(values.std(correction=0)), 1.0))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("cifar10", (50000, 10000)), ("cifar100", (50000, 10000)), ("svhn", (73257, 26032))],
)
def test_published_files(name, sizes):
    root = os.environ.get("DWF_DATA_ROOT")
    if not root:
        pytest.skip("DWF_DATA_ROOT is not set: no published files to read")
    folder = Path(root)
    files = [*expected_files(name), NAMED_SETS[name].files[0].name]
    if not any((folder / file).is_file() for file in files):
        pytest.skip(f"{name} is not in DWF_DATA_ROOT")
    for split, size in zip(("train", "test"), sizes, strict=True):
        data = load(name, root, split)
        assert len(data) == size
        assert data.image_shape == (3, 32, 32)
        assert data.labels.bincount(minlength=data.num_classes).min() > 0
        if split == "train":
            mean, _ = channel_statistics(data.images)
            assert mean == pytest.approx(data.mean, abs=6e-4)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def user_arrays(num_train=40, channels=3):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (num_train, channels, 8, 6), dtype=np.uint8),
        "y_train": np.arange(num_train) % 4,
        "x_test": rng.integers(0, 256, (12, channels, 8, 6), dtype=np.uint8),
        "y_test": np.arange(12) % 4,
    }


def write_npz(folder, arrays):
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def write_folder(folder):
    """Write train/ and test/ with three 8x8 images of cat and dog each; returns [6, H, W, 3]."""
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8) for split in SPLITS}
    for split, pixels in images.items():
        for i, image in enumerate(pixels):
            path = folder / split / ("cat" if i < 3 else "dog") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return images
