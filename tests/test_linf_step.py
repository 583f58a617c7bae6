"""linf_step_: equal bits in every implementation, the ball and the range, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_kernels import lang, linf_step_, reference
from moe_kernels.testing import unequal_bits

if TYPE_CHECKING:
    from conftest import Way

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

# CIFAR; digits; odd; one pixel; no axis but the batch; longer than a block.
SHAPES = [(8, 3, 32, 32), (5, 1, 8, 8), (3, 2, 5, 7), (4, 1), (6,), (2, 1500)]

BUGS: dict[str, Callable[..., Tensor]] = {
    "no projection": lambda a, g, x, e, s: (a + _rows(s, a) * g.sign()).clamp(0, 1),
    "ball around the moving point": lambda a, g, x, e, s: reference_step(a, g, a.clone(), e, s),
    "no clip": lambda a, g, x, e, s: torch.minimum(
        torch.maximum(a + _rows(s, a) * g.nan_to_num(0.0).sign(), x - _rows(e, a)), x + _rows(e, a)
    ),
    "sign(0) = 1": lambda a, g, x, e, s: reference_step(a, g + (g == 0), x, e, s),
    "descent": lambda a, g, x, e, s: reference_step(a, -g, x, e, s),
    "state in bfloat16": lambda a, g, x, e, s: reference_step(a, g, x, e, s).bfloat16().float(),
    "one epsilon for all": lambda a, g, x, e, s: reference_step(a, g, x, e[:1].expand_as(e), s),
    "NaN gradient moves": lambda a, g, x, e, s: reference_step(a, g.nan_to_num(1.0), x, e, s),
}


def _rows(per_image: Tensor, images: Tensor) -> Tensor:
    return per_image.view(-1, *[1] * (images.dim() - 1))


def make_inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Images of which some touch 0 or 1, gradients with zeros and NaN, a radius per image."""
    generator = torch.Generator().manual_seed(sum(shape))
    images = (torch.rand(shape, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    epsilon = torch.rand(shape[0], generator=generator) * 0.3
    step_size = torch.rand(shape[0], generator=generator) * 0.2
    noise = torch.rand(shape, generator=generator) * 2 - 1
    adversarial = (images + _rows(epsilon, images) * noise).clamp(0, 1)
    grad = torch.randn(shape, generator=generator)
    flat = grad.view(-1)
    flat[::5], flat[1::7], flat[3::11] = 0.0, -0.0, torch.nan
    flat[2::13] = -torch.inf
    inputs = adversarial, grad.to(dtype), images, epsilon, step_size
    return tuple(x.to(device) for x in inputs)


def reference_step(*inputs: Any) -> Tensor:
    adversarial = inputs[0].clone()
    reference.linf_step_(adversarial, *inputs[1:], 0.0, 1.0)
    return adversarial


def our_step(*inputs: Any) -> Tensor:
    adversarial = inputs[0].clone()
    assert linf_step_(adversarial, *inputs[1:]) is adversarial
    return adversarial


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_bits(shape: tuple[int, ...], way: Way) -> None:
    inputs = make_inputs(shape, way.device, way.dtype)
    assert not unequal_bits(our_step, reference_step, inputs)
    # And the same as the definition on the CPU, whatever the device.
    on_cpu = [x.cpu() for x in inputs]
    assert torch.equal(our_step(*inputs).cpu(), reference_step(*on_cpu))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    low=st.floats(-1, 0.4),
    high=st.floats(0.6, 2),
)
def test_any_shape(shape: tuple[int, ...], low: float, high: float) -> None:
    inputs = make_inputs(shape, "cpu", torch.float32)
    ours, plain = inputs[0].clone(), inputs[0].clone()
    linf_step_(ours, *inputs[1:], low=low, high=high)
    reference.linf_step_(plain, *inputs[1:], low, high)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("bug", BUGS)
def test_bits_reject(bug: str) -> None:
    inputs = make_inputs((8, 3, 16, 16), "cpu", torch.float32)
    assert not unequal_bits(reference_step, reference_step, inputs)
    assert unequal_bits(BUGS[bug], reference_step, inputs)


def test_by_hand(way: Way) -> None:
    images = torch.tensor([[0.5, 0.5, 0.0, 1.0, 0.5, 0.5]], device=way.device)
    adversarial = torch.tensor([[0.5, 0.625, 0.0, 1.0, 0.5, 0.5]], device=way.device)
    grad = torch.tensor([[1.0, 2.0, -1.0, 3.0, 0.0, torch.nan]], device=way.device)
    result = linf_step_(adversarial, grad.to(way.dtype), images, 0.125, 0.0625)
    assert result is adversarial
    # moved; held by the ball; held at 0; held at 1; no gradient; a broken gradient.
    assert result.tolist() == [[0.5625, 0.625, 0.0, 1.0, 0.5, 0.5]]


def test_numbers_are_one_radius_for_all(way: Way) -> None:
    adversarial, grad, images, _, _ = make_inputs((8, 3, 16, 16), way.device, way.dtype)
    by_number = linf_step_(adversarial.clone(), grad, images, 8 / 255, 2 / 255)
    epsilon, step_size = (torch.full((8,), x / 255, device=way.device) for x in (8, 2))
    by_tensor = linf_step_(adversarial.clone(), grad, images, epsilon, step_size)
    assert torch.equal(by_number, by_tensor)


def test_stays_in_the_ball_and_in_range(way: Way) -> None:
    adversarial, grad, images, _, _ = make_inputs((16, 3, 32, 32), way.device, way.dtype)
    for _ in range(20):
        linf_step_(adversarial, grad, images, 8 / 255, 2 / 255)
    assert (adversarial - images).abs().max().item() <= 8 / 255 + 1e-6
    assert 0 <= adversarial.min().item() <= adversarial.max().item() <= 1


def test_nan_pixel_stays_visible(way: Way) -> None:
    adversarial, grad, images, epsilon, step_size = make_inputs((4, 9), way.device, way.dtype)
    adversarial[1, 2] = torch.nan
    images[2, 3] = torch.nan
    linf_step_(adversarial, grad, images, epsilon, step_size)
    assert adversarial.isnan().nonzero().tolist() == [[1, 2], [2, 3]]


def test_strided(way: Way) -> None:
    inputs = make_inputs((4, 3, 8, 8), way.device, way.dtype)
    expected = our_step(*inputs)
    adversarial, grad, images = (x.clone(memory_format=torch.channels_last) for x in inputs[:3])
    assert torch.equal(linf_step_(inputs[0].clone(), grad, images, *inputs[3:]), expected)
    if way.implementation == "reference":
        # No kernel writes into strides: here, and whenever no name is given, the body does.
        assert torch.equal(linf_step_(adversarial, grad, images, *inputs[3:]), expected)
    else:
        with pytest.raises(ValueError, match="strided in-place tensor"):
            linf_step_(adversarial, grad, images, *inputs[3:])


def test_strided_without_a_name(device: torch.device) -> None:
    adversarial, *rest = make_inputs((4, 3, 8, 8), str(device), torch.float32)
    expected = our_step(adversarial, *rest)
    adversarial = adversarial.clone(memory_format=torch.channels_last)
    assert torch.equal(linf_step_(adversarial, *rest), expected)


def test_empty_batch(way: Way) -> None:
    adversarial = torch.empty(0, 3, 8, 8, device=way.device)
    grad = adversarial.to(way.dtype)
    assert linf_step_(adversarial, grad, adversarial.clone(), 0.1, 0.1).shape == (0, 3, 8, 8)


@pytest.mark.real_gpu
def test_opcheck(device: torch.device) -> None:
    for shape in [(3, 2, 5, 7), (0, 4)]:
        inputs = make_inputs(shape, str(device), torch.float32)
        torch.library.opcheck(torch.ops.moe_kernels.linf_step_.default, (*inputs, 0.0, 1.0))


def test_autograd_sees_the_change() -> None:
    adversarial, *rest = make_inputs((4, 9), "cpu", torch.float32)
    weight = torch.ones(4, 9, requires_grad=True)
    loss = (weight * adversarial).sum()
    linf_step_(adversarial, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_has_no_derivative() -> None:
    adversarial, grad, *rest = make_inputs((4, 9), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=r"linf_step_ has no derivative.*detach"):
        linf_step_(adversarial, grad.requires_grad_(), *rest)
    expected = our_step(adversarial, grad.detach(), *rest)
    adversarial.requires_grad_()
    with torch.no_grad():
        linf_step_(adversarial, grad, *rest)
    assert torch.equal(adversarial, expected)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        inputs = make_inputs((4, 9), "cpu", torch.float32)
        assert torch.equal(our_step(*inputs), reference_step(*inputs))


@pytest.mark.skipif(lang.interpreted, reason="the interpreter's kernels are not traced")
def test_compiles_to_one_graph() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(adversarial: Tensor, grad: Tensor, images: Tensor) -> Tensor:
        return linf_step_(adversarial.clone(), grad, images, 0.1, 0.05)

    adversarial, grad, images, _, _ = make_inputs((4, 9), "cpu", torch.float32)
    expected = linf_step_(adversarial.clone(), grad, images, 0.1, 0.05)
    assert torch.equal(step(adversarial, grad, images), expected)


ONES = torch.ones(4, 9)
ERRORS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "grad shape": (
        (ONES.clone(), torch.ones(4, 8), ONES, 0.1, 0.1),
        ValueError,
        r"grad: expected shape \[4, 9\] like adversarial, found \[4, 8\]",
    ),
    "batch": (
        (ONES.clone(), ONES, torch.ones(3, 9), 0.1, 0.1),
        ValueError,
        r"images: expected shape \[B=4, \.\.\.\], found \[3, 9\]",
    ),
    "half images": (
        (ONES.clone(), ONES, ONES.half(), 0.1, 0.1),
        TypeError,
        "images: expected torch.float32, found torch.float16",
    ),
    "integer images": (
        (ONES.byte(), ONES, ONES, 0.1, 0.1),
        TypeError,
        "adversarial: expected torch.float32, found torch.uint8",
    ),
    "integer gradient": (
        (ONES.clone(), ONES.long(), ONES, 0.1, 0.1),
        TypeError,
        "grad: expected a floating dtype, found torch.int64",
    ),
    "negative epsilon": (
        (ONES.clone(), ONES, ONES, -0.1, 0.1),
        ValueError,
        "epsilon: expected a number >= 0, found -0.1",
    ),
    "NaN step": (
        (ONES.clone(), ONES, ONES, 0.1, float("nan")),
        ValueError,
        "step_size: expected a number >= 0, found nan",
    ),
    "epsilon per pixel": (
        (ONES.clone(), ONES, ONES, ONES, 0.1),
        ValueError,
        r"epsilon: expected a number or shape \[4\] on cpu, found \[4, 9\] on cpu",
    ),
    "double epsilon": (
        (ONES.clone(), ONES, ONES, torch.ones(4, dtype=torch.float64), 0.1),
        TypeError,
        "epsilon: expected torch.float32, found torch.float64",
    ),
    "empty range": (
        (ONES.clone(), ONES, ONES, 0.1, 0.1, 1.0, 0.0),
        ValueError,
        "low <= high, found 1.0 and 0.0",
    ),
    "aliased": ((ONES, ONES, ONES, 0.1, 0.1), ValueError, "a copy of images"),
    "no batch": (
        (torch.ones(()), torch.ones(()), torch.ones(()), 0.1, 0.1),
        ValueError,
        r"adversarial: expected shape \[B, \.\.\.\], found \[\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_found(case: str) -> None:
    arguments, error, message = ERRORS[case]
    before = arguments[0].clone()
    with pytest.raises(error, match=message):
        linf_step_(*arguments)
    assert torch.equal(arguments[0], before)
