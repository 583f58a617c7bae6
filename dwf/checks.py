"""Check the arguments of public functions, and define the errors that say what was wrong.

Every check reads its tensor once, before any work starts, and changes nothing. Messages name the
tensor, the first offending index, what was found and what is expected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")
# Pixels this far outside [0, 1] were inside before some arithmetic, such as normalizing and back.
_ROUNDING = 1e-5


class DwfError(Exception):
    """Base of every error that dwf raises on purpose."""


class ConfigError(DwfError, ValueError):
    """A setting is unknown, of the wrong type, impossible, or contradicts another."""


class ImageTypeError(DwfError, TypeError):
    """Images are not a float tensor."""


class ImageError(DwfError, ValueError):
    """Images have the wrong shape or live on the wrong device."""


class PixelRangeError(DwfError, ValueError):
    """A pixel is NaN, infinite or outside [0, 1]."""


class LabelError(DwfError, ValueError):
    """Labels are not integers, have the wrong shape, or name a class that does not exist."""


class ModelOutputError(DwfError, ValueError):
    """The model did not return logits [B, K]."""


class ModelError(DwfError, RuntimeError):
    """The model raised an error; the message names the model, the error and the images."""


class DataError(DwfError, OSError):
    """A data set is missing, damaged, or not what its name promises."""


class CheckpointError(DwfError, OSError):
    """A checkpoint or run folder is missing, damaged, or belongs to something else."""


def first_index(mask: Tensor) -> list[int]:
    """Index of the first true element of a mask, in row-major order."""
    flat = int(mask.flatten().to(torch.uint8).argmax())
    return [int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape)]


def check_image_tensor(images: object, name: str = "images") -> Tensor:
    """Require a float tensor [B, C, H, W] without looking at its values; return it."""
    if not isinstance(images, Tensor):
        raise ImageTypeError(f"{name}: expected a torch.Tensor, found {type(images).__name__}")
    if not images.is_floating_point():
        raise ImageTypeError(
            f"{name}: expected float values in [0, 1], found {images.dtype}; "
            f"pass {name}.float() / 255 if these are 8-bit pixels"
        )
    if images.ndim != 4:
        raise ImageError(f"{name}: expected shape [B, C, H, W], found {list(images.shape)}")
    return images


def check_images(images: object, name: str = "images") -> Tensor:
    """Require float images [B, C, H, W] with every pixel in [0, 1]; return them."""
    tensor = check_image_tensor(images, name)
    if tensor.numel() == 0:
        return tensor
    low, high = (float(v) for v in torch.aminmax(tensor.detach()))
    if low >= 0.0 and high <= 1.0:  # false for NaN
        return tensor
    # written so that NaN counts as outside
    outside = ~((tensor >= 0) & (tensor <= 1))
    index = first_index(outside)
    raise PixelRangeError(
        f"{name}: {float(tensor[tuple(index)]):.6g} at {index}, expected [0, 1]; "
        f"{int(outside.sum())} of {tensor.numel()} values are outside "
        f"(min {low:.6g}, max {high:.6g})" + _advice(low, high)
    )


def _advice(low: float, high: float) -> str:
    """What to do about pixels from ``low`` to ``high``, if that is plain to see."""
    if 2 < high <= 255 and low >= 0:
        return "; divide 8-bit pixels by 255"
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return "; by no more than rounding: pass images.clamp(0, 1)"
    return ""


def check_labels(
    labels: object, num_images: int, num_classes: int | None = None, name: str = "labels"
) -> Tensor:
    """Require integer labels [B] in [0, num_classes); return them as int64."""
    if not isinstance(labels, Tensor):
        raise LabelError(f"{name}: expected a torch.Tensor, found {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LabelError(f"{name}: expected integers, found {labels.dtype}")
    if list(labels.shape) != [num_images]:
        raise LabelError(
            f"{name}: expected shape [{num_images}], one per image, found {list(labels.shape)}"
        )
    labels = labels.long()
    if num_classes is not None and num_images > 0:
        outside = (labels < 0) | (labels >= num_classes)
        if bool(outside.any()):
            index = first_index(outside)
            raise LabelError(
                f"{name}: {int(labels[tuple(index)])} at {index}, "
                f"expected 0 to {num_classes - 1}; {int(outside.sum())} labels are outside"
            )
    return labels


def check_logits(logits: object, num_images: int, *, allow_probabilities: bool = False) -> Tensor:
    """Require logits [B, K]: not a tuple, not another shape, and not probabilities.

    If all rows lie in [0, 1] and sum to 1, they are probabilities: their cross-entropy saturates,
    and attacks look weaker than they are. ``allow_probabilities`` accepts them all the same.
    """
    if not isinstance(logits, Tensor):
        raise ModelOutputError(
            f"model output: expected a tensor of logits [B, K], found {type(logits).__name__}"
        )
    if logits.ndim != 2 or logits.shape[0] != num_images:
        raise ModelOutputError(
            f"model output: expected logits [{num_images}, K], found {list(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise ModelOutputError(f"model output: expected float logits, found {logits.dtype}")
    if logits.shape[1] == 1:
        raise ModelOutputError(
            "model output: one logit per image; for two classes return two, "
            "torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    if not allow_probabilities and logits.numel() > 0 and logits.shape[1] > 1:
        rows = logits.detach().float()
        if bool(((rows >= 0) & (rows <= 1)).all()) and bool(
            ((rows.sum(dim=1) - 1).abs() <= 1e-4).all()
        ):
            raise ModelOutputError(
                "model output: every row lies in [0, 1] and sums to 1, so these are probabilities; "
                "return logits (drop the softmax), or pass allow_probabilities=True"
            )
    return logits


def check_same_device(images: Tensor, labels: Tensor, model: object) -> None:
    """Require images, labels and the model's parameters on one device; name all three if not."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    home = images.device if parameter is None else parameter.device
    if not images.device == labels.device == home:
        raise ImageError(
            f"devices differ: images on {images.device}, labels on {labels.device}, "
            f"model on {home}; move all three to one device"
        )


def check_positive(value: T, name: str, *, zero_allowed: bool = False) -> T:
    """Require a finite positive number, or a tensor of them; return it, numpy's as Python's."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name}: {value!r} is not a number") from error
    ok = torch.isfinite(tensor) & ((tensor >= 0) if zero_allowed else (tensor > 0))
    if not bool(ok.all()):
        kind = "zero or more" if zero_allowed else "more than zero"
        shown = value if tensor.ndim == 0 else float(tensor.flatten()[~ok.flatten()][0])
        raise ConfigError(f"{name}: {shown} is not possible, expected a finite number, {kind}")
    number: T = plain(value)
    return number


def check_epsilon(epsilon: float | Tensor, name: str = "epsilon") -> None:
    """Require a radius in pixel units of [0, 1]: 8/255, not 8."""
    check_positive(epsilon, name, zero_allowed=True)
    largest = float(torch.as_tensor(epsilon).max()) if torch.as_tensor(epsilon).numel() else 0.0
    if largest > 1.0:
        raise ConfigError(
            f"{name}: {largest:g} is larger than the whole pixel range [0, 1]; "
            f"did you mean {largest:g}/255 = {largest / 255:.4g}?"
        )


def check_radius(
    epsilon: float | Tensor, norm: str, image_shape: Sequence[int], name: str = "epsilon"
) -> None:
    """Require a radius that means something for images [C, H, W] in [0, 1].

    In L-inf up to 1, the whole range; in L2 up to the distance of a black from a white image.
    """
    if norm == "linf":
        check_epsilon(epsilon, name)
        return
    check_positive(epsilon, name, zero_allowed=True)
    radii = torch.as_tensor(epsilon)
    largest = float(radii.max()) if radii.numel() else 0.0
    diameter = math.sqrt(math.prod(image_shape))
    if largest > max(diameter, 1.0) * (1 + 1e-6):  # the diameter may be rounded up
        raise ConfigError(
            f"{name}: {largest:g} is larger than the L2 diameter {diameter:.4g} of images "
            f"{list(image_shape)} in [0, 1]; did you mean {largest / 255:.4g}, in pixel units?"
        )


def check_count(value: int, name: str, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Require an integer from ``minimum`` to ``maximum``, also numpy's; return it as Python's."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
        raise ConfigError(f"{name}: {value!r} is not possible, expected an integer >= {minimum}")
    if maximum is not None and number > maximum:
        raise ConfigError(f"{name}: {value!s:.20} is not possible, expected at most {maximum:,}")
    return number


def check_seed(seed: int, name: str = "seed") -> int:
    """Require an integer, Python's or numpy's; return it as Python's."""
    number = plain(seed)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigError(f"{name}: {seed!r} is not possible, expected an integer")
    return number


def check_targets(targets: object, labels: Tensor) -> Tensor:
    """Require classes [B] to be reached, none of them the label [B]; return them as int64.

    How many classes there are is not known yet. Comparing waits for the labels' device.
    """
    found = check_labels(targets, len(labels), name="targets").to(labels.device)
    same = found == labels
    if bool(same.any()):
        index = first_index(same)
        raise LabelError(
            f"targets: {int(found[tuple(index)])} at {index} is the label itself, expected another "
            f"class; {int(same.sum())} of {len(found)} are. Without targets, an attack seeks any "
            "wrong class"
        )
    return found


def plain(value: Any) -> Any:
    """A number of numpy, or a tensor on the CPU that holds one number, as a Python number.

    Also inside a tuple. Everything else is returned as it is.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu":
        return value.item()
    if type(value) is tuple:
        return tuple(map(plain, value))
    return value


def make_plain(settings: Any) -> None:
    """Turn the fields of a dataclass that hold a number of numpy into Python numbers, in place."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        number = plain(value)
        if number is not value:
            object.__setattr__(settings, entry.name, number)  # it may be frozen


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    """Require one of the listed words; suggest the nearest one."""
    if value not in choices:
        from difflib import get_close_matches

        near = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: {value!r} is unknown, expected one of {list(choices)}{hint}")
