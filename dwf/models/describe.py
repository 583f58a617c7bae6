"""Describe models in one line, for ``repr`` and for titles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from dwf.models.networks import NETWORKS, Bottleneck, ResNet


def one_line(model: nn.Module, *parts: str) -> str:
    """``Class(part, part, N parameters)``; ``nn.Module.__repr__(model)`` shows all layers."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}({', '.join([*parts, f'{count:,} parameters'])})"


def describe(network: nn.Module) -> str:
    """A network in a few words: ``resnet18 width 64``, or the name of its class."""
    if isinstance(network, nn.Sequential):  # a ResNet with a small layer before or after it
        network = next((part for part in network if isinstance(part, ResNet)), network)
    if not isinstance(network, ResNet):
        return type(network).__name__
    # from its modules, because sparse layers may stand in for blocks
    deep = any(isinstance(module, Bottleneck) for module in network.modules())
    counts = tuple(len(list(network.get_submodule(stage).children())) for stage in network.stages)
    known = {(block is Bottleneck, blocks): name for name, (block, blocks) in NETWORKS.items()}
    return f"{known.get((deep, counts), 'ResNet')} width {network.conv1.out_channels}"


def describe_all(networks: Iterable[nn.Module]) -> str:
    """Several networks, equal ones counted: ``9 x resnet18 width 64``."""
    counts = Counter(map(describe, networks))
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
