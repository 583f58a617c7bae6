"""The dtypes of compiled layers, as parameters of tests that skip where this CPU lacks them."""

import pytest
import torch

from moe_kernels.plan.back_ends.simd_calls import INSTRUCTIONS, available, fastest

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            fastest(dtype) is None, reason=str(available(INSTRUCTIONS[0], dtype))
        ),
        id=str(dtype).removeprefix("torch."),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
