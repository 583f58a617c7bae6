"""Give every benchmark its device and a `Bench`, whose lines reach the terminal at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

# Before torch starts its threads: spinning ones cost a whole time slice each on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import rows
import torch
from bench import Bench


def pytest_collection_finish(session: pytest.Session) -> None:
    reason = rows.obstacle(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason and not session.config.option.collectonly:
        pytest.exit(reason, returncode=1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def bench(device: torch.device, request: pytest.FixtureRequest) -> Bench:
    """The tools of one case; its lines reach the terminal also while pytest captures output."""
    manager = request.config.pluginmanager
    reporter, capture = manager.getplugin("terminalreporter"), manager.getplugin("capturemanager")

    lines: list[str] = []

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            if not lines:
                reporter.ensure_newline()
                reporter.write_line(request.node.nodeid)
            lines.append(line)
            reporter.write_line(f"  {line}")

    return Bench(device, say)


class OnlyCalls:
    """As much of pytest-benchmark's fixture as is used here: it only calls."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(
        self, function: Callable[..., Any], args: Sequence[Any] = (), **options: Any
    ) -> Any:
        return function(*args)


class WithoutPytestBenchmark:
    """A `benchmark` fixture, for machines without the plugin: nothing is lost but its table."""

    @pytest.fixture
    def benchmark(self) -> OnlyCalls:
        return OnlyCalls()


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("benchmark"):
        config.pluginmanager.register(WithoutPytestBenchmark())
