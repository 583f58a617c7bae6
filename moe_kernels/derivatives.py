"""Tell autograd about an op: its derivative, or that it changes arguments and has none.

Tensors are named by their places among the op's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import select


def register(
    library: Any, name: str, tensors: Sequence[int], backward: Callable[..., Any] | None
) -> None:
    """Register the derivative of an op that changes nothing.

    Args:
        library: the `torch.library.Library` of the op.
        backward: maps (gradients of the outputs, tensor arguments) to the gradients of the tensor
            arguments; None for an op without a derivative, which raises RuntimeError if asked.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        # Autograd calls back on another thread, which does not see the caller's context.
        ctx.named = select.named_implementation()

    def derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if backward is None:
            raise RuntimeError(f"moe_kernels.{name} has no derivative")
        with select.named(ctx.named):
            outputs = backward(*grads, *ctx.saved_tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        found = dict(zip(tensors, outputs, strict=True))
        return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))

    torch.library.register_autograd(
        f"moe_kernels::{name}", derivative, setup_context=setup_context, lib=library
    )


def refuse(library: Any, overload: Any, tensors: Sequence[int], mutated: Sequence[int]) -> None:
    """Let an op that changes its arguments raise RuntimeError where a gradient is required."""
    name = overload._schema.name.split("::")[1]

    def refuse_gradients(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            args[i] is not None and args[i].requires_grad for i in tensors
        ):
            raise RuntimeError(
                f"moe_kernels.{name} has no derivative, and an input requires one: detach it or "
                "call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def count_versions(keys: Any, *args: Any) -> Any:
        # Autograd has to notice that a tensor which it saved was overwritten.
        torch.autograd.graph.increment_version([args[i] for i in mutated])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    library.impl(name, count_versions, "ADInplaceOrView", with_keyset=True)
