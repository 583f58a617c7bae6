"""What libraries compute wrongly is refused with a reason, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwf.checks import ConfigError
from dwf.models import build_network, known_faults
from dwf.models.known_faults import SubsampledConv2d, check_convolutions
from moe_kernels import processor

CPU = torch.device("cpu")


def network(width: int) -> nn.Module:
    return build_network("resnet6", num_classes=10, width=width, in_channels=1, seed=0)


@pytest.fixture
def avx2_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.mark.usefixtures("avx2_only")
@pytest.mark.parametrize("width", [4, 7])
def test_narrow_strided_convolutions_are_refused(width: int) -> None:
    foreign = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 8, 1, stride=2))
    with pytest.raises(ConfigError, match=rf"^1: .* of {width} channels"):
        check_convolutions(foreign, CPU)


def test_networks_of_this_project_keep_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function with the same state dict."""
    plain = network(4)
    monkeypatch.setattr(known_faults, "_is_affected", lambda: True)
    kept = network(4)
    assert any(isinstance(x, SubsampledConv2d) for x in kept.modules())
    assert not any(isinstance(x, SubsampledConv2d) for x in network(8).modules())
    check_convolutions(kept, CPU)
    kept.load_state_dict(plain.state_dict())
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kept(images), plain(images))


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
    monkeypatch.setattr(processor, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    check_convolutions(narrow, CPU)
