"""Tell which parameters changed since they were last taken over, by a hash of their bytes.

A tensor's version does not tell: writes through `.data` or numpy leave it as it is. To hash bytes
is several times faster than to fold and pack them anew; where versions or addresses say that
something changed, as in training, nothing is hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import native


class Group(NamedTuple):
    """Tensors that are taken over together, and plain values that belong to them."""

    tensors: list[Tensor]
    values: tuple[Any, ...] = ()


class _Content(NamedTuple):
    """What a group was; without hashes if its next state has to be taken over anyhow."""

    facts: list[Any]
    hashes: list[int] | None


class Contents:
    """What groups of tensors contained at the last call of `changed`."""

    def __init__(self) -> None:
        self._known: list[_Content] = []

    def changed(self, groups: Sequence[Group | None]) -> list[int]:
        """The numbers of the groups that may differ from those of the last call; at first all.

        Args:
            groups: as many at each call; None for one of which nothing is known.
        """
        facts = [None if group is None else _facts(group) for group in groups]
        first = not self._known
        known = self._known or [_Content(x or [], None) for x in facts]
        same = [x is not None and x == then.facts for x, then in zip(facts, known, strict=True)]
        hashed = [i for i, is_same in enumerate(same) if is_same]
        hashes = dict(zip(hashed, _hashes([groups[i] for i in hashed]), strict=True))
        self._known = [_Content(x or [], hashes.get(i)) for i, x in enumerate(facts)]
        return [
            i
            for i, then in enumerate(known)
            if first or i not in hashes or hashes[i] != then.hashes
        ]

    def forget(self) -> None:
        """Let everything count as changed."""
        self._known = []


def held(module: nn.Module, names: Sequence[str]) -> list[Tensor] | None:
    """Parameters and buffers of a module, without those that are None.

    None if one of them is not simply stored, but computed where it is read.
    """
    tensors = []
    for name in names:
        stored = module._parameters if name in module._parameters else module._buffers
        if name not in stored or name in vars(module) or hasattr(type(module), name):
            return None
        if (tensor := stored[name]) is not None:
            tensors.append(tensor)
    return tensors


def _facts(group: Group) -> list[Any] | None:
    """What is seen without reading a tensor; None if one cannot be hashed."""
    if not native.has_cpu:
        return None
    facts = list(group.values)
    for x in group.tensors:
        plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and x.is_cpu
        if not plain or not _is_dense(x) or (x.data_ptr() == 0 and x.numel()):
            return None
        version = 0 if x.is_inference() else x._version
        facts.append((x.data_ptr(), version, x.shape, x.stride(), x.dtype))
    return facts


def _is_dense(x: Tensor) -> bool:
    """Whether its numbers fill a single piece of memory."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def _hashes(groups: Sequence[Group | None]) -> list[list[int]]:
    """Of each tensor of groups that have facts."""
    tensors = [x for group in groups if group is not None for x in group.tensors]
    table = torch.tensor(
        [[x.data_ptr() for x in tensors], [x.nbytes for x in tensors], [0] * len(tensors)],
        dtype=torch.int64,
        device="cpu",
    )
    addresses, sizes, hashes = table
    native.module.content_hashes(
        addresses=addresses.data_ptr(),
        sizes=sizes.data_ptr(),
        hashes=hashes.data_ptr(),
        count=len(tensors),
        num_threads=torch.get_num_threads(),
    )
    rest = iter(hashes.tolist())
    return [[next(rest) for _ in group.tensors] for group in groups if group is not None]
