"""Differentiate any module by autograd, its large products in bfloat16 and all else in float32.

For modules that no plan knows, as transformers. Only linear layers and dense convolutions of at
least 32 channels change: sums, norms, activations and softmax stay in float32, where small
differences survive, and so does the last layer. That costs time beside autocast, which keeps whole
activations in bfloat16.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.back_ends.simd_calls import available, convolve, instructions_for
from moe_kernels.plan.back_ends.simd_weights import LANES, PackedWeights
from moe_kernels.plan.choose import default_dtype
from moe_kernels.plan.composed import ComposedPlan
from moe_kernels.plan.contents import Contents, Group, held
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Conv
from moe_kernels.plan.modules import structure
from moe_kernels.plan.verify import compare, differentiated, normal, probe

_MIN_CHANNELS = 32
_MIN_SHARE = 0.9  # of the weights of linear layers and convolutions
_ALLOWED = 0.05, 0.3  # errors of logits and gradients, relative to their norm


class ReducedPlan(ComposedPlan):
    """A module in eval mode with large products in bfloat16.

    A snapshot of the weights that are multiplied so: of the last `refresh`.

    Args:
        model: maps images [B, C, H, W] to logits [B, K], with float32 parameters.
    Raises:
        CannotPlan: this processor has no fast bfloat16, most products are small, or the model
            cannot be copied; at the first batch, if results differ by more than rounding, from call
            to call, or if a call changes the model.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        if any(x.is_floating_point() and x.dtype is not torch.float32 for x in parameters):
            raise CannotPlan("its parameters are not float32")
        if not parameters or default_dtype(parameters[0].device) is not torch.bfloat16:
            raise CannotPlan("bfloat16 is not faster here")
        super().__init__(model, _large_products(model))
        self._contents = Contents()
        self._is_right = False
        self._fault: CannotPlan | None = None

    @property
    def back_end(self) -> str:
        """For reports."""
        return "autograd, products in bfloat16"

    def prepare(self, images: Tensor) -> None:
        """Compare with the module itself, once; errors as of the class."""
        if self._fault is not None:
            raise CannotPlan(str(self._fault))
        self.refresh()
        if self._is_right:
            return
        try:
            self._check(probe(images))
        except CannotPlan as error:
            self._fault = error
            raise
        self._is_right = True

    def refresh(self) -> None:
        """Take over the weights of this moment, where they changed."""
        stored = [held(part, ("weight", "bias")) for part in self._parts]
        groups = [None if tensors is None else Group(tensors) for tensors in stored]
        for i in self._contents.changed(groups):
            self._stand_ins[i].refresh()

    def is_of(self, model: nn.Module) -> bool:
        """Whether a refresh would make this the plan of this module."""
        return self.fits(model, self._parts, self._dtype)

    def _check(self, few: Tensor) -> None:
        """Run copies alone: a forward may change its module, whose tensors are shared."""
        before = structure(self._composed)
        tensors = [*self._composed.parameters(), *self._composed.buffers()]
        values = [x.detach().clone() for x in tensors]
        plain = copy.deepcopy(self._model)
        try:
            super().prepare(few)
            grad_logits = normal(self(few), 1)
            ours = [differentiated(self._composed, few, grad_logits) for _ in range(2)]
            theirs = differentiated(plain, few, grad_logits)
        finally:
            changed = [x for x in zip(tensors, values, strict=True) if not _same(*x)]
            with torch.no_grad():
                for tensor, value in changed:
                    tensor.copy_(value)
        if changed or structure(self._composed) != before:
            raise CannotPlan("its forward changes the module")
        if not all(torch.equal(a, b) for a, b in zip(*ours, strict=True)):
            raise CannotPlan("its results differ from call to call")
        compare(ours[0], theirs, _ALLOWED)

    def _stand_in(self, part: nn.Module) -> Any:
        return _reduced(part)


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Equal numbers, NaN where NaN is."""
    return bool(((tensor == value) | (tensor.isnan() & value.isnan())).all())


def _large_products(model: nn.Module) -> list[nn.Module]:
    """Linear layers and dense convolutions of many channels, without the last layer of all."""
    products = [x for x in model.modules() if type(x) in (nn.Linear, nn.Conv2d)]
    large = [x for x in products[:-1] if _is_large(cast(Any, x))]
    counts = [sum(cast(Tensor, x.weight).numel() for x in group) for group in (large, products)]
    if not large or counts[0] < _MIN_SHARE * counts[1]:
        raise CannotPlan("most of its products are small")
    return large


def _is_large(module: Any) -> bool:
    outputs, channels = module.weight.shape[:2]
    return (
        min(outputs, channels) >= _MIN_CHANNELS
        and getattr(module, "groups", 1) == 1
        and not is_parametrized(module)
        and "forward" not in vars(module)
    )


class _Reduced:
    """A layer whose `forward` multiplies in bfloat16; its own weight stays for whoever reads it."""

    weight: Tensor
    bias: Tensor | None
    _weight: Tensor | None = None
    fault, age = None, 0

    def refresh(self) -> None:
        layout = torch.channels_last if self.weight.dim() == 4 else torch.contiguous_format
        made = self.weight.detach().to(torch.bfloat16, memory_format=layout)
        if self._weight is None:
            self.__dict__["_weight"] = made
        else:  # a captured graph knows its address
            self._weight.copy_(made)


class _ReducedLinear(_Reduced, nn.Linear):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        out = F.linear(x.to(torch.bfloat16), self._weight).float()
        return out if self.bias is None else out + self.bias


class _CompiledLinear(nn.Linear):
    """A linear layer with packed weights, by compiled products."""

    _packed: PackedWeights | None = None
    fault, age = None, 0

    def refresh(self) -> None:
        if self._packed is None:
            name = instructions_for(torch.bfloat16)
            self.__dict__["_packed"] = PackedWeights(torch.bfloat16, name)
        assert self._packed is not None
        weight = self.weight.detach().float()
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach().float()
        self._packed.load([_PRODUCT], [Weights(weight[None, :, :, None, None], bias[None])])
        self._packed.of(_PRODUCT)  # now: the weights may change

    def forward(self, x: Tensor) -> Tensor:
        rows = _Product.apply(x.reshape(-1, self.in_features), self._packed, self.out_features)
        return cast(Tensor, rows).view(*x.shape[:-1], self.out_features)


_PRODUCT = Conv("product", 1, 2, 0, 0, (1, 1))


class _Product(torch.autograd.Function):
    """rows [N, C] @ weight.T + bias in float32, of bfloat16 factors, and its input gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: PackedWeights, outputs: int) -> Tensor:
        own = packed.of(_PRODUCT)
        assert own.main is not None
        ctx.kernels = packed.kernels
        ctx.weight, ctx.channels = own.main.gradient, rows.shape[1]
        return _multiplied(packed.kernels, rows, own.main.forward, outputs, own.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _multiplied(ctx.kernels, grad, ctx.weight, ctx.channels, None), None, None


def _multiplied(
    kernels: Any, rows: Tensor, weight: Tensor, channels: int, bias: Tensor | None
) -> Tensor:
    source = rows.to(torch.bfloat16).contiguous()
    out = rows.new_empty(len(rows), channels, dtype=torch.float32)
    if len(rows):
        convolve(kernels, source[:, None, None], weight, out[:, None, None], _PRODUCT, bias=bias)
    return out


class _ReducedConv(_Reduced, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding: Any = self.padding if self.padding_mode == "zeros" else 0
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        out = F.conv2d(x, self._weight, None, self.stride, padding, self.dilation).float()
        return out if self.bias is None else out + self.bias[:, None, None]


def _reduced(part: nn.Module) -> nn.Module:
    """A copy of a layer, of the class that multiplies in bfloat16; the parameters are shared."""
    made = copy.copy(part)
    if not isinstance(part, nn.Linear):
        made.__class__ = _ReducedConv
    else:
        made.__class__ = _CompiledLinear if _is_compiled(part) else _ReducedLinear
    return made


def _is_compiled(part: nn.Linear) -> bool:
    """Whether the compiled products take it, which fill blocks of channels."""
    fills = part.in_features % (2 * LANES) == 0 == part.out_features % (2 * LANES)
    dtype = torch.bfloat16
    return fills and part.weight.is_cpu and available(instructions_for(dtype), dtype) is None
