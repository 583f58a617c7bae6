"""Test functions for accuracy: the oracle's checks, and a way to include gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.oracle import (
    TOLERANCES,
    Tolerance,
    as_tuple,
    assert_accurate,
    errors,
    unequal_bits,
    without_tf32,
)

__all__ = [
    "TOLERANCES",
    "Tolerance",
    "assert_accurate",
    "errors",
    "unequal_bits",
    "with_gradients",
    "without_tf32",
]

Function = Callable[..., Any]


def with_gradients(function: Function) -> Function:
    """`function`, returning its outputs and the gradients of every floating-point input.

    The incoming gradients are multiples of 1/8 in [-1, 1] from a fixed seed: exact in every dtype,
    so that the truth and the tested function receive the same ones.
    """

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        leaves = [_leaf(value) for value in inputs]
        outputs = as_tuple(function(*leaves))
        generator = torch.Generator().manual_seed(0)
        grad_outputs = [
            (torch.randint(-8, 9, x.shape, generator=generator) / 8).to(x.device, x.dtype)
            for x in outputs
        ]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        with torch.enable_grad():
            grads = torch.autograd.grad(outputs, wanted, grad_outputs)
        return (*(x.detach() for x in outputs), *grads)

    return run


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        return value.requires_grad_() if value.is_floating_point() else value
    return value
