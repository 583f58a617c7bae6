"""Judge how accurate a function is, against float64 and against plain torch.

Inputs are made once in the tested dtype, and *those* are upcast for the truth. For every element of
every output,

    |actual - truth| <= slack * max|plain - truth| + floor * max|truth|

where `plain` is the reference run in the tested dtype. No tolerance depends on the shape, and no
average hides a bad row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Allowed error: `slack` times plain torch's own, plus `floor` times the largest value."""

    slack: float
    floor: float


TOLERANCES = {
    torch.float64: Tolerance(slack=2, floor=1e-12),
    torch.float32: Tolerance(slack=2, floor=1e-6),
    torch.float16: Tolerance(slack=2, floor=2**-11),
    torch.bfloat16: Tolerance(slack=2, floor=2**-8),
}

Function = Callable[..., Any]


def errors(
    function: Function,
    reference: Function,
    inputs: Sequence[Any],
    tolerance: Tolerance | None = None,
) -> list[str]:
    """Every output of `function` that misses the bound, described in one line each.

    Args:
        function: the tested function; takes `inputs`, returns a tensor or a tuple of tensors.
        reference: the same in plain torch; runs in the tested dtype and in float64.
        inputs: tensors and other values; the narrowest floating dtype among them is the tested one.
        tolerance: instead of the row of TOLERANCES for that dtype.
    """
    tolerance = tolerance or TOLERANCES[_tested_dtype(inputs)]
    with without_tf32():
        actual = as_tuple(function(*inputs))
        plain = as_tuple(reference(*inputs))
        truth = as_tuple(reference(*(_upcast(value) for value in inputs)))
    if not len(actual) == len(plain) == len(truth):
        return [f"{len(actual)} outputs, expected {len(truth)}"]
    messages = (
        _compare(index, *tensors, tolerance)
        for index, tensors in enumerate(zip(actual, plain, truth, strict=True))
    )
    return [message for message in messages if message is not None]


def unequal_bits(function: Function, reference: Function, inputs: Sequence[Any]) -> list[str]:
    """Outputs of `function` that differ in a bit from `reference`, described in one line each."""
    actual, expected = as_tuple(function(*inputs)), as_tuple(reference(*inputs))
    messages = []
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            messages.append(f"output {index}: {_describe(ours)}, expected {_describe(theirs)}")
            continue
        # NaN is equal to NaN here, whatever its payload.
        different = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
        different |= ours.signbit() != theirs.signbit()
        if different.any():
            first = tuple(different.nonzero()[0].tolist())
            messages.append(
                f"output {index}: {int(different.sum())} of {different.numel()} elements differ, "
                f"first at {list(first)}: {ours[first].item()!r}, expected {theirs[first].item()!r}"
            )
    return messages


def assert_accurate(
    function: Function,
    reference: Function,
    inputs: Sequence[Any],
    tolerance: Tolerance | None = None,
) -> None:
    """Raise AssertionError naming every output that misses the bound; arguments as in `errors`."""
    messages = errors(function, reference, inputs, tolerance)
    assert not messages, "; ".join(messages)


def _compare(
    index: int, actual: Tensor, plain: Tensor, truth: Tensor, tolerance: Tolerance
) -> str | None:
    if actual.shape != plain.shape or actual.dtype != plain.dtype or actual.device != plain.device:
        return f"output {index}: {_describe(actual)}, expected {_describe(plain)}"
    if actual.numel() == 0:
        return None
    if not truth.is_floating_point():
        return None if torch.equal(actual, truth) else f"output {index}: integers differ"
    actual, plain = actual.double(), plain.double()
    # Infinities and NaN have no distance: they must be where plain torch, or the truth, has them.
    finite = truth.isfinite() & plain.isfinite()
    same = (actual == plain) | (actual == truth) | (actual.isnan() & plain.isnan())
    slack = torch.where(finite, (plain - truth).abs(), 0).max()
    size = torch.where(finite, truth.abs(), 0).max()
    allowed = tolerance.slack * slack + tolerance.floor * size
    error = (actual - truth).abs()
    bad = torch.where(finite, ~(error <= allowed), ~same)
    if not bad.any():
        return None
    worst = torch.where(bad, error.nan_to_num(torch.inf, torch.inf), -1).argmax()
    where = [int(i) for i in torch.unravel_index(worst, bad.shape)]
    return (
        f"output {index}: {int(bad.sum())} of {bad.numel()} elements are off, worst at {where}: "
        f"{actual.flatten()[worst].item():.9g}, truth {truth.flatten()[worst].item():.9g}, "
        f"allowed error {allowed.item():.3g} (plain torch's own {slack.item():.3g})"
    )


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _tested_dtype(inputs: Sequence[Any]) -> torch.dtype:
    dtypes = [x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a function that returns one tensor or several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


@contextlib.contextmanager
def without_tf32(*, deterministic: bool = True) -> Iterator[None]:
    """Switch TF32 off inside the block, and let cuDNN choose deterministic algorithms.

    Args:
        deterministic: False leaves cuDNN's choice of algorithms to the caller's flags.
    """
    cudnn: Any = torch.backends.cudnn
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    flags = {
        "enabled": deterministic or cudnn.enabled,
        "benchmark": not deterministic and cudnn.benchmark,
        "deterministic": deterministic or cudnn.deterministic,
    }
    try:
        with cudnn.flags(**flags, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def any_algorithm() -> Iterator[None]:
    """Switch torch's deterministic mode off inside the block: some operations would raise in it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
