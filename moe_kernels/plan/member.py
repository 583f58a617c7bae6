"""Networks of equal layers on one back end: which layer comes when, and where gradients meet.

Axes: G networks that run together, B images, C H W, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_kernels.plan.back_ends.base import BackEnd, Value
from moe_kernels.plan.fold import fold
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv, Head, Layer, Pool
from moe_kernels.plan.trace import Traced


class Member:
    """Some networks of a plan and what they run on.

    Args:
        indices: their numbers in the plan.
        traced: the layers that they share.
    Raises:
        CannotPlan: gradients would meet where no back end lets them.
    """

    def __init__(
        self, indices: Sequence[int], traced: Traced, back_end: BackEnd, device: torch.device
    ) -> None:
        self.indices = list(indices)
        self.back_end = back_end
        self.layers = traced.layers
        head = traced.layers[-1]
        assert isinstance(head, Head)
        self.head = head
        # the networks' numbers as an index that a graph can capture
        first, last = indices[0], indices[-1]
        consecutive = self.indices == list(range(first, last + 1))
        self.place = slice(first, last + 1) if consecutive else torch.tensor(indices, device=device)
        self.rectified = frozenset(x.output for x in self.layers if isinstance(x, Conv) and x.relu)
        self.first_reader = _first_readers(self.layers, self.rectified)
        self._sources = traced.sources

    def load(self, networks: Sequence[nn.Module]) -> None:
        """Take the parameters of these networks, of all that the plan has."""
        own = [networks[e] for e in self.indices]
        self.back_end.load(self.layers, fold(own, self.layers, self._sources))

    def forward(self, images: Tensor) -> dict[int, Value]:
        """All values from normalized images [1 or G, B, C, H, W]."""
        back_end = self.back_end
        values: dict[int, Value] = {0: back_end.enter(images)}
        for layer in self.layers[:-1]:
            source = values[layer.source]
            if isinstance(layer, Conv):
                residual = None if layer.residual is None else values[layer.residual]
                projected = None if layer.projection is None else values[layer.projection.source]
                values[layer.output] = back_end.conv(layer, source, residual, projected)
            elif isinstance(layer, Pool):
                values[layer.output] = back_end.pool(layer, source)
        return values

    def logits(self, values: dict[int, Value]) -> Tensor:
        """Logits [G, B, K]."""
        return self.back_end.head(self.head, values[self.head.source])

    def head_input_grad(self, values: dict[int, Value], grad_logits: Tensor) -> Value:
        """Gradient of what the head reads from that of the logits [G, B, K]."""
        source = self.head.source
        masked = source in self.rectified
        return self.back_end.head_input_grad(self.head, grad_logits, values[source], masked=masked)

    def cross_entropy(
        self, values: dict[int, Value], gate_logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Value] | None:
        """Logits, and gradients of gate_logits and of what the head reads; see `BackEnd`."""
        source = self.head.source
        masked = source in self.rectified
        return self.back_end.cross_entropy(
            self.head, values[source], gate_logits, labels, masked=masked
        )

    def backward(self, values: dict[int, Value], grad: Value) -> Tensor:
        """Gradient of the normalized images from that of what the head reads.

        Uses up ``values``, each as soon as nothing needs it any more.
        """
        return _Backward(self, values).run(grad)


@dataclass
class _Pending:
    """What later readers of a value have contributed to its gradient."""

    skip: Value | None = None
    projection: tuple[Conv, Value] | None = None


class _Backward:
    """One way back. The first reader of a value is the last to contribute to its gradient."""

    def __init__(self, member: Member, values: dict[int, Value]) -> None:
        self._member = member
        self._back_end = member.back_end
        self._values = values
        self._pending: dict[int, _Pending] = {}
        self._finished: dict[int, Value] = {}

    def run(self, grad: Value) -> Tensor:
        self._finished[self._member.head.source] = grad
        for index in reversed(range(len(self._member.layers) - 1)):
            layer = self._member.layers[index]
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
        for value in _added(layer):
            if value != layer.source and self._member.first_reader[value] == index:
                self._finished[value] = self._skip(value)

    def _contribute(self, index: int, grad: Value) -> None:
        """A contribution to a layer's source, with everything that came before it."""
        value = self._member.layers[index].source
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
        return self._member.first_reader[self._member.layers[index].source] == index

    def _masked(self, index: int) -> bool:
        return self._is_last(index) and (
            self._member.layers[index].source in self._member.rectified
        )


def _first_readers(layers: Sequence[Layer], rectified: frozenset[int]) -> dict[int, int]:
    """For each value the index of the first layer that reads it."""
    readers: dict[int, int] = {}
    for index, layer in enumerate(layers):
        readers.setdefault(layer.source, index)
        for value in _added(layer):
            if value not in readers and value in rectified:
                # nobody would apply the ReLU's mask
                raise CannotPlan(f"{layer.name} adds a ReLU's output that no layer before it reads")
            readers.setdefault(value, index)
    return readers


def _added(layer: Layer) -> list[int]:
    """Values that a layer reads besides its source."""
    if not isinstance(layer, Conv):
        return []
    side = None if layer.projection is None else layer.projection.source
    return [x for x in (layer.residual, side) if x is not None]
