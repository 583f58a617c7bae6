"""Images to columns and back, pooling on slabs: bits, accuracy, mistakes, by hand, errors."""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED, WAYS, Way
from torch import Tensor
from torch.nn.functional import conv2d

import moe_kernels
from moe_kernels import lang, reference
from moe_kernels.arguments import num_outputs
from moe_kernels.ops import pool as pooling
from moe_kernels.ops import slab
from moe_kernels.ops.pool import pool, pool_input_grad
from moe_kernels.ops.slab import image_columns, num_columns, num_rows, stem_input_grad
from moe_kernels.testing import assert_accurate, errors, unequal_bits

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory", "one_thread")

# G, B, C, H, W, kernel, stride, padding: CIFAR's; ImageNet's; odd; one pixel.
STEMS = [
    (1, 5, 3, 6, 6, (3, 3), 1, 1),
    (2, 3, 3, 9, 8, (7, 7), 2, 3),
    (3, 2, 2, 5, 7, (3, 4), 2, 1),
    (1, 17, 1, 1, 1, (1, 1), 1, 0),
]
# E, H, W, N, C, kernel, stride, padding, kind.
POOLS = [
    (2, 5, 4, 3, 5, 3, 2, 1, "max"),
    (1, 4, 4, 16, 8, 2, 2, 0, "max"),
    (2, 3, 5, 2, 3, 3, 1, 1, "max"),
    (2, 5, 4, 3, 5, 3, 2, 1, "mean"),
    (3, 2, 2, 5, 7, 2, 2, 0, "mean"),
]
if INTERPRETED:  # which takes seconds for each
    STEMS, POOLS = [STEMS[0], STEMS[2]], [POOLS[0], POOLS[4]]


@pytest.fixture(
    params=[
        pytest.param(x, marks=[pytest.mark.gpu] if x.device == "cuda" else [], id=str(x))
        for x in WAYS
        if x.implementation != "native"  # these ops have none
    ]
)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """Each implementation; ops inside the test run by it or raise."""
    with moe_kernels.implementation(request.param.implementation):
        yield request.param


def normal(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_columns_have_the_bits_of_the_definition(stem: Any, way: Way) -> None:
    *shape, kernel, stride, padding = stem
    images = normal(*shape, device=way.device)
    columns = image_columns(images, kernel=kernel, stride=stride, padding=padding, dtype=way.dtype)
    expected = torch.full_like(columns, torch.nan)
    reference.image_columns_(expected, images, *kernel, stride, padding)
    assert not unequal_bits(lambda: columns, lambda: expected, ())


@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_columns_times_weights_are_the_convolution(stem: Any) -> None:
    G, B, C, H, W, kernel, stride, padding = stem
    images, weight = normal(G, B, C, H, W), normal(4, C, *kernel)
    geometry = {"kernel": kernel, "stride": stride, "padding": padding}
    taps = kernel[0] * kernel[1] * C
    flat = weight.permute(0, 2, 3, 1).flatten(1)  # [O, R * S * C]
    for dtype, sets, tolerance in [(torch.float32, 1, 1e-5), (torch.bfloat16, 2, 1e-3)]:
        columns = image_columns(images, dtype=dtype, **geometry)
        _, P, Q, N, K = columns.shape
        assert (N, K) == (num_rows(B), num_columns(taps, dtype))
        assert not columns[:, :, :, B:].any()
        assert not columns[..., sets * taps :].any()
        found = columns[..., : sets * taps].double() @ torch.cat([flat] * sets, dim=1).double().T
        for g in range(G):
            expected = conv2d(images[g].double(), weight.double(), None, stride, padding)
            torch.testing.assert_close(
                found[g, :, :, :B].permute(2, 3, 0, 1), expected, rtol=tolerance, atol=tolerance
            )
            assert expected.shape[2:] == (P, Q)


def test_two_sets_carry_sixteen_bits() -> None:
    images = normal(1, 64, 1, 4, 4)
    columns = image_columns(images, kernel=(1, 1), stride=1, padding=0, dtype=torch.bfloat16)
    carried = columns[0, ..., :64, :2].float().sum(dim=3)  # [P, Q, B]
    error = (carried - images[0, :, 0].permute(1, 2, 0)).abs()
    assert (error <= 2**-16 * images.abs().max()).all()
    alone = (columns[0, ..., :64, 0].float() - images[0, :, 0].permute(1, 2, 0)).abs()
    assert alone.max() > 2**-10


@pytest.mark.parametrize(
    ("B", "rows"), [(0, 16), (1, 16), (16, 16), (17, 32), (33, 64), (128, 128), (129, 192)]
)
def test_rows_are_whole_tiles(B: int, rows: int) -> None:
    assert num_rows(B) == rows


def stem_inputs(stem: Any, O: int, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    _, B, C, H, W, (R, S), stride, padding = stem
    E, P, Q = 3, num_outputs(H, R, stride, padding), num_outputs(W, S, stride, padding)
    grad = normal(E, P, Q, num_rows(B), O, device=device, dtype=dtype)
    # The rows behind the images must not matter.
    grad[:, :, :, B:] = 1e4
    weight_t = normal(E, R, S, C, O, device=device, dtype=dtype)
    return grad, weight_t, B, H, W, stride, padding


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own images"])
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_stem_gradient(stem: Any, shared: bool, way: Way) -> None:
    inputs = *stem_inputs(stem, 5, way.device, way.dtype), shared
    assert_accurate(slab._stem_input_grad, reference.stem_input_grad, inputs)
    assert slab._stem_input_grad(*inputs).dtype is torch.float32


@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_stem_gradient_formula_is_autograd(stem: Any) -> None:
    grad, weight_t, B, H, W, stride, padding = stem_inputs(stem, 5, "cpu", torch.float64)
    images = normal(3, B, stem[2], H, W, dtype=torch.float64).requires_grad_()
    y = torch.stack(
        [conv2d(x, w.permute(3, 2, 0, 1), None, stride, padding)
         for x, w in zip(images, weight_t, strict=True)]
    )  # fmt: skip
    outer = grad[:, :, :, :B].permute(0, 3, 4, 1, 2)
    (expected,) = torch.autograd.grad(y, images, outer)
    numbers = B, H, W, stride, padding
    ours = reference.stem_input_grad(grad, weight_t, *numbers, False)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours = reference.stem_input_grad(grad, weight_t, *numbers, True)
    torch.testing.assert_close(ours, expected.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


STEM_BUGS: dict[str, Callable[..., Tensor]] = {
    "taps reversed": lambda grad, weight_t, *rest: reference.stem_input_grad(
        grad, weight_t.flip(1, 2), *rest
    ),
    "last expert dropped": lambda grad, weight_t, *rest: reference.stem_input_grad(
        grad[:-1], weight_t[:-1], *rest
    ),
    "mean over the experts": lambda *inputs: reference.stem_input_grad(*inputs) / 3,
    "images in the order of rows": lambda *inputs: reference.stem_input_grad(*inputs).flip(1),
    "H and W exchanged": lambda *inputs: reference.stem_input_grad(*inputs).mT,
    "sums in bfloat16": lambda *inputs: reference.stem_input_grad(*inputs).bfloat16().float(),
}


@pytest.mark.parametrize("bug", STEM_BUGS)
def test_oracle_rejects(bug: str) -> None:
    inputs = *stem_inputs(STEMS[0], 5, "cpu", torch.float32), True
    assert not errors(reference.stem_input_grad, reference.stem_input_grad, inputs)
    assert errors(STEM_BUGS[bug], reference.stem_input_grad, inputs)


def pool_inputs(case: Any, device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], ...]:
    E, H, W, N, C, kernel, stride, padding, kind = case
    P, Q = (num_outputs(size, kernel, stride, padding) for size in (H, W))
    # Few different numbers, so that maxima are shared.
    x = normal(E, H, W, N, C, device=device).round().to(dtype)
    grad = normal(E, P, Q, N, C, device=device, dtype=dtype)
    skip = normal(E, H, W, N, C + 1, device=device, dtype=dtype)[..., 1:]
    window = kernel, stride, padding, kind == "max"
    return (x, *window), (grad, x, skip, *window, True), (grad, x, None, *window, False)


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool(case: Any, way: Way) -> None:
    forward, *backward = pool_inputs(case, way.device, way.dtype)
    assert_accurate(pooling._pool, reference.pool, forward)
    for inputs in backward:
        assert_accurate(pooling._pool_input_grad, reference.pool_input_grad, inputs)


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool_gradient_formula_is_autograd(case: Any) -> None:
    (x, *window), (grad, _, skip, *_), _ = pool_inputs(case, "cpu", torch.float64)
    leaf = x.clone().requires_grad_()
    (inner,) = torch.autograd.grad(reference.pool(leaf, *window), leaf, grad)
    ours = reference.pool_input_grad(grad, x, skip, *window, True)
    torch.testing.assert_close(ours, (inner + skip) * (x > 0), rtol=1e-12, atol=1e-12)


def _last_maximum(grad: Tensor, x: Tensor, skip: Any, *rest: Any) -> Tensor:
    grads = reference.pool_input_grad(grad.flip(1, 2), x.flip(1, 2), skip.flip(1, 2), *rest)
    return grads.flip(1, 2)


POOL_BUGS: dict[str, Callable[..., Tensor]] = {
    "last maximum wins": _last_maximum,
    "no mask": lambda *inputs: reference.pool_input_grad(*inputs[:-1], False),
    "no skip": lambda grad, x, skip, *rest: reference.pool_input_grad(grad, x, None, *rest),
    "mean instead of maximum": lambda *inputs: reference.pool_input_grad(
        *inputs[:6], False, *inputs[7:]
    ),
}


@pytest.mark.parametrize("bug", POOL_BUGS)
def test_oracle_rejects_in_the_pool(bug: str) -> None:
    # A window that lies alike from both sides.
    inputs = pool_inputs((2, 5, 5, 3, 5, 3, 2, 1, "max"), "cpu", torch.float32)[1]
    assert not errors(reference.pool_input_grad, reference.pool_input_grad, inputs)
    assert errors(POOL_BUGS[bug], reference.pool_input_grad, inputs)


def test_pool_by_hand(way: Way) -> None:
    def make(*values: float) -> Tensor:
        return torch.tensor(values, device=way.device, dtype=way.dtype).view(1, 2, -1, 1, 1)

    x = make(1, 5, 5, 2, 0, 5, 1, 3)
    assert pool(x, kind="max", kernel=2, stride=2).flatten().tolist() == [5.0, 5.0]
    assert pool(x, kind="mean", kernel=2, stride=2).flatten().tolist() == [2.75, 2.75]
    grad = make(8, 16)[:, :1].view(1, 1, 1, 1, 1) * make(1, 2).view(1, 1, 2, 1, 1)
    grads = pool_input_grad(grad, x, kind="max", kernel=2, stride=2)
    # Of the two fives on the left the first one; on the right there is one.
    assert grads.flatten().tolist() == [0.0, 8.0, 16.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    grads = pool_input_grad(grad, x, kind="mean", kernel=2, stride=2, masked=True)
    assert grads.flatten().tolist() == [2.0, 2.0, 4.0, 4.0, 0.0, 2.0, 4.0, 4.0]


def test_empty_batch(way: Way) -> None:
    images = torch.zeros(1, 0, 3, 4, 4, device=way.device)
    columns = image_columns(images, kernel=(3, 3), stride=1, padding=1, dtype=way.dtype)
    assert not columns.any()
    grad, weight_t = (
        torch.zeros(shape, device=way.device, dtype=way.dtype)
        for shape in ((2, 4, 4, 16, 5), (2, 3, 3, 3, 5))
    )
    geometry = {"image_shape": (0, 4, 4), "stride": 1, "padding": 1}
    assert stem_input_grad(grad, weight_t, shared=True, **geometry).shape == (1, 0, 3, 4, 4)
    assert pool(grad[:, :, :, :0], kind="max", kernel=2, stride=2).shape == (2, 2, 2, 0, 5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(lang.interpreted, reason="it looks at the op, not at the kernels")
@pytest.mark.parametrize("name", ["image_columns_", "stem_input_grad", "pool", "pool_input_grad"])
@pytest.mark.real_gpu
def test_opcheck(name: str, device: torch.device) -> None:
    forward, backward, _ = pool_inputs(POOLS[0], str(device), torch.float32)
    inputs = {
        "image_columns_": (
            torch.zeros(1, 6, 6, 16, 32, device=device),
            normal(1, 5, 3, 6, 6, device=str(device)),
            *(3, 3, 1, 1),
        ),
        "stem_input_grad": (*stem_inputs(STEMS[-1], 5, str(device), torch.float32), False),
        "pool": forward,
        "pool_input_grad": backward,
    }
    torch.library.opcheck(getattr(torch.ops.moe_kernels, name).default, inputs[name])


def test_what_does_not_fit_is_named() -> None:
    images, x = torch.zeros(1, 2, 3, 4, 4), torch.zeros(2, 4, 4, 3, 5)
    geometry = {"kernel": (3, 3), "stride": 1, "padding": 1}
    with pytest.raises(ValueError, match=r"images: expected shape \[G, B, C, H, W\]"):
        image_columns(images[0], dtype=torch.float32, **geometry)
    with pytest.raises(
        TypeError, match=r"images: expected torch\.float32 for columns in torch\.bf"
    ):
        image_columns(images.double(), dtype=torch.bfloat16, **geometry)
    with pytest.raises(ValueError, match="images: expected at least 9 x 3 pixels"):
        image_columns(images, dtype=torch.float32, kernel=(9, 3), stride=1, padding=1)
    grad, weight_t = torch.zeros(2, 4, 4, 16, 5), torch.zeros(2, 3, 3, 3, 5)
    with pytest.raises(ValueError, match="grad: expected at least 17 rows, one for each image"):
        stem_input_grad(grad, weight_t, image_shape=(17, 4, 4), stride=1, padding=1, shared=True)
    with pytest.raises(ValueError, match=r"grad: expected shape \[E=2, P=3, Q=3"):
        stem_input_grad(grad, weight_t, image_shape=(2, 3, 3), stride=1, padding=1, shared=True)
    with pytest.raises(ValueError, match="kind: expected 'max' or 'mean', found 'median'"):
        pool(x, kind="median", kernel=2, stride=2)
    with pytest.raises(ValueError, match="padding: expected at most half of kernel 2, found 2"):
        pool(x, kind="max", kernel=2, stride=2, padding=2)
    with pytest.raises(ValueError, match="x: expected at least 5 x 5 pixels with padding 0"):
        pool(x, kind="max", kernel=5, stride=2)
    with pytest.raises(ValueError, match=r"grad: expected shape \[E=2, P=2, Q=2"):
        pool_input_grad(x, x, kind="max", kernel=2, stride=2)
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        pool(x.long(), kind="max", kernel=2, stride=2)
