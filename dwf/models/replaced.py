"""Put another module in one place of a network, without changing the network."""

from __future__ import annotations

import copy

from torch import nn


def with_replaced(root: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """``root`` with another module in one place; everything else is shared with it."""
    head, _, rest = name.partition(".")
    made, children = copy.copy(root), dict(root._modules)
    old = children[head]
    assert old is not None
    children[head] = with_replaced(old, rest, new) if rest else new
    made._modules = children
    return made
