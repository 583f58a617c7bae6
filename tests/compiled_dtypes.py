"""The dtypes of compiled layers, as parameters of tests that skip where this CPU lacks them."""

import pytest
import torch

from moe_kernels.plan.back_ends.simd_calls import available, instructions_for

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            available(instructions_for(dtype), dtype) is not None,
            reason=str(available(instructions_for(dtype), dtype)),
        ),
        id=str(dtype).removeprefix("torch."),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
