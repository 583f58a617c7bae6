"""Installing with every set of compilers, without them, and with broken source.

Each case builds a wheel from a copy of the source tree and runs `moe_kernels.info` from the
unpacked wheel in another folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = [
    *("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore"),
    *("csrc", "moe_kernels", "dwf"),
]
VARIABLES = ("SKIP_CUDA", "CUDA_ARCHS", "STRICT", "IMPLEMENTATION")
NOWHERE = "/nowhere/compiler"
NO_COMPILER = {"CC": NOWHERE, "CXX": NOWHERE, "CUDACXX": NOWHERE}
NO_NVCC = {"CUDACXX": NOWHERE}
NO_CUDA = {"MOE_KERNELS_SKIP_CUDA": "1"}
# One architecture: what the installation of the project itself builds is all of them.
SMALL_CUDA = {"MOE_KERNELS_CUDA_ARCHS": "80"}

has_compiler = bool(os.environ.get("CXX") or shutil.which("c++"))
has_nvcc = has_compiler and bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not has_nvcc, reason="no nvcc")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without our variables and import path, plus `changes`."""
    ours = {f"MOE_KERNELS_{name}" for name in VARIABLES} | {"PYTHONPATH", "TRITON_INTERPRET"}
    return {k: v for k, v in os.environ.items() if k not in ours} | changes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree, to be broken at will."""
    root = tmp_path / "tree"
    root.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            shutil.copytree(source, root / name, ignore=ignored)
        else:
            shutil.copy(source, root / name)
    return root


def build(tree: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `pip wheel`, in this environment if it holds the build tools, else in an isolated one."""
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "-w", f"{tree}/wheels"]
    if all(map(importlib.util.find_spec, ("scikit_build_core", "pybind11", "ninja", "cmake"))):
        command.append("--no-build-isolation")
    result = subprocess.run(
        command,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if "No matching distribution found for" in result.stdout:
        pytest.skip("pip cannot fetch the build tools, and they are not installed")
    return result


def unpack(tree: Path, variables: dict[str, str]) -> Path:
    """The folder of an unpacked wheel."""
    result = build(tree, variables)
    assert result.returncode == 0, result.stdout
    (wheel,) = (tree / "wheels").glob("*.whl")
    folder = tree.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in another folder, with the wheel in front of everything that is installed.

    Without `site`, because an editable installation of this project would come first there.
    """
    path = [str(folder), *(x for x in sys.path if x and Path(x) != ROOT)]
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=folder.parent,
        env=environment(PYTHONPATH=os.pathsep.join(path), **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def facts(folder: Path) -> dict[str, Any]:
    """What `moe_kernels.info` says; the self-test has to pass, unless there is nothing to test."""
    result = python(folder, "-m", "moe_kernels.info", "--json", "--selftest")
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == int(not found["selftest"]), result.stdout + result.stderr
    assert ("nothing was tested" in result.stderr) == (not found["selftest"])
    return found


def compiled_files(folder: Path) -> list[Path]:
    return list(folder.glob("moe_kernels/_native*.so"))


def uses(found: dict[str, Any]) -> set[str]:
    """The implementations, on the CPU in float32, of the ops that have compiled ones there."""
    rows = [x for x in found["ops"] if (x["device"], x["dtype"]) == ("cpu", "float32")]
    compiled = ("linf_step_", "softmax_combine")
    return {x["implementation"] for x in rows if x["op"].startswith(compiled)}


@pytest.mark.slow
@needs_nvcc
def test_with_nvcc(tree: Path) -> None:
    folder = unpack(tree, SMALL_CUDA)
    found = facts(folder)
    assert found["native"]["cuda_archs"] == found["build"]["cuda"]["archs"] == ["80-real"]
    assert found["build"]["cuda"]["skipped"] is None
    assert Path(found["native"]["file"]) in compiled_files(folder)
    assert uses(found) == {"native"}
    check_needed(folder)


@pytest.mark.slow
@needs_compiler
def test_without_cuda_on_request(tree: Path) -> None:
    folder = unpack(tree, NO_CUDA)
    found = facts(folder)
    assert found["build"]["commit"] is None  # a copy without a repository
    assert found["build"]["cuda"]["skip_requested"] is True
    assert "MOE_KERNELS_SKIP_CUDA" in found["build"]["line"]
    assert (found["native"]["cpu"], found["native"]["cuda"]) == (True, False)
    assert uses(found) == {"native"}
    check_needed(folder)
    strict = python(folder, "-c", "import moe_kernels", MOE_KERNELS_STRICT="1")
    assert strict.returncode == 0, strict.stderr


@pytest.mark.slow
def test_without_any_compiler(tree: Path) -> None:
    # A leftover of another build must not travel in the wheel.
    (tree / "moe_kernels" / "_native.abi3.so").write_bytes(b"leftover")
    folder = unpack(tree, NO_COMPILER)
    assert compiled_files(folder) == []
    story = json.loads((folder / "moe_kernels" / "_build.json").read_text())
    assert story["line"] == "pure Python, because no working C++ compiler was found"
    found = facts(folder)
    assert found["native"]["missing"] == story["line"]
    assert uses(found) == {"reference"}
    assert not [x for x in found["selftest"] if x["implementation"] == "native"]
    assert (folder / "moe_kernels" / "py.typed").is_file()
    assert (folder / "moe_kernels" / "_native.pyi").is_file()
    strict = python(folder, "-c", "import moe_kernels", MOE_KERNELS_STRICT="1")
    assert strict.returncode != 0
    assert "MOE_KERNELS_STRICT is set" in strict.stderr
    assert "no working C++ compiler" in strict.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (NO_COMPILER, "no working C++ compiler"),
        pytest.param(NO_NVCC, f"{NOWHERE} does not compile", marks=needs_compiler),
        pytest.param(
            {"MOE_KERNELS_CUDA_ARCHS": "80 12345"}, "cannot build 12345-real", marks=needs_nvcc
        ),
        pytest.param({"MOE_KERNELS_CUDA_ARCHS": "sm_80"}, '"sm_80" is not like', marks=needs_nvcc),
    ],
    ids=["no compiler", "no nvcc", "unknown architecture", "misspelled architecture"],
)
def test_strict_installation_fails(tree: Path, variables: dict[str, str], reason: str) -> None:
    result = build(tree, {**variables, "MOE_KERNELS_STRICT": "1"})
    assert result.returncode != 0
    # CMake breaks its lines as it likes.
    assert reason in " ".join(result.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variables"),
    [
        pytest.param("cuda/linf_step.cu", SMALL_CUDA, marks=needs_nvcc),
        pytest.param("cpu/linf_step.cpp", NO_CUDA, marks=needs_compiler),
    ],
)
def test_compile_error_fails_and_is_shown(tree: Path, name: str, variables: dict[str, str]) -> None:
    with open(tree / "csrc" / name, "a") as file:
        file.write("int broken = no_such_name;\n")
    result = build(tree, variables)
    assert result.returncode != 0
    assert "no_such_name" in result.stdout
    assert f"csrc/{name}" in result.stdout
    assert not list(tree.glob("wheels/*.whl"))


def check_needed(folder: Path) -> None:
    """The module asks the loader for neither torch nor CUDA."""
    if shutil.which("readelf") is None:
        return
    (file,) = compiled_files(folder)
    dynamic = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True)
    needed = [line for line in dynamic.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [line for line in needed if any(x in line for x in ("torch", "c10", "cuda"))]


IMPORT = """
import sys, time
import torch
try:
    import triton
except ImportError:
    pass
before = time.process_time()
import moe_kernels
print((time.process_time() - before) / before)
assert not torch.cuda.is_initialized()
assert not any(name.startswith("dwf") for name in sys.modules)
"""


@pytest.mark.slow
def test_import_is_quick_and_compiles_nothing(tmp_path: Path) -> None:
    """At most a tenth of the processor time of Python, torch and Triton, and no warning."""
    caches = {"TRITON_CACHE_DIR": tmp_path / "triton", "MOE_KERNELS_CACHE_DIR": tmp_path / "ours"}
    variables = environment(
        PYTHONPATH=str(ROOT),
        PYTHONPYCACHEPREFIX=str(tmp_path / "bytecode"),
        **{name: str(folder) for name, folder in caches.items()},
    )
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # the first run compiles for the others
    shares = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning:moe_kernels", "-c", IMPORT],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        shares.append(float(result.stdout))
    assert min(shares) <= 0.1
    assert not any(path.exists() for path in caches.values())


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A checkout that was never built."""
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "moe_kernels", tmp_path / "checkout" / "moe_kernels", ignore=ignored)
    return tmp_path / "checkout"


def run_in(checkout: Path, *arguments: str, installed: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a checkout, with a folder in front of everything that is installed."""
    path = [str(installed), *(x for x in sys.path if x and Path(x) != ROOT)]
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=checkout,
        env=environment(PYTHONPATH=os.pathsep.join(path)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_checkout_that_hides_an_installed_build_says_so(unbuilt: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    build = site / "moe_kernels" / f"_native{EXTENSION_SUFFIXES[0]}"
    build.parent.mkdir(parents=True)
    build.touch()
    remedy = f"{unbuilt} is not built and hides the installed {build}; run `pip install -e .` there"
    done = run_in(unbuilt, "-c", "import moe_kernels", installed=site)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert remedy in line

    done = run_in(unbuilt, "-m", "moe_kernels.info", "--selftest", installed=site)
    assert remedy in done.stdout
    (line,) = done.stderr.splitlines()
    assert remedy in line
    if not torch.cuda.is_available():
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == "nothing was tested"
