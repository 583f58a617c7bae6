"""What libraries compute wrongly is refused with a reason, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwf.checks import ConfigError
from dwf.models import build_network
from dwf.training import known_faults
from dwf.training.known_faults import check_convolutions

CPU = torch.device("cpu")


def network(width: int) -> nn.Module:
    return build_network("resnet6", num_classes=10, width=width, in_channels=1, seed=0)


@pytest.fixture
def avx2_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_faults, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.mark.usefixtures("avx2_only")
@pytest.mark.parametrize("width", [4, 7])
def test_narrow_strided_convolutions_are_refused(width: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer2\.0\.shortcut\.0: .* of {width} channels"):
        check_convolutions(network(width), CPU)


@pytest.mark.usefixtures("avx2_only")
@pytest.mark.parametrize(
    "layer",
    [
        network(8),
        nn.Conv2d(4, 8, 1),  # no stride
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Linear(4, 8),
    ],
    ids=["wide", "stride 1", "3x3", "linear"],
)
def test_others_are_not(layer: nn.Module) -> None:
    check_convolutions(layer, CPU)


@pytest.mark.usefixtures("avx2_only")
def test_only_where_onednn_uses_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = network(4)
    check_convolutions(narrow, torch.device("cuda"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")
    check_convolutions(narrow, CPU)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(known_faults, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    check_convolutions(narrow, CPU)
