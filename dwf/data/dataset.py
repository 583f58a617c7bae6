"""A data set in memory: images, mostly uint8, labels, statistics, and the cut for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moe_kernels
from dwf.checks import ConfigError, DataError, check_count
from dwf.config import derive_seed

SPLITS = ("train", "test")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Images and labels of one split, in CPU memory.

    Attributes:
        images: [N, C, H, W] uint8; float32 in [0, 1] where 8 bits do not hold the pixels.
        labels: [N] int64, 0 to num_classes - 1.
        mean: of the training images, per channel, in pixel units of [0, 1].
        std: standard deviation, likewise.
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

    def __repr__(self) -> str:
        return (
            f"ImageDataset({self.name} {self.split}, {len(self):,} images "
            f"{list(self.image_shape)}, {self.num_classes} classes)"
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, index: Tensor) -> ImageDataset:
        """Copy the images at these positions, in this order, into a new data set."""
        images, labels = self.images[index], self.labels[index]
        return replace(self, images=images, labels=labels, digest=content_digest(images, labels))


def content_digest(images: Tensor, labels: Tensor) -> str:
    """sha256 over the bytes of contiguous images, then of int64 labels."""
    digest = hashlib.sha256(images.flatten().numpy().data)
    digest.update(labels.numpy().data)
    return digest.hexdigest()


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images [N, C, H, W], in units of [0, 1].

    Exact for uint8: counted in integers. A channel of one color gets deviation 1, so that dividing
    by it is possible.
    """
    channels = images.shape[1]
    if images.is_floating_point():
        of_channel = images.double().transpose(0, 1).reshape(channels, -1)
        deviation = of_channel.std(dim=1, correction=0).tolist()
        return tuple(of_channel.mean(dim=1).tolist()), tuple(value or 1.0 for value in deviation)
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


def check_label_range(labels: Tensor, num_classes: int, what: str) -> None:
    """Require labels [N] from 0 to num_classes - 1; ``what`` names them in the DataError."""
    outside = torch.nonzero((labels < 0) | (labels >= num_classes))[:, 0]
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{what}: {int(labels[first])} at [{first}], expected 0 to {num_classes - 1}; "
            f"{len(outside)} labels are outside"
        )


def check_same_shape(path: Path, *, test: Sequence[int], train: Sequence[int]) -> None:
    """Require test images of the shape [C, H, W] that the training images have."""
    if list(test) != list(train):
        raise DataError(f"{path}: test images are {list(test)}, training images {list(train)}")


@contextmanager
def naming_damage(path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a reader says about a broken file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # which ones a parser raises on random bytes has no list
        raise DataError(f"{path}: damaged, {error or type(error).__name__}; {remedy}") from error
