"""The pooled classifiers of all experts, and the mixture's loss: accuracy, mistakes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import WAYS, Way
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import moe_kernels
from moe_kernels import lang, reference
from moe_kernels.ops import head
from moe_kernels.ops.head import pooled_cross_entropy, pooled_logits, pooled_logits_input_grad
from moe_kernels.testing import assert_accurate, errors

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory", "one_thread")

# E, P, Q, B, N, C, K: the paper's, narrower; odd; one of everything; more channels than a program
# holds at a time; more classes than a program holds.
SHAPES = [
    (9, 4, 4, 5, 16, 48, 10),
    (3, 2, 3, 3, 5, 7, 4),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 2, 2, 2, 300, 3),
    (1, 1, 1, 1, 2, 130, 200),
]


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


def make_inputs(shape: Any, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias, gate_logits, labels; the rows behind the images are large."""
    E, P, Q, B, N, C, K = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device)

    x = make(E, P, Q, N, C).to(dtype)
    x[:, :, :, B:] = 1e4
    labels = torch.arange(B, device=device) * 7 % K
    wide = torch.promote_types(dtype, torch.float32)
    numbers = make(E, K, C), make(E, K), make(B, E)
    return x, *(value.to(wide) for value in numbers), labels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits(shape: Any, way: Way) -> None:
    x, weight, bias, _, labels = make_inputs(shape, way.device, way.dtype)
    inputs = x, weight, bias, len(labels)
    assert_accurate(head._logits, reference.pooled_logits, inputs)
    assert head._logits(*inputs).dtype is torch.float32


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient(shape: Any, masked: bool, way: Way) -> None:
    x, weight, _, _, labels = make_inputs(shape, way.device, way.dtype)
    E, *_, K = shape
    generator = torch.Generator().manual_seed(0)
    grad_logits = torch.randn(E, len(labels), K, generator=generator).to(way.device)
    inputs = grad_logits, weight, x, masked
    assert_accurate(head._input_grad, reference.pooled_logits_input_grad, inputs)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(shape: Any, masked: bool, way: Way) -> None:
    inputs = *make_inputs(shape, way.device, way.dtype), masked
    assert_accurate(head._cross_entropy, reference.pooled_cross_entropy, inputs)


def test_definitions_are_torch() -> None:
    x, weight, bias, gate, labels = make_inputs(SHAPES[1], "cpu", torch.float64)
    B = len(labels)
    leaf, gate_leaf = x.clone().requires_grad_(), gate.clone().requires_grad_()
    features = leaf[:, :, :, :B].mean(dim=(1, 2))
    expert_logits = torch.stack([linear(*one) for one in zip(features, weight, bias, strict=True)])
    torch.testing.assert_close(reference.pooled_logits(x, weight, bias, B), expert_logits)
    mixed = torch.einsum("be,ebk->bk", gate_leaf.softmax(1), expert_logits)
    losses = cross_entropy(mixed, labels, reduction="none")
    grads = torch.autograd.grad(losses.sum(), (gate_leaf, leaf))
    loss, logits, grad_gate, grad_x = reference.pooled_cross_entropy(
        x, weight, bias, gate, labels, False
    )
    torch.testing.assert_close((loss, logits), (losses, mixed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((grad_gate, grad_x), grads, rtol=1e-12, atol=1e-12)
    masked = reference.pooled_cross_entropy(x, weight, bias, gate, labels, True)[3]
    torch.testing.assert_close(masked, grads[1] * (x > 0), rtol=1e-12, atol=1e-12)


def _changed(place: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args: reference.pooled_cross_entropy(
        *(change(x) if i == place else x for i, x in enumerate(args))
    )


def _output(place: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda *args: tuple(
        change(x) if i == place else x for i, x in enumerate(reference.pooled_cross_entropy(*args))
    )


BUGS: dict[str, Callable[..., Any]] = {
    "sum over the pixels": _output(3, lambda grad: grad * 16),
    "no mask": _changed(5, lambda masked: False),
    "weights of the next expert": _changed(1, lambda weight: weight.roll(1, 0)),
    "uniform gate": _changed(3, torch.zeros_like),
    "label off by one": _changed(4, lambda labels: (labels + 1) % 10),
    "mean over the batch": _output(3, lambda grad: grad / 5),
    "gate gradient of the wrong sign": _output(2, torch.neg),
    "gradient behind the images": _output(3, lambda grad: grad.where(grad != 0, 1.0)),
    "classes shuffled": _output(1, lambda logits: logits.roll(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_oracle_rejects(bug: str) -> None:
    inputs = *make_inputs(SHAPES[0], "cpu", torch.float32), True
    plain = reference.pooled_cross_entropy
    assert not errors(plain, plain, inputs)
    assert errors(BUGS[bug], plain, inputs)


def test_by_hand(way: Way) -> None:
    # Two pixels of one channel, 1 and 3: mean 2; logits 2 and -2, less 2 for the first: 0 and -2.
    x = torch.tensor([1.0, 3.0], device=way.device, dtype=way.dtype).view(1, 1, 2, 1, 1)
    weight = torch.tensor([[[1.0], [-1.0]]], device=way.device)
    bias = torch.tensor([[-2.0, 2.0]], device=way.device)
    assert pooled_logits(x, weight, bias, B=1).flatten().tolist() == [0.0, 0.0]
    grad_logits = torch.tensor([[[4.0, 1.0]]], device=way.device)
    grad_x = pooled_logits_input_grad(grad_logits, weight, x)
    assert grad_x.flatten().tolist() == [1.5, 1.5]
    gate_logits = torch.zeros(1, 1, device=way.device)
    labels = torch.ones(1, dtype=torch.uint8, device=way.device)
    loss, logits, grad_gate, grad_x = pooled_cross_entropy(x, weight, bias, gate_logits, labels)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert logits.tolist() == [[0.0, 0.0]]
    assert grad_gate.tolist() == [[0.0]]
    # Probabilities less label: 1/2, -1/2; times 1, -1, over two pixels.
    assert grad_x.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_impossible_label_is_nan(label: int, way: Way) -> None:
    x, weight, bias, gate, labels = make_inputs(SHAPES[1], way.device, way.dtype)
    labels[1] = label
    loss, _, grad_gate, grad_x = pooled_cross_entropy(x, weight, bias, gate, labels)
    bad = torch.tensor([False, True, False])
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(grad_gate.isnan().all(dim=1).cpu(), bad)
    assert torch.equal(grad_x[:, :, :, :3].isnan().all(dim=(0, 1, 2, 4)).cpu(), bad)
    assert not grad_x[:, :, :, 3:].any()


def test_empty_batch(way: Way) -> None:
    x, weight, bias, gate, labels = make_inputs(SHAPES[1], way.device, way.dtype)
    assert pooled_logits(x, weight, bias, B=0).shape == (3, 0, 4)
    outputs = pooled_cross_entropy(x, weight, bias, gate[:0], labels[:0])
    assert [x.shape for x in outputs[:3]] == [(0,), (0, 4), (0, 3)]
    assert not outputs[3].any()
    assert not pooled_logits_input_grad(x.new_zeros(3, 0, 4).float(), weight, x).any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(lang.interpreted, reason="it looks at the op, not at the kernels")
@pytest.mark.real_gpu
def test_opcheck(device: torch.device) -> None:
    x, weight, bias, gate, labels = make_inputs(SHAPES[1], str(device), torch.float32)
    grad_logits = torch.ones(3, 3, 4, device=device)
    for name, inputs in {
        "pooled_logits": (x, weight, bias, 3),
        "pooled_logits_input_grad": (grad_logits, weight, x, True),
        "pooled_cross_entropy": (x, weight, bias, gate, labels, True),
    }.items():
        torch.library.opcheck(getattr(torch.ops.moe_kernels, name).default, inputs)


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias, gate, labels = make_inputs(SHAPES[1], "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"weight: expected shape \[.*C=7\], found \[3, 4, 6\]"):
        pooled_logits(x, weight[:, :, 1:], bias, B=3)
    with pytest.raises(ValueError, match="x: expected at least 6 rows, one for each image"):
        pooled_logits(x, weight, bias, B=6)
    with pytest.raises(ValueError, match=r"x: expected shape"):
        pooled_logits_input_grad(torch.zeros(3, 3, 4), weight, x[:2])
    with pytest.raises(ValueError, match=r"labels: expected shape \[B=3\], found \[2\]"):
        pooled_cross_entropy(x, weight, bias, gate, labels[1:])
    with pytest.raises(TypeError, match=r"labels: expected an integer dtype, found torch\.float32"):
        pooled_cross_entropy(x, weight, bias, gate, labels.float())
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        pooled_logits(x.long(), weight, bias, B=3)
