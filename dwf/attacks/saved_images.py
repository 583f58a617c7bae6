"""Save adversarial images to a file, and load them again."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dwf.checks import CheckpointError, check_image_tensor, check_labels
from dwf.files import atomic_write_bytes


def save_images(path: str | Path, images: Tensor, labels: Tensor, *, made_by: str = "") -> None:
    """Write images [N, C, H, W] and labels [N] to a safetensors file, atomically.

    Images keep their dtype and every bit; ``made_by`` goes into the file's metadata.

    Raises:
        ImageTypeError, ImageError, LabelError: not images with their labels.
        CheckpointError: the file cannot be written.
    """
    check_image_tensor(images)
    tensors = {"images": images, "labels": check_labels(labels, len(images))}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    atomic_write_bytes(Path(path), to_safetensors(tensors, {"made_by": made_by}))


def load_images(path: str | Path) -> tuple[Tensor, Tensor]:
    """The images [N, C, H, W] and labels [N] that :func:`save_images` wrote.

    Raises:
        CheckpointError: no such file, or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not saved adversarial images, {error}") from error
