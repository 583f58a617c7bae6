"""Forty models with nothing to hide: a verdict must not condemn one of them.

Architectures, activations, normalizations, pooling, training methods and mixtures differ; all are
small networks for digits. Limits of findings are set from what these models show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks import pgd
from dwf.data import load
from dwf.data.batches import to_unit_range
from dwf.evaluation.honest import build_small_network, honest_mixture
from dwf.evaluation.measures import parts
from dwf.evaluation.zoo.parts import EPSILON, Wrapped, frozen, trained
from dwf.models import (
    DualMixture,
    Mixture,
    MlpGate,
    Normalize,
    PathwayMixture,
    PathwayResNet,
    PixelModel,
    RoutedMixture,
    SparseModel,
    SynergyOfExperts,
    build_network,
    build_router,
)
from dwf.models.routed import linear_router
from dwf.models.sparse_network import make_sparse


class HonestModel(NamedTuple):
    """How a model is made, and the radius that it is judged at."""

    make: Callable[[], nn.Module]
    epsilon: float


def network(
    seed: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    *,
    width: int = 12,
    pool: Callable[[], nn.Module] = nn.Identity,
    groups: bool = False,
) -> nn.Module:
    """Two or three convolutions and a linear layer, with these parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        separable = [nn.Conv2d(width, width, 3, padding=1, groups=width)] if groups else []
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            norm(width),
            activation(),
            *separable,
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            norm(2 * width),
            activation(),
            pool(),
            nn.Flatten(),
            nn.LazyLinear(10),
        )


def _made(seed: int, epsilon: float, **parts: object) -> nn.Module:
    made = network(seed, **parts)  # type: ignore[arg-type]
    made(torch.zeros(2, 1, 8, 8))  # the lazy layer
    return trained(made, seed=seed, epsilon=epsilon)


class _Attention(nn.Module):
    """Patches of 2 x 2, one layer of attention, a linear layer."""

    def __init__(self, seed: int, size: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(1, size, 2, stride=2)
            self.places = nn.Parameter(0.1 * torch.randn(1, 16, size))
            self.norm = nn.LayerNorm(size)
            self.query, self.key, self.value = (nn.Linear(size, size) for _ in "qkv")
            self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 48), nn.GELU())
            self.linear = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        logits: Tensor = self.linear(self.mlp(x).mean(dim=1))
        return logits


def _perceptron(seed: int, activation: nn.Module, epsilon: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Flatten(), nn.Linear(64, 64), activation, nn.Linear(64, 10)
    return trained(nn.Sequential(*layers), seed=seed, epsilon=epsilon)


def _linear(epsilon: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(64, 10)
    return trained(nn.Sequential(*layers), epsilon=epsilon)


def _resnet(seed: int, epsilon: float) -> nn.Module:
    made = build_network("resnet6", num_classes=10, width=8, in_channels=1, seed=seed)
    return trained(made, seed=seed, epsilon=epsilon, num_epochs=5)


def _normalized(seed: int, epsilon: float) -> nn.Module:
    inside = build_small_network(seed, width=12)
    return trained(PixelModel(Normalize((0.3,), (0.37,)), inside), seed=seed, epsilon=epsilon)


def by_loss(seed: int, epsilon: float, method: str, num_epochs: int = 8) -> nn.Module:
    """A network trained by another method: TRADES, mixup, label smoothing, noise."""
    model = build_small_network(seed, width=12).train()
    data = load("digits")
    images, labels = to_unit_range(data.images), data.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(num_epochs):
        for step, part in enumerate(parts(torch.randperm(len(images), generator=generator), 100)):
            x, y = images[part], labels[part]
            if method == "trades":
                adversarial = pgd(
                    model,
                    x,
                    y,
                    epsilon=epsilon,
                    step_size=epsilon / 3,
                    num_steps=4,
                    random_start=True,
                    seed=epoch * 100 + step,
                )
                clean, attacked = model(x), model(adversarial)
                loss = F.cross_entropy(clean, y) + 4 * F.kl_div(
                    attacked.log_softmax(1), clean.softmax(1), reduction="batchmean"
                )
            elif method == "mixup":
                other = torch.randperm(len(x), generator=generator)
                logits = model(0.7 * x + 0.3 * x[other])
                loss = 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y[other])
            elif method == "noise":
                noisy = x + 0.1 * torch.randn(x.shape, generator=generator)
                loss = F.cross_entropy(model(noisy), y)
            else:
                loss = F.cross_entropy(model(x), y, label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return frozen(model)


def _experts(seed: int, count: int = 3) -> list[nn.Module]:
    return [build_small_network(seed + e, width=8) for e in range(count)]


def _learned_gate(seed: int, epsilon: float) -> nn.Module:
    gate = MlpGate((1, 8, 8), 3, hidden=16, seed=seed)
    return trained(Mixture(_experts(seed), gate), seed=seed, epsilon=epsilon)


def _routed(seed: int, epsilon: float) -> nn.Module:
    mixture = RoutedMixture(_experts(seed), linear_router((1, 8, 8), 3, seed=seed))
    return trained(mixture, seed=seed, epsilon=epsilon)


def _dual(epsilon: float) -> nn.Module:
    halves = [
        RoutedMixture(_experts(seed, 2), linear_router((1, 8, 8), 2, seed=seed))
        for seed in (60, 65)
    ]
    return trained(DualMixture(halves[0], halves[1], alpha=0.4), epsilon=epsilon)


def _pathways(seed: int, epsilon: float) -> nn.Module:
    inside = PathwayResNet((1, 1), num_pathways=2, width=8, in_channels=1, seed=seed)
    router = build_router(2, width=4, in_channels=1, seed=seed)
    gate = nn.Sequential(router, nn.BatchNorm1d(2, affine=False))
    return trained(PathwayMixture(inside, gate), seed=seed, epsilon=epsilon, num_epochs=5)


def _sparse(seed: int, epsilon: float, place: str, top_k: int = 1) -> nn.Module:
    inside = build_network("resnet6", num_classes=10, width=8, in_channels=1, seed=seed)
    name = make_sparse(inside, place, num_experts=3, top_k=top_k, seed=seed)
    model = SparseModel(Normalize((0.3,), (0.37,)), inside, name)
    return trained(model, seed=seed, epsilon=epsilon, num_epochs=5)


def _synergy(epsilon: float) -> nn.Module:
    members = [
        build_network("resnet6", num_classes=10, width=6, in_channels=1, seed=70 + e)
        for e in range(2)
    ]
    return trained(SynergyOfExperts(members, seed=70), epsilon=epsilon, num_epochs=5)


def _scaled(factor: float) -> nn.Module:
    inside = trained(build_small_network(80, width=12), seed=80, epsilon=EPSILON)
    return Wrapped(inside, after=lambda logits: factor * logits)


def _shifted() -> nn.Module:
    inside = trained(build_small_network(81, width=12), seed=81, epsilon=EPSILON)
    return Wrapped(inside, after=lambda logits: logits + 50.0)


def _ensemble(epsilon: float) -> nn.Module:
    members = [trained(build_small_network(90 + e, width=8), 90 + e, epsilon) for e in range(3)]
    return Wrapped(nn.Identity(), after=lambda x: sum(member(x) for member in members) / 3)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


E = EPSILON
HONEST_ZOO: dict[str, HonestModel] = {
    "plain": HonestModel(lambda: _made(101, 0.0), 0.1),
    "plain, small radius": HonestModel(lambda: _made(102, 0.0), 0.02),
    "plain, GELU": HonestModel(lambda: _made(103, 0.0, activation=nn.GELU), 0.1),
    "plain, GroupNorm": HonestModel(lambda: _made(104, 0.0, norm=_group_norm), 0.1),
    "plain, max-pooling": HonestModel(lambda: _made(105, 0.0, pool=lambda: nn.MaxPool2d(2)), 0.1),
    "adversarial 1": HonestModel(lambda: _made(111, E), E),
    "adversarial 2": HonestModel(lambda: _made(112, E), E),
    "adversarial, wide": HonestModel(lambda: _made(113, E, width=24), E),
    "adversarial, narrow": HonestModel(lambda: _made(114, E, width=6), E),
    "adversarial, GELU": HonestModel(lambda: _made(115, E, activation=nn.GELU), E),
    "adversarial, SiLU": HonestModel(lambda: _made(116, E, activation=nn.SiLU), E),
    "adversarial, Softplus": HonestModel(lambda: _made(117, E, activation=nn.Softplus), E),
    "adversarial, Tanh": HonestModel(lambda: _made(118, E, activation=nn.Tanh), E),
    "adversarial, LeakyReLU": HonestModel(lambda: _made(119, E, activation=nn.LeakyReLU), E),
    "adversarial, ELU": HonestModel(lambda: _made(120, E, activation=nn.ELU), E),
    "adversarial, GroupNorm": HonestModel(lambda: _made(121, E, norm=_group_norm), E),
    "adversarial, InstanceNorm": HonestModel(lambda: _made(122, E, norm=nn.InstanceNorm2d), E),
    "adversarial, no norm": HonestModel(lambda: _made(123, E, norm=lambda c: nn.Identity()), E),
    "adversarial, mean-pooling": HonestModel(
        lambda: _made(124, E, pool=lambda: nn.AvgPool2d(2)), E
    ),
    "adversarial, max-pooling": HonestModel(lambda: _made(125, E, pool=lambda: nn.MaxPool2d(2)), E),
    "adversarial, depthwise": HonestModel(lambda: _made(126, E, groups=True), E),
    "adversarial at half the radius": HonestModel(lambda: _made(127, E / 2), E),
    "adversarial, judged at half": HonestModel(lambda: _made(128, E), E / 2),
    "adversarial, large radius": HonestModel(lambda: _made(129, 0.25), 0.25),
    "adversarial, normalization inside": HonestModel(lambda: _normalized(130, E), E),
    "adversarial ResNet": HonestModel(lambda: _resnet(131, E), E),
    "plain ResNet": HonestModel(lambda: _resnet(132, 0.0), 0.1),
    "adversarial perceptron": HonestModel(lambda: _perceptron(133, nn.ReLU(), E), E),
    "tanh perceptron": HonestModel(lambda: _perceptron(134, nn.Tanh(), 0.1), 0.1),
    "linear": HonestModel(lambda: _linear(0.1), 0.1),
    "attention": HonestModel(lambda: trained(_Attention(136), 136, 0.0, num_epochs=40), 0.03),
    "TRADES": HonestModel(lambda: by_loss(137, E, "trades"), E),
    "mixup": HonestModel(lambda: by_loss(138, 0.0, "mixup"), 0.1),
    "label smoothing": HonestModel(lambda: by_loss(139, 0.0, "smoothing"), 0.1),
    "noise augmentation": HonestModel(lambda: by_loss(140, 0.0, "noise"), 0.1),
    "logits times 0.01": HonestModel(lambda: _scaled(0.01), E),
    "logits plus 50": HonestModel(_shifted, E),
    "ensemble": HonestModel(lambda: _ensemble(E), E),
    "soft mixture": HonestModel(lambda: honest_mixture(141, epsilon=E), E),
    "soft mixture, learned gate": HonestModel(lambda: _learned_gate(142, E), E),
    "plain mixture": HonestModel(lambda: _learned_gate(143, 0.0), 0.1),
    "routed mixture": HonestModel(lambda: _routed(144, E), E),
    "dual mixture": HonestModel(lambda: _dual(E), E),
    "pathways": HonestModel(lambda: _pathways(145, E), E),
    "sparse blocks": HonestModel(lambda: _sparse(146, E, "block"), E),
    "sparse convolutions": HonestModel(lambda: _sparse(147, E, "conv"), E),
    "sparse blocks, two of three": HonestModel(lambda: _sparse(148, E, "block", 2), E),
    "synergy of experts": HonestModel(lambda: _synergy(E), E),
}
