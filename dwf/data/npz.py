"""Read a user's own data from an .npz archive: uint8 images and integer labels.

Shapes, types and labels are checked in the archive's headers before any image is read, and nothing
is unpickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwf.checks import DataError
from dwf.data.dataset import (
    ImageDataset,
    Pixels,
    channel_statistics,
    check_label_range,
    check_same_shape,
    content_digest,
    naming_damage,
)

# numpy's headers are shorter.
MAX_HEADER = 1 << 16


def npz_splits(path: Path) -> tuple[str, ...]:
    """The splits of an archive: both, or "train" alone."""
    with _open_npz(path) as archive:
        return tuple(_npz_keys(path, archive))


def load_npz(path: Path, split: str) -> ImageDataset:
    """Read one split of an archive; `dwf.data.load` says what an archive holds.

    Raises:
        DataError: naming the file and the array that is wrong.
    """
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
        check_label_range(labels, num_classes, f"{path}: {keys[split][1]}")
        for s in {"train", split}:
            _check_image_header(path, archive, *keys[s])
        images, labels, notes = _read_split(path, archive, *keys["train"])
        mean, std = channel_statistics(images)
        absent = torch.nonzero(labels.bincount(minlength=num_classes) == 0)[:, 0].tolist()
        if split == "test":
            train_shape = images.shape[1:]
            del images  # two splits in memory at once would be one too many
            images, labels, notes = _read_split(path, archive, *keys["test"])
            check_same_shape(path, test=images.shape[1:], train=train_shape)
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
    with naming_damage(path, "write or copy it again"):
        with open(path, "rb") as stream:
            start = stream.read(4)
            if start[:2] != b"PK":  # an error page saved under the wrong name starts with <
                raise DataError(f"{path}: not an .npz archive, its first bytes are {start!r}")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                yield archive


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
    shape, dtype = _header(archive, key)
    held = archive.zip.getinfo(f"{key}.npy").file_size
    wanted = math.prod(shape) * dtype.itemsize
    if not wanted < held <= wanted + MAX_HEADER:
        raise DataError(
            f"{path}: {key} holds {held:,} bytes, its header says {wanted:,}; "
            "write or copy it again"
        )
    if wanted > (room := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise DataError(f"{path}: {key} takes {wanted:,} bytes, this machine has {room:,}")
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
    check_label_range(labels, max(int(labels.max()) + 1, 1), f"{path}: {key}")
    return labels


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
