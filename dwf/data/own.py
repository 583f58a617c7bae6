"""Make a data set of what a user has: tensors, arrays, loaders, data sets of torch, or a name.

    as_dataset((images, labels))
    as_dataset(torch.utils.data.DataLoader(...))
    as_dataset(torchvision.datasets.CIFAR10(root, train=False, transform=ToTensor()))
    as_dataset("digits")

Images are put into memory. They are kept to the bit: as uint8 where every pixel is a multiple of
1/255, which is what `ToTensor` makes of a file, else as float32.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dwf.checks import DataError, ImageTypeError, PixelRangeError, check_images, check_labels
from dwf.data.dataset import ImageDataset, channel_statistics, content_digest
from dwf.data.folder import pixels_of
from dwf.data.sources import load

_EXPECTED = (
    "expected an ImageDataset, a pair (images, labels) of tensors or arrays, a DataLoader or "
    "Dataset of such pairs, the name of a data set, or the path of a folder or .npz file"
)


def as_dataset(
    data: Any, *, name: str = "own data", split: str = "test", limit: int | None = None
) -> ImageDataset:
    """A data set in memory of anything that gives images and labels.

    Args:
        data: a pair of images [N, C, H, W] (also [N, H, W, C] with 1 or 3 channels, or [N, H, W])
            and labels [N]; a loader, or any iterable, of such pairs; a data set of torch or
            torchvision, whose items are pairs of an image, or a PIL image, and a label; a name or
            path, as for `load`; an ImageDataset, which comes back as it is.
        name: of the data set, in tables.
        split: "train" or "test", of a name or path; what the data are called otherwise.
        limit: at most so many images, the first ones; the others are not read.
    Returns:
        The data set. A loader that shuffles is read in an order that is the same every time, and
        the caller's random states are as before.
    Raises:
        DataError: something else, or no images; the message lists what is possible.
        ImageTypeError, ImageError, PixelRangeError, LabelError: of the images and labels.
    """
    if isinstance(data, ImageDataset):
        return data
    if isinstance(data, str | os.PathLike):
        return load(data, split=split)
    classes = _class_names(data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        images, labels = _gathered(data, limit)
    images, labels = _as_pixels(images), check_labels(labels, len(images))
    if int(labels.min()) < 0:
        check_labels(labels, len(images), int(labels.max()) + 1)
    count = int(labels.max()) + 1
    if len(classes) < count:
        classes = tuple(str(k) for k in range(count))
    mean, std = channel_statistics(images)
    return ImageDataset(
        name=name if not isinstance(data, Dataset) else type(data).__name__,
        images=images,
        labels=labels,
        num_classes=len(classes),
        class_names=classes,
        mean=mean,
        std=std,
        digest=content_digest(images, labels),
        split=split,
    )


def _class_names(data: Any) -> tuple[str, ...]:
    """The names of the classes, if a data set inside a loader or subset has some."""
    for _ in range(8):  # a loader of a subset of a subset
        names = getattr(data, "classes", None)
        if isinstance(names, list | tuple):
            return tuple(map(str, names))
        if not hasattr(data, "dataset"):
            break
        data = data.dataset
    return ()


def _gathered(data: Any, limit: int | None) -> tuple[Tensor, Tensor]:
    """All images and labels, one after the other, or the first ``limit`` of them."""
    if _is_pair(data):
        images, labels = (_as_tensor(part) for part in data)
        if len(images) != len(labels):
            raise DataError(f"dataset: {len(images)} images, but {len(labels)} labels")
    else:
        parts: list[tuple[Tensor, Tensor]] = []
        count = 0
        for part in _batches(data):
            parts.append(part)
            count += len(part[0])
            if limit is not None and count >= limit:
                break
        if not parts:
            raise DataError("dataset: it gives no images")
        shapes = {tuple(images.shape[1:]) for images, _ in parts}
        if len(shapes) > 1:
            raise DataError(
                f"dataset: images of different shapes, {sorted(shapes)[:3]}; resize or crop them "
                "to one"
            )
        images = torch.cat([images for images, _ in parts])
        labels = torch.cat([labels for _, labels in parts])
    if limit is not None:
        images, labels = images[:limit], labels[:limit]
    if len(images) == 0:
        raise DataError("dataset: it holds no images")
    return images, labels


def _is_pair(data: Any) -> bool:
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    images, labels = data
    return isinstance(images, Tensor | np.ndarray) and isinstance(
        labels, Tensor | np.ndarray | list
    )


def _batches(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a batch of images and a batch of labels."""
    if isinstance(data, Dataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items: Iterable[Any] = (data[i] for i in range(len(data)))
        for first, second in map(_pair, items):
            yield _as_tensor(first).unsqueeze(0), _as_tensor(second).reshape(1)
        return
    if not isinstance(data, DataLoader | Dataset | Iterable) or isinstance(data, dict | Tensor):
        raise DataError(f"dataset: found {type(data).__name__}; {_EXPECTED}")
    batches = iter(data)
    first_of_all = next(batches, None)
    if first_of_all is None:
        return
    for item in itertools.chain([first_of_all], batches):
        images, labels = map(_as_tensor, _pair(item))
        if labels.ndim == 0:  # an iterable of single images
            images, labels = images.unsqueeze(0), labels.reshape(1)
        yield images, labels


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    found = sorted(item) if isinstance(item, dict) else type(item).__name__
    raise DataError(f"dataset: expected pairs (images, labels), found {found}; {_EXPECTED}")


def _as_tensor(part: Any) -> Tensor:
    """A tensor on the CPU; of a PIL image [C, H, W] uint8."""
    if isinstance(part, Tensor):
        return part.detach().cpu()
    if hasattr(part, "getbands"):  # a PIL image
        if part.mode == "L":  # gray stays one channel, as `ToTensor` has it
            return torch.from_numpy(np.array(part)).unsqueeze(0)
        return torch.from_numpy(pixels_of(part).transpose(2, 0, 1).copy())
    try:
        return torch.as_tensor(np.asarray(part))
    except (TypeError, ValueError) as error:
        raise DataError(f"dataset: found {type(part).__name__}; {_EXPECTED}") from error


def _as_pixels(images: Tensor) -> Tensor:
    """Images [N, C, H, W], contiguous: uint8 where that changes no pixel, else float32."""
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.dtype == torch.uint8 and images.ndim == 4:
        return images.contiguous()
    if not images.is_floating_point():
        raise ImageTypeError(
            f"images: expected uint8 in 0 to 255 or floats in [0, 1], found {images.dtype}"
        )
    images = images.float().contiguous()
    try:
        check_images(images)
    except PixelRangeError as error:
        raise PixelRangeError(
            f"{error}. If your transform normalizes, leave that out: dwf.as_pixel_model(network, "
            "mean, std) puts it into the model"
        ) from error
    levels = (images * 255).round()
    if bool((levels / 255 == images).all()):
        return levels.to(torch.uint8)
    return images
