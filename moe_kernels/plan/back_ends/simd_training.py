"""Run layers in train mode by compiled convolutions: batch statistics, and gradients of parameters.

One object holds one forward pass, until its backward pass. Values and convolutions are those of
`SimdBackEnd`, but BatchNorm is not folded: a convolution stores its plain output y, whose sums
give mean and variance, and another pass over y normalizes it, adds what the layer adds and
rectifies. On the way back, with g the finished gradient of the normalized output, over n rows,

    y' = gamma / deviation * (g - sum(g) / n - (y - mean) * sum(g * (y - mean)) / n / variance)

which is one pass for the sums and one for a * g + b * y + c. Sums are float32 over 256 rows and
float64 over all of them. Gradients of weights are float32, of factors in the values' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from moe_kernels.native import FLOATS
from moe_kernels.plan.back_ends.simd import SimdBackEnd
from moe_kernels.plan.back_ends.simd_calls import address, conv_sizes, convolve
from moe_kernels.plan.back_ends.simd_weights import PackedWeights, empty
from moe_kernels.plan.layers import RELU, Conv, Head, Pointwise, Source

PROJECTION = Conv("", 0, 0, 0, 0, (1, 1))


@dataclass
class _Normalized:
    """A value y [..., C], and what BatchNorm made of it by the statistics of the batch.

    Attributes:
        norm: the path of the BatchNorm that reads it; None if none does.
        affine: scale and shift, float32 [2, C]; padding is zero.
        numbers: mean, deviation and scale, float64 [3, C]; None without a BatchNorm.
    """

    value: Tensor
    norm: str | None
    affine: Tensor
    numbers: Tensor | None = None


@dataclass
class _Kept:
    """What the way back of a convolution needs; `side` and what it read if it adds a projection."""

    main: _Normalized
    side: _Normalized | None = None
    side_source: Tensor | None = None


class TrainingBackEnd(SimdBackEnd):
    """One pass through a network in train mode; its BatchNorms move their running statistics.

    Args:
        modules: of the network by path, whose parameters and BatchNorms the layers use.
        places: for each layer's name where its parameters are.
        weights: of the layers as they are, packed.

    Attributes:
        gradients: after the way back, of each wanted parameter by its name.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        places: Mapping[str, Source],
        weights: PackedWeights,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(dtype, weights.name)
        self._weights = weights
        self._modules, self._places = modules, places
        self._wanted: set[str] = set()
        self._wants_images = False
        self._kept: dict[str, _Kept] = {}
        self.gradients: dict[str, Tensor] = {}

    def begin(self, wanted: set[str], *, wants_images: bool) -> None:
        """Begin a way back.

        Args:
            wanted: the names of the parameters whose gradients are computed.
            wants_images: whether the images' gradient is.
        """
        self._wanted, self._wants_images = wanted, wants_images
        self.gradients = {}

    # Convolutions -----------------------------------------------------------------------------

    def conv(
        self, layer: Conv, source: Tensor, residual: Tensor | None, projected: Tensor | None
    ) -> Tensor:
        place = self._places[layer.name]
        if place.norm is None and place.projection_norm is None:
            made = super().conv(layer, source, residual, projected)
            plain = _plain(made)
            self._kept[layer.name] = _Kept(plain, plain, projected)
            return made
        alone = replace(layer, relu=False, residual=None, projection=None)
        main = self._normalized(super().conv(alone, source, None, None), place.norm)
        kept = self._kept[layer.name] = _Kept(main, None, projected)
        second, (scale, shift) = None, main.affine
        if layer.projection is not None:
            second = kept.side = self._projected(layer, projected, main.value, place)
            shift = shift + second.affine[1]
        out = torch.empty_like(main.value)
        self._scale(
            main.value,
            scale,
            out,
            second=None if second is None else second.value,
            second_scale=None if second is None else second.affine[0],
            shift=shift,
            addend=residual,
            relu=layer.relu,
        )
        return out

    def _projected(
        self, layer: Conv, source: Tensor | None, like: Tensor, place: Source
    ) -> _Normalized:
        own = self._weights.packed(layer)
        assert layer.projection is not None
        assert own.projection is not None
        assert source is not None
        out = torch.empty_like(like)
        side = source, own.projection.forward, layer.projection.stride
        convolve(self._kernels, None, None, out, None, side=side)
        bias = self._optional(place.projection, "bias")
        if bias is not None:
            out += self._padded(bias).to(out.dtype)
        return self._normalized(out, place.projection_norm)

    def conv_input_grad(
        self,
        layer: Conv,
        grad: Tensor,
        source: Tensor,
        *,
        masked: bool,
        skip: Tensor | None = None,
        projection: tuple[Conv, Tensor] | None = None,
    ) -> Tensor:
        grad = self._conv_gradients(layer, grad, source)
        return super().conv_input_grad(
            layer, grad, source, masked=masked, skip=skip, projection=projection
        )

    def image_grad(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        grad = self._conv_gradients(layer, grad, source)
        if self._wants_images:
            return super().image_grad(layer, grad, source)
        H, W, B, _ = source.shape
        return grad.new_zeros(1, B, layer.in_channels, H, W, dtype=torch.float32)

    def _conv_gradients(self, layer: Conv, grad: Tensor, source: Tensor) -> Tensor:
        """The gradient of the plain output, after those of the layer's parameters."""
        place, kept = self._places[layer.name], self._kept[layer.name]
        grad = self._before_norm(kept.main, grad)
        self._product_gradients(place.module, layer, grad, source)
        return grad

    def _side_gradient(self, layer: Conv, grad: Tensor) -> tuple[Tensor, Tensor, int]:
        place, kept = self._places[layer.name], self._kept[layer.name]
        assert layer.projection is not None
        assert kept.side is not None
        assert kept.side_source is not None
        grad = self._before_norm(kept.side, grad)
        alone = replace(
            PROJECTION,
            source=1,
            in_channels=layer.projection.in_channels,
            out_channels=layer.out_channels,
            stride=layer.projection.stride,
        )
        self._product_gradients(cast(str, place.projection), alone, grad, kept.side_source)
        return super()._side_gradient(layer, grad)

    def _product_gradients(self, path: str, layer: Conv, grad: Tensor, source: Tensor) -> None:
        """Of the weight and the bias of a convolution or a linear layer."""
        if f"{path}.bias" in self._wanted:
            sums = self._sums(grad)[: layer.out_channels]
            self._add_gradient(f"{path}.bias", sums.float())
        if f"{path}.weight" in self._wanted:
            weight = cast(Tensor, self._optional(path, "weight"))
            made = self._weight_gradient(layer, grad, source, weight)
            self._add_gradient(f"{path}.weight", made)

    def _weight_gradient(self, layer: Conv, grad: Tensor, source: Tensor, weight: Tensor) -> Tensor:
        outputs, channels, (R, S) = layer.out_channels, layer.in_channels, layer.kernel
        facts = {
            "source": source.data_ptr(),
            "grad": grad.data_ptr(),
            "sizes": conv_sizes(layer, source, grad, input_grad=False),
            "dtype": self._code,
            "num_threads": torch.get_num_threads(),
        }
        made = torch.empty_like(weight)
        winograd = layer.name != "" and self._weights.packed(layer).winograd
        if winograd and source.shape[-1] % 32 == 0 == grad.shape[-1] % 32:
            self._kernels.weight_grad_winograd(
                grad_weight=made.data_ptr(),
                outputs=outputs,
                channels=channels,
                output_stride=made.stride(0),
                channel_stride=made.stride(1),
                tap_stride=1 if made.is_contiguous() else made.stride(3),
                **facts,
            )
            return made
        C, O = source.shape[-1], grad.shape[-1]  # noqa: E741  (the letter of an axis)
        sums = empty(R, S, C, O)
        self._kernels.weight_grad(grad_weight=sums.data_ptr(), **facts)
        if layer.source == 0 and self.dtype is torch.bfloat16:  # high and low parts
            sums = sums.view(R, S, C // 2, 2, O).sum(dim=3)
        ordered = sums[:, :, :channels, :outputs].permute(3, 2, 0, 1)
        if made.dim() == 4:
            return made.copy_(ordered)
        return ordered.reshape(made.shape)

    # Other layers -----------------------------------------------------------------------------

    def pointwise(self, layer: Pointwise, source: Tensor) -> Tensor:
        if not layer.affine:
            return super().pointwise(layer, source)
        made = self._normalized(source, self._places[layer.name].norm)
        self._kept[layer.name] = _Kept(made)
        out = torch.empty_like(source)
        scale, shift = made.affine
        self._scale(source, scale, out, shift=shift, relu=layer.activation == RELU)
        return out

    def pointwise_input_grad(
        self, layer: Pointwise, grad: Tensor, source: Tensor, *, masked: bool, skip: Tensor | None
    ) -> Tensor:
        if not layer.affine:
            return super().pointwise_input_grad(layer, grad, source, masked=masked, skip=skip)
        activation = source if masked else None
        return self._before_norm(self._kept[layer.name].main, grad, skip, activation)

    def head_input_grad(
        self, layer: Head, grad_logits: Tensor, source: Tensor, *, masked: bool
    ) -> Tensor:
        path, grad = self._places[layer.name].module, grad_logits[0]
        if f"{path}.weight" in self._wanted:
            means = self._means(source)[0, 0, :, : layer.in_channels]
            self._add_gradient(f"{path}.weight", grad.T @ means)
        if f"{path}.bias" in self._wanted:
            self._add_gradient(f"{path}.bias", grad.sum(dim=0))
        return super().head_input_grad(layer, grad_logits, source, masked=masked)

    # BatchNorm --------------------------------------------------------------------------------

    def _normalized(self, value: Tensor, path: str | None) -> _Normalized:
        """A value and its affine by batch statistics, which move the running ones as torch does."""
        if path is None:
            return _plain(value)
        norm = cast(nn.BatchNorm2d, self._modules[path])
        C = value.shape[-1]
        rows = value.numel() // C
        if rows < 2:
            raise ValueError(f"{path} needs more than one value for each channel in train mode")
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = norm.momentum
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
        weight, bias = norm.weight, norm.bias  # kept until the call ends, if they are computed
        numbers, affine = empty(3, C, dtype=torch.float64), empty(2, C)
        self._kernels.batch_norm(
            source=value.data_ptr(),
            weight=address(weight),
            bias=address(bias),
            running_mean=norm.running_mean.data_ptr(),
            running_variance=norm.running_var.data_ptr(),
            numbers=numbers.data_ptr(),
            affine=affine.data_ptr(),
            rows=rows,
            C=C,
            channels=norm.num_features,
            epsilon=norm.eps,
            momentum=momentum,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version([norm.running_mean, norm.running_var])
        return _Normalized(value, path, affine, numbers)

    def _before_norm(
        self,
        known: _Normalized,
        grad: Tensor,
        skip: Tensor | None = None,
        activation: Tensor | None = None,
    ) -> Tensor:
        """The gradient of what a BatchNorm read, after those of its weight and bias."""
        if known.norm is None:
            return grad
        assert known.numbers is not None
        norm = cast(nn.BatchNorm2d, self._modules[known.norm])
        C = grad.shape[-1]
        of_weight, of_bias = (
            empty(norm.num_features) if f"{known.norm}.{name}" in self._wanted else None
            for name in ("weight", "bias")
        )
        affine = empty(3, C)
        self._kernels.batch_norm_backward(
            grad=grad.data_ptr(),
            source=known.value.data_ptr(),
            numbers=known.numbers.data_ptr(),
            grad_weight=address(of_weight),
            grad_bias=address(of_bias),
            affine=affine.data_ptr(),
            rows=grad.numel() // C,
            C=C,
            channels=norm.num_features,
            dtype=self._code,
            num_threads=torch.get_num_threads(),
        )
        for name, made in (("weight", of_weight), ("bias", of_bias)):
            if made is not None:
                self._add_gradient(f"{known.norm}.{name}", made)
        scale, slope, shift = affine
        out = torch.empty_like(grad)
        self._scale(
            grad,
            scale,
            out,
            second=known.value,
            second_scale=slope,
            shift=shift,
            addend=skip,
            activation=activation,
        )
        return out

    def _sums(self, source: Tensor) -> Tensor:
        """Over all rows, float64 [C]."""
        C = source.shape[-1]
        shift = empty(C).zero_()
        sums, squares = (empty(C, dtype=torch.float64) for _ in range(2))
        self._kernels.channel_sums(
            factor=0,
            source=source.data_ptr(),
            shift=shift.data_ptr(),
            sums=sums.data_ptr(),
            products=squares.data_ptr(),
            rows=source.numel() // C,
            C=C,
            dtype=FLOATS.index(source.dtype),
            num_threads=torch.get_num_threads(),
        )
        return sums

    def _optional(self, path: str | None, name: str) -> Tensor | None:
        module = self._modules[cast(str, path)]
        return cast("Tensor | None", getattr(module, name))

    def _padded(self, numbers: Tensor) -> Tensor:
        """With zeros for the channels that are padding."""
        out = numbers.new_zeros(self.num_padded(len(numbers)))
        out[: len(numbers)] = numbers.detach()
        return out

    def _add_gradient(self, name: str, made: Tensor) -> None:
        known = self.gradients.get(name)
        self.gradients[name] = made if known is None else known + made


def _plain(value: Tensor) -> _Normalized:
    """A value that no BatchNorm reads."""
    affine = empty(2, value.shape[-1])
    affine[0], affine[1] = 1.0, 0.0
    return _Normalized(value, None, affine)
