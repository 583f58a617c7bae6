"""The compiled convolution for Hopper: its order of work and its code anywhere, itself on a GPU."""

# ruff: noqa: E741  (O is the letter of an axis)

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import hopper_kernels
import pytest
import torch
from torch import Tensor

from moe_kernels import native, op, reference, select
from moe_kernels.ops import grouped_conv_sm90a
from moe_kernels.ops.grouped_conv import conv_call, input_grad_call
from moe_kernels.ops.grouped_conv_tiles import Call
from moe_kernels.testing import assert_accurate

needs_cpu_build = pytest.mark.skipif(not native.has_cpu, reason=f"not built: {native.missing}")
needs_kernel = pytest.mark.skipif(
    not grouped_conv_sm90a.BUILT, reason="not built for GPUs of compute capability 9.0"
)


class Case(NamedTuple):
    """A layer; side is the channels of its side input, 0: none."""

    name: str
    H: int
    W: int
    C: int = 64
    O: int = 8
    taps: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    side: int = 0
    E: int = 3
    shared: bool = False
    N: int = 4

    @property
    def pixels(self) -> tuple[int, int]:
        """Of the output."""
        return tuple(  # type: ignore[return-value]
            (size + 2 * self.padding - taps) // self.stride + 1
            for size, taps in zip((self.H, self.W), self.taps, strict=True)
        )


CASES = [
    Case("plain", 5, 4),
    Case("one expert", 4, 4, E=1),
    Case("shared input", 3, 4, shared=True),
    Case("two chunks", 3, 3, C=128),
    Case("stride 2", 6, 8, stride=2),
    Case("stride 2, odd", 7, 5, stride=2),
    Case("stride 3, more padding", 7, 8, stride=3, padding=2),
    Case("no padding", 5, 5, padding=0),
    Case("1x1", 3, 2, taps=(1, 1), padding=0),
    Case("1x1, stride 2: pixels without taps", 4, 5, taps=(1, 1), stride=2, padding=0),
    Case("1x1, padded: outputs without taps", 2, 3, taps=(1, 1)),
    Case("oblong", 4, 5, taps=(1, 3)),
    Case("side", 4, 4, side=128),
    Case("side, stride 2", 6, 4, stride=2, side=64),
    Case("side, stride 2, odd", 5, 7, stride=2, side=192, E=1),
    Case("one pixel", 1, 1),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Work(NamedTuple):
    """How the emulation shares out its work."""

    tile_rows: int
    tile_channels: int
    num_workers: int
    by_expert: bool = False


WORKS = {
    "one worker": Work(4, 8, 1),
    "pixels outermost": Work(2, 4, 29),
    "experts outermost": Work(1, 4, 3),
    "more workers than tiles": Work(4, 8, 500),
    "by expert": Work(2, 8, 6, True),
    "by expert, unequal": Work(2, 4, 22, True),
}


def make_conv(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Any]:
    """The arguments of grouped_conv."""
    generator = torch.Generator().manual_seed(0)
    E, N = case.E, case.N
    P, Q = case.pixels

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    side: list[Any] = [None, None]
    if case.side:
        # As large as the smallest that a residual block may have, and one more.
        read = [case.stride * (size - 1) + 1 + (case.stride > 1) for size in (P, Q)]
        side = [normal(E, *read, N, case.side), normal(E, case.O, case.side)]
    return [
        normal(1 if case.shared else E, case.H, case.W, N, case.C),
        normal(E, case.O, *case.taps, case.C),
        torch.randn((E, case.O), generator=generator).to(device),
        normal(E, P, Q, N, case.O),
        *side,
        *(case.stride, case.padding, case.stride, True),
    ]


def make_input_grad(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Any]:
    """The arguments of grouped_conv_input_grad; its input has O channels, its output C."""
    generator = torch.Generator().manual_seed(1)
    E, N = case.E, case.N

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    side: list[Any] = [None, None]
    if case.side:
        made = [(size - 1) // case.stride + 1 for size in (case.H, case.W)]
        side = [normal(E, *made, N, case.side), normal(E, case.O, case.side)]
    return [
        normal(E, *case.pixels, N, case.C),
        normal(E, case.O, *case.taps, case.C),
        normal(E, case.H, case.W, N, case.O),
        *side,
        normal(E, case.H, case.W, N, case.O),
        *(case.H, case.W, case.stride, case.padding, case.stride),
    ]


def emulate(call: Call, work: Work) -> Tensor:
    call.y.fill_(math.nan)
    arguments = grouped_conv_sm90a.kernel_arguments(call)
    tiles = native.module.conv_by_schedule(**arguments, **work._asdict())
    assert tiles * work.tile_rows * work.tile_channels == call.y.numel()
    return call.y


@needs_cpu_build
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@cases
def test_order_of_work(case: Case, work: Work) -> None:
    def ours(*args: Any) -> Tensor:
        return emulate(conv_call(*args), work)

    assert_accurate(ours, reference.grouped_conv, make_conv(case))


@needs_cpu_build
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@cases
def test_order_of_work_of_the_gradient(case: Case, work: Work) -> None:
    def ours(*args: Any) -> Tensor:
        return emulate(input_grad_call(*args), work)

    case = case._replace(shared=False)
    assert_accurate(ours, reference.grouped_conv_input_grad, make_input_grad(case))


@needs_cpu_build
def test_more_pixels_than_can_be_sorted() -> None:
    x, weight, bias, *_ = make_conv(Case("wide", 33, 34, N=1, O=1, E=1))
    arguments = x, weight, bias, None, None, None, 1, 1, 1, False
    output = emulate(conv_call(*arguments), Work(1, 1, 7))
    assert torch.allclose(output, reference.grouped_conv(*arguments), atol=1e-4)


@pytest.mark.slow
@needs_kernel
@pytest.mark.skipif(hopper_kernels.find_cuobjdump() is None, reason="no cuobjdump")
def test_code() -> None:
    """No spilled register, no product that waits for the one before it."""
    kernels = hopper_kernels.compiled_kernels(str(hopper_kernels.find_cuobjdump()))
    tiles = "128 64", "128 128", "256 128", "128 256"
    wide = {f"wide {x} {blocks}" for x in tiles for blocks in (1, 2)}
    assert set(kernels) == wide | {"narrow 128", "narrow 256"}
    for name, cost in kernels.items():
        count = {
            word: len(re.findall(rf"\b{word}\b", cost.code))
            for word in ("WARPGROUP.ARRIVE", "USETMAXREG", "STL", "LDL", "UCGABAR_WAIT")
        }
        # One chunk of 64 channels: four steps of 16, for one or two halves, inside one fence.
        assert cost.instructions["HGMMA"] == (8 if "256 128" in name else 4), name
        assert count["WARPGROUP.ARRIVE"] == 1, name
        assert count["USETMAXREG"] == 2, name
        assert cost.instructions["UTMALDG"] >= 2, name
        assert cost.spilled_bytes == count["STL"] == count["LDL"] == 0, name
        # Three warpgroups share 64 Ki registers.
        assert cost.registers <= 65536 // 384, name
        # Two blocks: their first and last meeting, and copies that go to both.
        clusters = name.startswith("wide") and name.endswith("2")
        assert ("UTMALDG.2D.MULTICAST" in cost.code) == clusters, name
        assert count["UCGABAR_WAIT"] == 2 * clusters, name


@needs_cpu_build
@pytest.mark.parametrize(
    ("case", "single", "cluster"),
    [
        (Case("", 32, 32, O=64, N=128, E=9), (128, 64, 128, 64, True), None),
        (Case("", 32, 32, O=64, N=512, E=9), (256, 64, 256, 64, True), None),
        (Case("", 16, 16, C=128, O=64, N=128, E=9), (128, 64, 128, 64, False), None),
        (Case("", 16, 16, O=128, N=128, E=9), (128, 128) * 2, (128, 64, 128, 128)),
        (Case("", 16, 16, O=128, N=256, E=9), (256, 128) * 2, (128, 128, 256, 128)),
        (Case("", 16, 16, O=128, N=512, E=9), (256, 128) * 2, (256, 128, 512, 128)),
        (Case("", 8, 8, O=256, N=128, E=9), (128, 256) * 2, (128, 128, 128, 256)),
        (Case("", 8, 8, O=256, N=256, E=9), (128, 256) * 2, (128, 256, 256, 256)),
        (Case("", 8, 8, O=512, N=128, E=9), (128, 256) * 2, (128, 256, 128, 512)),
        # One tile for each multiprocessor is better than a large one for a few.
        (Case("", 2, 2, O=512, N=128, E=8), (128, 128) * 2, (128, 128, 128, 256)),
    ],
    ids=lambda x: f"O={x.O}, N={x.N}" if isinstance(x, Case) else "",
)
def test_tiles(case: Case, single: tuple[Any, ...], cluster: tuple[Any, ...] | None) -> None:
    """Tiles of a block and of a worker, as single blocks and as clusters; None: no clusters."""
    P, Q = case.pixels
    shape = {"E": case.E, "P": P, "Q": Q, "H": case.H, "W": case.W, "C": case.C, "D": 0}
    sizes = native.module.ConvSizes(**{**SIZES, **shape, "N": case.N, "O": case.O})
    found = native.module.conv_sm90a_tiles(sizes, 132, False)
    assert found[: len(single)] == single
    assert found[4] == (len(single) == 5 and single[4])
    pairs = native.module.conv_sm90a_tiles(sizes, 132, True)
    assert pairs[: len(cluster or single)] == (cluster or single)
    with pytest.raises(ValueError, match="multiple of 128"):
        native.module.conv_sm90a_tiles(native.module.ConvSizes(**{**SIZES, "N": 64}), 132, True)


# A 3x3 layer with a side that the kernel takes.
SIZES = {
    "N": 128,
    "H": 4,
    "W": 4,
    "C": 64,
    "P": 4,
    "Q": 4,
    "O": 64,
    "R": 3,
    "S": 3,
    "stride": 1,
    "padding": 1,
    "side_H": 4,
    "side_W": 4,
    "D": 64,
}


def call_kernel(address: int = 1024, clusters: bool = False, **sizes: int) -> None:
    """Call the kernel with no tensors at all, which it must not touch."""
    names = "source weight side side_weight bias addend activation output"
    native.module.conv_sm90a(
        **dict.fromkeys(names.split(), address),
        sizes=native.module.ConvSizes(**{**SIZES, **sizes}),
        relu=False,
        clusters=clusters,
        dtype=2,
        stream=0,
    )


@needs_kernel
@pytest.mark.skipif(torch.cuda.is_available(), reason="here a launch succeeds")
def test_launch_without_a_gpu_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA error \d+: .+"):
        call_kernel(side_H=0, side_W=0, D=0)


@needs_kernel
@pytest.mark.parametrize(("name", "value"), [("N", 64), ("O", 32), ("C", 16), ("D", 32)])
def test_sizes_that_do_not_fit_are_a_runtime_error(name: str, value: int) -> None:
    for clusters in (False, True):
        with pytest.raises(RuntimeError, match="CUDA error 1: invalid argument"):
            call_kernel(clusters=clusters, **{name: value})


@needs_kernel
def test_nothing_to_do_is_no_call() -> None:
    call_kernel(address=0, N=0)


@needs_cpu_build
def test_sizes_keep_their_names() -> None:
    for name, numbers in {"ConvSizes": range(1, 21), "PoolSizes": range(1, 10)}.items():
        kind = getattr(native.module, name)
        fields = [x for x in vars(kind) if not x.startswith("_")]
        given = dict(zip([x for x in fields if x != "input_grad"], numbers, strict=True))
        assert {x: getattr(kind(**given), x) for x in given} == given
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        native.module.ConvSizes(1, 1)
    assert native.module.ConvSizes(**SIZES, input_grad=True).input_grad


@pytest.mark.parametrize("name", ["grouped_conv", "grouped_conv_input_grad"])
def test_runs_in_a_child_first(name: str) -> None:
    found = [
        x
        for x in op.registry()[name].implementations
        if x.function.__module__ == grouped_conv_sm90a.__name__
    ]
    assert [(x.name, x.device, x.isolated, x.capability) for x in found] == [
        (x, "cuda", True, (9, 0)) for x in ("native", "clusters")
    ]
    assert {x.dtypes for x in found} == {(torch.bfloat16,)}


@needs_kernel
def test_a_gpu_that_nothing_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "_compiled_for", lambda device: False)
    for x in op.registry()["grouped_conv"].implementations:
        if x.name in ("native", "clusters"):
            reason = x.obstacle(torch.device("cuda"), torch.bfloat16)
            assert reason == "no kernels were compiled for this GPU"


FITTING = Case("fitting", 4, 4, O=64, N=128, side=64)


@pytest.mark.parametrize("name", ["grouped_conv", "grouped_conv_input_grad"])
def test_examples_of_the_check_reach_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(
        grouped_conv_sm90a, "_launch", lambda call, clusters: calls.append(clusters)
    )
    for one in op.registry()[name].implementations:
        if one.name not in ("native", "clusters") or one.device != "cuda":
            continue
        calls.clear()
        for example in one.examples:
            args = [torch.empty(x, device="meta") if isinstance(x, tuple) else x for x in example]
            assert one.function(*args) is not NotImplemented
        assert calls == [one.name == "clusters"] * len(one.examples) != []


@needs_cpu_build
@pytest.mark.parametrize(
    ("name", "make"),
    [("grouped_conv", conv_call), ("grouped_conv_input_grad", input_grad_call)],
)
def test_examples_of_the_check_reach_every_tile(name: str, make: Callable[..., Call]) -> None:
    """Of the convolution; the gradient runs the same code."""
    reached = set()
    for one in op.registry()[name].implementations:
        if one.name in ("native", "clusters") and one.device == "cuda":
            for example in one.examples:
                args = [
                    torch.empty(x, device="meta") if isinstance(x, tuple) else x for x in example
                ]
                found = hopper_kernels.tiles_of(make(*args), one.name == "clusters")
                assert (found.blocks > 1) == (one.name == "clusters")
                reached.add(found)
    if name == "grouped_conv":
        rows_by_channels = {(x.rows, x.channels, x.worker_rows, x.worker_channels) for x in reached}
        single = {(128, 64), (256, 64), (128, 128), (256, 128), (128, 256)}
        assert {x[:2] for x in rows_by_channels if x[:2] == x[2:]} == single
        assert {x for x in rows_by_channels if x[:2] != x[2:]} == {
            (128, 256, 256, 256),
            (256, 128, 512, 128),
            (128, 128, 256, 128),
            (128, 64, 256, 64),
            (128, 256, 128, 512),
            (128, 128, 128, 256),
            (128, 64, 128, 128),
        }
        assert {x.rows for x in reached if x.narrow} == {128, 256}
        assert {x.rows for x in reached if not x.narrow and x.channels == 64} == {128}


@pytest.mark.parametrize(
    "case",
    [
        FITTING._replace(N=64),
        FITTING._replace(N=192),
        FITTING._replace(C=32),
        FITTING._replace(O=96),
        FITTING._replace(side=16),
    ],
    ids=str,
)
def test_what_does_not_fit_is_for_others(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_conv_sm90a, "_launch", lambda *_: pytest.fail("called the kernel"))
    dtype = torch.bfloat16
    assert grouped_conv_sm90a.conv_native(*make_conv(case, dtype=dtype)) is NotImplemented
    grads = make_input_grad(case, dtype=dtype)
    assert grouped_conv_sm90a.input_grad_native(*grads) is NotImplemented


def test_addresses_that_tma_cannot_read_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_conv_sm90a, "_launch", lambda *_: pytest.fail("called the kernel"))
    inputs = make_conv(FITTING, dtype=torch.bfloat16)
    x = inputs[0]
    inputs[0] = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    assert grouped_conv_sm90a.conv_native(*inputs) is NotImplemented


# Each kernel (csrc: choose), strides, sides, one and several experts; many tiles per block.
LARGE = [
    Case("narrow, 128 images", 9, 7, O=64, N=128),
    Case("narrow, 256 images", 8, 8, O=64, N=512, side=64, E=2),
    Case("narrow, one expert", 16, 16, O=64, N=128, E=1),
    Case("wide, 128 x 64", 8, 8, C=128, O=64, N=128, stride=2, side=128, E=2),
    Case("wide, 128 x 128", 8, 8, O=128, N=128, E=9),
    Case("wide, 256 x 128", 8, 8, C=128, O=128, N=256, E=5),
    Case("wide, 128 x 256", 8, 8, C=128, O=256, N=128, E=9),
    Case("wide, 128 x 256, stride 2", 8, 8, C=256, O=512, N=128, stride=2, side=256, E=9),
    Case("shared input", 6, 6, O=64, N=128, shared=True),
    Case("pixels without taps", 8, 8, O=128, N=128, taps=(1, 1), stride=2, padding=0),
    Case("clusters, 2 x 128 x 256", 8, 8, O=256, N=256, E=4, side=64),
    Case("clusters, 2 x 256 x 128", 8, 8, O=128, N=512, E=4),
    Case("clusters, 2 x 128 x 64", 8, 8, C=128, O=64, N=256, E=4),
]


@pytest.mark.gpu
@pytest.mark.real_gpu
@needs_kernel
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_accuracy_on_a_gpu(case: Case) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    dtype = torch.bfloat16
    single = grouped_conv_sm90a.conv_native, grouped_conv_sm90a.input_grad_native
    clusters = grouped_conv_sm90a.conv_clusters, grouped_conv_sm90a.input_grad_clusters
    conv = make_conv(case, "cuda", dtype)
    grad = make_input_grad(case._replace(shared=False), "cuda", dtype)
    for ours, ours_grad in (single, clusters):
        assert_accurate(ours, reference.grouped_conv, conv)
        assert_accurate(ours_grad, reference.grouped_conv_input_grad, grad)
        assert torch.equal(ours_grad(*grad), ours_grad(*grad))
