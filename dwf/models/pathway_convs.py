"""Convolutions with a slice of channels for each pathway, and what plans read in their place."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Taken(NamedTuple):
    """One pathway for all images; ``weights`` [B] multiply what its convolutions give."""

    pathway: int
    weights: Tensor | None = None


# Which pathway computes: one, or all by routing [B, E], one-hot rows with a gradient.
Routing = Taken | Tensor


class PathwayConv2d(nn.Module):
    """3x3 convolutions of E pathways; ``weight`` [E * O, C, 3, 3] holds pathway e in block e.

    With routing [B, E], all E are computed and summed with these weights; with one pathway, that
    alone is computed. Maps [B, C, H, W] to [B, O, H / stride, W / stride].
    """

    def __init__(
        self, in_channels: int, channels: int, num_pathways: int, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.num_pathways = num_pathways
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(num_pathways * channels, in_channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # torch's for each of E convolutions

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if isinstance(routing, Taken):
            weight = self.weight.chunk(self.num_pathways)[routing.pathway]
            y = F.conv2d(x, weight, stride=self.stride, padding=1)
            own = routing.weights
            return y if own is None else y * own.to(y.dtype).view(-1, 1, 1, 1)
        slices = F.conv2d(x, self.weight, stride=self.stride, padding=1)
        parts = zip(slices.chunk(self.num_pathways, dim=1), routing.to(slices.dtype).T, strict=True)
        # one after another: a sum over an axis would give up the memory format, and is slower
        weighted = [part * own.view(-1, 1, 1, 1) for part, own in parts]
        out: Tensor = functools.reduce(torch.add, weighted)
        return out


class PlannedConv2d(nn.Module):
    """A convolution without bias or a weight of its own; plans read it as torch's."""

    evaluates_as = nn.Conv2d
    weight: Tensor
    bias = None
    dilation, groups, padding_mode = (1, 1), 1, "zeros"

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.padding = (kernel, kernel), (kernel // 2, kernel // 2)
        self.stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)


class OfOnePathway(PlannedConv2d):
    """A convolution with pathways that takes one for all images."""

    def __init__(self, conv: PathwayConv2d, pathway: int) -> None:
        channels, in_channels = conv.weight.shape[:2]
        super().__init__(in_channels, channels // conv.num_pathways, 3, conv.stride)
        self.conv = conv
        self._taken = Taken(pathway)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.conv.weight.chunk(self.conv.num_pathways)[self._taken.pathway]

    def forward(self, x: Tensor, routing: None = None) -> Tensor:
        maps: Tensor = self.conv(x, self._taken)
        return maps


class OfAllPathways(nn.Module):
    """All pathways of a convolution as one, on weighted copies of the maps.

    sum_e w[b, e] * conv_e(x[b]) = conv(cat_e(w[b, e] * x[b]))
    """

    def __init__(self, conv: PathwayConv2d) -> None:
        super().__init__()
        self.num_pathways = conv.num_pathways
        self.repeated = _Repeated(conv)
        self.conv = _Joined(conv)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        own = self.repeated(weights).view(-1, self.repeated.out_features, 1, 1)
        maps: Tensor = self.conv(torch.cat([x] * self.num_pathways, dim=1) * own)
        return maps


class _Repeated(nn.Module):
    """Weights of pathways [B, E], each for the channels of its copy of the maps [B, E * C]."""

    evaluates_as = nn.Linear
    bias = None

    def __init__(self, conv: PathwayConv2d) -> None:
        super().__init__()
        self.conv = conv
        self.in_features = conv.num_pathways
        self.out_features = conv.num_pathways * conv.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        like = self.conv.weight
        each = torch.eye(self.in_features, dtype=like.dtype, device=like.device)
        return each.repeat_interleave(like.shape[1], dim=0)

    def forward(self, weights: Tensor) -> Tensor:
        return F.linear(weights, self.weight)


class _Joined(PlannedConv2d):
    """The convolutions of all pathways, joined along their input channels."""

    def __init__(self, conv: PathwayConv2d) -> None:
        channels, in_channels = conv.weight.shape[:2]
        num_pathways = conv.num_pathways
        super().__init__(num_pathways * in_channels, channels // num_pathways, 3, conv.stride)
        self.conv = conv

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        weight = self.conv.weight
        each = weight.reshape(self.conv.num_pathways, -1, *weight.shape[1:])
        return each.transpose(0, 1).flatten(1, 2)


class OfImage(nn.Module):
    """The first convolution, on an image with planes behind it that it does not read."""

    evaluates_as = nn.Conv2d

    def __init__(self, conv: nn.Conv2d, num_planes: int) -> None:
        super().__init__()
        self.conv, self.num_planes = conv, num_planes
        self.in_channels = conv.in_channels + num_planes
        self.out_channels, self.kernel_size = conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups, self.padding_mode = conv.groups, conv.padding_mode

    @property
    def weight(self) -> Tensor:
        return F.pad(self.conv.weight, (0, 0, 0, 0, 0, self.num_planes))

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.conv(x[:, : -self.num_planes])
        return maps


class OfPlanes(PlannedConv2d):
    """The planes behind an image."""

    def __init__(self, conv: nn.Conv2d, num_planes: int) -> None:
        super().__init__(conv.in_channels + num_planes, num_planes, 1, 1)
        self.conv = conv

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        like = self.conv.weight
        each = torch.eye(self.out_channels, dtype=like.dtype, device=like.device)
        return F.pad(each, (self.conv.in_channels, 0))[:, :, None, None]
