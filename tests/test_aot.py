"""Every Triton kernel compiles ahead of time for sm_80 and sm_90, without spilling registers.

No GPU is needed: Triton brings its own assembler. A kernel that is missing from KERNELS fails. The
slab kernels are compiled as their ops launch them (benchmarks/aot_table.py).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import aot_table
import pytest
import torch

import moe_kernels
from moe_kernels import lang

pytestmark = [
    pytest.mark.skipif(lang.missing is not None, reason=f"{lang.missing}"),
    pytest.mark.skipif(lang.interpreted, reason="the interpreter's kernels are not compiled"),
]

CAPABILITIES = [80, 90]
DTYPES = ["fp32", "fp16", "bf16"]


class Variant(NamedTuple):
    """One way to compile a kernel: Triton types by argument, constants, warps."""

    signature: str
    constants: dict[str, int]
    num_warps: int = 1


def _tiles(signature: str) -> list[Variant]:
    """The paper's size, a wide one, and the largest that a program accepts."""
    return [
        Variant(signature, {"BLOCK_E": E, "BLOCK_K": K}, num_warps)
        for E, K, num_warps in [(16, 16, 1), (16, 128, 8), (8, 1024, 16)]
    ]


# T is each of DTYPES in turn.
KERNELS: dict[str, list[Variant]] = {
    "softmax_combine.gate_weights": [],
    "softmax_combine.gate_gradient": [],
    "softmax_combine._forward_kernel": _tiles("*T *T *T i32 i32 i32"),
    "softmax_combine._backward_kernel": _tiles("*T *T *T *T *T i32 i32 i32"),
    "softmax_combine._cross_entropy_kernel": _tiles("*T *T *i64 *fp32 *T *T i32 i32 i32"),
    "linf_step._step_kernel": [
        Variant("*fp32 *T *fp32 *fp32 *fp32 i32 fp32 fp32", {"BLOCK": 1024}, 4)
    ],
    # These are compiled by test_slab_launches.
    "grouped_conv_tiles._taps": [],
    "grouped_conv_tiles.load_tile": [],
    "grouped_conv_tiles._conv_kernel": [],
    "slab._columns_kernel": [],
    "slab._column_grad_kernel": [],
    "slab._gather_kernel": [],
    "pool._pool_kernel": [],
    "pool._pool_input_grad_kernel": [],
    "head._logits_kernel": [],
    "head._store_input_grad": [],
    "head._input_grad_kernel": [],
    "head._cross_entropy_kernel": [],
}
# Those that other kernels call.
PARTS = {
    "softmax_combine.gate_weights",
    "softmax_combine.gate_gradient",
    "grouped_conv_tiles._taps",
    "grouped_conv_tiles.load_tile",
    "head._store_input_grad",
}
# A layer of each kind; the table on disk has all of them.
LAYERS = [
    "stem forward",
    "stage 1 backward skip",
    "stage 2 forward side",
    "stage 2 backward narrowing",
    "stage 4 forward residual",
]


def find_kernels() -> dict[str, Any]:
    """All jitted functions defined in moe_kernels, by module and name."""
    found = {}
    for module_info in pkgutil.walk_packages(moe_kernels.__path__, "moe_kernels."):
        if module_info.name.rpartition(".")[2].startswith("_"):
            continue
        module = importlib.import_module(module_info.name)
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module_info.name
            if isinstance(value, lang.triton.JITFunction) and defined_here:
                found[f"{module_info.name.rpartition('.')[2]}.{name}"] = value
    return found


def compile_kernel(name: str, variant: Variant, dtype: str, capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = find_kernels()[name]
    types = variant.signature.replace("T", dtype).split()
    arguments = [x for x in kernel.arg_names if x not in variant.constants]
    signature = dict(zip(arguments, types, strict=True))
    signature |= dict.fromkeys(variant.constants, "constexpr")
    pointers = [i for i, x in enumerate(kernel.arg_names) if signature[x].startswith("*")]
    source = ASTSource(
        kernel,
        signature={x: signature[x] for x in kernel.arg_names},
        constexprs=variant.constants,
        # What Triton finds out by itself about torch's allocations.
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": "linf_step" not in name}
    return lang.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_no_kernel_is_missing() -> None:
    assert set(find_kernels()) == set(KERNELS)
    launched = {x.kernel.__name__ for x in aot_table.other_launches(80)} | {"_conv_kernel"}
    for name, variants in KERNELS.items():
        assert variants or name in PARTS or name.partition(".")[2] in launched, name


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
def test_slab_launches(capability: int) -> None:
    if (tool := aot_table.cuobjdump()) is None:
        pytest.skip("this Triton has no cuobjdump to look for spills")
    launches = [(None, x) for x in aot_table.other_launches(capability)]
    for name in LAYERS:
        found = aot_table.conv_launches(*aot_table.layers()[name], capability)
        # The first tile of each kind.
        kinds = {tile.tma: (tile, launch) for tile, launch in reversed(found)}
        launches += kinds.values()
        assert False in kinds
        assert (True in kinds) == (capability >= 90)
    layer = aot_table.layers()["stage 1 forward residual"]
    launches += aot_table.conv_launches(*layer, capability, torch.float32)
    for tile, launch in launches:
        compiled = aot_table.compile_launch(launch, capability)
        cost = aot_table.cost(compiled, tool)
        name = f"{launch.kernel.__name__} {tile}: {cost}"
        assert (cost.stack_bytes, cost.local_bytes, cost.spill_instructions) == (0, 0, 0), name
        assert cost.shared_bytes <= aot_table.SHARED_BYTES[capability], name
        assert cost.registers <= 65536 // (32 * cost.num_warps), name
        if tile is None or tile.block_c < 32:
            continue
        assert (cost.instructions["HGMMA" if capability >= 90 else "HMMA"]) > 0, name
        assert (cost.instructions["UTMALDG"] > 0) == tile.tma, name


@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, variants in KERNELS.items() if variants])
def test_compiles_without_spills(name: str, dtype: str, capability: int, tmp_path: Path) -> None:
    for number, variant in enumerate(KERNELS[name]):
        compiled = compile_kernel(name, variant, dtype, capability)
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        if "linf_step" in name:
            assert "fma." not in compiled.asm["ptx"]
        if (tool := aot_table.cuobjdump()) is None:
            pytest.skip("it compiles; this Triton has no cuobjdump to look for spills")
        cubin = tmp_path / f"{number}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        # Local memory is where registers spill to; the stack of a call frame counts as well.
        found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        assert (stack, local) == (0, 0), f"{variant}: {usage}"
        assert registers <= 65536 // (32 * variant.num_warps)
