"""Build the networks of adversarial training that normalize before they convolve.

| network      | stages | layout of its state dict                           |
|--------------|--------|----------------------------------------------------|
| PreActResNet | four   | fast_adversarial's and AWP's, a BatchNorm at last  |
| WideResNet   | three  | xternalz's, as TRADES, AWP and RobustBench have it |

Checkpoints of these load with ``strict=True``. Two generalizations, as of `ResNet`: ``width``
scales every stage, and the last pooling is global.

Sources: He et al., arXiv:1603.05027; Zagoruyko and Komodakis, arXiv:1605.07146.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dwf.checks import check_count
from dwf.models.known_faults import shortcut_conv


class _Block(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice; subclasses name the 1x1 shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def projection(self) -> nn.Module | None:
        """The shortcut; None where the shape stays."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        projection = self.projection()
        shortcut = x if projection is None else projection(out)
        total: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut
        return total


class PreActBlock(_Block):
    """The block of PreActResNet, whose shortcut is 1x1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(shortcut_conv(in_channels, channels, stride))

    def projection(self) -> nn.Module | None:
        return getattr(self, "shortcut", None)


class PreActResNet(nn.Module):
    """PreActResNet without the ImageNet stem.

    Args:
        num_blocks: blocks of each of four stages; stage i has ``width * 2**i`` channels.

    Input [B, in_channels, H, W]; output [B, num_classes]. Attributes as of `networks.ResNet`.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        num_classes, width, in_channels = _checked(num_classes, width, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        channels = width
        for i, count in enumerate(num_blocks):
            blocks = []
            for j in range(count):
                blocks.append(PreActBlock(channels, width * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.stages = [f"layer{i + 1}" for i in range(len(num_blocks))]
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.last_layer = "relu"
        self.linear = nn.Linear(channels, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, of whatever name."""
        return self.linear

    def features(self, x: Tensor) -> Tensor:
        """The input of ``linear``, [B, channels]: the last stage's maps averaged over pixels."""
        out = self.conv1(x)
        for name in self.stages:
            out = self.get_submodule(name)(out)
        pooled: Tensor = self.relu(self.bn(out)).mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x))
        return logits


class WideBlock(_Block):
    """The block of WideResNet, whose shortcut is 1x1 where the number of channels changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        if in_channels != channels:
            self.convShortcut = shortcut_conv(in_channels, channels, stride)

    def projection(self) -> nn.Module | None:
        return getattr(self, "convShortcut", None)


class WideStage(nn.Module):
    """Blocks of equal width, in a container named as in the original."""

    def __init__(self, count: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                WideBlock(*((channels, channels, 1) if i else (in_channels, channels, stride)))
                for i in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WideResNet of three stages of ``num_blocks`` blocks each: its depth is 6 * num_blocks + 4.

    Args:
        width: channels of the first stage, 16 times the widening factor; the next have twice and
            four times as many. The stem has 16.

    Input [B, in_channels, H, W]; output [B, num_classes]. Attributes as of `networks.ResNet`.
    """

    def __init__(
        self, num_blocks: int, *, num_classes: int = 10, width: int = 160, in_channels: int = 3
    ) -> None:
        super().__init__()
        num_classes, width, in_channels = _checked(num_classes, width, in_channels)
        stem = 16
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.block1 = WideStage(num_blocks, stem, width, 1)
        self.block2 = WideStage(num_blocks, width, 2 * width, 2)
        self.block3 = WideStage(num_blocks, 2 * width, 4 * width, 2)
        self.stages = ["block1", "block2", "block3"]
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.last_layer = "relu"
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, of whatever name."""
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        """The input of ``fc``, [B, 4 * width]: the last stage's maps averaged over pixels."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        pooled: Tensor = self.relu(self.bn1(out)).mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


def _checked(num_classes: int, width: int, in_channels: int) -> tuple[int, int, int]:
    return (
        check_count(num_classes, "num_classes"),
        check_count(width, "width"),
        check_count(in_channels, "in_channels"),
    )
