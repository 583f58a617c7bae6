"""Cut batches on the device from a data set that is there as a whole, mostly as uint8.

There is no worker process and no state: the order of an epoch is a function of (seed, epoch), the
crop and flip of an image of (seed, epoch, sample_index). So any batch of any epoch can be made
directly, on any number of ranks, and a resumed run sees what the uninterrupted one saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

import moe_kernels
from dwf.checks import ConfigError, check_count
from dwf.config import derive_seed
from dwf.data.augment import NUM_DRAWS, VARIATIONS, cutmix
from dwf.data.dataset import ImageDataset


class Rows(NamedTuple):
    """Rows of a data set on one device, unchanged.

    ``images`` [B, C, H, W] float32 in [0, 1]; ``labels`` [B] int64; ``sample_index`` [B] int64, the
    places of the images in the data set.
    """

    images: Tensor
    labels: Tensor
    sample_index: Tensor


class Batch(NamedTuple):
    """Rows of a data set to train on: as `Rows`, but varied.

    ``targets`` [B, K] float32: the share of each class, where labels are smoothed or images mixed;
    else None. Attacks and accuracies know ``labels`` only.
    """

    images: Tensor
    labels: Tensor
    sample_index: Tensor
    targets: Tensor | None = None

    @property
    def wanted(self) -> Tensor:
        """What losses compare logits with: targets [B, K] if there are some, else labels [B]."""
        return self.labels if self.targets is None else self.targets

    def rows(self, choose: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of the rows that ``choose`` takes of each tensor."""
        targets = None if self.targets is None else choose(self.targets)
        return Batch(choose(self.images), choose(self.labels), choose(self.sample_index), targets)

    def repeated(self, times: int) -> Batch:
        """All rows ``times`` times over, block after block: [times * B]."""
        return self.rows(lambda part: torch.cat([part] * times))

    def split(self, parts: int) -> list[Batch]:
        """The rows in ``parts`` blocks, as equal as B allows."""
        count = len(self.images)
        size = -(-count // parts)
        return [self.rows(itemgetter(slice(i, i + size))) for i in range(0, count, size)]

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """The rows of several batches, one after another."""
        targets = [batch.targets for batch in batches if batch.targets is not None]
        return Batch(
            torch.cat([batch.images for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            torch.cat([batch.sample_index for batch in batches]),
            torch.cat(targets) if targets else None,
        )


def classes_of(wanted: Tensor) -> Tensor:
    """The class of each row [B] of what a loss compares with: [B] classes, or [B, K] shares."""
    return wanted if wanted.ndim == 1 else wanted.argmax(dim=1)


class Batches:
    """Shuffled, augmented training batches.

    images are [B, C, H, W] float32 in [0, 1], labels and sample_index (the place in the data set)
    [B] int64, all on ``device``. The last, incomplete batch of an epoch is dropped. Extra images
    lie evenly among the data set's in each batch, and are counted after them.

    Args:
        batch_size: images of the whole batch, over all ranks.
        crop_padding: zero pixels added on each side before a random crop to the old size.
        flip: mirror a random half of the images left to right.
        rank: of this process, which gets rows [rank * b / W, (rank + 1) * b / W) of each part.
        world_size: W, the number of processes; the whole batch does not depend on it.
        num_parts: equal parts of b rows, in which a batch is cut; they come one after another.
        label_smoothing: share of the targets that goes to all classes alike; with 0 there are none.
        augment, cutmix: as of `dwf.config.DataConfig`.
        extra: further images of the same shape and classes, of which each batch has the share
            ``extra_fraction``.

    Raises:
        ConfigError: if the batch is larger than the data set, or does not divide over the ranks;
            if an image could be cropped to nothing but padding.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int,
        crop_padding: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_parts: int = 1,
        label_smoothing: float = 0.0,
        augment: str = "none",
        cutmix: float = 0.0,
        extra: ImageDataset | None = None,
        extra_fraction: float = 0.0,
    ) -> None:
        check_count(batch_size, "batch_size")
        check_count(crop_padding, "crop_padding", minimum=0)
        check_count(world_size, "world_size")
        check_count(rank, "rank", minimum=0)
        if rank >= world_size:
            raise ConfigError(f"rank: {rank} is not possible with world_size {world_size}")
        check_count(num_parts, "num_parts")
        share = world_size * num_parts
        if batch_size % share:
            parts = f" and {num_parts} parts" if num_parts > 1 else ""
            raise ConfigError(
                f"batch_size: {batch_size} does not divide over world_size {world_size}{parts}; "
                f"the nearest that does is {max(1, round(batch_size / share)) * share}"
            )
        if crop_padding > max(dataset.images.shape[2:]):
            raise ConfigError(
                f"crop_padding: {crop_padding} is more than the images' "
                f"{max(dataset.images.shape[2:])} pixels"
            )
        if batch_size > len(dataset):
            raise ConfigError(
                f"batch_size: {batch_size} is larger than the {len(dataset)} images of "
                f"{dataset.name} {dataset.split}"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = len(dataset) // batch_size
        self._parts = [_Part(dataset.images.to(device), dataset.labels.to(device), "order")]
        self._counts = [batch_size]
        if extra is not None:
            count = round(extra_fraction * batch_size)
            _check_extra(dataset, extra, count, batch_size)
            self._parts.append(_Part(extra.images.to(device), extra.labels.to(device), "extra"))
            self._counts = [batch_size - count, count]
        # evenly, so that each part of a batch and each process has its share of both
        places = torch.cat([(torch.arange(count) + 0.5) / count for count in self._counts])
        self._spread = places.argsort(stable=True).to(device)
        self._seed = seed
        self._crop_padding = crop_padding
        self._flip = flip
        self._label_smoothing = label_smoothing
        self._augment = augment
        self._cutmix = cutmix
        self._num_classes = dataset.num_classes
        # of every part the same share: each part is what one process would make of it
        of_parts = torch.arange(batch_size).view(num_parts, world_size, -1)
        self._rows = of_parts[:, rank].flatten().to(device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Make the batches of an epoch, from step ``start`` on."""
        for step in range(start, self.steps_per_epoch):
            yield self.batch(epoch, step)

    def batch(self, epoch: int, step: int) -> Batch:
        """Make one batch of one epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step}: an epoch has steps 0 to {self.steps_per_epoch - 1}")
        index = torch.cat(
            [
                part.order(self._seed, epoch, step * count, count) + first
                for part, count, first in zip(self._parts, self._counts, self._firsts, strict=True)
            ]
        )[self._spread]
        images, labels = self._varied(epoch, index[self._rows])
        targets = None
        if self._label_smoothing or self._cutmix:
            targets = smoothed(labels, self._num_classes, self._label_smoothing)
        if self._cutmix and targets is not None:
            partners = index.roll(-1)[self._rows]  # the next row of the whole batch
            theirs, their_labels = self._varied(epoch, partners)
            noise = self._noise("cutmix", epoch, index[self._rows], 4)
            mixed, kept = cutmix(images, theirs, noise)
            chosen = noise[:, 3] < self._cutmix
            images = torch.where(chosen.view(-1, 1, 1, 1), mixed, images)
            kept = torch.where(chosen, kept, 1.0).unsqueeze(1)
            other = smoothed(their_labels, self._num_classes, self._label_smoothing)
            targets = kept * targets + (1 - kept) * other
            labels = targets.argmax(dim=1)
        return Batch(images, labels, index[self._rows], targets)

    @property
    def _firsts(self) -> list[int]:
        """Of each part, the index of its first image."""
        return [0, len(self._parts[0].labels)][: len(self._parts)]

    def _varied(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] at these places, varied, and their labels [B]."""
        images, labels = self._parts[0].images, self._parts[0].labels
        if len(self._parts) == 1:
            images, labels = images[index], labels[index]
        else:
            own, extra = index < len(labels), self._parts[1]
            here, there = index.clamp(max=len(labels) - 1), (index - len(labels)).clamp(min=0)
            chosen = own.view(-1, 1, 1, 1)
            images = torch.where(chosen, images[here], extra.images[there])
            labels = torch.where(own, labels[here], extra.labels[there])
        if self._crop_padding or self._flip:
            noise = self._noise("augment", epoch, index, 3)
            images = crop_and_flip(images, noise, self._crop_padding, self._flip)
        images = to_unit_range(images)
        if self._augment != "none":
            images = VARIATIONS[self._augment](
                images, self._noise(self._augment, epoch, index, NUM_DRAWS)
            )
        return images, labels

    def _noise(self, name: str, epoch: int, index: Tensor, count: int) -> Tensor:
        """``count`` numbers in [0, 1) for each image."""
        seed = derive_seed(self._seed, name, epoch)
        return moe_kernels.uniform_noise(seed, index, (count,), device=index.device)


class _Part:
    """A source of a batch's images, and their order in each epoch."""

    def __init__(self, images: Tensor, labels: Tensor, name: str) -> None:
        self.images, self.labels, self._name = images, labels, name
        self._order = (-1, torch.empty(0, dtype=torch.int64))  # the permutation made last

    def order(self, seed: int, epoch: int, start: int, count: int) -> Tensor:
        """The places of ``count`` images of an epoch from ``start`` on.

        A set that is used up before the epoch is over goes on with another permutation.
        """
        size, found = len(self.labels), []
        while count:
            again, place = divmod(start, size)
            piece = self._permutation(seed, epoch, again)[place : place + count]
            found.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(found)

    def _permutation(self, seed: int, epoch: int, again: int) -> Tensor:
        names = (self._name, epoch, again) if again else (self._name, epoch)
        seed = derive_seed(seed, *names)
        if self._order[0] != seed:
            # on the CPU, because each device has a generator of its own
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.labels), generator=generator)
            self._order = (seed, order.to(self.labels.device))
        return self._order[1]


def _check_extra(dataset: ImageDataset, extra: ImageDataset, count: int, batch_size: int) -> None:
    """Require extra images that fit the data set, and rows of both in each batch: ConfigError."""
    if extra.image_shape != dataset.image_shape or extra.num_classes > dataset.num_classes:
        raise ConfigError(
            f"data.extra: {extra.name} has images {list(extra.image_shape)} and "
            f"{extra.num_classes} classes, {dataset.name} {list(dataset.image_shape)} and "
            f"{dataset.num_classes}"
        )
    if extra.images.dtype != dataset.images.dtype:
        raise ConfigError(
            f"data.extra: {extra.name} has pixels of {extra.images.dtype}, {dataset.name} of "
            f"{dataset.images.dtype}"
        )
    if not 0 < count < batch_size:
        raise ConfigError(
            f"data.extra_fraction: {count} of {batch_size} images of a batch, expected some of both"
        )


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Shares of the classes [B, K]: 1 - s of the label, and s / K of every class.

    Source: Szegedy et al., arXiv:1512.00567.
    """
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


def crop_and_flip(images: Tensor, noise: Tensor, crop_padding: int, flip: bool) -> Tensor:
    """Shift every image by up to ``crop_padding`` pixels over zeros, then mirror half of them.

    Args:
        images: [B, C, H, W], any dtype.
        noise: [B, 3] in [0, 1): decides on the rows, the columns and the mirroring.
    """
    B, C, H, W = images.shape
    device = images.device
    # the product can round up to the number of places, one more than the last
    offset = (noise[:, :2] * (2 * crop_padding + 1)).long().clamp(max=2 * crop_padding)  # [B, 2]
    columns = torch.arange(W, device=device).expand(B, W)
    if flip:
        columns = torch.where(noise[:, 2:] < 0.5, columns.flip(1), columns)
    rows = offset[:, :1] + torch.arange(H, device=device)  # [B, H]
    columns = offset[:, 1:] + columns  # [B, W]
    padded = torch.nn.functional.pad(images, [crop_padding] * 4)
    b = torch.arange(B, device=device)[:, None, None, None]
    c = torch.arange(C, device=device)[:, None, None]
    return padded[b, c, rows[:, None, :, None], columns[:, None, None, :]]


def to_unit_range(images: Tensor) -> Tensor:
    """Turn 8-bit pixels into float32 in [0, 1], to equal bits on every device; keep float32."""
    if images.is_floating_point():
        return images
    # CUDA multiplies by the reciprocal of a Python number, but truly divides by a tensor of its own
    return images.float() / torch.full((), 255.0, device=images.device)


def evaluation_batches(
    dataset: ImageDataset, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[Rows]:
    """Make batches (images, labels, sample_index) of all images, in order and unchanged.

    As in ``Batches``, but the last batch may be smaller.
    """
    check_count(batch_size, "batch_size")
    for start in range(0, len(dataset), batch_size):
        places = torch.arange(start, min(start + batch_size, len(dataset)))
        yield batch_at(dataset, places, device)


def at_equal_distances(num_images: int, count: int) -> Tensor:
    """Indices [count] of images at equal distances, so that all classes of a sorted set occur.

    All indices if the data set has no more than ``count`` images.
    """
    count = min(count, num_images)
    return torch.arange(count) * num_images // count


def batch_at(dataset: ImageDataset, places: Tensor, device: torch.device | str = "cpu") -> Rows:
    """The batch of the images at these places [B] of the data set, unchanged."""
    images = to_unit_range(dataset.images[places].to(device))
    return Rows(images, dataset.labels[places].to(device), places.to(device))
