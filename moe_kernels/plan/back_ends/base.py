"""The interface of a back end: single layers, forward and backward, in a layout it chooses.

Which layer comes when (program.py) and where gradients meet (backward.py) is the plan's part.

A value is whatever the back end's methods return; the plan only passes it on. Gradients of a value
look like the value. A gradient is *finished* when all consumers of the value have contributed and,
if a ReLU made the value, it is zero where the value is not positive. Layers receive finished ones.

Axes: G networks that run together, B images, C H W, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels.plan.back_ends import elementwise
from moe_kernels.plan.layers import Conv, Head, Join, Layer, Pointwise, Pool

Value = Any


@dataclass(frozen=True, repr=False)
class Weights:
    """Float32 parameters of one layer of G networks, with BatchNorm folded in.

    Attributes:
        weight: [G, O, C / groups, R, S] of a Conv, [G, K, C] of a Head, [G, C] of a Pointwise.
        bias: [G, O], [G, K] or [G, C].
        projection: [G, O, D], whose bias is part of `bias`; None for a layer without one.
    """

    weight: Tensor
    bias: Tensor
    projection: Tensor | None = None


class BackEnd(ABC):
    """Layers of G networks at a time, forward and gradient of the input.

    A back end is made for a device and a dtype; a plan calls `load` before anything else. No method
    changes its arguments: one gradient may be the skip of another.

    Attributes:
        name: by which reports and `choose.back_end` know it.
        dtype: of values and weights inside.
        preferred_batch: a larger batch of 32x32 pixels runs in parts of this size, one of smaller
            images in larger parts; None for any size.
    """

    name: str
    dtype: torch.dtype
    preferred_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @abstractmethod
    def load(self, layers: Sequence[Layer], weights: Sequence[Weights | None]) -> None:
        """Take (again) the parameters of G networks, into the same buffers if shapes allow."""

    @abstractmethod
    def enter(self, images: Tensor) -> Value:
        """Value 0 from normalized images, float32 [1 or G, B, C, H, W] (1: all see the same)."""

    @abstractmethod
    def conv(
        self, layer: Conv, source: Value, residual: Value | None, projected: Value | None
    ) -> Value:
        """The layer's output; `projected` is the value its projection reads."""

    @abstractmethod
    def conv_input_grad(
        self,
        layer: Conv,
        grad: Value,
        source: Value,
        *,
        masked: bool,
        skip: Value | None = None,
        projection: tuple[Conv, Value] | None = None,
    ) -> Value:
        """Gradient of `source` from the finished gradient of the layer's output.

        Adds `skip`, a gradient of `source` itself, and the gradient through the projection of
        another layer (that layer, finished gradient of its output), then zeroes what a ReLU cut
        if `masked`.
        """

    @abstractmethod
    def projection_input_grad(self, layer: Conv, grad: Value, source: Value) -> Value:
        """Gradient of the value that the layer's projection reads, alone and unmasked."""

    @abstractmethod
    def pool(self, layer: Pool, source: Value) -> Value:
        """The layer's output."""

    @abstractmethod
    def pool_input_grad(
        self,
        layer: Pool,
        grad: Value,
        source: Value,
        output: Value,
        *,
        masked: bool,
        skip: Value | None = None,
    ) -> Value:
        """Gradient of `source` from the finished gradient of `output`; `skip` and `masked` as in
        `conv_input_grad`."""

    # What works number by number or channel by channel is the same in every layout.

    @abstractmethod
    def rows(self, value: Value) -> Tensor:
        """A view of a value whose last axis are its channels, with those added as padding.

        The pixels' axes come first but for the networks', so that a value of 1 x 1 pixels
        broadcasts over others.
        """

    @abstractmethod
    def value(self, rows: Tensor, like: Value) -> Value:
        """The value that `rows` is a view of, for as many images as `like`."""

    @abstractmethod
    def affine(self, layer: Pointwise) -> tuple[Tensor, Tensor]:
        """Scale and shift of a layer, float32, to broadcast over `rows`."""

    def num_padded(self, channels: int) -> int:
        """How many channels `rows` has of a value with so many."""
        return channels

    def pointwise(self, layer: Pointwise, source: Value) -> Value:
        """The layer's output."""
        affine = self.affine(layer) if layer.affine else None
        return self.value(elementwise.pointwise(layer, self.rows(source), affine), source)

    def pointwise_input_grad(
        self, layer: Pointwise, grad: Value, source: Value, *, masked: bool, skip: Value | None
    ) -> Value:
        """Gradient of `source` from the finished gradient of the layer's output; `skip` and
        `masked` as in `conv_input_grad`."""
        affine = self.affine(layer) if layer.affine else None
        rows = self.rows(source)
        out = elementwise.pointwise_input_grad(layer, self.rows(grad), rows, affine)
        if skip is not None:
            out = out + self.rows(skip)
        return self.value(elementwise.masked(out, rows) if masked else out, source)

    def join(self, layer: Join, sources: Sequence[Value]) -> Value:
        """The layer's output."""
        rows = [self.rows(x) for x in sources]
        total = self.num_padded(sum(layer.channels))
        return self.value(elementwise.join(layer, rows, total), sources[0])

    def join_input_grads(self, layer: Join, grad: Value, sources: Sequence[Value]) -> list[Value]:
        """Gradients of all sources from the finished one of the output, alone and unmasked."""
        rows = [self.rows(x) for x in sources]
        grads = elementwise.join_input_grads(layer, self.rows(grad), rows)
        return [self.value(x, like) for x, like in zip(grads, sources, strict=True)]

    def add(self, a: Value, b: Value) -> Value:
        """Sum of two gradients of one value."""
        return self.value(self.rows(a) + self.rows(b), a)

    def mask(self, grad: Value, value: Value) -> Value:
        """A gradient, zero where the value is not positive."""
        return self.value(elementwise.masked(self.rows(grad), self.rows(value)), value)

    @abstractmethod
    def head(self, layer: Head, source: Value) -> Tensor:
        """Logits, float32 [G, B, K]."""

    @abstractmethod
    def head_input_grad(
        self, layer: Head, grad_logits: Tensor, source: Value, *, masked: bool
    ) -> Value:
        """Gradient of `source` from grad_logits, float32 [G, B, K]."""

    def cross_entropy(
        self, layer: Head, source: Value, gate_logits: Tensor, labels: Tensor, *, masked: bool
    ) -> tuple[Tensor, Tensor, Value] | None:
        """The head, the gate's mixture of all networks, and the gradients of its cross-entropy.

        Returns logits [B, K], and the gradients of gate_logits [B, E] and of `source`, of the sum
        over the batch; or None, if the back end has nothing better than the methods above.
        """
        return None

    @abstractmethod
    def from_map(self, maps: Tensor) -> Value:
        """A value, or its gradient, from maps, float32 [G, B, C, H, W]; a copy, whose owner may
        change them."""

    @abstractmethod
    def to_map(self, value: Value, channels: int) -> Tensor:
        """Maps, float32 [G, B, C, H, W], from a value or its gradient; a copy."""

    @abstractmethod
    def image_grad(self, layer: Conv, grad: Value, source: Value) -> Tensor:
        """Gradient of the normalized images, float32 in the shape that `enter` took (summed over
        the networks if they share them), from the finished gradient of the first layer's output."""
