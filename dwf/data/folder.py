"""Read a user's own data from image folders, ``train/<class>/`` and ``test/<class>/``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

# Files that are taken for images, as in torchvision.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def folder_splits(path: Path) -> tuple[str, ...]:
    """The splits of a folder: both, or "train" alone."""
    return SPLITS if (path / "test").is_dir() else SPLITS[:1]


def load_folder(path: Path, split: str) -> ImageDataset:
    """Read one split of a folder; images become 8-bit RGB.

    Hidden files and folders, whose names begin with a dot, are no data.

    Raises:
        DataError: a folder or class is missing, an image is broken, of another size, or of floats
            or 32-bit integers.
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
    folder = path / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: not found; expected image folders {split}/<class>/, one per class"
        )
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and _is_data(entry.name)
    )
    if not classes:
        raise DataError(f"{folder}: no class folders in it; expected {split}/<class>/")
    files, labels = [], []
    for k, name in enumerate(classes):
        found = list(_image_files(folder / name))
        if not found:
            raise DataError(
                f"{folder / name}: no images in it; known are files {', '.join(SUFFIXES)}"
            )
        files += found
        labels += [k] * len(found)
    images: Pixels = np.empty(0, dtype=np.uint8)
    for i, file in enumerate(files):
        pixels = _read_image(file)
        if i == 0:
            images = np.empty((len(files), 3, *pixels.shape[:2]), dtype=np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            raise DataError(
                f"{file}: {pixels.shape[0]}x{pixels.shape[1]} pixels, expected "
                f"{images.shape[2]}x{images.shape[3]} as in {files[0]}"
            )
        images[i] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64), tuple(classes)


def _is_data(name: str) -> bool:
    """Whether a file or folder is meant as data: notebooks and systems leave hidden ones behind."""
    return not name.startswith(".") and name != "__MACOSX"


def _image_files(folder: Path) -> Iterator[Path]:
    """The images in a class folder and below it, in the order of torchvision's ImageFolder."""
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        if all(_is_data(part) for part in Path(root).relative_to(folder).parts):
            for name in sorted(names):
                if Path(name).suffix.lower() in SUFFIXES and _is_data(name):
                    yield Path(root, name)


def _read_image(file: Path) -> Pixels:
    """The pixels of a file, [H, W, 3]; DataError if they cannot be read as 8-bit RGB."""
    from PIL import Image

    if not file.is_file():  # a pipe would wait for ever
        raise DataError(f"{file}: not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return pixels_of(image)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except Exception as error:  # whatever Pillow's readers raise on a broken file
        raise DataError(f"{file}: not a readable image, {error}") from error


def pixels_of(image: Any) -> Pixels:
    """A PIL image as RGB, uint8 [H, W, 3]. Pixels of 16 bits are rounded to 8.

    Raises:
        DataError: pixels of floats or of 32 bits, whose range nobody can know.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.int64)
        gray = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise DataError(
            f"pixels are {kind}, whose range is not known; save 8-bit or 16-bit images, or put "
            "uint8 arrays into an .npz file"
        )
    pixels: Pixels = np.asarray(image.convert("RGB"))
    return pixels
