"""Networks that a plan has to hold, narrow enough for a CPU, with statistics as after training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dwf.models import build_network
from moe_kernels.plan import choose

BACK_ENDS = ["aten", "avx512", "avx2", "slab"]


def unless_missing(back_end: str, dtype: torch.dtype) -> None:
    """Skip the test if this back end does not run on this CPU."""
    if reason := choose.obstacle(back_end, torch.device("cpu"), dtype):
        pytest.skip(f"{back_end}: {reason}")


class Vgg(nn.Module):
    """kuangliu's VGG: convolution, BatchNorm, ReLU, pooling, and one linear layer."""

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (12, "pool", 20, "pool", 24, 24, "pool", 24, "pool", 24, "pool"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers, nn.AvgPool2d(1, 1))
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.classifier(out.view(out.size(0), -1))


class TwoLayerHead(nn.Module):
    """torchvision's VGG in small: adaptive pooling to a grid, two linear layers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((3, 2))
        self.classifier = nn.Sequential(
            nn.Linear(48, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class Skips(nn.Module):
    """Everything about residual sums that ResNets do not do at once.

    A sum whose other part is the convolution's own input, a map that three layers read, a 3x3
    shortcut, a mean pool inside, a ReLU after a ReLU, and no bias.
    """

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 1)
        self.c = nn.Conv2d(width, width, 3, padding=1)
        self.d = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.shortcut = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.last = nn.Conv2d(2 * width, 2 * width, 2)
        self.linear = nn.Linear(2 * width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem((x - 0.4) / 0.25))
        x = torch.relu(self.a(x) + x)
        y = torch.relu(self.b(x))
        z = self.c(y)
        z += x
        z = torch.relu(torch.relu(z))
        z = torch.relu(torch.add(self.d(z), self.shortcut(x)))
        z = nn.functional.avg_pool2d(z, 2, 1)
        return self.linear(self.last(z).mean([2, 3]))


class Dense(nn.Module):
    """What DenseNets, squeeze-and-excitation and other activations do, without groups."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width * (i + 1)) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width * (i + 1), width, 3, 1, 1) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(4 * width), nn.SiLU(inplace=True), nn.Conv2d(4 * width, 12, 1)
        )
        self.pool = nn.MaxPool2d(2)
        self.squeeze, self.excite = nn.Linear(12, 5), nn.Linear(5, 12)
        self.last = nn.Conv2d(12, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            maps.append(conv(torch.relu(norm(torch.cat(maps, 1)))))
        x = nn.functional.leaky_relu(self.pool(self.transition(torch.cat(maps, dim=1))), 0.2)
        scale = nn.functional.gelu(self.squeeze(x.mean((2, 3))))
        scale = torch.sigmoid(self.excite(scale)).view(x.size(0), 12, 1, 1)
        x = x * scale.expand_as(x)
        x = torch.relu(x) + torch.relu(nn.functional.avg_pool2d(x, 3, 1, 1))
        return self.last(x * x.sigmoid()).mean((2, 3))


class MobileBlocks(nn.Module):
    """Grouped and depthwise convolutions, of blocks of 32 channels and of fewer; a rounded size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU6())
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.strided = nn.Conv2d(64, 64, 5, 2, 2, groups=64, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.grouped = nn.Conv2d(64, 128, 3, 2, 1, groups=16)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.few = nn.Conv2d(128, 40, 1)
        self.narrow = nn.Conv2d(40, 20, 3, padding=1, groups=5)
        self.shortcut = nn.Conv2d(64, 64, 1, 2)
        self.linear = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.depthwise(x) + x)
        x = nn.functional.hardswish(self.norm(self.strided(x))) + self.shortcut(x)
        x = self.pool(torch.relu(self.grouped(x)))
        return self.linear(torch.relu(self.narrow(torch.relu(self.few(x)))).mean((2, 3)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """ConvNeXt in small: channels last between depthwise convolutions, one map read twice there."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), ChannelNorm(width, eps=1e-6))
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.wide, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.beside = nn.Linear(3 * width, width)
        self.layer_scale = nn.Parameter(torch.linspace(0.5, 1.5, width).view(width, 1, 1))
        self.last = nn.Sequential(ChannelNorm(width), nn.Flatten(1), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.wide(self.norm(torch.permute(self.depthwise(x), (0, 2, 3, 1))))
        y = self.narrow(nn.functional.gelu(y)) + self.beside(y)
        x = x + self.layer_scale * y.permute(0, 3, 1, 2)
        return self.last(nn.functional.adaptive_avg_pool2d(x, 1))


class Stems(nn.Module):
    """Several layers read the image: convolutions of two kinds, a norm, a pool, a concatenation.

    And an identity stands behind the last layer.
    """

    def __init__(self, width: int = 8, groups: int = 3) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.one = nn.Sequential(nn.Conv2d(3, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.norm, self.mean = nn.BatchNorm2d(3), nn.AvgPool2d(2, 2)
        self.each = nn.Conv2d(3, 6, 3, 2, 1, groups=groups)
        self.join = nn.Conv2d(width + 15, width, 3, padding=1)
        self.linear, self.same = nn.Linear(width, 10), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.4) / 0.25
        y = torch.relu(self.three(x) + self.one(x))
        small = torch.cat([torch.relu(self.norm(x)), x], 1)
        y = torch.cat([y, self.mean(small), torch.relu(self.each(x)), self.mean(x)], 1)
        return self.same(self.linear(torch.relu(self.join(y)).mean((2, 3))))


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode, its BatchNorm with statistics and weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.1, generator=generator)
    return network.eval()


def resnet(name: str, width: int, seed: int = 0, num_classes: int = 10) -> nn.Module:
    network = build_network(name, num_classes=num_classes, width=width, in_channels=3, seed=seed)
    return trained(network, seed)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return trained(make(), seed)
