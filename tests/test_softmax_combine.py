"""softmax_combine and its cross-entropy variant: accuracy, gradients, shapes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_kernels
from moe_kernels import lang, reference, softmax_combine, softmax_combine_cross_entropy
from moe_kernels.op import registry
from moe_kernels.testing import Tolerance, assert_accurate, errors, with_gradients

if TYPE_CHECKING:
    from conftest import Way

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

# The paper's; one expert; odd; one image; wide; many experts. B, E, K.
SHAPES = [(8, 9, 10), (4, 1, 10), (3, 5, 7), (1, 9, 10), (2, 9, 100), (2, 70, 3), (5, 3, 1)]
FUSED = ["native", "triton"]

BUGS: dict[str, Callable[..., Any]] = {
    "softmax over the batch": lambda gate, expert: torch.einsum(
        "be,ebk->bk", gate.softmax(0), expert
    ),
    "last expert dropped": lambda gate, expert: reference.softmax_combine(
        gate[:, :-1], expert[:-1]
    ),
    "1e-3 in the denominator": lambda gate, expert: reference.softmax_combine(gate, expert) * 0.999,
    "gate without gradient": lambda gate, expert: (
        reference.softmax_combine(gate.detach(), expert) + 0 * gate.sum()
    ),
    "softmax without the maximum": lambda gate, expert: torch.einsum(
        "be,ebk->bk", gate.exp() / gate.exp().sum(1, keepdim=True), expert
    ),
    "a row not written": lambda gate, expert: torch.cat(
        [reference.softmax_combine(gate, expert)[:-1], expert[0, -1:] * torch.nan]
    ),
}
LOSS_BUGS: dict[str, Callable[..., Any]] = {
    "mean instead of sum": lambda gate, expert, labels: _scaled(
        reference.softmax_combine_cross_entropy(gate, expert, labels), 1, 1 / len(labels)
    ),
    "wrong sign": lambda gate, expert, labels: _scaled(
        reference.softmax_combine_cross_entropy(gate, expert, labels), 1, -1
    ),
    "label off by one": lambda gate, expert, labels: reference.softmax_combine_cross_entropy(
        gate, expert, (labels + 1) % expert.shape[2]
    ),
    "gradient through the gate's logits unmixed": lambda gate, expert, labels: (
        reference.softmax_combine_cross_entropy(0 * gate, expert, labels)
    ),
}


def _scaled(outputs: tuple[Tensor, ...], loss: float, grads: float) -> tuple[Tensor, ...]:
    return outputs[0] * loss, *(x * grads for x in outputs[1:])


def make_inputs(
    B: int, E: int, K: int, device: str, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + 31 * E + 997 * K)
    gate = torch.randn(B, E, generator=generator)
    expert = torch.randn(E, B, K, generator=generator)
    return (scale * gate).to(device, dtype), (scale * expert).to(device, dtype)


def make_labels(B: int, K: int, device: str) -> Tensor:
    return torch.arange(B, device=device) * 7 % K


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-E{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["mild", "saturated"])
def test_accuracy(shape: tuple[int, int, int], scale: float, way: Way) -> None:
    inputs = make_inputs(*shape, way.device, way.dtype, scale)
    ours, plain = with_gradients(softmax_combine), with_gradients(reference.softmax_combine)
    assert_accurate(ours, plain, inputs)


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-E{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["mild", "saturated"])
def test_cross_entropy_accuracy(shape: tuple[int, int, int], scale: float, way: Way) -> None:
    inputs = make_inputs(*shape, way.device, way.dtype, scale)
    labels = make_labels(shape[0], shape[2], way.device)
    assert_accurate(
        softmax_combine_cross_entropy,
        reference.softmax_combine_cross_entropy,
        (*inputs, labels),
    )


@pytest.mark.parametrize("bug", BUGS)
def test_oracle_rejects(bug: str) -> None:
    # At scale 100 an exponential without its maximum overflows.
    inputs = make_inputs(8, 9, 10, "cpu", torch.float32, scale=100.0)
    plain = with_gradients(reference.softmax_combine)
    assert not errors(plain, plain, inputs)
    assert errors(with_gradients(BUGS[bug]), plain, inputs)


@pytest.mark.parametrize("bug", LOSS_BUGS)
def test_oracle_rejects_in_the_loss(bug: str) -> None:
    inputs = *make_inputs(8, 9, 10, "cpu", torch.float32), make_labels(8, 10, "cpu")
    assert errors(LOSS_BUGS[bug], reference.softmax_combine_cross_entropy, inputs)


def test_by_hand(way: Way) -> None:
    # Two experts with weights 3/4 and 1/4.
    gate = torch.tensor([[math.log(3.0), 0.0]], device=way.device, dtype=way.dtype)
    expert = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]]], device=way.device, dtype=way.dtype)
    logits = softmax_combine(gate, expert)
    tolerance = {"rtol": 4 * torch.finfo(way.dtype).eps, "atol": 4 * torch.finfo(way.dtype).eps}
    torch.testing.assert_close(logits.cpu().float(), torch.tensor([[3.0, 2.0]]), **tolerance)
    # Equal logits: probabilities 1/2, d = (-1/2, 1/2), s = (-2, 4), mean of s = -1/2.
    expert = torch.tensor([[[4.0, 0.0]], [[-12.0, 0.0]]], device=way.device, dtype=way.dtype)
    labels = torch.zeros(1, dtype=torch.uint8, device=way.device)
    loss, grad_gate, grad_expert = softmax_combine_cross_entropy(gate, expert, labels)
    expected = [[math.log(2.0)], [[-1.5, 1.5]], [[[-0.375, 0.375]], [[-0.125, 0.125]]]]
    for actual, wanted in zip((loss, grad_gate, grad_expert), expected, strict=True):
        wider = {"rtol": 0.0, "atol": 16 * torch.finfo(way.dtype).eps}
        torch.testing.assert_close(actual.cpu().float(), torch.tensor(wanted), **wider)


def test_reference_against_loops() -> None:
    B, E, K = 3, 4, 5
    gate, expert = make_inputs(B, E, K, "cpu", torch.float64)
    labels = make_labels(B, K, "cpu")
    loss, grad_gate, grad_expert = reference.softmax_combine_cross_entropy(gate, expert, labels)
    logits = reference.softmax_combine(gate, expert)
    for b in range(B):
        total = sum(math.exp(gate[b, e]) for e in range(E))
        weights = [math.exp(gate[b, e]) / total for e in range(E)]
        row = [sum(weights[e] * expert[e, b, k].item() for e in range(E)) for k in range(K)]
        assert logits[b].tolist() == pytest.approx(row, rel=1e-12)
        normalizer = sum(map(math.exp, row))
        label = int(labels[b])
        assert loss[b].item() == pytest.approx(math.log(normalizer) - row[label], rel=1e-12)
        d = [math.exp(row[k]) / normalizer - (k == label) for k in range(K)]
        scores = [sum(d[k] * expert[e, b, k].item() for k in range(K)) for e in range(E)]
        mean = sum(w * s for w, s in zip(weights, scores, strict=True))
        for e in range(E):
            wanted = weights[e] * (scores[e] - mean)
            assert grad_gate[b, e].item() == pytest.approx(wanted, rel=1e-9, abs=1e-14)
            assert grad_expert[e, b].tolist() == pytest.approx([weights[e] * x for x in d])


def test_backward_formula_is_autograd() -> None:
    gate, expert = (x.requires_grad_() for x in make_inputs(3, 5, 7, "cpu", torch.float64))
    grad = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(reference.softmax_combine(gate, expert), (gate, expert), grad)
    actual = reference.softmax_combine_backward(grad, gate.detach(), expert.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    labels = make_labels(3, 7, "cpu")
    logits = reference.softmax_combine(gate, expert)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (loss, *torch.autograd.grad(loss.sum(), (gate, expert)))
    actual = reference.softmax_combine_cross_entropy(gate.detach(), expert.detach(), labels)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck(device: torch.device) -> None:
    inputs = tuple(x.requires_grad_() for x in make_inputs(2, 3, 4, str(device), torch.float64))
    assert torch.autograd.gradcheck(softmax_combine, inputs)


# opcheck itself reads the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("name", "requires_grad"),
    [
        ("softmax_combine", False),
        ("softmax_combine", True),
        ("softmax_combine_backward", False),
        ("softmax_combine_cross_entropy", False),
    ],
)
@pytest.mark.real_gpu
def test_opcheck(name: str, requires_grad: bool, device: torch.device) -> None:
    operator = getattr(torch.ops.moe_kernels, name).default
    for shape in [(3, 5, 7), (0, 2, 3)]:
        gate, expert = (
            x.requires_grad_(requires_grad) for x in make_inputs(*shape, str(device), torch.float32)
        )
        B, _, K = shape
        inputs = {
            "softmax_combine": (gate, expert),
            "softmax_combine_backward": (torch.ones(B, K, device=device), gate, expert),
            "softmax_combine_cross_entropy": (gate, expert, make_labels(B, K, str(device))),
        }
        torch.library.opcheck(operator, inputs[name])


def test_strided(way: Way) -> None:
    gate, expert = make_inputs(4, 5, 6, way.device, way.dtype)
    strided = gate.t().contiguous().t(), expert.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    run = with_gradients(softmax_combine)
    labels = make_labels(8, 6, way.device)[::2]
    for actual, expected in zip(run(*strided), run(gate, expert), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(
        softmax_combine_cross_entropy(*strided, labels),
        softmax_combine_cross_entropy(gate, expert, labels.contiguous()),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_empty_batch(way: Way) -> None:
    gate, expert = make_inputs(0, 5, 7, way.device, way.dtype)
    logits, grad_gate, grad_expert = with_gradients(softmax_combine)(gate, expert)
    assert logits.shape == (0, 7)
    assert (grad_gate.shape, grad_expert.shape) == ((0, 5), (5, 0, 7))
    labels = make_labels(0, 7, way.device)
    loss, grad_gate, grad_expert = softmax_combine_cross_entropy(gate, expert, labels)
    assert (loss.shape, grad_gate.shape, grad_expert.shape) == ((0,), (0, 5), (5, 0, 7))
    assert loss.dtype is torch.float32


@settings(max_examples=20, deadline=None)
@given(B=st.integers(0, 5), E=st.integers(1, 20), K=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_shape(B: int, E: int, K: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(B, E, generator=generator)
    expert = torch.randn(E, B, K, generator=generator)
    labels = torch.randint(K, (B,), generator=generator)
    assert_accurate(
        with_gradients(softmax_combine),
        with_gradients(reference.softmax_combine),
        (gate, expert),
    )
    assert_accurate(
        softmax_combine_cross_entropy,
        reference.softmax_combine_cross_entropy,
        (gate, expert, labels),
    )


def test_more_experts_than_a_program_holds(device: torch.device) -> None:
    inputs = make_inputs(2, 7000, 10, str(device), torch.float32)
    plain = with_gradients(reference.softmax_combine)
    # Kernels add 7,000 terms one after the other, torch in pairs.
    tolerance = Tolerance(slack=2, floor=1e-5)
    assert_accurate(with_gradients(softmax_combine), plain, inputs, tolerance)


def test_mixed_dtypes(device: torch.device) -> None:
    gate, expert = make_inputs(3, 5, 7, str(device), torch.float32)
    logits, grad_gate, grad_expert = with_gradients(softmax_combine)(gate, expert.bfloat16())
    assert (logits.dtype, grad_gate.dtype) == (torch.float32, torch.float32)
    assert grad_expert.dtype is torch.bfloat16
    expected = reference.softmax_combine(gate.double(), expert.bfloat16().double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast(device: torch.device) -> None:
    gate, expert = make_inputs(3, 5, 7, str(device), torch.bfloat16)
    expected = softmax_combine(gate, expert)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = softmax_combine(gate, expert)
    assert actual.dtype is torch.bfloat16
    assert torch.equal(actual, expected)


# The interpreter computes in numpy, which comments on inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_logits_stay_visible(value: float, way: Way) -> None:
    gate, expert = make_inputs(4, 3, 5, way.device, way.dtype)
    expert[1, 2, 3] = value
    gate[1, 0] = value
    labels = make_labels(4, 5, way.device)
    logits = softmax_combine(gate, expert)
    plain = reference.softmax_combine(gate, expert)
    assert torch.equal(logits.isfinite(), plain.isfinite())
    loss, *grads = softmax_combine_cross_entropy(gate, expert, labels)
    plain_loss, *plain_grads = reference.softmax_combine_cross_entropy(gate, expert, labels)
    assert torch.equal(loss.isfinite(), plain_loss.isfinite())
    for actual, expected in zip(grads, plain_grads, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_impossible_label_is_nan(label: int, way: Way) -> None:
    gate, expert = make_inputs(3, 4, 5, way.device, way.dtype)
    labels = torch.tensor([0, label, 4], device=way.device)
    loss, grad_gate, grad_expert = softmax_combine_cross_entropy(gate, expert, labels)
    bad = torch.tensor([False, True, False])
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(grad_gate.isnan().all(dim=1).cpu(), bad)
    assert torch.equal(grad_expert.isnan().all(dim=2).any(dim=0).cpu(), bad)


def test_second_derivative_raises() -> None:
    gate, expert = (x.requires_grad_() for x in make_inputs(3, 5, 7, "cpu", torch.float32))
    (grad,) = torch.autograd.grad(softmax_combine(gate, expert).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="softmax_combine_backward has no derivative"):
        grad.sum().backward()


def test_cross_entropy_has_no_derivative() -> None:
    gate, expert = (x.requires_grad_() for x in make_inputs(3, 5, 7, "cpu", torch.float32))
    loss, _, _ = softmax_combine_cross_entropy(gate, expert, make_labels(3, 7, "cpu"))
    with pytest.raises(RuntimeError, match="softmax_combine_cross_entropy has no derivative"):
        loss.sum().backward()


@pytest.mark.skipif(lang.interpreted, reason="the interpreter's kernels are not traced")
def test_compiles_to_one_graph() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(gate: Tensor, expert: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, _ = softmax_combine_cross_entropy(gate.detach(), expert.detach(), labels)
        return softmax_combine(gate, expert), loss

    gate, expert = (x.requires_grad_() for x in make_inputs(3, 5, 7, "cpu", torch.float32))
    logits, loss = step(gate, expert, make_labels(3, 7, "cpu"))
    logits.sum().backward()
    assert torch.equal(logits, softmax_combine(gate, expert))
    assert gate.grad is not None
    assert loss.shape == (3,)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "experts": (
        lambda: softmax_combine(torch.ones(8, 9), torch.ones(7, 8, 10)),
        ValueError,
        r"expert_logits: expected shape \[E=9, B=8, K\], found \[7, 8, 10\]",
    ),
    "axes": (
        lambda: softmax_combine(torch.ones(8), torch.ones(9, 8, 10)),
        ValueError,
        r"gate_logits: expected shape \[B, E\], found \[8\]",
    ),
    "labels": (
        lambda: softmax_combine_cross_entropy(
            torch.ones(8, 9), torch.ones(9, 8, 10), torch.ones(7, dtype=torch.int64)
        ),
        ValueError,
        r"labels: expected shape \[B=8\], found \[7\]",
    ),
    "label dtype": (
        lambda: softmax_combine_cross_entropy(
            torch.ones(8, 9), torch.ones(9, 8, 10), torch.ones(8)
        ),
        TypeError,
        "labels: expected an integer dtype, found torch.float32",
    ),
    "integer logits": (
        lambda: softmax_combine(torch.ones(8, 9), torch.ones(9, 8, 10, dtype=torch.int32)),
        TypeError,
        "expert_logits: expected a floating dtype, found torch.int32",
    ),
    "no tensor": (
        lambda: softmax_combine([[1.0]], torch.ones(1, 1, 10)),  # type: ignore[arg-type]
        TypeError,
        "gate_logits: expected a tensor, found list",
    ),
    "no expert": (
        lambda: softmax_combine(torch.ones(8, 0), torch.ones(0, 8, 10)),
        ValueError,
        "at least one expert and one class",
    ),
    "device": (
        lambda: softmax_combine(torch.ones(8, 9), torch.ones(9, 8, 10, device="meta")),
        ValueError,
        "expert_logits: expected on cpu like the rest, found on meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_found(case: str) -> None:
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.real_gpu
def test_native_and_triton_agree_in_a_captured_graph() -> None:
    inputs = make_inputs(8, 9, 10, "cuda", torch.float32)
    expected = reference.softmax_combine(*inputs)
    for name in FUSED:
        with moe_kernels.implementation(name):
            softmax_combine(*inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = softmax_combine(*inputs)
        graph.replay()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_registered() -> None:
    names = {"softmax_combine", "softmax_combine_backward", "softmax_combine_cross_entropy"}
    assert names <= set(registry())
