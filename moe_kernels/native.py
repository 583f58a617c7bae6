"""Load the compiled module `_native`, or say why there is none; call its kernels; tell its build.

Loading touches no GPU. The functions take addresses and sizes as integers, release the GIL and
raise RuntimeError for a CUDA error; csrc/kernels.h describes their arguments. CPU functions end
with `num_threads`, CUDA functions with `dtype` and `stream`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.resources
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

log = logging.getLogger("moe_kernels")

# The place of a dtype in this tuple is its number in the compiled kernels.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def call(name: str, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, **numbers: Any) -> None:
    """Call a kernel that exists for CPU and CUDA, on the current device if that is a GPU.

    Args:
        name: of the CPU function; the CUDA function has the suffix "_cuda".
        tensors: its pointers by name; contiguous, on one device.
        dtype: the variant of the CUDA kernel; CPU kernels are float32.
        numbers: its other arguments by name.
    """
    addresses = {argument: x.data_ptr() for argument, x in tensors.items()}
    if next(iter(tensors.values())).is_cuda:
        stream = torch.cuda.current_stream().cuda_stream
        kernel = getattr(module, f"{name}_cuda")
        kernel(**addresses, **numbers, dtype=FLOATS.index(dtype), stream=stream)
    else:
        kernel = getattr(module, name)
        kernel(**addresses, **numbers, num_threads=torch.get_num_threads())


@functools.cache
def build_story() -> dict[str, Any] | None:
    """The build's record of what it found, built and skipped; None if nothing was ever built."""
    # Not beside this file: an editable installation keeps what it built elsewhere.
    file = importlib.resources.files(__package__).joinpath("_build.json")
    if not file.is_file():
        return None
    story: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return story


@functools.cache
def hidden_build() -> Path | None:
    """The compiled module of an installed copy of this package that this unbuilt copy hides.

    Python that is started in a source tree imports that tree, even if a built package is installed.
    None where this copy is built, or no other copy on the import path is.
    """
    here = Path(__file__).resolve().parent
    if importlib.util.find_spec(f"{__package__}._native") or build_story():
        return None
    for entry in sys.path:
        folder = Path(entry, here.name).resolve()
        if folder != here:
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                if (file := folder / f"_native{suffix}").is_file():
                    return file
    return None


def supports_device(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability can run the compiled CUDA kernels.

    Machine code runs on its own generation from its minor version on ("80-real" on 8.9), code for
    one architecture's own instructions nowhere else ("90a-real"), PTX on anything newer.
    """
    major, minor = capability
    for arch in module.cuda_archs if has_cuda else ():
        name, _, kind = arch.partition("-")
        specific = not name.isdigit()
        built = divmod(int(name.rstrip("af")), 10)
        if built == (major, minor):
            return True
        if not specific and (kind == "virtual" or built[0] == major) and built < (major, minor):
            return True
    return False


def _load() -> tuple[Any, str | None]:
    """The module, or None and the reason."""
    name = f"{__package__}._native"
    # A plain import of what is not there would complain about a circular import.
    if importlib.util.find_spec(name) is None:
        story = build_story()
        if story is not None:
            return None, story["line"]
        tree = Path(__file__).resolve().parents[1]
        hidden = hidden_build()
        if hidden is None:
            return None, f"{tree} was never built, only copied"
        reason = (
            f"{tree} is not built and hides the installed {hidden}; run `pip install -e .` there, "
            "or start Python in another folder"
        )
        log.warning("moe_kernels runs without compiled kernels: %s", reason)
        return None, reason
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        reason = f"{name} was built but does not load: {error}"
        log.warning("%s; reinstall it on this machine", reason)
        return None, reason


def _require_all() -> None:
    """Under MOE_KERNELS_STRICT, raise for what is missing without having been asked to."""
    story = build_story()
    skip_requested = story is not None and story["cuda"]["skip_requested"]
    if module is None or not (has_cuda or skip_requested):
        reason = missing or (story["line"] if story else "it was built without CUDA")
        raise ImportError(
            f"MOE_KERNELS_STRICT is set, but compiled kernels are missing: {reason}. Reinstall "
            "with a C++ compiler and nvcc, or with MOE_KERNELS_SKIP_CUDA=1, or unset it."
        )


if TYPE_CHECKING:
    from moe_kernels import _native

    module = _native
    missing: str | None
else:
    module, missing = _load()
has_cpu: bool = module is not None
has_cuda: bool = has_cpu and module.has_cuda

if os.environ.get("MOE_KERNELS_STRICT", "0") not in ("", "0"):
    _require_all()
