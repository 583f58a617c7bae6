"""Refuse what a library under this project is known to compute wrongly on this machine."""

from __future__ import annotations

import os

import torch
from torch import nn

from dwf.checks import ConfigError
from moe_kernels.plan.choose import cpu_flags

# Channels of a block of oneDNN's kernels for AVX2.
_BLOCK = 8


def check_convolutions(model: nn.Module, device: torch.device) -> None:
    """Raise if the gradient of a weight would be written out of bounds.

    On CPUs with AVX2 and without AVX-512, oneDNN's gradient of the weight of a strided 1x1
    convolution with fewer than 8 input channels writes past its workspace: a crash, a hang, or
    wrong numbers (https://github.com/uxlfoundation/oneDNN/issues/6035; seen with torch 2.14.1).

    Raises:
        ConfigError: ``model`` has such a layer, and is to be trained on such a ``device``.
    """
    if not _is_affected(device):
        return
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and _overflows(layer):
            raise ConfigError(
                f"{name}: on this CPU torch writes the gradient of a strided 1x1 convolution of "
                f"{layer.in_channels} channels out of bounds (oneDNN issue 6035); use networks of "
                f"{_BLOCK} channels or more, or set ONEDNN_MAX_CPU_ISA=AVX before Python starts"
            )


def _is_affected(device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ("SSE41", "AVX"):
        return False
    return "avx2" in cpu_flags() and "avx512f" not in cpu_flags()


def _overflows(layer: nn.Conv2d) -> bool:
    is_narrow = layer.in_channels // layer.groups < _BLOCK
    return is_narrow and layer.kernel_size == (1, 1) and max(layer.stride) > 1
