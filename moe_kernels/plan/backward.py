"""Carry gradients back through the layers of a plan, to the normalized images.

The gradient of a value is the sum over all layers that read it. Contributions of later readers
wait until the first reader, which comes last on the way back, adds its own: a back end then
computes the sum and the ReLU's mask in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_kernels.plan.back_ends.base import BackEnd, Value
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv, Head, Layer, Pool, read_beside


@dataclass
class _Pending:
    """What later readers of a value have contributed to its gradient."""

    skip: Value | None = None
    projection: tuple[Conv, Value] | None = None


class Backward:
    """One way back through the layers.

    Args:
        first_reader: see `first_readers`.
        rectified: the values that a ReLU made.
        values: all values of the forward pass; used up, each as soon as nothing needs it any more.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        back_end: BackEnd,
        first_reader: Mapping[int, int],
        rectified: frozenset[int],
        values: dict[int, Value],
    ) -> None:
        self._layers = layers
        self._back_end = back_end
        self._first_reader = first_reader
        self._rectified = rectified
        self._values = values
        self._pending: dict[int, _Pending] = {}
        self._finished: dict[int, Value] = {}

    def run(self, grad: Value) -> Tensor:
        """Gradient [1 or G, B, C, H, W] of value 0 from that of what the head reads."""
        self._finished[self._layers[-1].source] = grad
        for index in reversed(range(len(self._layers) - 1)):
            layer = self._layers[index]
            assert not isinstance(layer, Head)
            grad = self._finished.pop(layer.output)
            output = self._values.pop(layer.output)
            if isinstance(layer, Pool):
                self._pool(index, layer, grad, output)
                continue
            self._additions(index, layer, grad)
            if layer.source == 0:
                return self._back_end.image_grad(layer, grad, self._values[0])
            self._conv(index, layer, grad)
        raise AssertionError("no layer reads the image")

    def _pool(self, index: int, layer: Pool, grad: Value, output: Value) -> None:
        skip = self._skip(layer.source)
        source = self._values[layer.source]
        masked = self._masked(index)
        grad = self._back_end.pool_input_grad(layer, grad, source, output, masked=masked, skip=skip)
        self._contribute(index, grad)

    def _conv(self, index: int, layer: Conv, grad: Value) -> None:
        mine = self._pending.pop(layer.source, _Pending())
        grad = self._back_end.conv_input_grad(
            layer,
            grad,
            self._values[layer.source],
            masked=self._masked(index),
            skip=mine.skip,
            projection=mine.projection,
        )
        self._contribute(index, grad)

    def _additions(self, index: int, layer: Conv, grad: Value) -> None:
        """What a convolution's sum gives to the values that it adds, besides its source."""
        if layer.residual is not None:
            self._add(layer.residual, grad)
        if layer.projection is not None:
            value = layer.projection.source
            mine = self._pending.setdefault(value, _Pending())
            if mine.projection is None:
                mine.projection = (layer, grad)
            else:
                source = self._values[value]
                self._add(value, self._back_end.projection_input_grad(layer, grad, source))
        for value in read_beside(layer):
            if value != layer.source and self._first_reader[value] == index:
                self._finished[value] = self._skip(value)

    def _contribute(self, index: int, grad: Value) -> None:
        """A contribution to a layer's source, with everything that came before it."""
        value = self._layers[index].source
        if self._is_last(index):
            self._finished[value] = grad
        else:
            self._add(value, grad)

    def _add(self, value: int, grad: Value) -> None:
        mine = self._pending.setdefault(value, _Pending())
        mine.skip = grad if mine.skip is None else self._back_end.add(mine.skip, grad)

    def _skip(self, value: int) -> Value | None:
        """All earlier contributions to a value as one gradient."""
        mine = self._pending.pop(value, _Pending())
        if mine.projection is None:
            return mine.skip
        side = self._back_end.projection_input_grad(*mine.projection, self._values[value])
        return side if mine.skip is None else self._back_end.add(mine.skip, side)

    def _is_last(self, index: int) -> bool:
        return self._first_reader[self._layers[index].source] == index

    def _masked(self, index: int) -> bool:
        return self._is_last(index) and self._layers[index].source in self._rectified


def first_readers(layers: Sequence[Layer], rectified: frozenset[int]) -> dict[int, int]:
    """For each value the index of the first layer that reads it.

    Raises:
        CannotPlan: that layer only adds a ReLU's output, and so cannot apply the ReLU's mask.
    """
    readers: dict[int, int] = {}
    for index, layer in enumerate(layers):
        readers.setdefault(layer.source, index)
        for value in read_beside(layer):
            if value not in readers and value in rectified:
                raise CannotPlan(f"{layer.name} adds a ReLU's output that no layer before it reads")
            readers.setdefault(value, index)
    return readers
