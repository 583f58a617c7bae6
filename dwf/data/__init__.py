"""Data sets in memory, and batches of them cut on the training device."""

from dwf.data.batches import Batch, Batches, classes_of, evaluation_batches
from dwf.data.dataset import ImageDataset, split_validation
from dwf.data.download import check, get, listing
from dwf.data.own import as_dataset
from dwf.data.sources import load

__all__ = [
    "Batch",
    "Batches",
    "ImageDataset",
    "as_dataset",
    "check",
    "classes_of",
    "evaluation_batches",
    "get",
    "listing",
    "load",
    "split_validation",
]
