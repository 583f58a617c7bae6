"""Run several networks side by side as one module, each on its block of rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dwf.checks import ConfigError, ImageError, ModelOutputError
from dwf.models.describe import describe_all, one_line
from dwf.models.planned import Planned, PlanParts


class Group(Planned):
    """E networks that see different images: rows [e * B, (e + 1) * B) go through network e.

    Maps images [E * B, C, H, W] to logits [E * B, K]. Attacks take a radius and a number of steps
    for each image, so one attack on a group is E attacks on its networks. The networks are shared,
    not copied.

    Raises:
        ConfigError: no networks, or one that is not a module.
        ImageError: the rows do not divide into E blocks.
        ModelOutputError: the networks' outputs have different shapes; names the network.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        members = list(networks)
        if not members:
            raise ConfigError("networks: an empty list, expected at least one module")
        for e, network in enumerate(members):
            if not isinstance(network, nn.Module):
                raise ConfigError(
                    f"networks[{e}]: expected a torch.nn.Module, found {type(network).__name__}"
                )
        self.networks = nn.ModuleList(members)

    def __repr__(self) -> str:
        return one_line(self, describe_all(self.networks))

    def plan_parts(self) -> PlanParts:
        return PlanParts(list(self.networks), independent=True)

    def forward(self, images: Tensor) -> Tensor:
        E = len(self.networks)
        if len(images) % E:
            raise ImageError(f"images: {len(images)} rows do not divide among {E} networks")
        blocks = images.view(E, len(images) // E, *images.shape[1:])  # [E, B, C, H, W]
        outputs = [network(block) for network, block in zip(self.networks, blocks, strict=True)]
        for e, output in enumerate(outputs):
            if output.shape != outputs[0].shape:
                raise ModelOutputError(
                    f"networks[{e}]: expected logits {list(outputs[0].shape)} like networks[0], "
                    f"found {list(output.shape)}"
                )
        return torch.cat(outputs)
