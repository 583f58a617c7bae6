"""Pack the weights of layers for the compiled convolutions of `simd`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels import native
from moe_kernels.native import FLOATS
from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv, Head, Layer, Pointwise

LANES = 16  # of a vector of float32
_GROUP = 32  # channels of the narrowest groups that run as such
_MAX_DENSE = 64  # channels of a grouped convolution that runs as a dense one


def padded(channels: int, multiple: int) -> int:
    """The number of channels rounded up."""
    return -(-channels // multiple) * multiple


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory on the CPU for a kernel to write to, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


@dataclass
class Matrix:
    """Packed weights of a convolution, tap by tap; `gradient` are those of its input gradient."""

    forward: Tensor
    gradient: Tensor


@dataclass
class Parameters:
    """Parameters of one layer. How its weights are packed is decided at the first image.

    Attributes:
        bias: [O], padded.
        channelwise: float32, padded: the scale [C] of a Pointwise, whose bias is the shift; the
            filters [taps, C] of a depthwise convolution.
        unpacked: the float32 weights until they are packed, then None.
        main, projection: packed weights.
        winograd: whether `main` is for Winograd's convolution.
    """

    bias: Tensor
    unpacked: Weights | None
    main: Matrix | None = None
    projection: Matrix | None = None
    winograd: bool = False
    channelwise: Tensor | None = None


class PackedWeights:
    """The parameters of one network's layers in `dtype` (float32 or bfloat16), by layer name.

    A second `load` writes into the same memory.

    Args:
        name: the instructions of the layers that will read them, as `SimdBackEnd` takes it.

    Attributes:
        multiple: values have a multiple of so many channels, 16 words.
        kernels: the functions compiled for these instructions.
    """

    def __init__(self, dtype: torch.dtype, name: str) -> None:
        self.name, self.kernels = name, getattr(native.module, name)
        self._code = FLOATS.index(dtype)
        self._per_word = 2 if dtype is torch.bfloat16 else 1
        self.multiple = LANES * self._per_word
        self._parameters: dict[str, Parameters] = {}

    def load(self, layers: Sequence[Layer], weights: Sequence[Weights | None]) -> None:
        """Take (again) the parameters of one network."""
        for layer, values in zip(layers, weights, strict=True):
            if values is None:
                continue
            if len(values.weight) != 1:
                raise ValueError(f"one network runs at a time, found {len(values.weight)}")
            own = self._parameters.get(layer.name)
            if own is None:
                multiple = LANES if isinstance(layer, Head) else self.multiple
                bias = empty(padded(values.weight.shape[1], multiple)).zero_()
                own = self._parameters[layer.name] = Parameters(bias, None)
            own.bias[: values.bias.shape[1]] = values.bias[0]
            if isinstance(layer, Pointwise) or is_depthwise(layer):
                channels = values.weight.shape[1]
                numbers = values.weight[0].reshape(channels, -1).T
                if own.channelwise is None:
                    own.channelwise = numbers.new_zeros(len(numbers), len(own.bias))
                own.channelwise[:, :channels] = numbers
                continue
            own.unpacked = values
            if own.main is not None:
                self._pack(layer, own)

    def packed(self, layer: Layer) -> Parameters:
        """The layer's parameters, after `of` has packed them."""
        return self._parameters[layer.name]

    def of(self, layer: Layer, H: int = 1, W: int = 1) -> Parameters:
        """The layer's parameters, packed for a source of H x W pixels."""
        own = self._parameters[layer.name]
        if own.main is None:
            own.winograd = isinstance(layer, Conv) and self._saves_products(layer, H, W)
            self._pack(layer, own)
        return own

    def _saves_products(self, layer: Conv, H: int, W: int) -> bool:
        """Whether Winograd multiplies less than the taps that meet the image."""
        fits = (layer.kernel, layer.stride, layer.padding, layer.groups) == ((3, 3), 1, 1, 1)
        if not fits or layer.source == 0:
            return False
        if self.name == "avx2" and max(layer.in_channels, layer.out_channels) <= LANES // 2:
            return False  # direct convolutions skip their padding
        return 24 * -(-H // 2) * -(-W // 4) < (3 * H - 2) * (3 * W - 2)

    def _pack(self, layer: Layer, own: Parameters) -> None:
        assert own.unpacked is not None
        weight = own.unpacked.weight[0].contiguous()
        if isinstance(layer, Head):
            own.main = self._matrix(own.main, weight[:, :, None], head=True)
        elif own.winograd:
            own.main = self._winograd_matrix(own.main, weight)
        elif isinstance(layer, Conv) and layer.groups != 1:
            own.main = self._grouped_matrix(own.main, weight.flatten(2), layer)
        else:
            assert isinstance(layer, Conv)
            taps = weight.flatten(2)
            own.main = self._matrix(own.main, taps, image=layer.source == 0)
        if own.unpacked.projection is not None:
            projection = own.unpacked.projection[0].contiguous()[:, :, None]
            own.projection = self._matrix(own.projection, projection)
        own.unpacked = None

    def _matrix(
        self, known: Matrix | None, weight: Tensor, *, image: bool = False, head: bool = False
    ) -> Matrix:
        """Pack [O, C, taps] into the known buffers, if there are any.

        The head is float32. An image keeps its number of channels, each in two parts if bfloat16.
        """
        outputs, channels, taps = weight.shape
        code, per_word = (0, 1) if head else (self._code, self._per_word)
        rows = padded(outputs, LANES if head else self.multiple)
        forward_words = channels if image else padded(channels, self.multiple) // per_word
        columns = padded(channels, LANES if image else self.multiple)
        gradient_words = outputs if head else padded(outputs, self.multiple) // per_word
        if known is None:
            known = Matrix(
                empty(rows * forward_words * taps, dtype=torch.int32),
                empty(columns * gradient_words * taps, dtype=torch.int32),
            )
        threads = torch.get_num_threads()
        doubled = image and per_word == 2
        self.kernels.pack_direct(
            weight=weight.data_ptr(),
            packed=known.forward.data_ptr(),
            O=rows,
            K=forward_words,
            outputs=outputs,
            channels=channels,
            taps=taps,
            output_stride=channels * taps,
            channel_stride=taps,
            tap_stride=1,
            doubled=doubled,
            dtype=code,
            num_threads=threads,
        )
        # For the input gradient outputs and channels change places.
        self.kernels.pack_direct(
            weight=weight.data_ptr(),
            packed=known.gradient.data_ptr(),
            O=columns,
            K=gradient_words,
            outputs=channels,
            channels=outputs,
            taps=taps,
            output_stride=taps,
            channel_stride=channels * taps,
            tap_stride=1,
            doubled=False,
            dtype=code,
            num_threads=threads,
        )
        return known

    def _grouped_matrix(self, known: Matrix | None, weight: Tensor, layer: Conv) -> Matrix:
        """Pack [O, C / groups, taps], block by block; a single block may need padding."""
        blocks = num_blocks(layer)
        outputs, channels, taps = weight.shape
        together = layer.groups // blocks  # groups, each of which reads the others' zeros
        split = weight.view(blocks, together, outputs // layer.groups, channels, taps)
        shape = blocks, together, split.shape[2], together, channels, taps
        full = weight.new_zeros(shape)
        full.diagonal(dim1=1, dim2=3).copy_(split.permute(0, 2, 3, 4, 1))
        full = full.view(blocks, outputs // blocks, together * channels, taps)
        if blocks == 1:
            return self._matrix(known, full[0])
        if known is None:
            words = full.numel() // self._per_word
            known = Matrix(*(empty(words, dtype=torch.int32) for _ in range(2)))
        parts = zip(known.forward.chunk(blocks), known.gradient.chunk(blocks), strict=True)
        for block, part in zip(full, parts, strict=True):
            self._matrix(Matrix(*part), block)
        return known

    def _winograd_matrix(self, known: Matrix | None, weight: Tensor) -> Matrix:
        outputs, channels = weight.shape[:2]
        rows, columns = (padded(x, self.multiple) for x in (outputs, channels))
        if known is None:
            size = 24 * rows * columns // self._per_word
            known = Matrix(*(empty(size, dtype=torch.int32) for _ in range(2)))
        self.kernels.pack_winograd(
            weight=weight.data_ptr(),
            forward=known.forward.data_ptr(),
            gradient=known.gradient.data_ptr(),
            O=rows,
            C=columns,
            outputs=outputs,
            channels=channels,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        return known


def is_depthwise(layer: Layer) -> bool:
    """Whether each channel has a filter of its own."""
    return isinstance(layer, Conv) and 1 < layer.groups == layer.in_channels == layer.out_channels


def num_blocks(layer: Conv) -> int:
    """Into how many groups with a multiple of 32 channels a grouped convolution can be merged.

    One of few channels may become a single dense one.

    Raises:
        CannotPlan: most of its products would be with zeros.
    """
    sizes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for blocks in range(layer.groups, 0, -1):
        together = layer.groups // blocks
        if layer.groups % blocks == 0 and all(x * together % _GROUP == 0 for x in sizes):
            return blocks
    if max(layer.in_channels, layer.out_channels) <= _MAX_DENSE:
        return 1
    raise CannotPlan(f"{layer.name} has groups that do not fill {_GROUP} channels")
