"""The work that bench_layers.py counts is the network's."""

import torch
from bench_layers import gflop, sizes

from dwf.models import build_network
from moe_kernels import Plan
from moe_kernels.plan.layers import Conv


def test_convolutions_of_resnet18() -> None:
    """555.4 million products an image, as everyone counts them; the head has 5 thousand more."""
    network = build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=0).eval()
    images = torch.zeros(1, 3, 32, 32)
    plan = Plan([network])
    plan.prepare(images)
    (member,) = plan._program(images).members
    layers = list(member.layers)
    of_value = sizes(layers, 32)
    convs = [layer for layer in layers if isinstance(layer, Conv)]
    assert (
        sorted(of_value[layer.output] for layer in convs) == [4] * 4 + [8] * 4 + [16] * 4 + [32] * 5
    )
    by_hand = 0
    for stage, (channels, pixels) in enumerate(((64, 32), (128, 16), (256, 8), (512, 4))):
        by_hand += 4 * 9 * channels**2 * pixels**2
        if stage:  # its first convolution reads half the channels, and a 1x1 joins
            by_hand -= 9 * channels**2 // 2 * pixels**2
            by_hand += channels**2 // 2 * pixels**2
    by_hand += 27 * 64 * 32**2
    assert abs(sum(gflop(layer, of_value[layer.output]) for layer in convs) - 2e-9 * by_hand) < 1e-9
