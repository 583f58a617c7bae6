"""Compare every contender of a step with a plain reference, before any of them is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from attack_columns import Column, eager_attack
from step_models import EPSILON, STEP_SIZE, input_gradient, plain_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_columns import Training

import dwf
from dwf.bench.stock import without_tf32

T = TypeVar("T")

# Required of a column in float32, and of one that computes in bfloat16.
MIN_AGREEMENT = {"float32": 0.999, "bfloat16": 0.97}
MAX_LOGITS_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
MIN_GAIN = {"float32": 0.999, "bfloat16": 0.98}
MAX_LOSS_ERROR = {"float32": 1e-3, "bfloat16": 2e-2}
MIN_COSINE = {"float32": 0.99, "bfloat16": 0.97}
# Rows of the batch that are also computed in float64.
TRUTH_ROWS = 8


class Reference(NamedTuple):
    """The right attack, computed in plain float32; its first R rows also in float64."""

    truth_logits: Tensor  # [R, K] float64
    truth_step: Tensor  # [R, C, H, W] float64, after one step
    step: Tensor  # [B, C, H, W]
    weight: Tensor  # [B, C, H, W], size of the gradient at the images
    clean_loss: float
    gain: float  # of loss, after all steps


def make_reference(
    mixture: dwf.Mixture, images: Tensor, labels: Tensor, num_steps: int
) -> Reference:
    rows = slice(TRUTH_ROWS)
    double = plain_model(mixture).double()
    plain = plain_model(mixture)
    attack = without_tf32(eager_attack(plain))
    clean_loss = mean_loss(plain, images, labels)
    with torch.no_grad():
        truth_logits = double(images[rows].double())
    return Reference(
        truth_logits,
        eager_attack(double)(images[rows].double(), labels[rows], 1),
        attack(images, labels, 1),
        without_tf32(input_gradient)(plain, images, labels).abs(),
        clean_loss,
        mean_loss(plain, attack(images, labels, num_steps), labels) - clean_loss,
    )


def judge_attack(
    column: Column,
    reference: Reference,
    mixture: dwf.Mixture,
    images: Tensor,
    labels: Tensor,
    num_steps: int,
) -> dict[str, float]:
    """Distances of a column from the reference; AssertionError names those beyond their bounds."""
    step = column.attack(images, labels, 1)
    adversarial = column.attack(images, labels, num_steps)
    # A step moves every pixel by its length, one way or the other, so equal pixels are equal signs.
    same_as_truth = (step[:TRUTH_ROWS] - reference.truth_step).abs() < STEP_SIZE / 2
    same = (step - reference.step).abs() < STEP_SIZE / 2
    loss = mean_loss(plain_model(mixture), adversarial, labels)
    found = {
        "sign_agreement_float64": float(same_as_truth.double().mean()),
        "sign_agreement": float(same.double().mean()),
        "weighted_sign_agreement": float((same * reference.weight).sum() / reference.weight.sum()),
        "gain_over_reference": (loss - reference.clean_loss) / reference.gain,
    }
    if column.logits is not None:
        with torch.no_grad():
            logits = column.logits(images)[:TRUTH_ROWS].double()
        error = (logits - reference.truth_logits).norm() / reference.truth_logits.norm()
        found["logits_error"] = float(error)
    precision = column.precision
    faults = [
        f"{name} {value:.5f}, expected at least {least:.5f}"
        for name, value in found.items()
        if name != "logits_error"
        and not value >= (least := (MIN_GAIN if "gain" in name else MIN_AGREEMENT)[precision])
    ]
    if not found.get("logits_error", 0.0) <= MAX_LOGITS_ERROR[precision]:
        faults.append(f"logits are off by {found['logits_error']:.2e} of their norm")
    outside = (adversarial - images).abs() > EPSILON + 1e-6
    outside |= (adversarial < 0) | (adversarial > 1)
    if bool(outside.any()):
        faults.append(f"{int(outside.sum())} pixels outside of the ball or of [0, 1]")
    assert not faults, f"{column.ran}: {'; '.join(faults)}"
    return found


@without_tf32
def mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The cross-entropy of a batch, in full float32."""
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def gflop_per_image(mixture: dwf.Mixture, images: Tensor, labels: Tensor) -> float:
    """GFLOP of one step (forward and gradient of the input), as torch counts them."""
    model = plain_model(mixture).requires_grad_(False)
    leaf = images[:1].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(leaf), labels[:1]).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 1e9


def first_update(training: Training, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Loss of the first step, and the change of all parameters by it, as one vector."""
    before = [x.detach().clone() for x in training.model.parameters()]
    loss = float(training(images, labels))
    after = training.model.parameters()
    return loss, torch.cat([(y.detach() - x).flatten() for x, y in zip(before, after, strict=True)])


def judge_training(
    training: Training, found: tuple[float, Tensor], expected: tuple[float, Tensor]
) -> dict[str, float]:
    """Distances of a first step from the reference's; AssertionError names those too large."""
    loss_error = abs(found[0] - expected[0]) / expected[0]
    # In float64: a sum over all parameters of nine experts loses digits in float32.
    cosine = float(F.cosine_similarity(found[1].double(), expected[1].double(), dim=0))
    precision = training.precision
    faults = []
    if not loss_error <= MAX_LOSS_ERROR[precision]:
        faults.append(f"loss {found[0]:.6f}, expected {expected[0]:.6f}")
    if not cosine >= MIN_COSINE[precision]:
        faults.append(f"the update's cosine with the reference's is {cosine:.5f}")
    assert not faults, f"{training.ran}: {'; '.join(faults)}"
    return {"loss_error": loss_error, "update_cosine": cosine}


def build_all(
    builders: Mapping[str, Callable[[], T]],
    judge: Callable[[T], dict[str, float]],
    say: Callable[[str], None],
) -> tuple[dict[str, T], dict[str, dict[str, float]], dict[str, str]]:
    """Build and judge the columns, one after the other, with a line about each.

    Returns the columns that run here, what `judge` found, and why the others were skipped.
    """
    columns, quality, skipped = {}, {}, {}
    for name, build in builders.items():
        began = time.monotonic()
        try:
            column = build()
            quality[name] = judge(column)
        except ImportError as error:
            skipped[name] = f"not installed: {error}"
        except torch.OutOfMemoryError:
            skipped[name] = "not enough memory on this GPU"
        else:
            columns[name] = column
        outcome = f"skipped, {skipped[name]}" if name in skipped else "built, and right"
        say(f"{name}: {outcome} ({time.monotonic() - began:.1f} s)")
    return columns, quality, skipped
