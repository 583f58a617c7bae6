"""Give the rehearsed device the autocast of CUDA: what it lowers, and what it computes in float32.

Source: the op lists in torch's documentation of torch.amp, as far as networks and losses use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from rehearsal.tensors import NAME, DeviceTensor

_LOWERED = "conv2d linear matmul mm bmm addmm baddbmm addbmm einsum"
_FLOAT32 = (
    "cross_entropy_loss nll_loss kl_div softmax log_softmax pow exp log norm cosine_similarity "
    "sum prod cumsum mse_loss binary_cross_entropy_with_logits layer_norm group_norm rsqrt erfinv"
)
_KEY = "AutocastPrivateUse1"
_libraries: list[Any] = []


def start() -> None:
    """Register the casts and let `torch.autocast("cuda")` be the device's."""
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, _KEY)
    library = torch.library.Library("aten", "IMPL")
    _libraries.extend((fallback, library))
    for names, lowered in ((_LOWERED, True), (_FLOAT32, False)):
        for name in names.split():
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" in overload or "Dimname" in overload:
                    continue
                full = name if overload == "default" else f"{name}.{overload}"
                library.impl(full, _casting(getattr(packet, overload), lowered), _KEY)
    _translate_names()


def _casting(op: Any, lowered: bool) -> Callable[..., Any]:
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME) if lowered else torch.float32

        def cast(x: Any) -> Any:
            floats = isinstance(x, DeviceTensor) and x.is_floating_point()
            return x.to(dtype) if floats and x.dtype is not torch.float64 else x

        with torch._C._ExcludeDispatchKeyGuard(off):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


def _translate_names() -> None:
    plain = torch.amp.autocast_mode.autocast.__init__

    def init(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == "cuda":
            device_type, dtype = NAME, dtype or torch.float16
        plain(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    torch.amp.autocast_mode.autocast.__init__ = init  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, _for_device(getattr(torch, name)))


def _for_device(function: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*device_type: str) -> Any:
        return function(*(NAME if x == "cuda" else x for x in device_type))

    return ask
