"""Find images of one data set in another, pixel by pixel."""

from __future__ import annotations

import hashlib

import torch

from dwf.data import ImageDataset
from dwf.evaluation.measures import Seen, seen


def twins(dataset: ImageDataset, training: ImageDataset) -> Seen:
    """The images of ``dataset`` that ``training`` holds as well; none if their shapes differ.

    Equal are images that round to the same 8-bit pixels.
    """
    if dataset.image_shape != training.image_shape:
        return Seen(0, len(dataset))
    known = set(_digests(training))
    return seen(torch.tensor([digest in known for digest in _digests(dataset)], dtype=torch.bool))


def _digests(dataset: ImageDataset) -> list[bytes]:
    images = dataset.images
    if images.dtype != torch.uint8:
        images = (images * 255).round().to(torch.uint8)
    rows = images.flatten(1).cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
