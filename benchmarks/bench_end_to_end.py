"""A slice of joint training from the data set on: cutting batches, crafting, stepping, three seeds.

Ours is `dwf.train` itself, by its own clock (metrics.jsonl); the other columns run the loop of a
script around the same batches. The first steps warm up and are left out. Attacks have one strength,
so that every column takes the same number of passes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import Bench
from step_models import EPSILON, STEP_SIZE, Case, joint_config
from training_columns import EagerTraining, Training, stock_training

import dwf
from dwf.checks import DataError
from dwf.config import Config, DataConfig, derive_seed
from dwf.data import Batches, ImageDataset, load, split_validation
from dwf.defenses import ModelFacts, get
from dwf.progress import read_metrics

pytestmark = pytest.mark.filterwarnings("default")

SEEDS = (0, 1, 2)
# Of the mean loss over the slice: bfloat16 and sums in another order change no more.
MAX_LOSS_ERROR = 0.05


@dataclasses.dataclass(frozen=True)
class Slice:
    """So many steps on one data set; `warm_up` of them are not timed."""

    data: str
    case: Case
    precision: str
    num_steps: int
    warm_up: int
    num_validation: int

    def __str__(self) -> str:
        return f"{self.data}-{self.case}"


SLICES = [
    Slice(
        "digits",
        Case("resnet6", 8, 8, batch_size=32, num_steps=4, needs_gpu=False),
        precision="float32",
        num_steps=8,
        warm_up=2,
        num_validation=100,
    ),
    Slice(
        "cifar10",
        Case("resnet18", 64, 32, batch_size=128, num_steps=10, needs_gpu=True),
        precision="bfloat16",
        num_steps=24,
        warm_up=8,
        num_validation=1000,
    ),
]


@pytest.mark.parametrize("work", SLICES, ids=str)
def test_joint_slice(work: Slice, bench: Bench, tmp_path: Path) -> None:
    case, device = work.case, bench.device
    bench.require(gpu=case.needs_gpu)
    torch.compiler.reset()
    name, real = find_data(work, tmp_path)
    seconds: dict[str, list[float]] = {"eager": [], "stock": [], "ours": []}
    losses: dict[str, list[float]] = {key: [] for key in seconds}
    ran: dict[str, str] = {}
    validations = []
    order = list(seconds)
    for seed in SEEDS:
        config = slice_config(work, name, seed)
        for column in order:
            if column == "ours":
                result = run_ours(config, tmp_path / f"seed{seed}", work.warm_up)
                took, loss, ran[column], validation = result
                validations.append(validation)
            else:
                build = eager if column == "eager" else stock
                took, loss, ran[column] = run_script(config, work, device, build)
            bench.say(f"{column}, seed {seed}: {took:.2f} s for the timed steps")
            seconds[column].append(took)
            losses[column].append(loss)
        order.append(order.pop(0))  # nobody always follows the same neighbor
    for column, values in losses.items():
        for ours, reference in zip(values, losses["eager"], strict=True):
            assert abs(ours - reference) <= MAX_LOSS_ERROR * reference, f"{column}: {losses}"

    timed = work.num_steps - work.warm_up
    columns = {
        column: {
            "seconds": times,
            "median_ms": 1e3 * statistics.median(times) / timed,
            "p20_ms": 1e3 * min(times) / timed,
            "p80_ms": 1e3 * max(times) / timed,
            "num_samples": len(times),
            "ratio": statistics.median(a / b for a, b in zip(times, seconds["eager"], strict=True)),
            "images_per_s": timed * case.batch_size / statistics.median(times),
            "mean_loss": losses[column],
            "ran": ran[column],
        }
        for column, times in seconds.items()
    }
    row = {
        "bench": "end_to_end",
        "case": f"joint-{work}",
        "data": name if real == "yes" else real,
        "network": case.network,
        "width": case.width,
        "num_experts": case.num_experts,
        "batch_size": case.batch_size,
        "num_steps": case.num_steps,
        "timed_training_steps": timed,
        "epsilon": EPSILON,
        "step_size": STEP_SIZE,
        "random_start": False,
        "bn_mode": "eval",
        "seeds": SEEDS,
        "columns": columns,
        "skipped": {},
    }
    if real == "yes":
        # Of a model that saw a slice of an epoch: whether it learns, not how good the method is.
        row["validation"] = validations
    bench.record(row)


def find_data(work: Slice, folder: Path) -> tuple[str, str]:
    """Name of the data set and "yes"; without it, a file of random images and their description."""
    try:
        load(work.data, split="train")
        return work.data, "yes"
    except DataError:
        size, count = work.case.image_size, images_needed(work)
        generator = np.random.default_rng(0)
        path = folder / "random.npz"
        np.savez(
            path,
            x_train=generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
            y_train=np.arange(count) % 10,
        )
        return str(path), f"random images of the shape of {work.data}, which is not on this machine"


def images_needed(work: Slice) -> int:
    return work.num_steps * work.case.batch_size + work.num_validation


def slice_config(work: Slice, name: str, seed: int) -> Config:
    """One epoch of exactly the slice's steps, a metrics row after the warm-up and at the end."""
    photographs = work.data == "cifar10"
    config = joint_config(work.case, work.precision)
    return replace(
        config,
        seed=seed,
        log_every=work.warm_up,
        validation_steps=work.case.num_steps,
        data=DataConfig(
            name,
            crop_padding=4 if photographs else 0,
            flip=photographs,
            num_validation=work.num_validation,
            num_train=work.num_steps * work.case.batch_size,
        ),
    )


def run_ours(
    config: Config, folder: Path, warm_up: int
) -> tuple[float, float, str, dict[str, Any]]:
    """Seconds and mean loss of the timed steps, what ran, and the validation after them."""
    dwf.train(config, folder, quiet=True)
    rows = read_metrics(folder)
    timed = [r for r in rows if r["kind"] == "train" and r["global_step"] > warm_up]
    (found,) = [r for r in rows if r["kind"] == "validation"]
    validation = {
        **{key: found[key] for key in ("clean_accuracy", "robust_accuracy", "num_images")},
        "attack": {
            "epsilon": config.attack.epsilon,
            "step_size": config.attack.step_size,
            "num_steps": config.validation_steps,
            "num_restarts": 1,
            "bn_mode": "eval",
        },
    }
    loss = statistics.mean(row["loss"] for row in timed)
    ran = f"dwf.train, precision={config.precision}, with the average of the weights"
    return sum(row["seconds"] for row in timed), loss, ran, validation


def run_script(
    config: Config,
    work: Slice,
    device: torch.device,
    build: Callable[[dwf.Mixture, Slice, torch.Tensor], Training],
) -> tuple[float, float, str]:
    """Seconds and mean loss of the timed steps over the batches of `dwf.train`, and what ran."""
    whole = load(config.data.name, split="train")
    rest, _ = split_validation(whole, config.data.num_validation, config.seed)
    train_set = rest.subset(torch.arange(config.data.num_train or len(rest)))
    batches = make_batches(config, train_set, device)
    facts = ModelFacts(train_set.image_shape, train_set.num_classes, train_set.mean, train_set.std)
    mixture = get("dwf").build(config, facts).to(device)
    assert isinstance(mixture, dwf.Mixture)
    training = build(mixture, work, batches.batch(0, 0)[0])
    losses = []
    for step, batch in enumerate(batches.epoch(0)):
        if step == work.warm_up:
            start = now(device)
        losses.append(training(batch.images, batch.labels))
    took = now(device) - start
    return took, float(torch.stack(losses[work.warm_up :]).mean()), training.ran


def make_batches(config: Config, train_set: ImageDataset, device: torch.device) -> Batches:
    assert config.joint is not None
    return Batches(
        train_set,
        config.joint.batch_size,
        seed=derive_seed(config.seed, "data", "joint"),
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
        device=device,
    )


def eager(mixture: dwf.Mixture, work: Slice, images: torch.Tensor) -> Training:
    return EagerTraining(mixture, work.case.num_steps, work.num_steps)


def stock(mixture: dwf.Mixture, work: Slice, images: torch.Tensor) -> Training:
    dtype = torch.bfloat16 if work.precision == "bfloat16" else torch.float32
    return stock_training(mixture, work.case.num_steps, images, work.num_steps, dtype)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
