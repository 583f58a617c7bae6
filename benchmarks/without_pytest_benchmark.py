"""A pytest plugin, `-p without_pytest_benchmark`: a `benchmark` fixture that only calls.

For machines without pytest-benchmark. Nothing is lost but its table: rows come from `compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


class Benchmark:
    """As much of pytest-benchmark's fixture as the benchmarks use."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(
        self, function: Callable[..., Any], args: Sequence[Any] = (), **options: Any
    ) -> Any:
        return function(*args)


@pytest.fixture
def benchmark() -> Benchmark:
    return Benchmark()
