"""The compiled module `_native`, or None and why; and the story of its build.

Looking for it touches no GPU. Its functions take addresses and sizes as integers, release the GIL
and raise RuntimeError for a CUDA error; csrc/kernels.h describes their arguments. Those of the CPU
take one more at the end, `num_threads`; those of CUDA have the suffix `_cuda` and take `dtype` and
`stream`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import json
import logging
import os
from typing import Any

log = logging.getLogger("moe_kernels")


@functools.cache
def build_story() -> dict[str, Any] | None:
    """What the build found, built and skipped, as it wrote it; None if nothing was ever built."""
    # Not beside this file: an editable installation keeps what it built elsewhere.
    file = importlib.resources.files(__package__).joinpath("_build.json")
    if not file.is_file():
        return None
    story: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return story


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
        return None, story["line"] if story else "moe_kernels was never built, only copied"
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


module, missing = _load()
has_cpu: bool = module is not None
has_cuda: bool = has_cpu and module.has_cuda

if os.environ.get("MOE_KERNELS_STRICT", "0") not in ("", "0"):
    _require_all()
