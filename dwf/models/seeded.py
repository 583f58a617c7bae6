"""Make initial weights a function of a seed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dwf.checks import check_seed


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Layers built inside the block get weights that ``seed`` alone decides.

    They must be built on the CPU. All random states of torch are as before at the end.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            check_seed(seed)
        )  # torch.manual_seed would seed the GPUs too
        yield
