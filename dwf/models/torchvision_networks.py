"""Build torchvision's GoogLeNet and DenseNet-121 for small images.

The first convolution becomes 3x3 with stride 1, and the pooling after it goes: a 32x32 image ends
as a 4x4 map, as in our ResNets, instead of a single pixel.

Sources: Szegedy et al., arXiv:1409.4842; Huang et al., arXiv:1608.06993.
"""

from __future__ import annotations

import torch
from torch import nn

from dwf.checks import ConfigError, check_choice
from dwf.models.seeded import seeded_weights

# The module whose output is pooled and classified. DenseNet rectifies it in place first.
LAST_LAYERS = {"googlenet": "inception5b", "densenet121": "features.norm5"}


def build_torchvision_network(
    name: str, *, num_classes: int, width: int, in_channels: int, seed: int
) -> nn.Module:
    """Build a network whose initial weights depend on ``seed`` alone; torch's RNG is untouched.

    Args:
        width: channels of DenseNet's first convolution, 64 in the original; the growth rate is half
            of it. GoogLeNet has one size.

    Raises:
        ConfigError: for an unknown name, or if torchvision cannot be imported.
    """
    check_choice(name, list(LAST_LAYERS), "network")
    try:
        from torchvision.models import DenseNet, GoogLeNet
    # RuntimeError: torchvision was built for another torch
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"network {name}: needs torchvision, which cannot be imported ({error}); "
            "install the version that belongs to your torch"
        ) from error
    with seeded_weights(seed):
        network: nn.Module
        if name == "googlenet":
            network = GoogLeNet(num_classes=num_classes, aux_logits=False, init_weights=True)
            first, channels, pooling = "conv1.conv", 64, "maxpool1"
        else:
            network = DenseNet(
                growth_rate=max(width // 2, 1), num_init_features=width, num_classes=num_classes
            )
            first, channels, pooling = "features.conv0", width, "features.pool0"
        convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    network.set_submodule(first, convolution)
    network.set_submodule(pooling, nn.Identity())
    return network.to(memory_format=torch.channels_last)
