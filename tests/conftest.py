"""Set up every test: tiers, two worker processes, one thread each, devices, ways to compute an op.

`pytest` runs everything that is not marked `slow`, `pytest --slow` all of it. A run of the whole
suite uses two processes where pytest-xdist is installed and no GPU is shared; `-n 0` uses one.
`pytest --rehearse-gpu` runs the tests marked `gpu` on a device made of Python (tests/rehearsal);
with TRITON_INTERPRET=1 Triton's kernels as well, float32 only.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before torch starts its threads. Small models are fastest on one, and two workers share the cores;
# spinning threads cost a whole time slice each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests train networks of 4 channels, whose gradients oneDNN writes out of bounds by AVX2: see
# dwf/models/known_faults.py. Compiled layers of this project are not concerned.
os.environ.setdefault(
    "ONEDNN_MAX_CPU_ISA",
    "DEFAULT"
    if Path("/proc/cpuinfo").exists() and "avx512f" in Path("/proc/cpuinfo").read_text()
    else "AVX",
)

import pytest
import rehearsal.option  # starts it, before moe_kernels is imported
import torch
from rehearsal import guarded

import moe_kernels
from moe_kernels import lang, native, op

WATCH = pytest.StashKey[guarded.Watch]()


class Way(NamedTuple):
    """Where and how an op under test is computed."""

    device: str
    dtype: torch.dtype
    implementation: str

    def __str__(self) -> str:
        return f"{self.device}-{self.implementation}-{str(self.dtype).removeprefix('torch.')}"


# Also in a rehearsal, where the code does as if kernels were compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if lang.interpreted:
    # The interpreter rounds everything but float32 wrongly.
    WAYS = [Way("cpu", torch.float32, "triton")]
    DEVICES = ["cpu"]
else:
    WAYS = [
        Way("cpu", torch.float32, "native"),
        *(Way("cpu", dtype, "reference") for dtype in op.FLOATS),
        *itertools.starmap(Way, itertools.product(["cuda"], op.FLOATS, ["native", "triton"])),
    ]
    DEVICES = ["cpu", "cuda"]
if rehearsal.running:
    # Triton runs in its interpreter alone, compiled code without it: two runs, none of them twice.
    # A rehearsed kernel is not the GPU's, one dtype says all.
    WAYS = [Way("cuda", torch.float32, "triton" if INTERPRETED else "native")]
    DEVICES = ["cuda"]


def _on(device: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if device == "cuda" else []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        rehearsal.option.OPTION, action="store_true", help="run the tests marked gpu without one"
    )
    parser.addoption(
        "--gpu-coverage",
        metavar="FOLDER",
        help="report which lines for GPUs ran, here and in earlier runs with this folder",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.rehearse_gpu and not rehearsal.running:
        raise pytest.UsageError(f"{rehearsal.option.OPTION}: {rehearsal.option.obstacle}")
    if config.option.gpu_coverage:
        config.stash[WATCH] = guarded.Watch()
        config.stash[WATCH].start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.gpu_coverage:
        session.config.stash[WATCH].write(Path(session.config.option.gpu_coverage))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if folder := config.option.gpu_coverage:
        terminalreporter.section("lines for GPUs")
        terminalreporter.write_line("\n".join(config.stash[WATCH].summary(Path(folder))))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test fails for what a GPU would not report: memory that a graph uses and nobody holds."""
    result = yield
    if problems := rehearsal.take_problems():
        pytest.fail("\n".join(problems), pytrace=False)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Ask pytest-xdist for two processes, unless the command names files or an interactive run."""
    options = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    interactive = options.usepdb or options.capture == "no" or options.collectonly
    installed = config.pluginmanager.has_plugin("xdist")
    # A worker comes here as well, and so does pytest run by a test.
    installed = installed and "PYTEST_XDIST_WORKER" not in os.environ
    shared = torch.cuda.is_available() and not rehearsal.running
    if installed and whole and not interactive and not shared:
        if options.numprocesses is None and options.dist == "no":
            # Files stay together, so that module fixtures are made once, and the faster one helps.
            options.numprocesses, options.dist = 2, "worksteal"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("real_gpu") and rehearsal.running:
        pytest.skip("too large for a rehearsed device, or beyond it")
    chosen = item.config.option.slow or "slow" in item.config.option.markexpr
    if item.get_closest_marker("slow") and not chosen:
        pytest.skip("slow, run by --slow")


@pytest.fixture(params=[pytest.param(x, marks=_on(x)) for x in DEVICES])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param(x, marks=_on(x.device), id=str(x)) for x in WAYS])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """Each implementation on each device and dtype; ops inside the test run by it or raise."""
    found: Way = request.param
    if found.implementation == "native" and not (
        native.has_cuda if found.device == "cuda" else native.has_cpu
    ):
        pytest.skip(f"no compiled kernels: {native.missing or 'built without CUDA'}")
    with moe_kernels.implementation(found.implementation):
        yield found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and some tests fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN: an element that nobody wrote fails its test."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    # warn_only: on CUDA some definitions in plain torch have no deterministic backward
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def reference() -> Iterator[None]:
    """Attacks by autograd: a plan rounds otherwise, which its own tests look at."""
    with moe_kernels.implementation("reference"):
        yield


@pytest.fixture(scope="module")
def brief_suites() -> Iterator[None]:
    """Suites in turn as they are, each attack and question with a tenth of its length."""
    from dwf.evaluation import doubts, harder, suites

    original = suites.suite_in_turn

    def brief(*arguments: Any, **options: Any) -> list[suites.AttackSpec]:
        return [_tenth(spec) for spec in original(*arguments, **options)]

    few = functools.partial(doubts.doubts, num_steps=5, num_draws=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dwf.evaluation.sequence.suite_in_turn", brief)
        patch.setattr("dwf.evaluation.questions.doubts", few)
        patch.setattr(doubts, "NUM_QUERIES", 30)
        patch.setattr(harder, "NUM_QUERIES", 60)
        patch.setattr(harder, "NUM_LESSONS", 20)
        yield


def _tenth(spec: Any) -> Any:
    num_steps = 60 if spec.kind == "square" else -(-spec.num_steps // 10)
    return dataclasses.replace(spec, num_steps=num_steps)
