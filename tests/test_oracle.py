"""The oracle itself: what it accepts, what it rejects, what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_kernels.testing import (
    TOLERANCES,
    Tolerance,
    assert_accurate,
    errors,
    unequal_bits,
    with_gradients,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def square(x: Tensor) -> Tensor:
    return x * x


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_bound(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 64, dtype=dtype)
    truth = square(x.double())
    own = (square(x).double() - truth).abs().max()
    allowed = TOLERANCES[dtype].slack * own + TOLERANCES[dtype].floor * truth.max()

    def off_by(factor: float) -> Tensor:
        # Away from the truth, by this share of what is allowed, at one element.
        wrong = square(x).double()
        wrong[7] = truth[7] + factor * allowed
        return wrong

    wide = {"inputs": (x,), "reference": square}
    rounding = torch.finfo(dtype).eps * truth[7] / allowed
    assert_accurate(lambda x: off_by(0.9 - rounding.item()).to(dtype), **wide)
    with pytest.raises(AssertionError, match=r"output 0: 1 of 64 elements are off, worst at \[7\]"):
        assert_accurate(lambda x: off_by(1.1 + rounding.item()).to(dtype), **wide)


def test_one_bad_element_in_a_million() -> None:
    x = torch.rand(1000, 1000)
    bad = x.clone()
    bad[999, 998] += 1e-5
    assert errors(lambda _: bad, lambda x: x * 1, (x,))


def test_shape_dtype_and_count_have_to_match() -> None:
    x = torch.rand(4, 5)
    assert "[5, 4] on cpu, expected" in errors(lambda x: square(x).t(), square, (x,))[0]
    assert (
        "torch.float64 [4, 5] on cpu, expected"
        in errors(lambda x: square(x).double(), square, (x,))[0]
    )
    assert errors(lambda x: (x, x), square, (x,)) == ["2 outputs, expected 1"]
    assert not errors(lambda x: x.new_empty(0), lambda x: x.new_empty(0), (x,))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values(value: float) -> None:
    x = torch.rand(10)
    x[3] = value
    assert not errors(lambda x: x * 1, lambda x: x * 1, (x,))
    assert errors(lambda x: x.nan_to_num(0.0, 0.0, 0.0), lambda x: x * 1, (x,))
    clean = torch.rand(10)
    assert errors(lambda _: x, lambda x: x * 1, (clean,))


def test_integers_have_to_be_equal() -> None:
    x = torch.rand(10)
    assert not errors(lambda x: x.argsort(), lambda x: x.argsort(), (x,))
    assert errors(lambda x: x.argsort() + 1, lambda x: x.argsort(), (x,))


def test_a_tolerance_of_its_own() -> None:
    x = torch.rand(10)
    assert errors(lambda x: x * (1 + 1e-4), lambda x: x * 1, (x,))
    assert not errors(lambda x: x * (1 + 1e-4), lambda x: x * 1, (x,), Tolerance(2, 1e-3))


def test_with_gradients() -> None:
    x, y = torch.rand(3, 4), torch.rand(4)
    labels = torch.arange(4)
    product, grad_x, grad_y = with_gradients(lambda x, y, labels: x * y)(x, y, labels)
    assert torch.equal(product, x * y)
    grad = grad_y.new_tensor(0)
    assert (grad_x.shape, grad_y.shape) == (x.shape, y.shape)
    # grad_x = g y and grad_y = sum of g x, for one and the same g in multiples of 1/8.
    grad = grad_x / y
    assert torch.allclose(8 * grad, (8 * grad).round(), atol=1e-5)
    assert torch.allclose(grad_y, (grad * x).sum(0))
    assert not x.requires_grad


def test_with_gradients_finds_a_wrong_gradient() -> None:
    x = torch.rand(5)

    def detached(x: Tensor) -> Tensor:
        return x * x.detach()

    assert not errors(detached, square, (x,))
    assert errors(with_gradients(detached), with_gradients(square), (x,))


def test_unequal_bits() -> None:
    x = torch.tensor([0.0, 1.0, torch.nan])
    assert not unequal_bits(lambda x: x.clone(), lambda x: x.clone(), (x,))
    message = unequal_bits(lambda x: x * (1 + 2**-23), lambda x: x * 1, (x,))[0]
    assert message == (
        "output 0: 1 of 3 elements differ, first at [1]: 1.0000001192092896, expected 1.0"
    )
    assert unequal_bits(lambda x: -x, lambda x: x * 1, (torch.zeros(1),))
    assert "expected torch.float32 [3]" in unequal_bits(lambda x: x.half(), lambda x: x, (x,))[0]


def test_settings_come_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        errors(fail, square, (torch.ones(1),))
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
