"""The slab back end, layer by layer against torch's own convolutions, pools and linear layers."""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import INTERPRETED, WAYS, Way
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, linear, max_pool2d

import moe_kernels
from moe_kernels.ops.slab import num_rows
from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.back_ends.slab import Slab, SlabBackEnd
from moe_kernels.plan.layers import Conv, Head, Pool, Projection
from moe_kernels.testing import TOLERANCES, errors

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory", "one_thread")

# Networks, images, input channels, pixels, output channels: odd; whole tiles; one network.
SIZES = [(3, 5, 3, (5, 4), 6), (2, 17, 16, (4, 4), 16), (1, 3, 8, (4, 5), 5)]
# Kernel, stride, padding; the last one is a linear layer after flattening.
WINDOWS = [((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 1), 2, 0), ((3, 2), 2, 1), ((4, 4), 1, 0)]
CASES = list(itertools.product(SIZES, WINDOWS))
STEMS = [(3, (3, 3), 1, 1), (3, (7, 7), 2, 3), (1, (3, 2), 2, 1), (2, (4, 4), 4, 0)]
if INTERPRETED:  # which takes a second for each
    CASES = [CASES[0], CASES[6], CASES[12]]
    STEMS = STEMS[::2]
D = 4  # channels of the side input

Where = tuple[str, torch.dtype]


# No compiled kernel takes slabs, and float64 is for the definitions alone.
SLAB_WAYS = [
    *(x for x in WAYS if x.implementation != "native"),
    Way("cpu", torch.float64, "reference"),
]


@pytest.fixture(
    params=[
        pytest.param(x, marks=[pytest.mark.gpu] if x.device == "cuda" else [], id=str(x))
        for x in SLAB_WAYS
    ]
)
def where(request: pytest.FixtureRequest) -> Iterator[Where]:
    """Device and dtype; ops inside the test run by one implementation or raise."""
    with moe_kernels.implementation(request.param.implementation):
        yield request.param.device, request.param.dtype


class Numbers:
    """Normally distributed tensors that the tested dtype holds."""

    def __init__(self, where: Where) -> None:
        self.device, self.dtype = where
        self.generator = torch.Generator().manual_seed(0)
        # What images, biases and the last layer are kept in.
        self.wide = torch.promote_types(self.dtype, torch.float32)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator)
        return numbers.to(self.device, self.dtype).to(dtype or self.dtype)

    def back_end(self, *loaded: tuple[Any, Weights | None]) -> SlabBackEnd:
        made = SlabBackEnd(torch.device(self.device), self.dtype)
        made.load([layer for layer, _ in loaded], [weights for _, weights in loaded])
        return made

    def wide_weights(self, *tensors: Tensor) -> Weights:
        return Weights(*(x.to(self.wide) for x in tensors))


def slab(images: Tensor, behind: float = 0.0) -> Slab:
    """[E, B, C, H, W] as the back end holds it; `behind` fills the rows that are no images."""
    E, B, C, H, W = images.shape
    rows = images.new_full((E, H, W, num_rows(B), C), behind)
    rows[:, :, :, :B] = images.permute(0, 3, 4, 1, 2)
    return Slab(rows, B)


def images_of(value: Slab) -> Tensor:
    assert value.rows.is_contiguous()
    return value.rows[:, :, :, : value.num_images].permute(0, 3, 4, 1, 2)


def no_gradient_behind(grad: Slab) -> bool:
    return not grad.rows[:, :, :, grad.num_images :].any()


def input_grad(function: Callable[[Tensor], Tensor], like: Tensor, grad: Tensor) -> Tensor:
    """By autograd, through stock torch."""
    x = like.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(function(x), x, grad)[0]


def per_expert(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.stack([function(*one) for one in zip(*tensors, strict=True)])


def faults(ours: Tensor, stock: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[str]:
    """Against stock torch, which gets the same numbers, computes in float32 and rounds once."""

    def plain(*tensors: Tensor) -> Tensor:
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
        exact = tensors[0].dtype is torch.float64
        return stock(*wide).to(torch.float64 if exact else ours.dtype)

    return errors(lambda *_: ours, plain, inputs, TOLERANCES[ours.dtype])


@pytest.mark.parametrize(("sizes", "window"), CASES, ids=str)
def test_conv(sizes: Any, window: Any, where: Where) -> None:
    make = Numbers(where)
    E, B, C, (H, W), O = sizes
    kernel, stride, padding = window
    layer = Conv(
        *("conv", 1, 2, C, O, kernel, stride, padding),
        relu=True,
        residual=3,
        projection=Projection(4, D, 2),
    )
    bare = Conv("bare", 1, 2, C, O, kernel, stride, padding, relu=False)
    weight, bias, projection = make(E, O, C, *kernel), make(E, O, dtype=make.wide), make(E, O, D)
    full = make.wide_weights(weight, bias, projection)
    back_end = make.back_end((layer, full), (bare, make.wide_weights(weight, bias)))
    x = make(E, B, C, H, W)
    P, Q = ((n + 2 * padding - k) // stride + 1 for n, k in zip((H, W), kernel, strict=True))
    residual, beside = make(E, B, O, P, Q), make(E, B, D, 2 * P - 1, 2 * Q)

    def stock(x, weight, bias):
        return per_expert(lambda *one: conv2d(*one, stride, padding), x, weight, bias)

    def stock_full(x, weight, bias, residual, beside, projection):
        side = per_expert(lambda x, w: conv2d(x, w[:, :, None, None], stride=2), beside, projection)
        return (stock(x, weight, bias) + residual + side).relu()

    # What lies behind the images must not reach them.
    y = back_end.conv(bare, slab(x, behind=torch.nan), None, None)
    assert not faults(images_of(y), stock, (x, weight, bias))
    y = back_end.conv(layer, slab(x), slab(residual), slab(beside))
    inputs = x, weight, bias, residual, beside, projection
    assert y.num_images == B
    assert not faults(images_of(y), stock_full, inputs)
    assert faults(images_of(y), lambda x, w, b, r, *_: (stock(x, w, b) + r).relu(), inputs)


@pytest.mark.parametrize(("sizes", "window"), CASES, ids=str)
def test_conv_input_grad(sizes: Any, window: Any, where: Where) -> None:
    make = Numbers(where)
    E, B, C, (H, W), O = sizes
    kernel, stride, padding = window
    layer = Conv("conv", 1, 2, C, O, kernel, stride, padding, relu=False)
    # Another layer, which reads value 1 through its projection alone.
    other = Conv("other", 5, 6, D, D, (1, 1), 1, 0, relu=False, projection=Projection(1, C, 2))
    weight, projection = make(E, O, C, *kernel), make(E, D, C)
    bias, bias_other = torch.zeros(E, O, device=make.device), torch.zeros(E, D, device=make.device)
    back_end = make.back_end(
        (layer, make.wide_weights(weight, bias)),
        (other, make.wide_weights(make(E, D, D, 1, 1), bias_other, projection)),
    )
    x, skip = make(E, B, C, H, W), make(E, B, C, H, W)
    P, Q = ((n + 2 * padding - k) // stride + 1 for n, k in zip((H, W), kernel, strict=True))
    grad, grad_other = make(E, B, O, P, Q), make(E, B, D, (H + 1) // 2, (W + 1) // 2)

    def stock(x, grad, weight):
        def one(x, grad, weight):
            return input_grad(lambda x: conv2d(x, weight, None, stride, padding), x, grad)

        return per_expert(one, x, grad, weight)

    def stock_projection(x, grad, projection):
        def one(x, grad, w):
            return input_grad(lambda x: conv2d(x, w[:, :, None, None], stride=2), x, grad)

        return per_expert(one, x, grad, projection)

    def stock_full(x, grad, weight, skip, grad_other, projection):
        side = stock_projection(x, grad_other, projection)
        return (stock(x, grad, weight) + skip + side) * (x > 0)

    source = slab(x)
    alone = back_end.conv_input_grad(layer, slab(grad), source, masked=False)
    assert not faults(images_of(alone), stock, (x, grad, weight))
    meeting = {"skip": slab(skip), "projection": (other, slab(grad_other))}
    full = back_end.conv_input_grad(layer, slab(grad), source, masked=True, **meeting)
    inputs = x, grad, weight, skip, grad_other, projection
    assert not faults(images_of(full), stock_full, inputs)
    assert faults(images_of(full), lambda x, g, w, s, *_: (stock(x, g, w) + s) * (x > 0), inputs)
    side = back_end.projection_input_grad(other, slab(grad_other), source)
    assert not faults(images_of(side), stock_projection, (x, grad_other, projection))
    assert all(map(no_gradient_behind, (alone, full, side)))
    total = back_end.add(alone, side)
    assert torch.equal(total.rows, alone.rows + side.rows)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own images"])
@pytest.mark.parametrize(("C", "kernel", "stride", "padding"), STEMS)
def test_images(
    C: int, kernel: tuple[int, int], stride: int, padding: int, shared: bool, where: Where
) -> None:
    make = Numbers(where)
    E, B, H, W, O = 3, 5, 8, 9, 6
    layer = Conv("stem", 0, 1, C, O, kernel, stride, padding, relu=True)
    weight, bias = make(E, O, C, *kernel), make(E, O, dtype=make.wide)
    back_end = make.back_end((layer, make.wide_weights(weight, bias)))
    # Numbers that bfloat16 does not hold.
    x = torch.randn(1 if shared else E, B, C, H, W, generator=make.generator).to(make.device)

    def stock(x, weight, bias):
        x = x.expand(E, -1, -1, -1, -1)
        return per_expert(lambda *one: conv2d(*one, stride, padding), x, weight, bias)

    entered = back_end.enter(x)
    y = back_end.conv(layer, entered, None, None)
    assert y.num_images == B
    x = x.to(make.wide)
    assert not faults(images_of(y), lambda *all: stock(*all).relu(), (x, weight, bias))

    P, Q = images_of(y).shape[3:]
    grad = make(E, B, O, P, Q)

    def stock_grad(x, weight, grad):
        no_bias = weight.new_zeros(E, O)
        return input_grad(lambda x: stock(x, weight, no_bias), x, grad)

    image_grad = back_end.image_grad(layer, slab(grad), entered)
    assert image_grad.shape == x.shape
    assert image_grad.dtype is make.wide
    assert not faults(image_grad, stock_grad, (x, weight, grad))


def test_images_are_read_more_precisely_than_the_dtype() -> None:
    make = Numbers(("cpu", torch.bfloat16))
    layer = Conv("stem", 0, 1, 1, 1, (1, 1), 1, 0, relu=False)
    # Twice almost the same pixel: rounded to bfloat16 nothing would be left of the difference.
    weight = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1)
    back_end = make.back_end((layer, Weights(weight, torch.zeros(1, 1))))
    x = torch.tensor([1.0 + 2**-12, 1.0]).view(1, 1, 2, 1, 1)
    assert x.bfloat16().diff(dim=2).item() == 0
    y = back_end.conv(layer, back_end.enter(x), None, None)
    assert images_of(y).item() == 2**-12


@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "padding"),
    [("max", 3, 2, 1), ("max", 2, 2, 0), ("mean", 3, 2, 1), ("mean", 2, 1, 0)],
)
def test_pool(kind: str, kernel: int, stride: int, padding: int, where: Where) -> None:
    make = Numbers(where)
    E, B, C, H, W = 2, 5, 3, 7, 6
    layer = Pool("pool", 1, 2, kind, kernel, stride, padding)
    back_end = make.back_end((layer, None))
    function = max_pool2d if kind == "max" else avg_pool2d

    def stock(x):
        return per_expert(lambda x: function(x, kernel, stride, padding), x)

    def stock_grad(x, grad, skip):
        return (input_grad(stock, x, grad) + skip) * (x > 0)

    # Few different numbers, so that maxima are shared.
    x = (make(E, B, C, H, W) * 2).round() / 2
    source = slab(x)
    y = back_end.pool(layer, source)
    assert not faults(images_of(y), stock, (x,))
    grad, skip = make(*images_of(y).shape), make(E, B, C, H, W)
    plain = back_end.pool_input_grad(layer, slab(grad), source, y, masked=False)
    assert not faults(images_of(plain), lambda x, grad: input_grad(stock, x, grad), (x, grad))
    full = back_end.pool_input_grad(layer, slab(grad), source, y, masked=True, skip=slab(skip))
    assert not faults(images_of(full), stock_grad, (x, grad, skip))
    assert no_gradient_behind(full)


@pytest.mark.parametrize("sizes", SIZES, ids="E{0[0]}-B{0[1]}-C{0[2]}-K{0[4]}".format)
def test_head(sizes: Any, where: Where) -> None:
    make = Numbers(where)
    E, B, C, (H, W), K = sizes
    layer = Head("head", 1, C, K)
    weight, bias = make(E, K, C, dtype=make.wide), make(E, K, dtype=make.wide)
    back_end = make.back_end((layer, Weights(weight, bias)))
    x, grad = make(E, B, C, H, W), make(E, B, K, dtype=make.wide)

    def stock(x, weight, bias):
        return per_expert(linear, x.mean(dim=(3, 4)), weight, bias)

    def stock_grad(x, weight, bias, grad):
        return input_grad(lambda x: stock(x, weight, bias), x, grad) * (x > 0)

    logits = back_end.head(layer, slab(x, behind=torch.nan))
    assert logits.dtype is make.wide
    assert not faults(logits, stock, (x, weight, bias))
    grad_x = back_end.head_input_grad(layer, grad, slab(x), masked=True)
    assert not faults(images_of(grad_x), stock_grad, (x, weight, bias, grad))
    assert no_gradient_behind(grad_x)


def test_loading_again_fills_the_same_memory() -> None:
    make = Numbers(("cpu", torch.float32))
    layer = Conv("conv", 1, 2, 3, 3, (3, 3), 1, 1, relu=False, projection=Projection(4, D, 1))
    stem = Conv("stem", 0, 1, 3, 3, (3, 3), 1, 1, relu=False)
    head = Head("head", 2, 3, 7)

    def weights() -> list[Weights]:
        shapes = (2, 3, 3, 3, 3), (2, 3), (2, 3, D)
        return [
            Weights(*(make(*shape) for shape in shapes)),
            Weights(*(make(*shape) for shape in shapes[:2])),
            Weights(make(2, 7, 3), make(2, 7)),
        ]

    layers = [layer, stem, head]
    back_end, fresh = (SlabBackEnd(torch.device("cpu"), torch.float32) for _ in range(2))
    first, second = weights(), weights()
    back_end.load(layers, first)

    def tensors(of: SlabBackEnd) -> list[Tensor]:
        parameters = of._parameters.values()
        return [x for one in parameters for x in vars(one).values() if x is not None]

    addresses = [x.data_ptr() for x in tensors(back_end)]
    assert not set(addresses) & {w.weight.data_ptr() for w in first}
    back_end.load(layers, second)
    assert [x.data_ptr() for x in tensors(back_end)] == addresses
    fresh.load(layers, second)
    assert all(map(torch.equal, tensors(back_end), tensors(fresh)))


@pytest.mark.parametrize(
    "layer",
    [
        Pool("pool", 0, 1, "max", 2, 2, 0),
        Head("head", 0, 3, 10),
        Conv("conv", 1, 2, 3, 3, (1, 1), 1, 0, relu=False, projection=Projection(0, 3, 1)),
    ],
    ids=lambda layer: layer.name,
)
def test_what_cannot_read_the_images_is_named(layer: Any) -> None:
    back_end = SlabBackEnd(torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=f"{layer.name}: only a convolution can read the images"):
        back_end.load([layer], [None])
