"""Check the arguments of ops: shapes, devices, dtypes; and compute the sizes that follow."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(spec: str, *tensors: Tensor | None, **known: int) -> dict[str, int]:
    """Check tensors against a spec such as "gate_logits [B, E], expert_logits [E, B, K]".

    Every axis letter must have one size, a known one where it is given; "..." stands for any
    further axes, and all tensors must be on one device. One that is None is left out. Returns the
    sizes by letter.

    Raises:
        TypeError: for something that is not a tensor.
        ValueError: naming the tensor, what was found and what was expected.
    """
    sizes = dict(known)
    device = None
    for (name, axes), tensor in zip(_parsed(spec), tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(
                f"{name}: expected on {device} like the rest, found on {tensor.device}"
            )
        open_ended = axes[-1] == "..."
        letters = axes[:-1] if open_ended else axes
        shape = tensor.shape
        fits = len(shape) >= len(letters) if open_ended else len(shape) == len(letters)
        for letter, size in zip(letters, shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            expected = ", ".join(f"{x}={sizes[x]}" if x in sizes else x for x in axes)
            raise ValueError(f"{name}: expected shape [{expected}], found {list(shape)}")
    return sizes


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError naming the first of these tensors that is not of a real floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, found {tensor.dtype}")


def check_integers(**tensors: Tensor) -> None:
    """Raise TypeError naming the first of these tensors that is not of an integer dtype."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
            raise TypeError(f"{name}: expected an integer dtype, found {tensor.dtype}")


def num_outputs(size: int, taps: int, stride: int, padding: int) -> int:
    """Pixels along one axis that a convolution or pooling makes of `size` pixels."""
    return (size + 2 * padding - taps) // stride + 1


_parsed_specs: dict[str, list[tuple[str, list[str]]]] = {}


def _parsed(spec: str) -> list[tuple[str, list[str]]]:
    """Names and axes of a spec."""
    # Not functools.lru_cache: torch.compile traces through here and warns about it.
    if spec not in _parsed_specs:
        parts = (part.partition(" [") for part in spec.rstrip("]").split("], "))
        _parsed_specs[spec] = [(name, axes.split(", ")) for name, _, axes in parts]
    return _parsed_specs[spec]
