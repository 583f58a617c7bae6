"""Compile the Triton kernels of a plan's slabs in parallel, before its first batch needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kernels import compile_pool
from moe_kernels.plan.back_ends.slab import SlabBackEnd
from moe_kernels.plan.layers import Traced
from moe_kernels.plan.program import Member

_META = torch.device("meta")


def compile_ahead(
    networks: Sequence[nn.Module],
    indices: Sequence[int],
    traced: Sequence[Traced],
    images: Tensor,
    counts: Sequence[int],
    dtype: torch.dtype,
    *,
    independent: bool,
) -> int:
    """Compile what networks of equal layers launch on slabs in an attack step.

    Args:
        networks: all networks of the plan.
        indices: the numbers of those that run together.
        traced: the layers of each of all networks.
        images: [B, C, H, W] on the device that the plan is for.
        counts: how many images each of them will see at once.
        dtype: of the plan.
    Returns:
        The number of launches that were looked at; 0 where Triton has nothing to compile.
    """

    def rehearse() -> None:
        own = [traced[e] for e in indices]
        back_end = SlabBackEnd(_META, dtype)
        member = Member(indices, own, back_end, _META, independent=independent)
        member.load(networks)
        for count in dict.fromkeys(counts):
            batch = torch.empty(
                len(indices) if independent else 1, count, *images.shape[1:], device=_META
            )
            _step(member, batch)

    return compile_pool.compile_ahead(images.device, rehearse)


def _step(member: Member, images: Tensor) -> None:
    """What a step launches, with the loss fused to the head and without."""
    count = images.shape[1]
    values = member.forward(images)
    grad = member.head_input_grad(values, torch.empty_like(member.logits(values)))
    gate_logits = torch.empty(count, len(member.indices), device=_META)
    labels = torch.empty(count, dtype=torch.int64, device=_META)
    member.cross_entropy(values, gate_logits, labels)
    member.backward(values, grad)
