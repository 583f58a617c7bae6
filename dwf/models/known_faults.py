"""Keep away from what a library under this project is known to compute wrongly on this machine.

On CPUs with AVX2 and without AVX-512, oneDNN's gradient of the weight of a strided 1x1 convolution
with fewer than 8 input channels writes past its workspace: a crash, a hang, or wrong numbers
(https://github.com/uxlfoundation/oneDNN/issues/6035; seen with torch 2.14.1).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.checks import ConfigError
from moe_kernels.processor import has_avx2_alone

# Channels of a block of oneDNN's kernels for AVX2.
_BLOCK = 8


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution as one without stride, of the pixels [B, C, H, W] that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight, self.bias)


def shortcut_conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    """A 1x1 convolution without bias whose gradients are right on this machine's CPU."""
    made = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    if _overflows(made) and _is_affected():
        made.__class__ = SubsampledConv2d
    return made


def check_convolutions(model: nn.Module, device: torch.device) -> None:
    """Raise if the gradient of a weight would be written out of bounds.

    Raises:
        ConfigError: ``model`` has such a layer, and is to be trained on such a ``device``.
    """
    if device.type != "cpu" or not _is_affected():
        return
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and _overflows(layer):
            raise ConfigError(
                f"{name}: on this CPU torch writes the gradient of a strided 1x1 convolution of "
                f"{layer.in_channels} channels out of bounds (oneDNN issue 6035); use networks of "
                f"{_BLOCK} channels or more, or set ONEDNN_MAX_CPU_ISA=AVX before Python starts"
            )


def _is_affected() -> bool:
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ("SSE41", "AVX"):
        return False
    return bool(torch.backends.mkldnn.enabled) and has_avx2_alone()


def _overflows(layer: nn.Conv2d) -> bool:
    is_narrow = layer.in_channels // layer.groups < _BLOCK
    is_strided = layer.kernel_size == (1, 1) and max(layer.stride) > 1
    return is_narrow and is_strided and not isinstance(layer, SubsampledConv2d)
