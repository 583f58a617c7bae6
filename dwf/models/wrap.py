"""Make normalization a layer of the model, and adopt networks that expect normalized images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dwf.checks import ConfigError, ImageError
from dwf.models.describe import describe, one_line
from dwf.models.planned import Planned, PlanParts


class Normalize(nn.Module):
    """Per-channel ``(images - mean) / std``, the first layer of every model.

    Attacks therefore act on pixels in [0, 1], and no caller can forget it or apply it twice.
    ``mean`` and ``std`` are in pixel units of [0, 1] and travel with the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ConfigError(
                f"mean {list(mean)} and std {list(std)}: expected one of each per channel, std > 0"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            # broadcasting would make three equal channels out of one
            raise ImageError(
                f"images: expected shape [B, {len(self.mean)}, H, W], found {list(images.shape)}"
            )
        return ((images - self.mean) / self.std).to(images.dtype)

    def channel_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), both [C]: forward(images) = images * scale + shift. For a plan."""
        return (1 / self.std).flatten(), (-self.mean / self.std).flatten()


class PixelModel(Planned):
    """A network on normalized images, with the normalization inside: [0, 1] images to logits."""

    def __init__(self, normalize: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network

    def __repr__(self) -> str:
        return one_line(self, describe(self.network))

    def plan_parts(self) -> PlanParts:
        return PlanParts([nn.Sequential(self.normalize, self.network)])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


def as_pixel_model(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> PixelModel:
    """Adopt a network that was trained on ``(images - mean) / std``.

    Returns a module that maps images [B, C, H, W] in [0, 1] to the network's logits. The network is
    shared, not copied.
    """
    return PixelModel(Normalize(mean, std), network)
