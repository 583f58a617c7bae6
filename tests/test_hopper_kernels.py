"""The predictions of benchmarks/hopper_kernels.py count what the kernels do."""

from __future__ import annotations

import aot_table
import hopper_kernels
import pytest
import torch
from hopper_kernels import Tiles

from moe_kernels import native

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"not built: {native.missing}")


def test_chunks_are_those_of_the_taps() -> None:
    layer, direction = aot_table.layers()["stage 4 forward residual"]
    chunks = hopper_kernels.chunks_of_pixels(getattr(layer, direction)(9, 128, torch.bfloat16))
    # 4 x 4 pixels: 9 taps inside, 6 at edges, 4 in corners, each of 512 channels.
    assert chunks == [x * 8 for x in [9] * 4 + [6] * 8 + [4] * 4]
    for stage in (2, 3, 4):
        forward, side, backward = (
            aot_table.layers()[f"stage {stage} {x}"][0]
            for x in ("forward narrowing", "forward side", "backward narrowing")
        )
        # The gradient goes back through each pair of pixels once; channels change places.
        there = hopper_kernels.chunks_of_pixels(forward.forward(9, 128, torch.bfloat16))
        back = hopper_kernels.chunks_of_pixels(backward.backward(9, 128, torch.bfloat16))
        pixels = forward.pixels**2 // 4
        of_side = pixels * forward.out_channels // 64
        assert sum(back) - of_side == sum(there) * 2
        plain = hopper_kernels.chunks_of_pixels(
            side._replace(side=None).forward(9, 128, torch.bfloat16)
        )
        assert sum(hopper_kernels.chunks_of_pixels(side.forward(9, 128, torch.bfloat16))) == sum(
            plain
        ) + pixels * (forward.in_channels // 64)


@pytest.mark.parametrize(
    ("tiles", "products", "shared", "fetched_rows"),
    [
        (Tiles(128, 256, 128, 256, False), 1024, 1024, 384),
        (Tiles(128, 256, 256, 256, False), 1024, 1024, 256),
        (Tiles(128, 256, 128, 512, False), 1024, 1024, 320),
        (Tiles(256, 128, 256, 128, False), 1024, 1152, 384),
        (Tiles(128, 128, 256, 128, False), 512, 640, 192),
        (Tiles(128, 64, 128, 64, False), 256, 448, 192),
        (Tiles(256, 64, 256, 64, True), 512, 576, 256),
    ],
)
def test_cycles_of_a_chunk(tiles: Tiles, products: int, shared: int, fetched_rows: int) -> None:
    # One byte per clock for each multiprocessor.
    rate = hopper_kernels.CLOCK_HZ * hopper_kernels.MULTIPROCESSORS
    found = hopper_kernels.chunk_cycles(tiles, rate)
    assert found["products"] == products
    assert found["shared memory"] == shared
    assert found["L2"] == pytest.approx(fetched_rows * 128)


def test_predictions_keep_to_the_limits() -> None:
    for call, _ in hopper_kernels.launches(256).values():
        for clusters in (False, True):
            fast, slow = (hopper_kernels.predict(call, clusters, rate) for rate in (9.8e12, 1e12))
            peak = hopper_kernels.FLOP_PER_CLOCK * hopper_kernels.CLOCK_HZ * 132 / 1e12
            assert slow.tflops < fast.tflops < peak
            assert slow.limit == "L2"
    # What is read twice as slowly gains from reading half of it once.
    call, _ = hopper_kernels.launches(256)["stage 4 forward residual"]
    single, cluster = (hopper_kernels.predict(call, x, 3e12) for x in (False, True))
    assert cluster.seconds < 0.75 * single.seconds


def test_says_that_nothing_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_kernels, "BATCHES", (128,))
    hopper_kernels.print_predictions()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTED, NOT MEASURED")
    assert sum(line.startswith("| a step, ") for line in lines) == 3
