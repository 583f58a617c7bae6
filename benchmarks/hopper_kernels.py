"""Say what the compiled Hopper kernels cost, and how long they should take. Needs no GPU.

    python benchmarks/hopper_kernels.py

Prints two tables. The first is read from the built module: registers, spills and instructions of
each kernel. The second is PREDICTED, NOT MEASURED: the convolutions of an attack step on nine
ResNet-18 experts on one H200, in single blocks and in clusters of two, from the tiles and the order
of work that csrc chooses, and the rates below. A GPU takes what its clock finds faster, launch by
launch: the last row. bench_conv.py measures the same launches on a GPU.

The prediction counts clock cycles. A chunk of 64 channels takes as long as the slowest of three:
products, reading and filling shared memory, and fetching from the L2 cache, all of which overlap.
After its last chunk a tile is stored, while its warps multiply nothing. A launch ends with its
slowest worker, or when its tensors have gone through memory once.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import aot_table
import bench_conv
import torch

from moe_kernels import native
from moe_kernels.ops import grouped_conv_sm90a
from moe_kernels.ops.grouped_conv_tiles import Call

EXPERTS = 9
BATCHES = (128, 256, 512)
CHUNK = 64  # channels; 128 bytes of bfloat16

# An H200: multiprocessors; their clock while all of them multiply, at which products alone make 788
# TFLOP/s, what large matrix products reach there; bytes per second from memory, and from the L2
# cache while what is read fits into 40 MB of it, and while it does not.
MULTIPROCESSORS = 132
CLOCK_HZ = 1.457e9
MEMORY_BYTES_PER_S = 4.3e12
L2_BYTES_PER_S = {"small": 9.8e12, "large": 6.5e12}
# Per multiprocessor and clock.
FLOP_PER_CLOCK = 4096
SHARED_BYTES_PER_CLOCK = 128
# From the end of a tile's products to the first store, and between stores: waits for memory.
STORE_LATENCY = 1500

# What to count in a kernel's code.
INSTRUCTIONS = ("HGMMA", "UTMALDG", "SYNCS", "LDS", "STS", "LDG", "STG", "BAR")


class Cost(NamedTuple):
    """What one kernel needs, per thread and in its code."""

    registers: int
    spilled_bytes: int
    instructions: dict[str, int]
    code: str


class Tiles(NamedTuple):
    """csrc's ConvTiles: images and channels of a block's tile, and of a worker's."""

    rows: int
    channels: int
    worker_rows: int
    worker_channels: int
    narrow: bool

    @property
    def blocks(self) -> int:
        """Of a cluster."""
        return self.worker_rows * self.worker_channels // (self.rows * self.channels)


class Prediction(NamedTuple):
    """One launch: predicted seconds, what limits its chunks, and its work."""

    tiles: Tiles
    seconds: float
    limit: str
    flop: int  # of products that are computed; taps on padding are not

    @property
    def tflops(self) -> float:
        """TFLOP/s, of products that are computed."""
        return self.flop / self.seconds / 1e12


def find_cuobjdump() -> str | None:
    """NVIDIA's disassembler: a CUDA toolkit's, or the one that Triton brings along."""
    folders = [os.environ[x] + "/bin" for x in ("CUDA_HOME", "CUDA_PATH") if x in os.environ]
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *folders])
    return shutil.which("cuobjdump", path=path)


def compiled_kernels(tool: str) -> dict[str, Cost]:
    """The kernels of conv_sm90a.cu in the built module, as "wide 128 256 2" or "narrow 128".

    Args:
        tool: the path of cuobjdump.
    Raises:
        RuntimeError: if it cannot read the module.
    """
    usage, code = (
        subprocess.run(
            [tool, "-arch", "sm_90a", flag, str(native.module.__file__)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for flag in ("-res-usage", "-sass")
    )
    used = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
    parts = re.split(r"Function : (\S+)", code)
    found = {}
    for symbol, text in zip(parts[1::2], parts[2::2], strict=True):
        named = re.search(r"\d+(wide|narrow)_kernelI((?:Li\d+E)+)E", symbol)
        if named is None:
            continue
        numbers = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", used[symbol])
        if numbers is None:
            raise RuntimeError(f"cuobjdump says of {symbol}: {used[symbol]}")
        registers, stack, local = map(int, numbers.groups())
        counts = {name: len(re.findall(rf"\b{name}\b", text)) for name in INSTRUCTIONS}
        name = " ".join([named[1], *re.findall(r"\d+", named[2])])
        found[name] = Cost(registers, stack + local, counts, text)
    return found


def tiles_of(call: Call, clusters: bool) -> Tiles:
    """How csrc cuts up this launch."""
    sizes = grouped_conv_sm90a.kernel_arguments(call)["sizes"]
    return Tiles(*native.module.conv_sm90a_tiles(sizes, MULTIPROCESSORS, clusters))


def chunks_of_pixels(call: Call) -> list[int]:
    """For each output pixel how many chunks its tiles sum over, most first."""
    _, P, Q, _, _ = call.y.shape
    taps = [
        [_num_taps(call, position, axis) for position in range(size)]
        for axis, size in enumerate((P, Q))
    ]
    side = 0 if call.side is None else call.side.shape[4] // CHUNK
    met = call.side_stride if call.backward else 1
    per_tap = call.x.shape[4] // CHUNK
    return sorted(
        (
            taps[0][p] * taps[1][q] * per_tap + side * (p % met == q % met == 0)
            for p in range(P)
            for q in range(Q)
        ),
        reverse=True,
    )


def _num_taps(call: Call, position: int, axis: int) -> int:
    """Filter taps along one axis that meet a pixel of the source."""
    size, taps = call.x.shape[1 + axis], call.weight.shape[2 + axis]
    if not call.backward:
        starts = [position * call.stride + tap - call.padding for tap in range(taps)]
        return sum(0 <= start < size for start in starts)
    starts = [position + call.padding - tap for tap in range(taps)]
    return sum(x % call.stride == 0 and 0 <= x // call.stride < size for x in starts)


def chunk_cycles(tiles: Tiles, l2_bytes_per_s: float) -> dict[str, float]:
    """Cycles of a chunk of a block, or of a warpgroup of the narrow kernel, by what takes them."""
    rows, channels = tiles.rows, tiles.channels
    products = 2 * rows * channels * CHUNK / FLOP_PER_CLOCK
    # A product of 64 rows reads both of its operands, 16 columns at a time.
    left, right = (channels, rows) if tiles.narrow else (rows, channels)
    operands = left // 64 * (CHUNK // 16) * (64 + right) * 32
    placed = (rows + (0 if tiles.narrow else channels)) * 2 * CHUNK
    fetched = placed
    if tiles.worker_channels > channels:
        fetched -= rows * CHUNK  # both blocks need the same images: each fetches a half
    elif tiles.worker_rows > rows:
        fetched -= channels * CHUNK  # or the same filters
    per_clock = l2_bytes_per_s / CLOCK_HZ / MULTIPROCESSORS
    return {
        "products": products,
        "shared memory": (operands + placed) / SHARED_BYTES_PER_CLOCK,
        "L2": fetched / per_clock,
    }


def predict(call: Call, clusters: bool, l2_bytes_per_s: float) -> Prediction:
    """How long a launch should take on an H200; predicted, not measured."""
    tiles = tiles_of(call, clusters)
    E, _, _, N, O = call.y.shape  # noqa: E741  (the letter of an axis)
    per_chunk = chunk_cycles(tiles, l2_bytes_per_s)
    limit = max(per_chunk, key=lambda name: per_chunk[name])
    read = 1 + (call.residual is not None) + (call.activation is not None)
    per_clock = l2_bytes_per_s / CLOCK_HZ / MULTIPROCESSORS
    # Through shared memory and back as float32; then out, beside what is added or compared.
    outputs = tiles.rows * tiles.channels
    store = outputs * 8 / SHARED_BYTES_PER_CLOCK + outputs * 2 * read / per_clock + STORE_LATENCY
    if tiles.narrow:
        store = 0.0  # the other warpgroup multiplies meanwhile
    copies = E * (N // tiles.worker_rows) * (O // tiles.worker_channels)
    chunks = chunks_of_pixels(call)
    workers = MULTIPROCESSORS // tiles.blocks
    # There and back again over the tiles, the longest first, as csrc's tile_at does; where it puts
    # experts first, workers have so many tiles that the order hardly matters.
    loads = [0.0] * workers
    for index, pixel in enumerate(pixel for pixel in chunks for _ in range(copies)):
        turn, place = divmod(index, workers)
        loads[place if turn % 2 == 0 else workers - 1 - place] += pixel * per_chunk[limit] + store
    seconds = max(loads) / CLOCK_HZ
    tensors = [
        x
        for x in (call.x, call.weight, call.y, call.residual, call.side, call.activation)
        if x is not None
    ]
    memory = sum(x.numel() * x.element_size() for x in tensors) / MEMORY_BYTES_PER_S
    flop = 2 * CHUNK * N * O * E * sum(chunks)
    return Prediction(tiles, max(seconds, memory), limit if seconds > memory else "memory", flop)


def launches(batch: int) -> dict[str, tuple[Call, int]]:
    """The convolutions of an attack step that the kernels take, and how often each comes."""
    calls = {}
    for name, (layer, direction) in aot_table.layers().items():
        if count := bench_conv.COUNTS.get(name):
            calls[name] = getattr(layer, direction)(EXPERTS, batch, torch.bfloat16), count
    return calls


def print_compiled(tool: str) -> int:
    """The table of the compiled kernels; returns how many bytes they spill."""
    found = compiled_kernels(tool)
    print("Compiled: kernel, registers at launch, bytes spilled, instructions\n")
    _print_row("kernel", "registers", "spilled", *INSTRUCTIONS)
    _print_row(*["---"] * (3 + len(INSTRUCTIONS)))
    for name, cost in found.items():
        _print_row(name, cost.registers, cost.spilled_bytes, *cost.instructions.values())
    return sum(cost.spilled_bytes for cost in found.values())


def print_predictions() -> None:
    """The table of predicted speeds and times."""
    print(
        f"PREDICTED, NOT MEASURED: TFLOP/s on one H200, {EXPERTS} experts, by batch size and rate "
        "of the L2 cache; single blocks -> clusters of two. Of products that are computed.\n"
    )
    columns = list(itertools.product(BATCHES, L2_BYTES_PER_S.values()))
    _print_row("launch", *(f"{batch} images, {rate / 1e12} TB/s" for batch, rate in columns))
    _print_row(*["---"] * (1 + len(columns)))
    total = {column: [0.0, 0.0, 0.0] for column in columns}
    calls = {batch: launches(batch) for batch in BATCHES}
    for name in calls[BATCHES[0]]:
        cells = []
        for batch, rate in columns:
            call, count = calls[batch][name]
            single, cluster = (predict(call, clusters, rate) for clusters in (False, True))
            faster = min(single.seconds, cluster.seconds)
            for i, seconds in enumerate((single.seconds, cluster.seconds, faster)):
                total[batch, rate][i] += count * seconds
            other = f" -> {cluster.tflops:.0f}" if cluster.tiles.blocks > 1 else ""
            cells.append(f"{single.tflops:.0f}{other} ({single.limit})")
        _print_row(name, *cells)
    for i, name in enumerate(("single blocks", "clusters", "the faster of both")):
        _print_row(f"a step, {name}", *(f"{1e3 * x[i]:.2f} ms" for x in total.values()))


def main() -> int:
    """Print both tables; exit code 1 if a kernel spills registers."""
    if not native.has_cpu:
        print(f"nothing is compiled here: {native.missing}", file=sys.stderr)
        return 2
    spilled = 0
    tool = find_cuobjdump()
    if tool is None or not grouped_conv_sm90a.BUILT:
        print("No table of the compiled kernels: it needs a build for 90a and cuobjdump.")
    else:
        spilled = print_compiled(tool)
    print()
    print_predictions()
    return int(spilled > 0)


def _print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.exit(main())
