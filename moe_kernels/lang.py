"""`triton` and its language `tl`, or stand-ins where Triton is missing.

With the stand-ins a module that defines Triton kernels still imports; its kernels are never offered
to anybody, because `missing` says why not.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any


class _StandIn:
    """Answers what a kernel's definition touches; everything inside its body stays unread."""

    constexpr = object

    @staticmethod
    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


missing: str | None = None
triton: Any = _StandIn
tl: Any = _StandIn
try:
    triton, tl = (importlib.import_module(name) for name in ("triton", "triton.language"))
except ImportError as error:
    missing = f"Triton cannot be imported: {error}"

# Triton reads the variable when a kernel is defined, so it is read once here as well.
interpreted: bool = missing is None and os.environ.get("TRITON_INTERPRET") == "1"
