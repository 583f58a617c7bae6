"""Networks that a plan has to hold, narrow enough for a CPU, with statistics as after training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dwf.models import build_network


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
