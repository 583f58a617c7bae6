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
from moe_kernels.plan.layers import (
    Conv,
    Entry,
    Exit,
    Head,
    Join,
    Layer,
    Pointwise,
    Pool,
    read_beside,
    reads,
)


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
        """Gradient [1 or G, B, C, H, W] of value 0 from that of what the last layer reads."""
        last = self._layers[-1]
        assert isinstance(last, Head | Exit)
        self._finished[last.source] = grad
        total: Tensor | None = None
        for index in reversed(range(len(self._layers) - 1)):
            layer = self._layers[index]
            assert not isinstance(layer, Head | Exit)
            grad = self._finished.pop(layer.output)
            output = self._values.pop(layer.output)
            if isinstance(layer, Join):
                self._join(index, layer, grad)
            elif isinstance(layer, Entry):
                total = self._back_end.to_map(grad, layer.channels)
            elif isinstance(layer, Conv):
                self._additions(index, layer, grad)
                if layer.source == 0:
                    own = self._back_end.image_grad(layer, grad, self._values[0])
                    total = own if total is None else total.add_(own)
                else:
                    self._conv(index, layer, grad)
            else:
                self._single(index, layer, grad, output)
        assert total is not None
        return total

    def _single(self, index: int, layer: Pool | Pointwise, grad: Value, output: Value) -> None:
        skip = self._skip(layer.source)
        source = self._values[layer.source]
        masked = self._masked(index, layer.source)
        if isinstance(layer, Pool):
            grad = self._back_end.pool_input_grad(
                layer, grad, source, output, masked=masked, skip=skip
            )
        else:
            grad = self._back_end.pointwise_input_grad(
                layer, grad, source, masked=masked, skip=skip
            )
        self._contribute(index, layer.source, grad)

    def _conv(self, index: int, layer: Conv, grad: Value) -> None:
        mine = self._pending.pop(layer.source, _Pending())
        grad = self._back_end.conv_input_grad(
            layer,
            grad,
            self._values[layer.source],
            masked=self._masked(index, layer.source),
            skip=mine.skip,
            projection=mine.projection,
        )
        self._contribute(index, layer.source, grad)

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
        for value in set(read_beside(layer)) - {layer.source}:
            self._finish(index, value)

    def _join(self, index: int, layer: Join, grad: Value) -> None:
        sources = [self._values[x] for x in layer.sources]
        grads = self._back_end.join_input_grads(layer, grad, sources)
        for value, own in zip(layer.sources, grads, strict=True):
            self._add(value, own)
        for value in set(layer.sources):
            self._finish(index, value)

    def _contribute(self, index: int, value: int, grad: Value) -> None:
        """A contribution to a layer's source, with everything that came before it."""
        if self._first_reader[value] == index:
            self._finished[value] = grad
        else:
            self._add(value, grad)

    def _add(self, value: int, grad: Value) -> None:
        mine = self._pending.setdefault(value, _Pending())
        mine.skip = grad if mine.skip is None else self._back_end.add(mine.skip, grad)

    def _finish(self, index: int, value: int) -> None:
        """Finish the gradient of a value if no layer before this one reads it."""
        if self._first_reader[value] == index:
            grad = self._skip(value)
            masked = value in self._rectified
            self._finished[value] = (
                self._back_end.mask(grad, self._values[value]) if masked else grad
            )

    def _skip(self, value: int) -> Value | None:
        """All earlier contributions to a value as one gradient."""
        mine = self._pending.pop(value, _Pending())
        if mine.projection is None:
            return mine.skip
        side = self._back_end.projection_input_grad(*mine.projection, self._values[value])
        return side if mine.skip is None else self._back_end.add(mine.skip, side)

    def _masked(self, index: int, value: int) -> bool:
        return self._first_reader[value] == index and value in self._rectified


def first_readers(layers: Sequence[Layer]) -> dict[int, int]:
    """For each value the index of the first layer that reads it."""
    readers: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for value in reads(layer):
            readers.setdefault(value, index)
    return readers
