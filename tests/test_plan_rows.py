"""Compiled layers that work row by row: products of pixels, norms over channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_dtypes import dtypes
from torch import Tensor, nn

from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.back_ends.simd import SimdBackEnd
from moe_kernels.plan.back_ends.simd_calls import available
from moe_kernels.plan.layers import Conv, Pointwise
from moe_kernels.plan.reduced import _CompiledLinear, _reduced
from moe_kernels.testing import assert_accurate

needs_bfloat16 = pytest.mark.skipif(
    available("avx512", torch.bfloat16) is not None, reason="no compiled bfloat16"
)


def normal(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# LayerNorm --------------------------------------------------------------------------------------


def norm_back_end(dtype: torch.dtype, channels: int) -> tuple[SimdBackEnd, Pointwise]:
    back_end = SimdBackEnd(dtype)
    layer = Pointwise("norm", 1, 2, channels, affine=True, epsilon=1e-5)
    weights = Weights(normal(1, channels, seed=1, mean=1.0), normal(1, channels, seed=2))
    back_end.load([layer], [weights])
    return back_end, layer


def filled(x: Tensor, back_end: SimdBackEnd) -> Tensor:
    """With the zeros that a value of this back end has behind its channels."""
    padding = back_end.num_padded(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, padding)).to(back_end.dtype)


@dtypes
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("channels", [96, 20, 33, 7])
def test_layer_norm(dtype, channels, mean):
    """Also where the mean is far larger than the differences."""
    back_end, layer = norm_back_end(dtype, channels)
    images = normal(3, 2, 5, channels, mean=mean).to(dtype)
    grad, skip = normal(3, 2, 5, channels, seed=3).to(dtype), normal(3, 2, 5, channels, seed=4)
    scale, shift = (x[..., :channels] for x in back_end.affine(layer))

    def ours(x: Tensor, grad: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        x, grad, skip = (filled(v, back_end) for v in (x, grad, skip))
        out = back_end.pointwise(layer, x)
        back = back_end.pointwise_input_grad(layer, grad, x, masked=True, skip=skip)
        assert not out[..., channels:].any()
        assert not back[..., channels:].any()
        return out[..., :channels], back[..., :channels]

    def plain(x: Tensor, grad: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.enable_grad():
            leaf = x.to(wide).requires_grad_()
            out = F.layer_norm(leaf, (channels,), scale.to(wide), shift.to(wide), 1e-5)
            (back,) = torch.autograd.grad(out, leaf, grad.to(wide))
        return out.detach().to(x.dtype), ((back + skip.to(wide)) * (x > 0)).to(x.dtype)

    assert_accurate(ours, plain, [images, grad, skip.to(dtype)])


@dtypes
def test_an_image_is_normalized_alone(dtype):
    back_end, layer = norm_back_end(dtype, 20)
    images = filled(normal(2, 3, 70, 20), back_end)
    together = back_end.pointwise(layer, images)
    alone = back_end.pointwise(layer, images[:, :, 68:69].contiguous())
    assert torch.equal(together[:, :, 68:69], alone)


# Products of pixels -----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("H", "W"), [(8, 8), (7, 5), (1, 1), (13, 1)])
def test_products_of_few_images_run_in_longer_rows(dtype, H, W):
    """And an image's bits are the same in every batch."""
    back_end = SimdBackEnd(dtype)
    layer = Conv("product", 1, 2, 40, 72, (1, 1))
    back_end.load([layer], [Weights(normal(1, 72, 40, 1, 1, seed=1), normal(1, 72, seed=2))])
    images, grad = filled(normal(H, W, 33, 40), back_end), filled(normal(H, W, 33, 72), back_end)

    def run(images: Tensor, grad: Tensor) -> list[Tensor]:
        ones = images.new_ones(H, W, images.shape[2], back_end.num_padded(72))
        out = back_end.conv(layer, images, ones, None)
        back = back_end.conv_input_grad(layer, grad, images, masked=True, skip=images)
        return [out, back]

    together = run(images, grad)
    for part in (slice(5, 6), slice(1, 5), slice(0, 0)):
        alone = run(images[:, :, part].contiguous(), grad[:, :, part].contiguous())
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[:, :, part])
    own = back_end._weights.packed(layer).bias[:72]
    weight = normal(1, 72, 40, 1, 1, seed=1)[0, :, :, 0, 0]
    truth = images[..., :40].float() @ weight.to(dtype).float().T + own + 1
    torch.testing.assert_close(together[0][..., :72].float(), truth, rtol=0.01, atol=0.02)


# Linear layers under autograd -------------------------------------------------------------------


def compiled_linear(*, bias: bool = True) -> tuple[nn.Linear, nn.Module]:
    linear = nn.Linear(64, 96, bias=bias)
    with torch.no_grad():
        for i, parameter in enumerate(linear.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
    made = _reduced(linear)
    assert isinstance(made, _CompiledLinear)
    made.refresh()
    return linear, made


@needs_bfloat16
@pytest.mark.parametrize("shape", [(2, 65, 64), (257, 64), (1, 64), (0, 3, 64), (64,)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_under_autograd(shape, bias):
    """As float32 computes it from factors that bfloat16 holds: sums and results are float32."""
    linear, made = compiled_linear(bias=bias)
    linear.weight.data = linear.weight.data.bfloat16().float()
    made.refresh()
    x = normal(*shape).bfloat16().float().requires_grad_()
    grad = normal(*shape[:-1], 96, seed=7).bfloat16().float()
    ours, truth = made(x), linear(x)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)
    (mine,), (its,) = (torch.autograd.grad(out, x, grad) for out in (ours, truth))
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-4)


@needs_bfloat16
def test_a_linear_layer_keeps_its_weights_until_it_is_refreshed():
    linear, made = compiled_linear()
    x = normal(3, 64)
    before = made(x)
    linear.weight.data.mul_(2)
    linear.bias.data.add_(1)
    assert torch.equal(made(x), before)
    made.refresh()
    torch.testing.assert_close(made(x), linear(x), rtol=0.01, atol=0.2)


def test_layers_that_do_not_fill_blocks_are_not_compiled():
    assert not isinstance(_reduced(nn.Linear(64, 40)), _CompiledLinear)
    assert not isinstance(_reduced(nn.Linear(48, 64)), _CompiledLinear)
