"""Import `triton` and its language `tl`, or stand-ins where Triton is missing.

With the stand-ins a module that defines Triton kernels still imports. Its kernels never run: then
`missing` says why.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any


class _StandIn:
    """Has the names that a kernel's signature and decorator use; the body never runs."""

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
