"""The dtypes of the "avx512" back end, as parameters of tests that skip where it is not there."""

import pytest
import torch

from moe_kernels.plan.back_ends.avx512 import Avx512BackEnd

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            Avx512BackEnd.available(dtype) is not None, reason=str(Avx512BackEnd.available(dtype))
        ),
        id=str(dtype).removeprefix("torch."),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
