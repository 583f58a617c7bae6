"""How many variants Triton compiles, counted without a GPU; and that a pool compiles them first.

A variant is what Triton keys its cache by: argument types, what is known of their divisors,
constants and options. Its own code makes the keys, for a device that only says that it is sm_90.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from plan_networks import Skips, TwoLayerHead, Vgg, resnet, seeded
from torch import nn

from moe_kernels import compile_pool, lang
from moe_kernels.lang import Launch
from moe_kernels.ops import grouped_conv, grouped_conv_tiles, linf_step
from moe_kernels.plan import ahead
from moe_kernels.plan.graph import graph_of
from moe_kernels.plan.reader import trace

pytestmark = [
    pytest.mark.skipif(lang.missing is not None, reason=f"{lang.missing}"),
    pytest.mark.skipif(lang.interpreted, reason="the interpreter's kernels are not compiled"),
]

HOPPER = (9, 0)
MAX_VARIANTS = 140


class Driver:
    """What Triton asks of a GPU before it compiles for it."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._number = 10 * capability[0] + capability[1]

    def get_current_device(self) -> str:
        return f"pretended sm_{self._number}"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._number, 32)

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture
def hopper(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Triton compiles for a Hopper GPU that is not there, and remembers nothing afterwards."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = Driver(HOPPER)
    config = lang.triton.runtime.driver
    monkeypatch.setattr(config, "_active", driver, raising=False)
    yield driver
    for kernel in kernels():
        kernel.device_caches.pop(driver.get_current_device(), None)


def kernels() -> list[Any]:
    from test_aot import find_kernels

    return list(find_kernels().values())


def variants(launches: Sequence[Launch]) -> set[tuple[str, str]]:
    """The different keys under which Triton would compile these launches."""
    found: set[tuple[str, str]] = set()

    def instead_of_compiling(*, key: str, fn: Any, **rest: Any) -> bool:
        found.add((f"{fn.module}.{fn.name}", key))
        return True

    from triton import knobs

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = instead_of_compiling
    try:
        for launch in launches:
            launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
    finally:
        knobs.runtime.jit_cache_hook = before
    return found


def launches_of_step(
    network: nn.Module,
    size: int,
    counts: Sequence[int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    num_networks: int = 1,
    *,
    independent: bool = False,
) -> list[Launch]:
    """What the plan of so many equal networks compiles ahead for these batches on Hopper."""
    noted: list[Launch] = []

    def note(device: torch.device, rehearse: Callable[[], None]) -> int:
        noted.extend(compile_pool.launches_of(rehearse, HOPPER))
        return len(noted)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(compile_pool, "compile_ahead", note)
        network = network.eval()
        traced = trace(network, graph_of(network), (3, size, size))
        ahead.compile_ahead(
            [network] * num_networks,
            range(num_networks),
            [traced] * num_networks,
            torch.empty(1, 3, size, size),
            counts,
            dtype,
            independent=independent,
        )
    assert noted
    return noted


@pytest.mark.slow
def test_variants_of_everything_a_first_run_compiles(
    hopper: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResNet-18 steps at the batch sizes of the benchmarks, the self-test, the fast-path tests."""

    def step(*args: Any, **rest: Any) -> set[tuple[str, str]]:
        return variants(launches_of_step(*args, monkeypatch, **rest))

    resnet18 = resnet("resnet18", 64)
    first = step(resnet18, 32, [2, 128], torch.bfloat16, num_networks=2)
    steps = first | step(resnet18, 32, [32, 256, 512], torch.bfloat16, num_networks=2)
    found = steps | variants(compile_pool.launches_of_checks(HOPPER))
    for dtype in (torch.float32, torch.bfloat16):
        # The networks of tests/test_plan_gpu.py.
        found |= step(resnet18, 32, [2, 128], dtype)
        found |= step(resnet("resnet6", 10), 9, [2, 5], dtype)
        found |= step(resnet("resnet50", 8), 16, [2, 20], dtype)
        found |= step(seeded(Vgg), 32, [2, 17], dtype)
        found |= step(seeded(TwoLayerHead), 22, [2, 4], dtype)
        found |= step(seeded(Skips), 11, [2, 3], dtype)
        for width, num_networks, batch in ((64, 9, 128), (12, 2, 7), (16, 3, 12)):
            found |= step(resnet("resnet6", width), 8, [2, batch], dtype, num_networks=num_networks)
        found |= step(resnet("resnet6", 16), 8, [2, 4], dtype, num_networks=3, independent=True)
    assert len(first) <= 32
    assert len(steps) <= 40
    assert len(found) <= MAX_VARIANTS


def test_the_count_sees_a_size_that_is_specialized(
    hopper: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 2 and 3 experts, and layers of 1 and 16 pixels, are one variant; were."""
    shapes = [((2, 3, 3, 64, 64), 2), ((3, 1, 16, 64, 64), 3)]

    def count() -> int:
        launches = []
        for shape, E in shapes:
            x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            weight = x.new_empty(E, 64, 3, 3, 64)
            bias = torch.empty(E, 64, device="meta")
            call = grouped_conv.conv_call(x, weight, bias, None, None, None, 1, 1, 1, True)
            with lang.noted(HOPPER) as noted:
                grouped_conv_tiles.run(call)
            launches += noted
        return len(variants(launches))

    once = count()
    assert once == 2  # with TMA and without
    (H,) = (x for x in grouped_conv_tiles._conv_kernel.params if x.name == "H")
    with monkeypatch.context() as patch:
        patch.setitem(vars(H), "do_not_specialize", False)
        grouped_conv_tiles._conv_kernel.device_caches.clear()
        assert count() == 2 * once
    grouped_conv_tiles._conv_kernel.device_caches.clear()


def test_pool_compiles_each_variant_once_and_launches_find_it(
    hopper: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = [
        x
        for x in compile_pool.launches_of_checks(HOPPER, ["linf_step_", "softmax_combine"])
        if x.kernel is linf_step._step_kernel or x.kwargs["num_warps"] == 1
    ]
    told: list[Any] = []
    monkeypatch.setattr(
        lang.triton.knobs.compilation, "listener", lambda **facts: told.append(facts)
    )
    expected = variants(launches)
    assert compile_pool.compile_all(launches, workers=2) == len(launches) > len(expected)
    assert [x["cache_hit"] for x in told] == [False] * len(expected)
    told.clear()
    compiled = [x.kernel.run(*x.args, grid=(1,), warmup=True, **x.kwargs) for x in launches]
    assert [x["cache_hit"] for x in told] == [True] * len(expected)
    assert all(".target sm_90" in x.asm["ptx"] for x in compiled)


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(
    hopper: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = compile_pool.launches_of_checks(HOPPER, ["linf_step_"])
    kernel = linf_step._step_kernel
    kernel.device_caches[hopper.get_current_device()]  # fills in `compile`
    tries: list[Any] = []

    def fail(src: Any, **rest: Any) -> None:
        tries.append(src)
        raise SystemError("AST constructor recursion depth mismatch")

    works = kernel.compile
    monkeypatch.setattr(kernel, "compile", fail)
    assert compile_pool.compile_all(launches, workers=2) == len(launches)
    assert len(tries) == 2 * len(variants(launches))
    with pytest.raises(SystemError):
        kernel.run(*launches[0].args, grid=(1,), warmup=True, **launches[0].kwargs)
    monkeypatch.setattr(kernel, "compile", works)
    kernel.run(*launches[0].args, grid=(1,), warmup=True, **launches[0].kwargs)


def test_where_nothing_is_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_pool.compile_ahead(torch.device("cpu"), lambda: pytest.fail("rehearsed")) == 0
    assert compile_pool.compile_all([]) == 0

    def fail() -> None:
        raise NotImplementedError("no meta tensors")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert compile_pool.compile_ahead(torch.device("cuda:0"), fail) == 0


def test_a_new_layer_compiles_all_its_tiles_before_one_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `_ranked` does on a GPU; here what it hands to the pool."""
    handed: list[Launch] = []
    monkeypatch.setattr(grouped_conv_tiles, "compile_all", handed.extend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    x = torch.empty(2, 4, 4, 128, 64, dtype=torch.bfloat16, device="meta")
    weight, bias = x.new_empty(2, 128, 3, 3, 64), torch.empty(2, 128, device="meta")
    call = grouped_conv.conv_call(x, weight, bias, None, None, None, 1, 1, 1, True)
    tiles = grouped_conv_tiles.fitting_tiles(call)
    grouped_conv_tiles._compile(call, tiles)
    assert len(handed) == len(tiles) > 2


def test_workers_are_the_processors_of_this_process(
    hopper: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    pool = compile_pool.ThreadPoolExecutor

    def make(count: int) -> Any:
        asked.append(count)
        return pool(count)

    monkeypatch.setattr(compile_pool, "ThreadPoolExecutor", make)
    launch = compile_pool.launches_of_checks(HOPPER, ["linf_step_"])[:1]
    for processors, expected in ((4, 4), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=processors: range(n))
        compile_pool.compile_all(launch)
        assert asked[-1] == expected
