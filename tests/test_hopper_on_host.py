"""The Hopper kernels themselves on a CPU: barriers, copies, swizzle and products, all emulated.

`tests/hopper_on_host` stands in for CUDA and for the inline assembly; all other files of the
kernels are compiled as they are, by the C++ compiler alone. Mistakes are planted in copies of them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = Path(__file__).with_name("hopper_on_host")
HEADERS = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
NUM_CASES = 18
NUM_KERNELS = 10  # six in single blocks, four in clusters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.system() != "Linux", reason="needs contexts of the GNU C library"),
]


class Mistake(NamedTuple):
    """A mistake in one of the kernels' files, and a case of main.cpp that it breaks."""

    file: str
    right: str
    wrong: str
    case: int
    says: str = "WRONG"


MISTAKES = {
    "a place of the ring is freed too early": Mistake(
        "conv_sm90a_wide.cuh", "wait_for_products<1>()", "wait_for_products<2>()", 1
    ),
    "the same in the narrow kernel": Mistake(
        "conv_sm90a_narrow.cuh", "wait_for_products<1>()", "wait_for_products<2>()", 4
    ),
    "multipliers wait for the wrong parity": Mistake(
        "conv_sm90a_wide.cuh",
        "wait(&shared.full[cursor.place], cursor.parity,",
        "wait(&shared.full[cursor.place], cursor.parity ^ 1,",
        1,
        "",  # wrong sums, or more arrivals than a barrier has room for
    ),
    # No endless wait: after its patience the kernel stores NaN, in both blocks of a cluster.
    "the copying thread waits for the wrong parity": Mistake(
        "conv_sm90a_wide.cuh", "cursor.parity ^ 1", "cursor.parity", 0, "32768 NaN, 0 wrong"
    ),
    "a copying thread stops": Mistake(
        "conv_sm90a_wide.cuh",
        "alive && wide_tile_at",
        "(blockIdx.x != 1 || turn == 0) && wide_tile_at",
        11,
        " NaN, 0 wrong",
    ),
    "copies are swizzled otherwise than products read": Mistake(
        "conv_sm90a.cu", "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B", 2
    ),
    "lanes read what others have not written": Mistake(
        "conv_sm90a_wide.cuh", "__syncwarp();\n        store_rows", "store_rows", 2
    ),
    "a block does not ask the other whether a place is free": Mistake(
        "conv_sm90a_wide.cuh",
        "arrive_at(empty, lane)",
        "arrive_at(empty, cluster_rank())",
        11,
    ),
    "a block starts before the other is ready": Mistake(
        "conv_sm90a_wide.cuh",
        "  } else {\n    sync_cluster();",
        "  } else {\n    __syncthreads();",
        11,
        "there is no barrier",
    ),
    "a block ends before the other has": Mistake(
        "conv_sm90a_wide.cuh",
        "if constexpr (kBlocks > 1) sync_cluster();",
        "",
        11,
        "a block that has ended",
    ),
    "both blocks fetch the same half": Mistake(
        "conv_sm90a_wide.cuh",
        "cluster_rank() * (kChannels / 2)",
        "(kChannels / 2)",
        10,
    ),
}


def compile_object(source: Path, csrc: Path, build: Path, level: str) -> Path:
    """An object file of C++ or CUDA source, on the machine instead of CUDA."""
    made = build / f"{source.stem}.o"
    for name in HEADERS:
        (build / name).touch()
    command = [str(COMPILER), "-std=c++17", level, "-include", str(MACHINE / "machine.h")]
    command += [f"-I{folder}" for folder in (MACHINE, build, csrc)]
    done = subprocess.run(
        [*command, "-x", "c++", "-c", str(source), "-o", str(made)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return made


def link(objects: list[Path], program: Path) -> Path:
    subprocess.run([str(COMPILER), *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program: Path, seed: int, *cases: int) -> tuple[int, str]:
    """Exit code and output."""
    command = [str(program), *map(str, (seed, *cases))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files of everything but the kernels."""
    build = tmp_path_factory.mktemp("machine")
    csrc = ROOT / "csrc"
    sources = MACHINE / "machine.cpp", MACHINE / "main.cpp", csrc / "cuda" / "conv_schedule.cpp"
    return [compile_object(source, csrc, build, "-O1") for source in sources]


def test_kernels_compute_convolutions(machine: list[Path], tmp_path: Path) -> None:
    csrc = ROOT / "csrc"
    kernels = compile_object(csrc / "cuda" / "conv_sm90a.cu", csrc, tmp_path, "-O0")
    program = link([*machine, kernels], tmp_path / "main")
    for seed in (1, 2):
        code, output = run(program, seed)
        assert code == 0, output
        lines = output.splitlines()
        assert lines[0] == "schedules are kept"
        assert [x.split()[:2] for x in lines[1:-1]] == [["right", str(i)] for i in range(NUM_CASES)]
        assert lines[-1] == f"{NUM_KERNELS} kernels"
    assert run(program, 3, 11) == run(program, 3, 11)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found(mistake: Mistake, machine: list[Path], tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    file = csrc / "cuda" / mistake.file
    text = file.read_text()
    assert text.count(mistake.right) == 1
    file.write_text(text.replace(mistake.right, mistake.wrong))
    kernels = compile_object(csrc / "cuda" / "conv_sm90a.cu", csrc, tmp_path, "-O0")
    code, output = run(link([*machine, kernels], tmp_path / "main"), 1, mistake.case)
    assert code == 1, output
    assert mistake.says in output
