"""Specimens that draw random numbers at every pass, and some that a single training step fools."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.evaluation.honest import build_small_network
from dwf.evaluation.zoo.parts import (
    FromFunction,
    Parts,
    Specimen,
    Wrapped,
    plain_inside,
    trained,
)


def _resized(images: Tensor) -> Tensor:
    """A random size and a random place."""
    side = images.shape[-1]
    size = int(torch.randint(side - 1, side + 2, ()))
    x = F.interpolate(images, size=(size, size), mode="nearest")
    left, top = (int(torch.randint(0, 3, ())) for _ in "xy")
    x = F.pad(x, (left, 2, top, 2))
    return x[..., 1 : 1 + side, 1 : 1 + side]


def _masked(images: Tensor) -> Tensor:
    """Random pixels dropped, and the rest smoothed over."""
    kept = (torch.rand_like(images) < 0.8).to(images)
    smooth = F.avg_pool2d(images * kept, 3, 1, 1) / F.avg_pool2d(kept, 3, 1, 1).clamp(min=0.1)
    return torch.where(kept > 0, images, smooth)


def _deflected(images: Tensor) -> Tensor:
    """Random pixels take the value of a neighbor."""
    moved = torch.roll(images, int(torch.randint(1, 3, ())), dims=int(torch.randint(2, 4, ())))
    return torch.where(torch.rand_like(images) < 0.15, moved, images)


def _noised_and_projected(parts: Parts) -> nn.Module:
    """Noise, then the projection onto principal directions, without a gradient."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        mean, basis = model.get_buffer("mean"), model.get_buffer("basis")
        with torch.no_grad():
            noisy = images + 0.1 * torch.randn_like(images)
            purified = ((noisy.flatten(1) - mean) @ basis @ basis.T + mean).view_as(images)
        logits: Tensor = model.networks[0](purified)
        return logits

    mean = parts.training_images.flatten(1).mean(dim=0)
    return FromFunction([parts.plain], forward, mean=mean, basis=parts.principal)


class _Pruned(nn.Module):
    """Activations dropped at random, the strong ones less often."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for module in self.network.children():
            x = module(x)
            if isinstance(module, nn.ReLU):
                share = (x / x.flatten(1).mean(dim=1).view(-1, 1, 1, 1).clamp(min=1e-6)).clamp(0, 1)
                kept = (torch.rand_like(x) < share).to(x)
                x = x * kept / share.clamp(min=0.3)
        return x


def _mixed_up(parts: Parts) -> nn.Module:
    """Mean answer to mixtures with random training images."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        keys = model.get_buffer("keys")
        total = torch.zeros(len(images), 10, device=images.device)
        for _ in range(3):
            others = keys[torch.randint(0, len(keys), (len(images),))]
            total = total + model.networks[0](0.7 * images + 0.3 * others)
        return total / 3

    return FromFunction([parts.plain], forward, keys=parts.training_images[:300])


def _drawn(parts: Parts) -> nn.Module:
    """One of three networks, drawn at each pass."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        logits: Tensor = model.networks[int(torch.randint(0, 3, ()))](images)
        return logits

    return FromFunction([parts.plain, parts.plain_again, parts.robust], forward)


def _collapsed(seed: int, epsilon: float, num_epochs: int) -> nn.Module:
    """Trained against single steps without a random start: it may learn to fool the step alone."""
    network = build_small_network(seed, width=10)
    return trained(network, seed=seed, epsilon=epsilon, num_epochs=num_epochs, num_steps=1)


def _itself(parts: Parts, model: nn.Module) -> list[nn.Module]:
    return [model]


def _with_robust(parts: Parts, model: nn.Module) -> list[nn.Module]:
    return [parts.plain, parts.plain_again, parts.robust]


CHANCE: dict[str, Specimen] = {
    "random_resizing": Specimen(
        "a random size and a random place",
        "Xie et al., arXiv:1711.01991; broken in arXiv:1802.00420",
        lambda parts: Wrapped(parts.plain, _resized),
        plain_inside,
        num_votes=5,
    ),
    "random_masks": Specimen(
        "random pixels dropped and reconstructed",
        "ME-Net, Yang et al., arXiv:1905.11971; broken in arXiv:2002.08347",
        lambda parts: Wrapped(parts.plain, _masked),
        plain_inside,
        num_votes=5,
    ),
    "pixel_deflection": Specimen(
        "random pixels take a neighbor's value",
        "Prakash et al., arXiv:1801.08926; broken in arXiv:1804.03286",
        lambda parts: Wrapped(parts.plain, _deflected),
        plain_inside,
        num_votes=5,
    ),
    "diffusion_purification": Specimen(
        "noise, then a denoiser without a gradient",
        "DiffPure, Nie et al., arXiv:2205.07460; attacked in arXiv:2303.09051",
        _noised_and_projected,
        plain_inside,
        num_votes=5,
    ),
    "activation_pruning": Specimen(
        "activations dropped at random, the strong ones less often",
        "Dhillon et al., arXiv:1803.01442; broken in arXiv:1802.00420",
        lambda parts: _Pruned(parts.plain),
        plain_inside,
        num_votes=5,
    ),
    "mixup_inference": Specimen(
        "the mean answer to mixtures with random training images",
        "Pang et al., arXiv:1909.11515; broken in arXiv:2002.08347",
        _mixed_up,
        plain_inside,
        num_votes=5,
    ),
    "random_network": Specimen(
        "one of three networks, drawn at each pass",
        "random self-ensemble, Liu et al., arXiv:1712.00673",
        _drawn,
        _with_robust,
        num_votes=6,
    ),
    "single_step_training": Specimen(
        "trained against a single step of twice the radius",
        "catastrophic overfitting, Wong et al., arXiv:2001.03994",
        lambda parts: _collapsed(21, 0.3, 8),
        _itself,
    ),
    "single_step_short": Specimen(
        "trained against a single step, in few epochs",
        "SSAT and ELLE collapse alike; FastAT benchmark, arXiv:2001.03994",
        lambda parts: _collapsed(22, 0.25, 4),
        _itself,
    ),
}
