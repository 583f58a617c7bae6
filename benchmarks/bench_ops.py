"""Each op at the paper's shapes and at large ones: plain torch, compiled torch, ours.

A case is timed only after its results passed the oracle: a red gate prints no number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench import Bench
from torch import Tensor

from moe_kernels import (
    linf_step_,
    reference,
    softmax_combine,
    softmax_combine_cross_entropy,
)
from moe_kernels.op import registry
from moe_kernels.testing import errors, unequal_bits

# A compiler's remark about an unused feature must not end a measurement.
pytestmark = pytest.mark.filterwarnings("default")

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size: how to make its inputs, its two definitions, the bytes it has to move."""

    name: str
    ops: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make_inputs: Callable[[Case, torch.device], tuple[Any, ...]]
    ours: Function
    plain: Function
    num_bytes: int
    exact: bool = False
    needs_gpu: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        return f"{self.name}-{sizes}-{str(self.dtype).removeprefix('torch.')}"


def make_logits(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """gate_logits, expert_logits, grad_logits, labels."""
    B, E, K = case.sizes
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(shape, generator=generator) for shape in [(B, E), (E, B, K), (B, K)]]
    labels = torch.randint(K, (B,), generator=generator).to(device)
    return *(x.to(device, case.dtype) for x in floats), labels


def make_logits_and_labels(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    gate_logits, expert_logits, _, labels = make_logits(case, device)
    return gate_logits, expert_logits, labels


def make_images(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """adversarial, grad, images, epsilon, step_size."""
    generator = torch.Generator().manual_seed(0)
    adversarial, images = (torch.rand(case.sizes, generator=generator) for _ in range(2))
    grad = torch.randn(case.sizes, generator=generator).to(case.dtype)
    per_image = [torch.full(case.sizes[:1], x / 255) for x in (8, 2)]
    return tuple(x.to(device) for x in (adversarial, grad, images, *per_image))


def with_backward(combine: Function) -> Function:
    def run(gate_logits: Tensor, expert_logits: Tensor, grad_logits: Tensor) -> Any:
        leaves = [x.detach().requires_grad_() for x in (gate_logits, expert_logits)]
        logits = combine(*leaves)
        return logits.detach(), *torch.autograd.grad(logits, leaves, grad_logits)

    return run


def step_with(step: Function) -> Function:
    def run(*inputs: Tensor) -> Tensor:
        step(*inputs, 0.0, 1.0)
        return inputs[0]

    return run


def combine_cases(sizes: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> list[Case]:
    B, E, K = sizes
    gate, expert, logits = B * E, E * B * K, B * K
    width = dtype.itemsize
    forward, backward = "softmax_combine", "softmax_combine_backward"
    fused = "softmax_combine_cross_entropy"
    return [
        Case(
            name="softmax_combine forward",
            ops=(forward,),
            sizes=sizes,
            dtype=dtype,
            make_inputs=lambda case, device: make_logits(case, device)[:2],
            ours=softmax_combine,
            plain=reference.softmax_combine,
            num_bytes=width * (gate + expert + logits),
            **options,
        ),
        Case(
            name="softmax_combine forward + backward",
            ops=(forward, backward),
            sizes=sizes,
            dtype=dtype,
            make_inputs=lambda case, device: make_logits(case, device)[:3],
            ours=with_backward(softmax_combine),
            plain=with_backward(reference.softmax_combine),
            num_bytes=width * (3 * gate + 3 * expert + 2 * logits),
            **options,
        ),
        Case(
            name="softmax_combine_cross_entropy",
            ops=(fused,),
            sizes=sizes,
            dtype=dtype,
            make_inputs=make_logits_and_labels,
            ours=softmax_combine_cross_entropy,
            plain=reference.softmax_combine_cross_entropy,
            num_bytes=width * 2 * (gate + expert) + 12 * B,
            **options,
        ),
    ]


def step_case(sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Case:
    num_pixels = torch.Size(sizes).numel()
    return Case(
        name="linf_step_",
        ops=("linf_step_",),
        sizes=sizes,
        dtype=dtype,
        make_inputs=make_images,
        ours=step_with(linf_step_),
        plain=step_with(reference.linf_step_),
        num_bytes=num_pixels * (3 * 4 + dtype.itemsize),
        exact=True,
        **options,
    )


CASES = [
    # The paper's batch; a large one; CIFAR-100; only worth a GPU's while.
    *combine_cases((128, 9, 10), torch.float32),
    *combine_cases((4096, 9, 10), torch.float32),
    *combine_cases((512, 9, 100), torch.float32),
    *combine_cases((128, 9, 10), torch.bfloat16, needs_gpu=True),
    *combine_cases((65536, 9, 10), torch.bfloat16, needs_gpu=True),
    step_case((128, 3, 32, 32), torch.float32),
    step_case((512, 3, 32, 32), torch.float32),
    step_case((128, 3, 32, 32), torch.bfloat16, needs_gpu=True),
    step_case((4096, 3, 32, 32), torch.bfloat16, needs_gpu=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case: Case, bench: Bench, benchmark: Any) -> None:
    if case.needs_gpu:
        bench.require(gpu=True)
    device = bench.device
    inputs = case.make_inputs(case, device)
    oracle = unequal_bits if case.exact else errors
    faults = oracle(copying(case.ours, case), copying(case.plain, case), inputs)
    assert not faults, "; ".join(faults)

    columns = {"eager": case.plain, "ours": case.ours}
    skipped = {}
    if device.type == "cuda":
        # Each case gets a graph of its own instead of one with dynamic shapes.
        torch.compiler.reset()
        columns["compile"] = torch.compile(case.plain)
        times = bench.time(columns, inputs, min_samples=100, min_s=0.2)
    else:
        skipped["compile"] = "CPU: compiling takes longer than all measurements"
        times = bench.time(columns, inputs, min_samples=50, min_s=0.05)
    ours = times["ours"]
    selected = {name: registry()[name].selected(device, case.dtype, inputs) for name in case.ops}
    # The table of pytest-benchmark; rows come from the stopwatch, where columns take turns.
    benchmark.extra_info |= {"eager_over_ours": 1 / ours.ratio, "implementation": selected}
    benchmark.pedantic(finished(case.ours, device), args=inputs, rounds=20, warmup_rounds=1)
    bench.record(
        {
            "bench": "ops",
            "case": str(case),
            "op": case.name,
            "sizes": case.sizes,
            "dtype": str(case.dtype).removeprefix("torch."),
            "implementation": selected,
            "columns": {name: dataclasses.asdict(column) for name, column in times.items()},
            "skipped": skipped,
            "gb_per_s": case.num_bytes / ours.median_ms / 1e6,
        }
    )


def copying(function: Function, case: Case) -> Function:
    """The function on a copy of its first input, if it changes that one."""
    return lambda first, *rest: function(first.clone() if case.exact else first, *rest)


def finished(function: Function, device: torch.device) -> Function:
    """The function, waiting for the GPU to be done."""

    def run(*inputs: Any) -> None:
        function(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
