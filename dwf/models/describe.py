"""Describe models and their outputs in one line, for ``repr`` and for titles."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from dwf.models.networks import (
    PREACT_RESNETS,
    RESNETS,
    WIDE_RESNETS,
    Bottleneck,
    ResNet,
)
from dwf.models.pre_activation import PreActResNet, WideResNet


def one_line(model: nn.Module, *parts: str) -> str:
    """``Class(part, part, N parameters)``; ``nn.Module.__repr__(model)`` shows all layers."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}({', '.join([*parts, f'{count:,} parameters'])})"


def describe(network: nn.Module) -> str:
    """A network in a few words: ``resnet18 width 64``, or the name of its class."""
    small = (ResNet, PreActResNet, WideResNet)
    if isinstance(network, nn.Sequential):  # one of ours with a small layer before or after it
        network = next((part for part in network if isinstance(part, small)), network)
    if not isinstance(network, small):
        return type(network).__name__
    stages = [network.get_submodule(stage) for stage in network.stages]
    if isinstance(network, WideResNet):
        blocks = len(list(stages[0].get_submodule("layer").children()))
        width = network.fc.in_features // 4
        for name, (depth, factor) in WIDE_RESNETS.items():
            if depth == 6 * blocks + 4:
                return f"{name} width {round(64 * width / (16 * factor))}"
        return f"WideResNet-{6 * blocks + 4} with {width} channels"
    counts = tuple(len(list(stage.children())) for stage in stages)
    if isinstance(network, PreActResNet):
        names = {blocks: name for name, blocks in PREACT_RESNETS.items()}
        name = names.get(counts, "PreActResNet")
    else:
        # from its modules, because sparse layers may stand in for blocks
        deep = any(isinstance(module, Bottleneck) for module in network.modules())
        known = {(block is Bottleneck, blocks): name for name, (block, blocks) in RESNETS.items()}
        name = known.get((deep, counts), "ResNet")
    return f"{name} width {network.conv1.out_channels}"


def describe_all(networks: Iterable[nn.Module]) -> str:
    """Several networks, equal ones counted: ``9 x resnet18 width 64``."""
    counts = Counter(map(describe, networks))
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


class Output:
    """A dataclass of tensors that is shown by their shapes: ``MixtureOutput(logits [4, 10], ...)``.

    Subclasses are dataclasses with ``repr=False``.
    """

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        parts = [f"{name} {_shape(value)}" for name, value in values.items()]
        return f"{type(self).__name__}({', '.join(parts)})"


def _shape(value: Tensor | dict[str, Tensor]) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {list(x.shape)}" for name, x in value.items()) + "}"
    return str(list(value.shape))
