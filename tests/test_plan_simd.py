"""Compiled layers, one by one: against float64, bit for bit across batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_dtypes import dtypes
from torch import Tensor

from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.back_ends.simd import SimdBackEnd
from moe_kernels.plan.back_ends.simd_calls import available, instructions_for
from moe_kernels.plan.layers import RELU, Activation, Conv, Head, Pointwise, Pool, Projection
from moe_kernels.testing import TOLERANCES, Tolerance, assert_accurate, errors

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

# Winograd's F(2x4, 3x3) adds up to five of its rounded products with factors up to 3.4: in bfloat16
# an error may be a floor larger than usual. The logits of a trained ResNet-18 are still closer to
# the truth than plain bfloat16's, which rounds between convolution, bias, residual and ReLU.
WINOGRAD = {
    torch.bfloat16: Tolerance(slack=2, floor=2**-7),
    torch.float32: TOLERANCES[torch.float32],
}

# B, C, O, H, W, kernel, stride, padding: those of ResNets; odd widths; odd and tiny images; one
# image; many images; kernels of other sizes; a kernel that covers the image; no padding; at most 8
# channels.
CONVS = [
    (4, 64, 64, 8, 8, 3, 1, 1),
    (3, 64, 128, 8, 8, 3, 2, 1),
    (2, 20, 40, 7, 9, 3, 1, 1),
    (2, 33, 70, 9, 7, 3, 2, 1),
    (1, 32, 96, 4, 4, 3, 1, 1),
    (37, 32, 32, 4, 5, 3, 1, 1),
    (2, 40, 30, 2, 3, 3, 1, 1),
    (3, 24, 24, 1, 1, 3, 1, 1),
    (3, 16, 16, 8, 8, 3, 1, 1),
    (5, 8, 48, 7, 6, 3, 1, 1),
    (4, 16, 80, 8, 8, 3, 2, 1),
    (2, 16, 16, 5, 6, 5, 2, 2),
    (2, 8, 48, 15, 14, 7, 2, 3),
    (3, 32, 64, 8, 8, 1, 2, 0),
    (2, 40, 30, 4, 4, 4, 1, 0),
    (2, 12, 20, 6, 7, 3, 1, 0),
    (2, 12, 20, 6, 7, 3, 3, 1),
    (29, 8, 8, 6, 5, 3, 1, 1),
    (5, 5, 24, 7, 7, 3, 2, 1),
    (3, 40, 7, 5, 4, 1, 1, 0),
]


def ids(case: Any) -> str:
    return "-".join(map(str, case)) if isinstance(case, tuple) else str(case)


convs = pytest.mark.parametrize("case", CONVS, ids=ids)


def value_of(images: Tensor) -> Tensor:
    """[B, C, H, W] to [H, W, B, C], C padded to 16 words."""
    x = images.permute(2, 3, 0, 1)
    multiple = 16 if images.dtype is torch.float32 else 32
    return F.pad(x, (0, -x.shape[3] % multiple)).contiguous()


def images_of(value: Tensor, channels: int) -> Tensor:
    assert not value[..., channels:].any(), "padding channels must stay zero"
    return value[..., :channels].permute(2, 3, 0, 1).contiguous()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator) * scale


def conv_layer(case: tuple[int, ...], **options: Any) -> Conv:
    _, C, outputs, _, _, kernel, stride, padding = case
    settings: dict[str, Any] = {"relu": False, **options}
    return Conv("conv", 1, 2, C, outputs, (kernel, kernel), stride, padding, **settings)


def output_size(case: tuple[int, ...]) -> tuple[int, int]:
    _, _, _, H, W, kernel, stride, padding = case
    return (H + 2 * padding - kernel) // stride + 1, (W + 2 * padding - kernel) // stride + 1


def parameters(case: tuple[int, ...], D: int = 0) -> Weights:
    _, C, outputs, _, _, kernel, _, _ = case
    weight = random(1, outputs, C, kernel, kernel, scale=(C * kernel**2) ** -0.5)
    projection = random(1, outputs, D, scale=D**-0.5) if D else None
    return Weights(weight, random(1, outputs, seed=1), projection)


def loaded(dtype: torch.dtype, layer: Any, weights: Weights) -> SimdBackEnd:
    back_end = SimdBackEnd(dtype)
    back_end.load([layer], [weights])
    return back_end


def tolerance(case: tuple[int, ...], dtype: torch.dtype) -> Tolerance:
    winograd = case[5:] == (3, 1, 1) and min(case[3:5]) >= 3
    return (WINOGRAD if winograd else TOLERANCES)[dtype]


def rounded(values: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight and bias as every implementation may take them: exact in the dtype."""
    return values.weight[0].to(dtype), values.bias[0].to(dtype)


def exact(values: Weights, dtype: torch.dtype) -> Weights:
    projection = values.projection
    return Weights(
        values.weight.to(dtype).float(),
        values.bias.to(dtype).float(),
        None if projection is None else projection.to(dtype).float(),
    )


@dtypes
@convs
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "relu-residual"])
def test_conv(case: tuple[int, ...], fused: bool, dtype: torch.dtype) -> None:
    B, C, outputs, H, W, _, stride, padding = case
    layer = conv_layer(case, relu=fused, residual=3 if fused else None)
    values = exact(parameters(case), dtype)
    back_end = loaded(dtype, layer, values)
    source, residual = (
        random(B, C, H, W).to(dtype),
        random(B, outputs, *output_size(case)).to(dtype),
    )

    def ours(source: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        addend = value_of(residual) if fused else None
        return images_of(back_end.conv(layer, value_of(source), addend, None), outputs)

    def plain(source: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.conv2d(source, weight, bias, stride, padding)
        return F.relu(out + residual) if fused else out

    inputs = source, residual, *rounded(values, dtype)
    assert_accurate(ours, plain, inputs, tolerance(case, dtype))


@dtypes
@convs
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "mask-skip"])
def test_conv_input_grad(case: tuple[int, ...], fused: bool, dtype: torch.dtype) -> None:
    B, C, outputs, H, W, _, stride, padding = case
    layer = conv_layer(case)
    values = exact(parameters(case), dtype)
    back_end = loaded(dtype, layer, values)
    source = random(B, C, H, W).relu().to(dtype)
    skip, grad = (
        random(B, C, H, W, seed=2).to(dtype),
        random(B, outputs, *output_size(case)).to(dtype),
    )

    def ours(grad: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
        value = value_of(source)
        back_end.conv(layer, value, None, None)
        added = value_of(skip) if fused else None
        out = back_end.conv_input_grad(layer, value_of(grad), value, masked=fused, skip=added)
        return images_of(out, C)

    def plain(grad: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
        out = torch.nn.grad.conv2d_input(source.shape, weight, grad, stride, padding)
        return torch.where(source > 0, out + skip, 0) if fused else out

    inputs = grad, skip, rounded(values, dtype)[0]
    assert_accurate(ours, plain, inputs, tolerance(case, dtype))


# The same and groups: depthwise with and without padding channels, strided, many images; groups of
# 32 channels, of fewer that are computed together, of few as a dense convolution.
GROUPED = [
    ((5, 32, 32, 7, 6, 3, 1, 1), 32),
    ((3, 40, 40, 9, 8, 5, 2, 2), 40),
    ((70, 16, 16, 4, 4, 3, 2, 1), 16),
    ((2, 24, 24, 5, 5, 3, 1, 0), 24),
    ((3, 64, 128, 6, 5, 3, 1, 1), 2),
    ((3, 128, 128, 6, 5, 3, 2, 1), 32),
    ((2, 192, 96, 4, 5, 1, 1, 0), 3),
    ((2, 20, 30, 6, 6, 3, 1, 1), 5),
]


@dtypes
@pytest.mark.parametrize(("case", "groups"), GROUPED, ids=ids)
def test_grouped_conv(case: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    """Both ways, with everything that is fused, and the input gradient of a projection beside."""
    B, C, outputs, H, W, kernel, stride, padding = case
    layer = conv_layer(case, relu=True, residual=3, groups=groups)
    weight = random(1, outputs, C // groups, kernel, kernel, scale=(C / groups * kernel**2) ** -0.5)
    values = exact(Weights(weight, random(1, outputs, seed=1)), dtype)
    other = Conv("other", 4, 5, 8, 24, (1, 1), 1, 0, False, projection=Projection(1, C, 1))
    beside = exact(parameters((B, 8, 24, H, W, 1, 1, 0), C), dtype)
    assert beside.projection is not None
    back_end = SimdBackEnd(dtype)
    back_end.load([layer, other], [values, beside])
    source = random(B, C, H, W).to(dtype)
    size = output_size(case)
    residual, grad = (random(B, outputs, *size, seed=i).to(dtype) for i in (3, 4))
    skip, grad_other = random(B, C, H, W, seed=5).to(dtype), random(B, 24, H, W).to(dtype)
    side = beside.projection[0, :, :, None, None].to(dtype)
    back_end.conv(other, value_of(random(B, 8, H, W).to(dtype)), None, value_of(source))

    def ours(
        source: Tensor, residual: Tensor, grad: Tensor, skip: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        value = value_of(source)
        out = back_end.conv(layer, value, value_of(residual), None)
        grad_source = back_end.conv_input_grad(
            layer,
            value_of(grad),
            value,
            masked=True,
            skip=value_of(skip),
            projection=(other, value_of(grad_other)),
        )
        return images_of(out, outputs), images_of(grad_source, C)

    def plain(
        source: Tensor, residual: Tensor, grad: Tensor, skip: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight, bias, side = parameters
        out = F.relu(F.conv2d(source, weight, bias, stride, padding, 1, groups) + residual)
        own = torch.nn.grad.conv2d_input(source.shape, weight, grad, stride, padding, groups=groups)
        total = own + skip + F.conv_transpose2d(grad_other.to(side.dtype), side)
        return out, torch.where(source > 0, total, 0)

    inputs = source, residual, grad, skip, *rounded(values, dtype), side
    assert_accurate(ours, plain, inputs, TOLERANCES[dtype])


@dtypes
@pytest.mark.parametrize("activation", [None, RELU, Activation("silu")], ids=str)
@pytest.mark.parametrize(("B", "C", "H", "W"), [(3, 32, 4, 5), (70, 20, 3, 3), (1, 100, 2, 1)])
def test_pointwise(B, C, H, W, activation, dtype):  # type: ignore[no-untyped-def]
    layer = Pointwise("norm", 1, 2, C, True, activation)
    values = Weights(random(1, C, seed=1), random(1, C, seed=2))
    back_end = loaded(dtype, layer, values)
    source, skip, grad = (random(B, C, H, W, seed=i).to(dtype) for i in (3, 4, 5))

    def ours(source: Tensor, skip: Tensor, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        value = value_of(source)
        out = back_end.pointwise(layer, value)
        if activation == RELU:  # a finished gradient is masked
            grad = torch.where(images_of(out, C) > 0, grad, 0)
        grad_source = back_end.pointwise_input_grad(
            layer, value_of(grad), value, masked=True, skip=value_of(skip)
        )
        return images_of(out, C), images_of(grad_source, C)

    def plain(
        source: Tensor, skip: Tensor, grad: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaf = source.detach().requires_grad_()
        out = leaf * scale[:, None, None] + shift[:, None, None]
        out = out if activation is None else getattr(F, activation.name)(out)
        (own,) = torch.autograd.grad(out, leaf, grad)
        return out.detach(), torch.where(source > 0, own + skip, 0)

    inputs = source, skip, grad, values.weight[0].to(dtype), values.bias[0].to(dtype)
    back_end.load([layer], [exact(values, dtype)])
    assert_accurate(ours, plain, inputs, TOLERANCES[dtype])


# B, C, O, H, W, kernel, stride, padding; D channels and stride of the projection.
PROJECTIONS = [
    ((3, 64, 64, 4, 4, 3, 1, 1), 32, 2),
    ((2, 20, 40, 5, 7, 3, 1, 1), 24, 1),
    ((2, 20, 40, 5, 7, 3, 1, 1), 33, 2),
    ((3, 32, 40, 8, 6, 3, 2, 1), 24, 2),
    ((2, 24, 40, 3, 3, 1, 1, 0), 16, 3),
]


@dtypes
@pytest.mark.parametrize(("case", "D", "stride"), PROJECTIONS, ids=ids)
def test_projection(case: tuple[int, ...], D: int, stride: int, dtype: torch.dtype) -> None:
    """In the sum, alone backwards, and beside the input gradient of another layer."""
    B, C, outputs, H, W, _, own_stride, padding = case
    P, Q = output_size(case)
    layer = conv_layer(case, projection=Projection(4, D, stride), relu=True)
    values = exact(parameters(case, D), dtype)
    assert values.projection is not None
    # the last rows and columns of the projection's source may go unread
    size = P * stride, (Q - 1) * stride + 1
    other = Conv("other", 4, 5, D, 24, (3, 3), 1, 1, False)
    beside = exact(parameters((B, D, 24, *size, 3, 1, 1)), dtype)
    back_end = SimdBackEnd(dtype)
    back_end.load([other, layer], [beside, values])
    side = values.projection[0, :, :, None, None].to(dtype)
    source, projected = random(B, C, H, W).to(dtype), random(B, D, *size, seed=3).to(dtype)
    grad, grad_other = random(B, outputs, P, Q).to(dtype), random(B, 24, *size, seed=4).to(dtype)

    def ours(source: Tensor, projected: Tensor, grad: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        read = value_of(projected)
        out = back_end.conv(layer, value_of(source), None, read)
        alone = back_end.projection_input_grad(layer, value_of(grad), read)
        back_end.conv(other, read, None, None)
        both = back_end.conv_input_grad(
            other, value_of(grad_other), read, masked=True, projection=(layer, value_of(grad))
        )
        return images_of(out, outputs), images_of(alone, D), images_of(both, D)

    def plain(
        source: Tensor, projected: Tensor, grad: Tensor, grad_other: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        weight, bias, side, beside = weights
        out = F.conv2d(source, weight, bias, own_stride, padding)
        out = F.relu(out + F.conv2d(projected, side, stride=stride))
        alone = torch.nn.grad.conv2d_input(projected.shape, side, grad, stride)
        both = torch.nn.grad.conv2d_input(projected.shape, beside, grad_other, 1, 1) + alone
        return out, alone, torch.where(projected > 0, both, 0)

    weights = *rounded(values, dtype), side, rounded(beside, dtype)[0]
    inputs = source, projected, grad, grad_other, *weights
    assert_accurate(ours, plain, inputs, WINOGRAD[dtype])


@dtypes
@pytest.mark.parametrize("C", [1, 3, 17])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
def test_image(C: int, kernel: int, stride: int, dtype: torch.dtype) -> None:
    """The first layer reads more of an image than bfloat16 holds; its gradient is float32."""
    case = (3, C, 20, 9, 8, kernel, stride, kernel // 2)
    layer = Conv("stem", 0, 1, C, 20, (kernel, kernel), stride, kernel // 2, False)
    values = exact(parameters(case), dtype)
    back_end = loaded(dtype, layer, values)
    images, grad = random(3, C, 9, 8), random(3, 20, *output_size(case)).to(dtype)
    value = back_end.enter(images[None])
    weight = values.weight[0]

    def split(images: Tensor) -> Tensor:
        return back_end.enter(images[None]).view(9, 8, 3, C, -1).double().sum(-1)

    error = (split(images) - images.permute(2, 3, 0, 1).double()).abs().max()
    assert error <= 2**-16 * images.abs().max()
    out = images_of(back_end.conv(layer, value, None, None), 20)
    truth = F.conv2d(images.double(), weight.double(), values.bias[0].double(), stride, kernel // 2)
    assert (out - truth).abs().max() <= TOLERANCES[dtype].floor * truth.abs().max()
    grad_images = back_end.image_grad(layer, value_of(grad), value)
    truth = torch.nn.grad.conv2d_input(
        images.shape, weight.double(), grad.double(), stride, kernel // 2
    )
    assert grad_images.dtype is torch.float32
    assert grad_images.shape == (1, 3, C, 9, 8)
    # nothing was rounded but sums
    assert (grad_images[0] - truth).abs().max() <= 2e-6 * truth.abs().max()


POOLS = [("max", 3, 2, 1), ("max", 2, 2, 0), ("max", 3, 1, 1), ("mean", 3, 2, 1), ("mean", 2, 2, 0)]


@dtypes
@pytest.mark.parametrize("setting", POOLS, ids=ids)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "mask-skip"])
def test_pool(setting: tuple[str, int, int, int], fused: bool, dtype: torch.dtype) -> None:
    kind, *window = setting
    layer = Pool("pool", 1, 2, kind, *window)
    back_end = SimdBackEnd(dtype)
    # few different numbers: ties, of which the first maximum wins
    source = (random(3, 20, 9, 8) * 2).round().relu().to(dtype)
    pool: Callable[..., Tensor] = F.max_pool2d if kind == "max" else F.avg_pool2d
    grad = random(*pool(source.float(), *window).shape).to(dtype)
    skip = random(3, 20, 9, 8, seed=1).to(dtype)

    def ours(source: Tensor, grad: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        value = value_of(source)
        out = back_end.pool(layer, value)
        added = value_of(skip) if fused else None
        back = back_end.pool_input_grad(layer, value_of(grad), value, out, masked=fused, skip=added)
        return images_of(out, 20), images_of(back, 20)

    def plain(source: Tensor, grad: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        leaf = source.detach().requires_grad_()
        with torch.enable_grad():
            out = pool(leaf, *window)
        (back,) = torch.autograd.grad(out, leaf, grad)
        return out.detach(), torch.where(source > 0, back + skip, 0) if fused else back

    assert_accurate(ours, plain, [source, grad, skip])


@dtypes
def test_nan_goes_through_a_pool(dtype: torch.dtype) -> None:
    source = torch.zeros(1, 32, 4, 4, dtype=dtype)
    source[0, 5, 1, 1] = torch.nan
    layer = Pool("pool", 1, 2, "max", 2, 2, 0)
    back_end = SimdBackEnd(dtype)
    out = back_end.pool(layer, value_of(source))
    back = back_end.pool_input_grad(
        layer, torch.ones_like(out), value_of(source), out, masked=False
    )
    assert images_of(out, 32).isnan().nonzero().tolist() == [[0, 5, 0, 0]]
    assert back[1, 1, 0, 5] == 1
    assert back.sum() == out.numel()


@dtypes
@pytest.mark.parametrize(("C", "K", "H", "W"), [(64, 10, 4, 4), (20, 7, 3, 2), (33, 100, 1, 1)])
def test_head(C: int, K: int, H: int, W: int, dtype: torch.dtype) -> None:
    layer = Head("fc", 1, C, K)
    weight, bias = random(1, K, C), random(1, K)
    back_end = loaded(dtype, layer, Weights(weight, bias))
    source, grad = random(5, C, H, W).relu().to(dtype), random(1, 5, K)
    logits = back_end.head(layer, value_of(source))
    truth = source.double().mean((2, 3)) @ weight[0].double().T + bias[0].double()
    assert logits.dtype is torch.float32
    assert (logits[0] - truth).abs().max() <= 1e-6 * truth.abs().max()
    back = images_of(back_end.head_input_grad(layer, grad, value_of(source), masked=True), C)
    spread = (grad[0].double() @ weight[0].double() / (H * W))[:, :, None, None]
    truth = torch.where(source > 0, spread, 0)
    assert (back - truth).abs().max() <= TOLERANCES[dtype].floor * truth.abs().max()


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dtypes
@convs
def test_bits_of_an_image(
    case: tuple[int, ...], dtype: torch.dtype, thread_count: Callable[[int], None]
) -> None:
    """They depend neither on the batch around it nor on the number of threads."""
    _, C, outputs, H, W, *_ = case
    layer = conv_layer(case, relu=True)
    back_end = loaded(dtype, layer, parameters(case))
    source, grad = random(37, C, H, W).to(dtype), random(37, outputs, *output_size(case)).to(dtype)

    def run(images: slice) -> tuple[Tensor, Tensor]:
        value = value_of(source[images])
        out = back_end.conv(layer, value, None, None)
        back = back_end.conv_input_grad(layer, value_of(grad[images]), value, masked=True)
        return images_of(out, outputs), images_of(back, C)

    whole = run(slice(0, 37))
    for threads in (1, 3):
        thread_count(threads)
        for images in (slice(0, 1), slice(20, 29), slice(36, 37), slice(0, 37)):
            for part, all_of_it in zip(run(images), whole, strict=True):
                assert torch.equal(part, all_of_it[images])


@dtypes
@convs
def test_empty_batch(case: tuple[int, ...], dtype: torch.dtype) -> None:
    _, C, _, H, W, *_ = case
    layer = conv_layer(case)
    back_end = loaded(dtype, layer, parameters(case))
    value = value_of(torch.zeros(0, C, H, W, dtype=dtype))
    out = back_end.conv(layer, value, None, None)
    assert out.shape[:3] == (*output_size(case), 0)
    assert back_end.conv_input_grad(layer, out, value, masked=True).shape == value.shape


@dtypes
@pytest.mark.parametrize("case", [(2, 32, 64, 8, 8, 1, 2, 0), (2, 32, 64, 8, 8, 3, 2, 1)], ids=ids)
def test_no_pixels(case: tuple[int, ...], dtype: torch.dtype) -> None:
    _, C, _, _, W, *_ = case
    layer = conv_layer(case)
    back_end = loaded(dtype, layer, parameters(case))
    value = value_of(torch.zeros(2, C, 0, W, dtype=dtype))
    assert back_end.conv(layer, value, None, None).numel() == 0


@convs
def test_instructions_agree(case: tuple[int, ...]) -> None:
    """A CPU with AVX-512 runs layers for AVX2 as well; other tests take its first choice."""
    reason = available("avx512", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    B, C, outputs, H, W, *_ = case
    layer, values = conv_layer(case, relu=True), parameters(case)
    value = value_of(random(B, C, H, W))
    grad = value_of(random(B, outputs, *output_size(case)))

    def run(name: str) -> tuple[Tensor, Tensor]:
        back_end = SimdBackEnd(torch.float32, name)
        back_end.load([layer], [values])
        out = back_end.conv(layer, value, None, None)
        return out, back_end.conv_input_grad(layer, grad, value, masked=True)

    for mine, its in zip(run("avx2"), run("avx512"), strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@dtypes
@pytest.mark.parametrize("case", CONVS[:2], ids=ids)
def test_load_again(case: tuple[int, ...], dtype: torch.dtype) -> None:
    """New numbers in the old buffers, for the gradient too."""
    B, C, outputs, H, W, *_ = case
    layer = conv_layer(case)
    old = parameters(case)
    new = Weights(old.weight.flip(1) * 2, old.bias + 1)
    source, grad = random(B, C, H, W).to(dtype), random(B, outputs, *output_size(case)).to(dtype)

    def run(back_end: SimdBackEnd) -> tuple[Tensor, Tensor]:
        value = value_of(source)
        out = back_end.conv(layer, value, None, None)
        return out, back_end.conv_input_grad(layer, value_of(grad), value, masked=False)

    reloaded = loaded(dtype, layer, old)
    before = run(reloaded)
    reloaded.load([layer], [new])
    for again, fresh, stale in zip(
        run(reloaded), run(loaded(dtype, layer, new)), before, strict=True
    ):
        assert torch.equal(again, fresh)
        assert not torch.equal(again, stale)


BUGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a tap dropped": lambda x, w: F.conv2d(x, _without_tap(w), padding=1),
    "weights not turned": lambda x, w: F.conv2d(x, w.flip(2, 3), padding=1),
    "last tile's column lost": lambda x, w: F.pad(F.conv2d(x, w, padding=1)[..., :-1], (0, 1)),
    "images swapped": lambda x, w: F.conv2d(x.flip(0), w, padding=1),
    "padding wraps around": lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w),
}


def _without_tap(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:, :, 2, 2] = 0
    return weight


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_oracle_rejects(bug: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    weight = parameters(CONVS[0]).weight[0].to(dtype)
    inputs = random(4, 64, 8, 8).to(dtype), weight
    assert errors(bug, lambda x, w: F.conv2d(x, w, padding=1), inputs, WINOGRAD[dtype])


def test_unsupported_dtype() -> None:
    assert "float16" in str(available(instructions_for(torch.float16), torch.float16))
    with pytest.raises(RuntimeError, match="float16"):
        SimdBackEnd(torch.float16)
