"""Every convolution of nine ResNet-18 experts, forward and gradient: stock torch, each kernel.

A row is one launch of an attack step: a convolution with all that is fused to it. On a GPU every
column is a CUDA graph, so that launch gaps count for nobody. A column whose result misses the
oracle gets no number, and its case fails after the others were timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from aot_table import Layer, layers
from bench import Bench
from torch import Tensor

import moe_kernels
from dwf.bench.stock import captured
from moe_kernels import reference
from moe_kernels.op import registry
from moe_kernels.ops import (
    grouped_conv,
    grouped_conv_sm90a,  # noqa: F401  registers the compiled kernel
    grouped_conv_tiles,
    slab,
)
from moe_kernels.plan.choose import default_dtype
from moe_kernels.testing import errors

# A compiler's remark about an unused feature must not end a measurement.
pytestmark = pytest.mark.filterwarnings("default")

DTYPE = default_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
KERNELS = ("triton", "native", "clusters")
COLUMNS = ("eager", "grouped", "fused", *KERNELS, "ours")
# Launches of aot_table.py, and how many of an attack step are like them; without the residual or
# the skip gradient counts as with it.
COUNTS = {
    "stem forward": 1,
    "stage 1 forward residual": 4,
    **{f"stage {s} forward {kind}": 1 for s in (2, 3, 4) for kind in ("narrowing", "side")},
    **{f"stage {s} forward residual": 2 for s in (2, 3, 4)},
    **{f"stage {s} backward skip": 3 for s in (2, 3, 4)},
    **{f"stage {s} backward narrowing": 1 for s in (2, 3, 4)},
    "stage 1 backward skip": 4,
    "stem backward": 1,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`count` of such launches make a step."""

    name: str  # "forward" or "backward" is part of it
    layer: Layer  # in_channels of the first one is that of images
    count: int
    num_images: int
    num_experts: int = 9
    needs_gpu: bool = True

    @property
    def backward(self) -> bool:
        return "backward" in self.name

    @property
    def stem(self) -> bool:
        return "stem" in self.name

    @property
    def gflop(self) -> float:
        """Of one launch, as torch counts them: also what falls on padding."""
        layer = self.layer
        taps = layer.in_channels * layer.out_channels * layer.kernel**2
        products = taps * (layer.pixels // layer.stride) ** 2
        if layer.side is not None:
            channels, pixels, stride = layer.side
            # The pixels of a shortcut's output, which in the gradient is what is read.
            made = pixels if self.backward else pixels // stride
            other = layer.in_channels if self.backward else layer.out_channels
            products += channels * other * made**2
        return 2e-9 * self.num_experts * self.num_images * products

    def __str__(self) -> str:
        return f"{self.name.replace(' ', '-')}-N{self.num_images}"


def _cases() -> Iterator[Case]:
    for name, layer in {
        "small stem forward": Layer(3, 16, 8),
        "small forward residual": Layer(16, 16, 8, residual=True),
        "small forward side": Layer(16, 16, 4, side=(8, 8, 2)),
        "small backward skip": Layer(16, 16, 8, residual=True),
        "small backward narrowing": Layer(8, 16, 8, stride=2, side=(16, 4, 2)),
        "small stem backward": Layer(3, 16, 8),
    }.items():
        yield Case(name, layer, 1, 16, num_experts=2, needs_gpu=False)
    known = layers()
    for num_images in (128, 512):
        for name, count in COUNTS.items():
            layer = Layer(3, 64, 32) if "stem" in name else known[name][0]
            yield Case(name, layer, count, num_images)


CASES = list(_cases())


class Stock(NamedTuple):
    """The tensors of a layer as stock torch has them, channels_last: of one expert, or of all as
    groups of channels. `source` is what the forward pass read, `grad` what comes back."""

    source: Tensor
    weight: Tensor
    bias: Tensor | None
    addend: Tensor | None
    side: Tensor | None
    side_weight: Tensor | None
    grad: Tensor | None
    groups: int


class Work(NamedTuple):
    """What a case computes: an op's arguments and its definition, and the same in stock torch.

    `as_ours` brings what a column of `stock` returns into the shape that the op returns.
    """

    op: str
    inputs: tuple[Any, ...]
    definition: Callable[..., Tensor]
    stock: dict[str, Callable[[], Any]]
    as_ours: dict[str, Callable[[Any], Tensor]]


# Stock torch ------------------------------------------------------------------------------------


def stock_forward(layer: Layer, stock: Stock) -> Tensor:
    """Convolution, shortcut, sum, ReLU, each on its own."""
    padding, groups = layer.kernel // 2, stock.groups
    y = torch.conv2d(stock.source, stock.weight, stock.bias, layer.stride, padding, 1, groups)
    if stock.side is not None:
        assert layer.side is not None
        assert stock.side_weight is not None
        y += torch.conv2d(stock.side, stock.side_weight, None, layer.side[2], 0, 1, groups)
    if stock.addend is not None:
        y += stock.addend
    return y.relu_()


def fused_forward(layer: Layer, stock: Stock) -> Tensor:
    """The same in one call of cuDNN, but for a shortcut's convolution."""
    addend, padding = stock.addend, [layer.kernel // 2] * 2
    if stock.side is not None:
        assert layer.side is not None
        assert stock.side_weight is not None
        addend = torch.conv2d(stock.side, stock.side_weight, None, layer.side[2])
    end = stock.bias, [layer.stride] * 2, padding, [1, 1], 1
    if addend is None:
        return torch.cudnn_convolution_relu(stock.source, stock.weight, *end)
    return torch.cudnn_convolution_add_relu(stock.source, stock.weight, addend, 1.0, *end)


def stock_backward(layer: Layer, stock: Stock) -> Tensor:
    """Its input's gradient, as autograd computes it; images were not behind a ReLU."""
    assert stock.grad is not None
    padding = layer.kernel // 2
    grad = _input_grad(stock.grad, stock, stock.weight, layer.stride, padding)
    if stock.side is not None:
        assert layer.side is not None
        assert stock.side_weight is not None
        grad += _input_grad(stock.side, stock, stock.side_weight, layer.side[2], 0)
    if stock.addend is not None:
        grad += stock.addend
    if stock.source.shape[1] == 3:
        return grad
    masked: Tensor = torch.ops.aten.threshold_backward(grad, stock.source, 0.0)
    return masked


def _input_grad(grad: Tensor, stock: Stock, weight: Tensor, stride: int, padding: int) -> Tensor:
    found: Tensor = torch.ops.aten.convolution_backward(
        grad,
        stock.source,
        weight,
        bias_sizes=None,
        stride=[stride] * 2,
        padding=[padding] * 2,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=stock.groups,
        output_mask=[True, False, False],
    )[0]
    return found


def _last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def to_images(rows: Tensor) -> Tensor:
    """[H, W, N, C] of one expert to [N, C, H, W]."""
    return _last(rows.permute(2, 3, 0, 1))


def to_slab(images: list[Tensor]) -> Tensor:
    return torch.stack([x.permute(2, 3, 0, 1) for x in images]).contiguous()


def in_groups(stocks: list[Stock]) -> Stock:
    """All experts as groups of one convolution."""

    def joined(name: str) -> Tensor | None:
        parts = [getattr(stock, name) for stock in stocks]
        if parts[0] is None:
            return None
        if name == "bias":
            return torch.cat(parts)
        return _last(torch.cat(parts, dim=0 if "weight" in name else 1))

    values = {name: joined(name) for name in Stock._fields if name != "groups"}
    return Stock(**values, groups=len(stocks))  # type: ignore[arg-type]


# What a case computes ---------------------------------------------------------------------------


def make_work(case: Case, device: torch.device) -> Work:
    """Random tensors for a case, and all that runs on them but our kernels."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    layer, E, N = case.layer, case.num_experts, case.num_images
    C, O, H, R = layer.in_channels, layer.out_channels, layer.pixels, layer.kernel  # noqa: E741
    P, D = H // layer.stride, layer.side[0] if layer.side else 0
    weight = randn(E, O, C, R, R, scale=(2 / (C * R * R)) ** 0.5)
    # ReLUs cut half of it.
    source = randn(E, H, H, N, C).relu()
    grad = randn(E, P, P, N, O) if case.backward else None
    residual = None
    if layer.residual:
        residual = randn(E, H, H, N, C) if case.backward else randn(E, P, P, N, O).relu()
    side = side_weight = None
    if layer.side is not None:
        # Forward from D channels to O; the gradient of what reads C of them comes from D.
        side = randn(E, layer.side[1], layer.side[1], N, D)
        made, read = (D, C) if case.backward else (O, D)
        side_weight = randn(E, made, read, 1, 1, scale=(2 / read) ** 0.5)
    bias = None if case.backward else randn(E, O, dtype=torch.float32)
    images = torch.rand(1, N, C, H, H, generator=generator, device=device) if case.stem else None

    def stock(e: int) -> Stock:
        def one(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else to_images(rows[e])

        return Stock(
            to_images(source[e]) if images is None else _last(images[0].to(DTYPE)),
            _last(weight[e]),
            None if bias is None else bias[e].to(DTYPE),
            one(residual),
            one(side),
            None if side_weight is None else _last(side_weight[e]),
            one(grad),
            groups=1,
        )

    stocks = [stock(e) for e in range(E)]
    run = stock_backward if case.backward else stock_forward

    def per_expert() -> list[Tensor]:
        return [run(layer, stock) for stock in stocks]

    columns: dict[str, Callable[[], Any]] = {"eager": per_expert}
    as_ours: dict[str, Callable[[Any], Tensor]] = {"eager": to_slab, "fused": to_slab}
    if device.type == "cuda" and not case.backward:
        columns["fused"] = lambda: [fused_forward(layer, stock) for stock in stocks]
    if not case.stem:  # images are shared by all experts, which groups of channels cannot say
        grouped = in_groups(stocks)
        columns["grouped"] = lambda: run(layer, grouped)
        as_ours["grouped"] = lambda y: to_slab(list(y.chunk(E, dim=1)))

    def taps(filters: Tensor) -> Tensor:
        return filters.permute(0, 1, 3, 4, 2).contiguous()  # [E, O, R, S, C]

    padding, side_stride = R // 2, layer.side[2] if layer.side else 1
    flat = None if side_weight is None else side_weight[..., 0, 0]
    inputs: tuple[Any, ...]
    if case.stem and case.backward:
        turned = weight.permute(0, 3, 4, 2, 1).contiguous()  # [E, R, S, C, O]
        inputs = grad, turned, N, H, H, 1, padding, True
        # All experts saw the same images: their gradients are added.
        columns["eager"] = lambda: torch.stack(per_expert()).sum(0, True, dtype=torch.float32)
        as_ours["eager"] = lambda y: y
        return Work("stem_input_grad", inputs, reference.stem_input_grad, columns, as_ours)
    if case.backward:
        turned = weight.permute(0, 2, 3, 4, 1).contiguous()  # [E, C, R, S, O]
        flat_turned = None if flat is None else flat.mT.contiguous()
        inputs = grad, turned, residual, side, flat_turned, source
        inputs = *inputs, H, H, layer.stride, padding, side_stride
        definition = reference.grouped_conv_input_grad
        return Work("grouped_conv_input_grad", inputs, definition, columns, as_ours)
    if images is not None:
        source = slab.image_columns(images, kernel=(R, R), stride=1, padding=padding, dtype=DTYPE)
        sets = torch.cat([taps(weight).flatten(2)] * slab.num_sets(DTYPE), dim=2)
        sets = torch.nn.functional.pad(sets, (0, source.shape[4] - sets.shape[2]))
        inputs = source, sets[:, :, None, None].contiguous(), bias, None, None, None, 1, 0, 1, True
    else:
        inputs = source, taps(weight), bias, residual, side, flat
        inputs = *inputs, layer.stride, padding, side_stride, True
    return Work("grouped_conv", inputs, reference.grouped_conv, columns, as_ours)


# The columns ------------------------------------------------------------------------------------


def kernel(work: Work, name: str) -> Callable[[], Tensor]:
    """One implementation of the op, and no other; raises if it is not there, wrong, or declines."""
    device = work.inputs[0].device
    op = registry()[work.op]
    with moe_kernels.implementation(name):
        op(*work.inputs)  # checked first, an isolated one in a process of its own
    found = next(
        x for x in op.implementations if x.name == name and x.obstacle(device, DTYPE) is None
    )
    if found.function(*work.inputs) is NotImplemented:
        raise ValueError(f"{name} does not take these sizes")
    return functools.partial(found.function, *work.inputs)


def tiles(work: Work) -> dict[str, Callable[[], Tensor]]:
    """The Triton kernel on each tile that its tables offer this layer."""
    if not work.op.startswith("grouped_conv"):
        return {}
    forward = work.op == "grouped_conv"
    make: Any = grouped_conv.conv_call if forward else grouped_conv.input_grad_call
    call: grouped_conv_tiles.Call = make(*work.inputs)

    def run(tile: grouped_conv_tiles.Tile, y: Tensor) -> Tensor:
        grouped_conv_tiles.launch(call._replace(y=y), tile)
        return y

    found: dict[str, Callable[[], Tensor]] = {}
    for tile in grouped_conv_tiles.fitting_tiles(call):
        sizes = "x".join(map(str, tile[1:4]))
        name = f"{'tma ' * tile.tma}{sizes}, {tile.num_warps} warps, {tile.num_stages} stages"
        # Memory of its own, where nothing is right already.
        found[name] = functools.partial(run, tile, torch.full_like(call.y, torch.nan))
    return found


def builders(work: Work) -> dict[str, Callable[[], Callable[[], Any]]]:
    """All columns, built when called; the first one is what the others are compared with."""
    made: dict[str, Callable[[], Callable[[], Any]]] = {
        name: functools.partial(_known, run) for name, run in work.stock.items()
    }
    if work.inputs[0].device.type == "cuda":
        made |= {name: functools.partial(kernel, work, name) for name in KERNELS}
    ours = functools.partial(registry()[work.op], *work.inputs)
    made["ours"] = functools.partial(_known, ours)
    if work.inputs[0].device.type == "cuda":
        made |= {name: functools.partial(_known, run) for name, run in tiles(work).items()}
    return made


def _known(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same in a CUDA graph; every call returns the same tensors, filled anew."""
    outputs: list[Any] = []

    def step() -> None:
        outputs[:] = [run()]

    # cuDNN may take its time to find its best algorithm.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        replay = captured(step)

    def call() -> Any:
        replay()
        return outputs[0]

    return call


def judge(work: Work, columns: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """What is wrong with each column that does not compute what the definition does."""
    known: dict[torch.dtype, Tensor] = {}

    def definition(*inputs: Any) -> Tensor:
        dtype = inputs[0].dtype
        if dtype not in known:
            known[dtype] = work.definition(*inputs)
        return known[dtype]

    faults = {}
    for name, run in columns.items():
        as_ours = work.as_ours.get(name, lambda y: y)
        found = errors(lambda *_, run=run, as_ours=as_ours: as_ours(run()), definition, work.inputs)
        if found:
            faults[name] = "; ".join(found)
    return faults


def build_columns(work: Work, bench: Bench) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """All columns that run here, on a GPU as CUDA graphs, and why the others do not."""
    columns: dict[str, Callable[[], Any]] = {}
    skipped = {}
    for name, build in builders(work).items():
        try:
            run = build()
            columns[name] = graphed(run) if bench.device.type == "cuda" else run
        except Exception as error:
            # Whatever one of them lacks, the others can run.
            skipped[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            bench.say(f"{name}: skipped, {skipped[name]}")
    return columns, skipped


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv(case: Case, bench: Bench) -> None:
    bench.require(gpu=case.needs_gpu)
    work = make_work(case, bench.device)
    columns, skipped = build_columns(work, bench)
    faults = judge(work, columns)
    right = {name: lambda *_, run=run: run() for name, run in columns.items() if name not in faults}
    if {"eager", "ours"} <= set(right):
        selected = registry()[work.op].selected(bench.device, DTYPE, work.inputs)
        times = bench.time(right, work.inputs[:1], min_samples=30, min_s=0.02)
        described = {
            name: {**dataclasses.asdict(time), "tflop_per_s": case.gflop / time.median_ms}
            for name, time in times.items()
        }
        row = {
            "bench": "conv",
            "case": str(case),
            "op": work.op,
            "batch_size": case.num_images,
            "num_experts": case.num_experts,
            "dtype": str(DTYPE).removeprefix("torch."),
            "count": case.count,
            "backward": case.backward,
            "gflop": case.gflop,
            "implementation": {work.op: selected},
            "columns": {name: x for name, x in described.items() if name in COLUMNS},
            "tiles": {name: x for name, x in described.items() if name not in COLUMNS},
            "skipped": skipped | faults,
        }
        bench.record(row)
    assert not faults, "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    assert "ours" in columns, skipped
