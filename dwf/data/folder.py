"""Read a user's own data from image folders, ``train/<class>/`` and ``test/<class>/``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dwf.checks import DataError
from dwf.data.dataset import (
    SPLITS,
    ImageDataset,
    Pixels,
    channel_statistics,
    check_same_shape,
    content_digest,
)


def folder_splits(path: Path) -> tuple[str, ...]:
    """The splits of a folder: both, or "train" alone."""
    return SPLITS if (path / "test").is_dir() else SPLITS[:1]


def load_folder(path: Path, split: str) -> ImageDataset:
    """Read one split of a folder; images become RGB.

    Raises:
        DataError: a folder or class is missing, an image is broken or of another size.
    """
    train_images, train_labels, class_names = _read_folder(path, "train")
    mean, std = channel_statistics(train_images)
    images, labels = train_images, train_labels
    if split == "test":
        images, labels, test_names = _read_folder(path, "test")
        check_same_shape(path, test=images.shape[1:], train=train_images.shape[1:])
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
