"""The Triton kernel of grouped_conv.py, and the tiles that cut up its launches.

One program computes a tile of BLOCK_N images x BLOCK_O output channels at one output pixel. Filter
taps that fall on padding, or between the outputs of a strided convolution, are not visited at all.
Which tile is fastest depends on the layer: on a GPU all tiles that fit and agree are timed once.

Axes as in grouped_conv.py.
"""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import lang
from moe_kernels.compile_pool import compile_all
from moe_kernels.lang import tl, triton
from moe_kernels.select import fastest

log = logging.getLogger("moe_kernels")


class Tile(NamedTuple):
    """A way to cut up a launch: a program makes block_n images x block_o channels."""

    tma: bool
    block_n: int
    block_o: int
    block_c: int
    num_warps: int
    num_stages: int


# By the number of output channels, widest first; the first of each row that fits a shape is what
# torch's deterministic mode uses. Found by compiling: no row spills, or overfills shared memory.
_TMA_TILES = {
    256: [
        Tile(True, 128, 256, 64, 8, 3),
        Tile(True, 256, 128, 64, 8, 3),
        Tile(True, 128, 128, 64, 8, 4),
        Tile(True, 64, 128, 64, 4, 4),
    ],
    128: [
        Tile(True, 256, 128, 64, 8, 3),
        Tile(True, 128, 128, 64, 8, 4),
        Tile(True, 64, 128, 64, 4, 4),
    ],
    0: [
        Tile(True, 256, 64, 64, 8, 4),
        Tile(True, 128, 64, 64, 4, 4),
        Tile(True, 64, 64, 64, 4, 4),
    ],
}
# Pointers and masks: any GPU, any size.
_TILES = {
    128: [Tile(False, 128, 128, 32, 8, 4), Tile(False, 64, 128, 32, 8, 4)],
    0: [Tile(False, 128, 64, 64, 4, 3), Tile(False, 64, 64, 64, 4, 3)],
}
# Rows of so many elements are loaded in whole vectors.
_UNIT = 16
# Without tensor cores: exact products of float32.
_FLOAT32_TILES = {0: [Tile(False, 64, 64, 16, 8, 3)]}


@triton.jit  # type: ignore[untyped-decorator]
def _taps(  # type: ignore[no-untyped-def]
    pixel, num_taps, num_pixels, stride, padding, BACKWARD: tl.constexpr
):
    """Along one axis: the first tap that meets a source pixel, that pixel, how many taps do."""
    if BACKWARD:
        # Tap r took input pixel h to output pixel p = (h + padding - r) / stride, if that is whole.
        shifted = pixel + padding
        first = tl.maximum(shifted - (num_pixels - 1) * stride, shifted % stride)
        last = tl.minimum(num_taps - 1, shifted)
        source = (shifted - first) // stride
        count = tl.maximum((last - first + stride) // stride, 0)
    else:
        start = pixel * stride - padding
        first = tl.maximum(-start, 0)
        source = start + first
        count = tl.maximum(tl.minimum(num_taps, num_pixels - start) - first, 0)
    return first, source, count


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(  # type: ignore[no-untyped-def]
    tensor, row, column, num_rows, num_columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix; without TMA num_rows and num_columns of it, and zeros."""
    if TMA:
        tile = tensor.load([row, column])
    else:
        i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        offsets = (row + i).to(tl.int64)[:, None] * stride + (column + j)[None, :]
        mask = (i < num_rows)[:, None] & (j < num_columns)[None, :]
        tile = tl.load(tensor + offsets, mask=mask, other=0.0)
    return tile


# What differs between layers is a runtime argument: a network would wait for a variant of each. Of
# the sizes only the channels, the length of rows, make faster loads when their divisor is known.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        *("tiles_n", "tiles_o", "E", "H", "W", "P", "Q", "side_H", "side_W", "N", "C", "O", "D"),
        *("R", "S", "stride", "padding", "side_stride", "shared", "relu", "add_residual", "mask"),
    ]
)
def _conv_kernel(  # type: ignore[no-untyped-def]
    x,  # [E or 1, H, W, N, C]; a pointer, or with TMA a descriptor of its rows, like all but bias
    weight,  # [E, O, R, S, C]
    bias,  # [E, O]
    residual,  # [E, P, Q, N, O]; like side and activation, some other tensor if there is none
    side,  # [E, side_H, side_W, N, D]
    side_weight,  # [E, O, D]
    activation,  # [E, P, Q, N, O]
    y,  # [E, P, Q, N, O]
    tiles_n,
    tiles_o,
    E,
    H,
    W,
    P,
    Q,
    side_H,
    side_W,
    N,
    C,
    O,
    D,
    R,
    S,
    stride,
    padding,
    side_stride,
    shared,  # whether the experts read the same x
    relu,
    add_residual,
    mask,  # by activation
    UNIT: tl.constexpr,  # C, O and D are given as multiples of this
    BACKWARD: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, O, D = C * UNIT, O * UNIT, D * UNIT
    tile = tl.program_id(0)
    o0 = tile % tiles_o * BLOCK_O
    tile //= tiles_o
    if shared:
        # The experts read the same rows: one after the other, while these are in the cache.
        e = tile % E
        tile //= E
        source_e = 0
    else:
        e = tile // (tiles_n * P * Q)
        tile %= tiles_n * P * Q
        source_e = e
    n0 = tile % tiles_n * BLOCK_N
    q = tile // tiles_n % Q
    p = tile // (tiles_n * Q)
    num_n, num_o = N - n0, O - o0

    first_r, first_h, num_r = _taps(p, R, H, stride, padding, BACKWARD)
    first_s, first_w, num_s = _taps(q, S, W, stride, padding, BACKWARD)
    chunks = tl.cdiv(C, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for i in tl.range(0, num_r * num_s * chunks):
        tap = i // chunks
        c0 = i % chunks * BLOCK_C
        step_r, step_s = tap // num_s, tap % num_s
        if BACKWARD:
            r, s = first_r + step_r * stride, first_s + step_s * stride
            h, w = first_h - step_r, first_w - step_s
        else:
            r, s = first_r + step_r, first_s + step_s
            h, w = first_h + step_r, first_w + step_s
        row = ((source_e * H + h) * W + w) * N + n0
        rows = load_tile(x, row, c0, num_n, C - c0, C, BLOCK_N, BLOCK_C, TMA)
        # TMA reads on into the next tap where C ends inside a tile, against zeros of x.
        column = (r * S + s) * C + c0
        filters = load_tile(
            weight, e * O + o0, column, num_o, C - c0, R * S * C, BLOCK_O, BLOCK_C, TMA
        )
        total = tl.dot(rows, filters.T, total, input_precision="ieee")

    # Without a side input D is 0.
    chunks = tl.cdiv(D, BLOCK_C)
    if BACKWARD:
        row = ((e * side_H + p // side_stride) * side_W + q // side_stride) * N + n0
        meets = (p % side_stride == 0) & (q % side_stride == 0)
        chunks = tl.where(meets, chunks, 0)
    else:
        row = ((e * side_H + p * side_stride) * side_W + q * side_stride) * N + n0
    for i in tl.range(0, chunks):
        d0 = i * BLOCK_C
        rows = load_tile(side, row, d0, num_n, D - d0, D, BLOCK_N, BLOCK_C, TMA)
        filters = load_tile(side_weight, e * O + o0, d0, num_o, D - d0, D, BLOCK_O, BLOCK_C, TMA)
        total = tl.dot(rows, filters.T, total, input_precision="ieee")

    o = o0 + tl.arange(0, BLOCK_O)
    row = ((e * P + p) * Q + q) * N + n0
    if not BACKWARD:
        total += tl.load(bias + e * O + o, mask=o < O, other=0.0)[None, :]
    if add_residual:
        total += load_tile(residual, row, o0, num_n, num_o, O, BLOCK_N, BLOCK_O, TMA).to(tl.float32)
    # A NaN stays NaN, as in torch; by default tl.maximum would hide it.
    least = tl.where(relu != 0, 0.0, -float("inf"))
    total = tl.maximum(total, least, propagate_nan=tl.PropagateNan.ALL)
    if mask:
        active = load_tile(activation, row, o0, num_n, num_o, O, BLOCK_N, BLOCK_O, TMA)
        total = tl.where(active.to(tl.float32) > 0, total, 0.0)
    if TMA:
        y.store([row, o0], total.to(y.dtype))
    else:
        n = tl.arange(0, BLOCK_N)
        offsets = (row + n).to(tl.int64)[:, None] * O + o[None, :]
        tl.store(y + offsets, total, mask=(n < num_n)[:, None] & (o < O)[None, :])


class Call(NamedTuple):
    """One launch, in the words of the kernel: y = act(conv(x) + ...), see `_conv_kernel`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    side: Tensor | None
    side_weight: Tensor | None
    activation: Tensor | None
    y: Tensor
    stride: int
    padding: int
    side_stride: int
    backward: bool = False
    relu: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Device, dtype, shapes and numbers: calls that share them run on the same tile."""
        return (self.x.device, self.x.dtype, *key(*self))


def key(*args: Any) -> tuple[Any, ...]:
    """The arguments with shapes in place of tensors."""
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in args)


# The fastest tile by device and layer, of those that were timed.
_fastest_tiles: dict[tuple[Any, ...], Tile] = {}


def fitting_tiles(call: Call) -> list[Tile]:
    """The tiles that fit the layer, shrunk to its sizes, in the order of the tables."""
    N, C = call.x.shape[3:]
    O = call.y.shape[4]
    tables = [_FLOAT32_TILES if call.x.dtype is torch.float32 else _TILES]
    # Small tiles are fed as well by plain loads, and need no variants of their own.
    if min(N, O, C) > 16 and _tma_reads(call):
        tables.insert(0, _TMA_TILES)
    tiles = []
    for table in tables:
        row = table[next(width for width in table if width <= O)]
        for tile in [x for x in row if x.block_n <= N] or row[-1:]:
            block_n = min(tile.block_n, max(triton.next_power_of_2(N), 32))
            block_o, block_c = (
                16 if size <= 16 else block for block, size in zip(tile[2:4], (O, C), strict=True)
            )
            num_warps = min(tile.num_warps, max(block_n * block_o // 256, 1))
            # TMA would store rows of the next pixel as well.
            if not tile.tma or N % block_n == 0:
                fitted = Tile(tile.tma, block_n, block_o, block_c, num_warps, tile.num_stages)
                tiles.append(fitted)
    return list(dict.fromkeys(tiles))


def _tma_reads(call: Call) -> bool:
    """Whether this GPU has TMA and it can address all tensors."""
    # float32 has no tensor cores here, and so no use for TMA; the interpreter has nothing else.
    if not lang.interpreted and (
        call.x.dtype is torch.float32 or lang.capability(call.x.device) < (9, 0)
    ):
        return False
    return all(
        x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0
        for x in _tma_operands(call)
        if x is not None
    )


def _tma_operands(call: Call) -> tuple[Tensor | None, ...]:
    return (
        call.x,
        call.weight,
        call.residual,
        call.side,
        call.side_weight,
        call.activation,
        call.y,
    )


def launch(call: Call, tile: Tile) -> None:
    """Start the kernel, which writes call.y.

    Raises:
        triton.OutOfResources: if the tile needs more registers or shared memory than there are.
    """
    x, weight, bias, residual, side, side_weight, activation, y = call[:8]
    _, H, W, N, C = x.shape
    E, P, Q, _, O = y.shape
    R, S = weight.shape[2:4]
    _, side_H, side_W, _, D = side.shape if side is not None else (0,) * 5
    tiles_n, tiles_o = triton.cdiv(N, tile.block_n), triton.cdiv(O, tile.block_o)
    num_programs = E * P * Q * tiles_n * tiles_o
    unit = _UNIT if all(size % _UNIT == 0 for size in (C, O, D)) else 1
    read = functools.partial(_rows, block_n=tile.block_n, block=tile.block_c, tma=tile.tma)
    made = functools.partial(_rows, block_n=tile.block_n, block=tile.block_o, tma=tile.tma)
    filters = functools.partial(_rows, block_n=tile.block_o, block=tile.block_c, tma=tile.tma)
    lang.launch(
        _conv_kernel,
        (num_programs,),
        x=read(x, C),
        weight=filters(weight, R * S * C),
        bias=bias,
        residual=made(y if residual is None else residual, O),
        side=read(x, C) if side is None else read(side, D),
        side_weight=filters(weight, R * S * C) if side is None else filters(side_weight, D),
        activation=made(y if activation is None else activation, O),
        y=made(y, O),
        tiles_n=tiles_n,
        tiles_o=tiles_o,
        E=E,
        H=H,
        W=W,
        P=P,
        Q=Q,
        side_H=side_H,
        side_W=side_W,
        N=N,
        C=C // unit,
        O=O // unit,
        D=D // unit,
        R=R,
        S=S,
        stride=call.stride,
        padding=call.padding,
        side_stride=call.side_stride,
        shared=int(x.shape[0] < E),
        relu=int(call.relu),
        add_residual=int(residual is not None),
        mask=int(activation is not None),
        UNIT=unit,
        BACKWARD=call.backward,
        TMA=tile.tma,
        BLOCK_N=tile.block_n,
        BLOCK_O=tile.block_o,
        BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _rows(tensor: Tensor | None, columns: int, *, block_n: int, block: int, tma: bool) -> Any:
    """The tensor as the kernel takes it: with TMA a descriptor of a matrix of so many columns."""
    if tensor is None or not tma:
        return tensor
    # Not at the top: Triton may be missing.
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = tensor.numel() // columns
    return TensorDescriptor(tensor, [rows, columns], [columns, 1], [block_n, block])


def run(call: Call) -> Any:
    """call.y, written; or NotImplemented if no tile of the tables launches."""
    if call.y.numel() == 0:  # CUDA rejects an empty grid
        return call.y
    if lang.noting():
        tiles = fitting_tiles(call)
        for tile in tiles[:1] if torch.are_deterministic_algorithms_enabled() else tiles:
            launch(call, tile)  # all that will be timed
        return call.y
    for tile in _ranked(call):
        try:
            launch(call, tile)
        except triton.OutOfResources:
            continue
        return call.y
    return NotImplemented


def _ranked(call: Call) -> list[Tile]:
    """The tiles to try: the one that was fastest, or where no clock is read all of them."""
    tiles = fitting_tiles(call)
    if call.x.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return tiles
    if call.key not in _fastest_tiles:
        if torch.cuda.is_current_stream_capturing():
            return tiles
        _compile(call, tiles)
        right = _right(call, tiles)
        if not right:
            return []
        best = next(iter(right))
        if len(right) > 1:
            columns = {
                name: functools.partial(_launch_again, tile=tile) for name, tile in right.items()
            }
            name = "grouped_conv tile"
            best = fastest(name, columns, call, call.x.device, call.x.dtype, *key(*call))
        _fastest_tiles[call.key] = right[best]
    return [_fastest_tiles[call.key]]


def _compile(call: Call, tiles: Sequence[Tile]) -> None:
    """Compile the tiles that will be tried side by side, not each at its first launch."""
    with lang.noted(torch.cuda.get_device_capability(call.x.device)) as launches:
        for tile in tiles:
            launch(call, tile)
    compile_all(launches)


def _right(call: Call, tiles: Sequence[Tile]) -> dict[str, Tile]:
    """By name, the tiles that launch and agree with the last one, the kind that runs anywhere."""
    right: dict[str, Tile] = {}
    expected: Tensor | None = None
    for tile in reversed(tiles):
        call.y.fill_(torch.nan)
        try:
            launch(call, tile)
        except triton.OutOfResources:
            continue
        y = call.y.to(torch.float32, copy=True)
        expected = y if expected is None else expected
        # Sums in another order: they may round to the neighbor.
        size = expected.abs().nan_to_num(0.0, 0.0).max().item()
        allowed = 2 * torch.finfo(call.y.dtype).eps * size
        if torch.allclose(y, expected, rtol=0.0, atol=allowed, equal_nan=True):
            right[",".join(map(str, tile))] = tile
        else:
            log.warning("grouped_conv: %s is not used on %s: it is wrong", tile, call.x.device)
    return dict(reversed(right.items()))


def _launch_again(*args: Any, tile: Tile) -> None:
    launch(Call(*args), tile)
