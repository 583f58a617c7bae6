"""PGD on single networks of many architectures: eager torch, the best stock torch, ours.

    pytest benchmarks/bench_architectures.py                      # one network, in a minute
    DWF_BENCH_FULL=1 pytest benchmarks/bench_architectures.py     # all, stock compiled too: an hour

Attacks take ten steps on 32 images of 32x32 pixels, or on 4 where networks are large or not all are
run. Most weights are untrained, since the time of a step does not depend on them. A column is timed
only if its images stay in the ball and gain as much loss as eager's; rounding costs untrained
networks some. For a network of your own: `dwf bench --model`.
"""

from __future__ import annotations

import copy
import importlib
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_columns import Column, OurAttack, eager_attack
from bench import Bench
from bench_step import describe
from gates import mean_loss
from step_models import EPSILON, STEP_SIZE
from torch import Tensor, nn

from dwf.attacks import attack_target
from dwf.bench.attack import StockAttack
from dwf.bench.stock import COMPILE, first_that_runs, without_tf32
from dwf.models import NETWORKS, build_network, planned
from moe_kernels.plan.choose import default_dtype

pytestmark = pytest.mark.filterwarnings("default")  # a compiler's remark ends no measurement

# name -> which library has it
ARCHITECTURES = {
    **dict.fromkeys(("resnet18", "resnet50", "preactresnet18", "preactresnet34"), "dwf"),
    **dict.fromkeys(("wrn16_4", "wrn28_10", "wrn34_10"), "dwf"),
    **dict.fromkeys(("vgg16_bn", "resnext50_32x4d", "wide_resnet50_2"), "torchvision"),
    **dict.fromkeys(("densenet121", "googlenet", "mobilenet_v2"), "torchvision"),
    **dict.fromkeys(("mobilenet_v3_large", "efficientnet_b0", "squeezenet1_1"), "torchvision"),
    "mnasnet1_0": "torchvision",
    "convnext_tiny": "torchvision",
    **dict.fromkeys(("resnetv2_50", "seresnet50", "repvgg_a0", "vit_tiny_patch16_224"), "timm"),
}
# networks made for larger images, as they are adapted to small ones
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4},
}
QUICK = "preactresnet18"
IMAGE_SHAPE, NUM_STEPS = (3, 32, 32), 10
# Untrained, their signals die out on small images: an attack has no gradient to judge columns by.
BRIEFLY_TRAINED = {
    *("googlenet", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0"),
    "repvgg_a0",
}
NUM_TRAINING_STEPS = 100
LARGE = {"wrn28_10", "wrn34_10"}
MIN_GAIN = 0.9


def make_network(name: str) -> nn.Module:
    """A network for ten classes, in eval mode, untrained unless it needs a little training."""
    network = _layers(name)
    if name in BRIEFLY_TRAINED:
        train_briefly(network)
    return network.eval()


def train_briefly(network: nn.Module) -> None:
    """Fit the network to ten smooth images and noise, until BatchNorm's averages are its own."""
    generator = torch.Generator().manual_seed(1)
    classes = F.interpolate(torch.rand(10, 3, 4, 4, generator=generator), IMAGE_SHAPE[1:])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MNASNet's averages would take thousands of steps
    optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-3)
    for _ in range(NUM_TRAINING_STEPS):
        labels = torch.randint(10, (64,), generator=generator)
        noise = torch.rand(64, *IMAGE_SHAPE, generator=generator)
        loss = F.cross_entropy(network(0.6 * classes[labels] + 0.4 * noise), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _layers(name: str) -> nn.Module:
    if name in NETWORKS:
        return build_network(name, num_classes=10, width=64, in_channels=3, seed=0)
    torch.manual_seed(0)
    options = {"num_classes": 10} | OPTIONS.get(name, {})
    if ARCHITECTURES[name] == "timm":
        network = importlib.import_module("timm").create_model(name, **options)
    else:
        network = importlib.import_module("torchvision.models").get_model(name, **options)
    assert isinstance(network, nn.Module)
    return network


def stock_column(
    network: nn.Module, images: Tensor, dtype: torch.dtype, *, compiles: bool
) -> Column:
    """Stock torch in that precision, compiled if that is wanted and runs here."""

    def build(*, compiled: bool, graphed: bool) -> StockAttack:
        model: nn.Module = copy.deepcopy(network).to(memory_format=torch.channels_last)
        if compiled:
            model = torch.compile(model, **COMPILE)  # type: ignore[assignment]
        return StockAttack(
            model, images, EPSILON, STEP_SIZE, dtype=dtype, compiled=compiled, graphed=graphed
        )

    stock, ran = first_that_runs(build, images.device, compiles=compiles)
    precision = str(dtype).removeprefix("torch.")
    return Column(stock, f"{precision}, {ran}", precision)


def our_column(network: nn.Module, images: Tensor) -> Column:
    """dwf.pgd on the network's plan, by the precision of its own rule."""
    model = planned(network)
    target = attack_target(model, images)
    back_end = target.plan.back_end if target.plan is not None else f"autograd ({target.reason})"
    precision = "bfloat16" if "bfloat16" in back_end else "float32"
    return Column(OurAttack(model), f"dwf.pgd, {back_end}", precision)


def batch_of(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, *IMAGE_SHAPE, generator=generator).to(device)
    return images, torch.randint(10, (batch_size,), generator=generator).to(device)


def measure(name: str, bench: Bench, *, batch_size: int, compiles: bool) -> dict[str, Any]:
    """The row of one architecture: every contender judged, then timed round by round."""
    network = make_network(name).to(bench.device)
    return {
        "bench": "architectures",
        "case": f"pgd-{name}-B{batch_size}",
        "network": name,
        "library": ARCHITECTURES[name],
        **side_by_side(network, bench, *batch_of(batch_size, bench.device), compiles=compiles),
    }


def side_by_side(
    network: nn.Module,
    bench: Bench,
    images: Tensor,
    labels: Tensor,
    *,
    offered: nn.Module | None = None,
    compiles: bool,
) -> dict[str, Any]:
    """What a row says of the contenders on one network: judged first, then timed round by round.

    ``offered``: what our column attacks in the network's place, by default the network.
    """
    torch.compiler.reset()
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    columns = {"eager": Column(eager_attack(plain), "float32, NCHW", "float32")}
    dtype = default_dtype(bench.device)
    columns["stock"] = stock_column(network, images, dtype, compiles=compiles)
    if compiles:  # a compiler loses where most layers are small
        columns["stock, not compiled"] = stock_column(network, images, dtype, compiles=False)
        if dtype is not torch.float32:
            columns["stock, float32"] = stock_column(network, images, torch.float32, compiles=False)
    columns["ours"] = our_column(network if offered is None else offered, images)
    before, gains = mean_loss(network, images, labels), {}
    for key, column in columns.items():
        adversarial = without_tf32(column.attack)(images, labels, NUM_STEPS)
        assert float((adversarial - images).abs().amax()) <= EPSILON + 1e-6, key
        gains[key] = mean_loss(network, adversarial, labels) - before
        assert gains[key] >= MIN_GAIN * gains["eager"], f"{key} gains {gains[key]:.3g} of loss"
        bench.say(f"{key}: {column.ran}")
    times = bench.time(
        {key: column.attack for key, column in columns.items()},
        (images, labels, NUM_STEPS),
        min_samples=3,
        min_s=0.0,
    )
    return {
        "batch_size": len(images),
        "image_shape": list(IMAGE_SHAPE),
        "num_steps": NUM_STEPS,
        "columns": describe(
            times,
            NUM_STEPS,
            len(images),
            {key: column.ran for key, column in columns.items()},
            {key: {"gain_over_eager": gain / gains["eager"]} for key, gain in gains.items()},
        ),
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pgd_step(name: str, bench: Bench) -> None:
    full = bool(os.environ.get("DWF_BENCH_FULL"))
    bench.require(gpu=bench.device.type == "cuda", minutes=name != QUICK)
    if ARCHITECTURES[name] != "dwf":
        pytest.importorskip(ARCHITECTURES[name])
    batch_size = 4 if not full or name in LARGE else 32
    bench.record(measure(name, bench, batch_size=batch_size, compiles=full))
