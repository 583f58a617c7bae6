"""Small honest models, trained in seconds, that a verdict must not condemn.

Canaries are made of them; see :mod:`dwf.evaluation.canaries`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dwf.attacks import pgd
from dwf.data import ImageDataset, load
from dwf.data.batches import to_unit_range
from dwf.models import Mixture
from dwf.models.gates import MlpGate

EPSILON = 0.2  # on digits, where 8/255 tests nothing
IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
NUM_EXPERTS = 3


def build_small_network(
    seed: int,
    *,
    width: int = 16,
    image_shape: Sequence[int] = IMAGE_SHAPE,
    num_classes: int = NUM_CLASSES,
) -> nn.Sequential:
    """Two convolutions with BatchNorm and a linear layer; weights depend on ``seed`` alone."""
    channels, height, breadth = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * -(-height // 2) * -(-breadth // 2), num_classes),
        )


def honest_network(seed: int = 0, *, epsilon: float = EPSILON) -> nn.Module:
    """A small network for digits, adversarially trained in seconds; plainly with ``epsilon=0``."""
    return train_quickly(build_small_network(seed), seed=seed, epsilon=epsilon)


def honest_mixture(seed: int = 0, *, epsilon: float = EPSILON) -> Mixture:
    """Three such networks behind a soft gate, adversarially trained together."""
    experts = [build_small_network(seed + e, width=8) for e in range(NUM_EXPERTS)]
    gate = MlpGate(IMAGE_SHAPE, NUM_EXPERTS, hidden=32, seed=seed)
    last = gate.layers[-1]
    assert isinstance(last, nn.Linear)
    # A gate with an opinion of its own that training leaves alone: in a few epochs one that learns
    # would trust one expert with everything.
    last.weight.data = 2 * torch.randn(
        last.weight.shape, generator=torch.Generator().manual_seed(seed)
    )
    gate.requires_grad_(False)
    mixture = Mixture(experts, gate)
    train_quickly(mixture, seed=seed, epsilon=epsilon)
    return mixture


def train_quickly(
    model: nn.Module,
    dataset: ImageDataset | None = None,
    *,
    seed: int = 0,
    epsilon: float = EPSILON,
    num_epochs: int = 6,
    num_steps: int = 3,
    batch_size: int = 100,
) -> nn.Module:
    """Train in place on images attacked by PGD, on clean ones with ``epsilon=0``; return it in eval
    mode."""
    dataset = dataset or load("digits")
    images, labels = to_unit_range(dataset.images), dataset.labels
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    total = num_epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for _ in range(num_epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            x, y = images[part], labels[part]
            if epsilon > 0:
                # a short warm-up: the first steps learn nothing at the full radius
                radius = epsilon * min(1.0, 4 * (step + 1) / total)
                x = pgd(
                    model,
                    x,
                    y,
                    epsilon=radius,
                    step_size=radius / 3,
                    num_steps=num_steps,
                    random_start=True,
                    seed=step,
                    sample_index=part,
                )
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
    return model.eval()


@dataclass(frozen=True, eq=False)
class Honest:
    """An adversarially trained network and mixture, and an undefended twin of the network."""

    network: nn.Module
    mixture: Mixture
    control: nn.Module


def honest_models(seed: int = 0) -> Honest:
    """All three, trained on digits: half a minute on one slow core."""
    return Honest(honest_network(seed), honest_mixture(seed), honest_network(seed, epsilon=0))
