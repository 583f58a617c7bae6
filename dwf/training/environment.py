"""Describe the circumstances of a run: versions, hardware, commit and command."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch

from dwf.version import DISTRIBUTION
from moe_kernels import timing

PACKAGES = (DISTRIBUTION, "torchvision", "numpy", "safetensors")


def environment(argv: list[str]) -> dict[str, Any]:
    """JSON values that describe this process's software, hardware and command line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "argv": argv or sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **timing.environment(device),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "num_processors": os.cpu_count(),
        "num_gpus": torch.cuda.device_count(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
