"""Compile the slab kernels ahead of time; count registers, spills, instructions. Needs no GPU.

    python benchmarks/aot_table.py

Compiles every launch of an attack step on nine ResNet-18 experts and 128 images of CIFAR-10, with
every tile that its table offers, for sm_80 and sm_90, and appends a row for each to
results/aot_<date>.jsonl: registers, spills, shared memory, and how many tensor-core (HMMA, HGMMA),
shared-memory (LDSM), TMA (UTMALDG, UTMASTG) and cp.async (LDGSTS) instructions there are. Exit code
1 if one spills or does not fit.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rows
import torch
from torch import Tensor

from moe_kernels import lang
from moe_kernels.ops import grouped_conv_tiles, head, pool, slab

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}
# What one program may use of shared memory.
SHARED_BYTES = {80: 166_912, 90: 232_448}
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "UTMALDG", "UTMASTG", "LDGSTS", "FFMA")


class Launch(NamedTuple):
    """A kernel and what it was launched with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Cost(NamedTuple):
    """What a compiled launch needs."""

    registers: int
    stack_bytes: int
    local_bytes: int
    spill_instructions: int
    shared_bytes: int
    num_warps: int
    instructions: dict[str, int]


class _Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            arguments = dict(zip(names, args, strict=False))
            arguments |= {name: kwargs.pop(name) for name in names if name in kwargs}
            self.launches.append(Launch(self.kernel, arguments, kwargs))

        return launch


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """The launches that the slab ops ask for, as on such a GPU, noted instead of run."""
    launches: list[Launch] = []
    places = [
        (module, name, value)
        for module in (grouped_conv_tiles, slab, pool, head)
        for name, value in vars(module).items()
        if isinstance(value, lang.triton.JITFunction)
    ]
    saved = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    for module, name, kernel in places:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        torch.cuda.get_device_capability = saved
        for module, name, kernel in places:
            setattr(module, name, kernel)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Layer(NamedTuple):
    """One convolution of a ResNet; `side` is what its input or its block's shortcut reads."""

    in_channels: int
    out_channels: int
    pixels: int
    stride: int = 1
    kernel: int = 3
    residual: bool = False
    side: tuple[int, int, int] | None = None  # channels, pixels, stride
    shared: bool = False

    def forward(self, E: int, N: int, dtype: torch.dtype) -> Any:
        """What the forward pass launches."""
        C, K, H, R = self.in_channels, self.out_channels, self.pixels, self.kernel
        P = H // self.stride
        side = side_weight = None
        if self.side is not None:
            D, size, _ = self.side
            side = meta(E, size, size, N, D, dtype=dtype)
            side_weight = meta(E, K, D, dtype=dtype)
        return grouped_conv_tiles.Call(
            x=meta(1 if self.shared else E, H, H, N, C, dtype=dtype),
            weight=meta(E, K, R, R, C, dtype=dtype),
            bias=meta(E, K, dtype=torch.float32),
            residual=meta(E, P, P, N, K, dtype=dtype) if self.residual else None,
            side=side,
            side_weight=side_weight,
            activation=None,
            y=meta(E, P, P, N, K, dtype=dtype),
            stride=self.stride,
            padding=R // 2,
            side_stride=self.side[2] if self.side else 1,
            relu=True,
        )

    def backward(self, E: int, N: int, dtype: torch.dtype) -> Any:
        """What its input gradient launches; here `residual` is the skip gradient."""
        C, K, H, R = self.in_channels, self.out_channels, self.pixels, self.kernel
        P = H // self.stride
        side = side_weight = None
        if self.side is not None:
            D, size, _ = self.side
            side = meta(E, size, size, N, D, dtype=dtype)
            side_weight = meta(E, C, D, dtype=dtype)
        return grouped_conv_tiles.Call(
            x=meta(E, P, P, N, K, dtype=dtype),
            weight=meta(E, C, R, R, K, dtype=dtype),
            bias=None,
            residual=meta(E, H, H, N, C, dtype=dtype) if self.residual else None,
            side=side,
            side_weight=side_weight,
            activation=meta(E, H, H, N, C, dtype=dtype),
            y=meta(E, H, H, N, C, dtype=dtype),
            stride=self.stride,
            padding=R // 2,
            side_stride=self.side[2] if self.side else 1,
            backward=True,
        )


def layers() -> dict[str, tuple[Layer, str]]:
    """The different launches of a ResNet-18 for 32 x 32 pixels, and their direction."""
    found = {"stem forward": (Layer(64, 64, 32, kernel=1, shared=True), "forward")}
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        pixels = 64 >> stage
        found |= {
            f"stage {stage} forward": (Layer(width, width, pixels), "forward"),
            f"stage {stage} forward residual": (
                Layer(width, width, pixels, residual=True),
                "forward",
            ),
            f"stage {stage} backward": (Layer(width, width, pixels), "backward"),
            f"stage {stage} backward skip": (
                Layer(width, width, pixels, residual=True),
                "backward",
            ),
        }
        if stage > 1:
            before = width // 2
            found |= {
                f"stage {stage} forward narrowing": (
                    Layer(before, width, 2 * pixels, stride=2),
                    "forward",
                ),
                f"stage {stage} forward side": (
                    Layer(width, width, pixels, side=(before, 2 * pixels, 2)),
                    "forward",
                ),
                f"stage {stage} backward narrowing": (
                    Layer(before, width, 2 * pixels, stride=2, side=(width, pixels, 2)),
                    "backward",
                ),
            }
    return found


def conv_launches(
    layer: Layer, direction: str, capability: int, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[Any, Launch]]:
    """A launch for every tile that the tables offer this layer."""
    call = getattr(layer, direction)(9, 128, dtype)
    with recorded(capability) as launches:
        tiles = grouped_conv_tiles.fitting_tiles(call)
        for tile in tiles:
            grouped_conv_tiles.launch(call, tile)
    return list(zip(tiles, launches, strict=True))


def other_launches(capability: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Stem, pooling and head of the same step; pooling as in ResNets for larger images."""
    E, B, N, K = 9, 128, 128, 10
    with recorded(capability) as launches:
        images = meta(1, B, 3, 32, 32, dtype=torch.float32)
        columns = meta(1, 32, 32, N, slab.num_columns(27, dtype), dtype=dtype)
        slab._columns_triton(columns, images, 3, 3, 1, 1)
        grad, weight_t = meta(E, 32, 32, N, 64, dtype=dtype), meta(E, 3, 3, 3, 64, dtype=dtype)
        slab._stem_input_grad_triton(grad, weight_t, B, 32, 32, 1, 1, True)
        for maximum in (True, False):
            y = pool._pool_triton(grad, 3, 2, 1, maximum)
            pool._pool_input_grad_triton(y, grad, grad, 3, 2, 1, maximum, True)
        x, weight = meta(E, 4, 4, N, 512, dtype=dtype), meta(E, K, 512, dtype=torch.float32)
        bias, gate_logits = (meta(*shape, dtype=torch.float32) for shape in ((E, K), (B, E)))
        logits = head._logits_triton(x, weight, bias, B)
        head._input_grad_triton(logits, weight, x, True)
        labels = meta(B, dtype=torch.int64)
        head._cross_entropy_triton(x, weight, bias, gate_logits, labels, True)
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """What Triton would run on a GPU of this capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, divisible = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        # As Triton's own launcher specializes.
        kind = _type(value)
        special = kind == "i32" and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = kind
        if kind.startswith("*") or (special and value % 16 == 0):
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", capability, 32)
    options = {"enable_fp_fusion": True, **launch.options}
    return lang.triton.compile(source, target=target, options=options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32"
    if value is None:
        return "constexpr"
    return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"


def cuobjdump() -> Path | None:
    """Triton's own disassembler."""
    folder = Path(lang.triton.__file__).parent / "backends" / "nvidia" / "bin"
    return next((x for x in folder.glob("cuobjdump*") if x.is_file()), None)


def cost(compiled: Any, tool: Path) -> Cost:
    """What the assembler says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [tool, flag, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    assert found is not None, usage
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in (*INSTRUCTIONS, "STL", "LDL")}
    spills = counts.pop("STL") + counts.pop("LDL")
    metadata = compiled.metadata
    return Cost(*map(int, found.groups()), spills, metadata.shared, metadata.num_warps, counts)


def main() -> int:
    tool = cuobjdump()
    if tool is None:
        print("this Triton has no cuobjdump", file=sys.stderr)
        return 2
    bad = 0
    for capability, case, tile, launch in _all_launches():
        found = cost(compile_launch(launch, capability), tool)
        fits = found.shared_bytes <= SHARED_BYTES[capability]
        spills = found.stack_bytes + found.local_bytes + found.spill_instructions
        bad += not fits or spills > 0
        row = {
            "bench": "aot",
            "case": case,
            "kernel": launch.kernel.__name__,
            "capability": capability,
            "tile": None if tile is None else tile._asdict(),
            **found._asdict(),
            "fits": fits,
        }
        rows.append(row, torch.device("cpu"), name=f"aot_{time.strftime('%Y-%m-%d')}")
        short = {name: count for name, count in found.instructions.items() if count}
        print(
            f"sm_{capability} {case} {'' if tile is None else tuple(tile)}: "
            f"{found.registers} registers, {spills} spilled, {found.shared_bytes} B, {short}"
            + ("" if fits else "  DOES NOT FIT"),
            flush=True,
        )
    return int(bad > 0)


def _all_launches() -> Iterator[tuple[int, str, Any, Launch]]:
    for capability in SHARED_BYTES:
        for case, (layer, direction) in layers().items():
            for tile, launch in conv_launches(layer, direction, capability):
                yield capability, case, tile, launch
        layer, direction = layers()["stage 1 forward residual"]
        for tile, launch in conv_launches(layer, direction, capability, torch.float32):
            yield capability, "stage 1 forward residual float32", tile, launch
        for launch in other_launches(capability):
            yield capability, launch.kernel.__name__.strip("_"), None, launch


if __name__ == "__main__":
    sys.exit(main())
