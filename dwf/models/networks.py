"""Build networks for small images by name, at any width and any input size: ResNets of all kinds.

State-dict keys and arithmetic of `ResNet` equal kuangliu/pytorch-cifar's, so its checkpoints load
with ``strict=True``. Two generalizations: ``width`` scales every stage, and the last pooling is
global, which equals the original's 4x4 pooling at 32x32 and makes 8x8 or 64x64 images possible.

Source: He et al., arXiv:1512.03385, in the form of section 1 of arXiv:2512.20821.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.checks import ConfigError, check_choice, check_count
from dwf.models.known_faults import shortcut_conv
from dwf.models.pre_activation import PreActResNet, WideResNet
from dwf.models.seeded import seeded_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions that widen four times, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * channels)
        self.shortcut = _shortcut(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        shortcut_conv(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
    )


class ResNet(nn.Module):
    """ResNet without the ImageNet stem: a 3x3 convolution, stages of blocks, global mean, linear.

    Args:
        block: BasicBlock or Bottleneck.
        num_blocks: blocks per stage; stage i has ``width * 2**i`` channels and halves the image
            (the first does not). pytorch-cifar has four stages; fewer are possible.
        width: channels of the first stage, 64 in the paper.
        in_channels: channels of the image.

    Input [B, in_channels, H, W], H and W at least ``2 ** (stages - 1)``; output [B, num_classes].

    Attributes:
        stages: names of the stages.
        last_layer: name of the module whose output is pooled and classified.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: Sequence[int],
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        num_classes = check_count(num_classes, "num_classes")
        width = check_count(width, "width")
        in_channels = check_count(in_channels, "in_channels")
        if not 1 <= len(num_blocks) <= 4:
            raise ConfigError(f"num_blocks: {list(num_blocks)} has to name one to four stages")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for i, count in enumerate(num_blocks):
            blocks: list[nn.Module] = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width * 2**i, stride))
                channels = width * 2**i * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.stages = [f"layer{i + 1}" for i in range(len(num_blocks))]
        self.last_layer = self.stages[-1]
        self.linear = nn.Linear(channels, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, of whatever name."""
        return self.linear

    def features(self, x: Tensor) -> Tensor:
        """The input of ``linear``, [B, channels]: the last stage's maps averaged over pixels."""
        out = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return out.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x))
        return logits


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet6": (BasicBlock, (1, 1)),
    "resnet8": (BasicBlock, (1, 1, 1)),
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet20": (BasicBlock, (3, 3, 3)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
PREACT_RESNETS: dict[str, tuple[int, ...]] = {
    "preactresnet18": (2, 2, 2, 2),
    "preactresnet34": (3, 4, 6, 3),
}
# depth and widening factor, as in the name
WIDE_RESNETS = {"wrn16_4": (16, 4), "wrn28_10": (28, 10), "wrn34_10": (34, 10)}
NETWORKS = (*RESNETS, *PREACT_RESNETS, *WIDE_RESNETS)

SmallNetwork = ResNet | PreActResNet | WideResNet


def build_network(
    name: str, *, num_classes: int, width: int, in_channels: int, seed: int
) -> SmallNetwork:
    """Build a network whose initial weights depend on ``seed`` alone; torch's RNG is untouched.

    Its weights are in channels_last order, the fastest for convolutions on CPUs and GPUs.

    Args:
        name: one of `NETWORKS`.
        width: 64 for the original; other numbers scale the channels of every stage.
    Raises:
        ConfigError: for an unknown name (with the nearest known one) or an impossible size.
    """
    check_choice(name, list(NETWORKS), "model.network")
    width = check_count(width, "width")
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    network: SmallNetwork
    with seeded_weights(seed):
        if name in RESNETS:
            block, num_blocks = RESNETS[name]
            network = ResNet(block, num_blocks, width=width, **sizes)
        elif name in PREACT_RESNETS:
            network = PreActResNet(PREACT_RESNETS[name], width=width, **sizes)
        else:
            depth, factor = WIDE_RESNETS[name]
            stage = max(16 * factor * width // 64, 1)
            network = WideResNet((depth - 4) // 6, width=stage, **sizes)
    return network.to(memory_format=torch.channels_last)
