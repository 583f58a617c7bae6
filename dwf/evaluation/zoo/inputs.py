"""Specimens that transform the image first: quantize, filter, purify, adapt."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    robust_inside,
    trained,
)


def _before(function: Callable[[Tensor], Tensor]) -> Callable[[Parts], nn.Module]:
    return lambda parts: Wrapped(parts.plain, function)


def cosines(size: int = 8) -> Tensor:
    """The orthonormal matrix [size, size] of the discrete cosine transform."""
    k = torch.arange(size, dtype=torch.float32)
    matrix = (math.pi / size * (k[None] + 0.5) * k[:, None]).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _jpeg(images: Tensor) -> Tensor:
    """Rounds the coefficients of 8 x 8 blocks, the higher frequencies more coarsely."""
    matrix = cosines().to(images)
    k = torch.arange(8).to(images)
    step = 0.15 * (1 + 0.5 * (k[:, None] + k[None]))
    rounded = (matrix @ images @ matrix.T / step).round() * step
    return (matrix.T @ rounded @ matrix).clamp(0, 1)


def _bits(images: Tensor) -> Tensor:
    return (images * 7).round() / 7


def _median(images: Tensor) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1), "replicate")
    B, C, H, W = images.shape
    windows = F.unfold(padded, 3).view(B, C, 9, H, W)
    return images + (0.5 * (windows.median(dim=2).values - images)).detach()


def _squeezed(images: Tensor) -> Tensor:
    return _median(_bits(images))


def _levels(images: Tensor) -> Tensor:
    """Thermometer code: [B, 10, H, W], whether the pixel is above each of ten levels."""
    levels = torch.linspace(0.05, 0.95, 10).view(1, 10, 1, 1).to(images)
    return (images > levels).to(images)


def _soft_levels(images: Tensor) -> Tensor:
    levels = torch.linspace(0.05, 0.95, 10).view(1, 10, 1, 1).to(images)
    return ((images - levels) * 20).sigmoid()


def _thermometer(parts: Parts) -> nn.Module:
    network = build_small_network(11, width=10, image_shape=(10, 8, 8))
    return trained(Wrapped(network, _levels))


def _soft_thermometer(parts: Parts, model: nn.Module) -> list[nn.Module]:
    return [Wrapped(model.network, _soft_levels)]  # type: ignore[arg-type]


def _projected(parts: Parts) -> nn.Module:
    """The nearest image spanned by the principal directions, found without a gradient."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        mean, basis = model.get_buffer("mean"), model.get_buffer("basis")
        with torch.no_grad():
            flat = images.flatten(1) - mean
            purified = (flat @ basis @ basis.T + mean).view_as(images)
        logits: Tensor = model.networks[0](purified)
        return logits

    mean = parts.training_images.flatten(1).mean(dim=0)
    return FromFunction([parts.plain], forward, mean=mean, basis=parts.principal)


def _projected_smoothly(parts: Parts, model: nn.Module) -> list[nn.Module]:
    basis = parts.principal
    mean = parts.training_images.flatten(1).mean(dim=0)

    def purify(images: Tensor) -> Tensor:
        flat = images.flatten(1) - mean
        return (flat @ basis @ basis.T + mean).view_as(images)

    return [Wrapped(parts.plain, purify), parts.plain]


def _nearest(parts: Parts) -> nn.Module:
    """Votes of the 5 nearest training images."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        keys, labels = model.get_buffer("keys"), model.get_buffer("labels")
        away = torch.cdist(images.flatten(1), keys)
        votes = F.one_hot(labels[away.topk(5, largest=False).indices], 10).sum(dim=1).to(images)
        # ties go to the nearer
        return votes + 1e-3 * F.one_hot(labels[away.argmin(dim=1)], 10).to(images)

    keys = parts.training_images.flatten(1)
    return FromFunction([], forward, keys=keys, labels=parts.training_labels)


def _soft_nearest(parts: Parts, model: nn.Module) -> list[nn.Module]:
    keys, labels = parts.training_images.flatten(1), parts.training_labels

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        away = (images.flatten(1)[:, None] - keys[None]).square().sum(dim=2)
        weights = (-away / 0.5).softmax(dim=1)
        return (weights @ F.one_hot(labels, 10).to(weights)).clamp(min=1e-9).log()

    return [FromFunction([], forward)]


def _k_winners(parts: Parts) -> nn.Module:
    """Hidden layers in which the strongest fifth of all units passes."""
    network = build_small_network(12, width=16)
    assert isinstance(network, nn.Sequential)
    for place, module in enumerate(network):
        if isinstance(module, nn.ReLU):
            network[place] = _KWinners(0.2)
    return trained(network)


class _KWinners(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        kept = max(int(self.share * flat.shape[1]), 1)
        threshold = flat.topk(kept, dim=1).values[:, -1:]
        return (flat * (flat >= threshold)).view_as(x)


def _itself_and_plain(parts: Parts, model: nn.Module) -> list[nn.Module]:
    return [model, parts.plain]


def _jag(images: Tensor) -> Tensor:
    return images + 0.02 * (400 * images).sin()


def _hashed_noise(images: Tensor) -> Tensor:
    """Noise that the image's pixels fix: random to an attack, not to a repetition."""
    phase = (images * 9973.0).sum(dim=(1, 2, 3), keepdim=True)
    place = torch.arange(images[0].numel()).view(1, *images.shape[1:]).to(images)
    noise = ((phase + place * 12.9898).sin() * 43758.5453).frac()
    return (images + 0.15 * noise.detach()).clamp(0, 1)


def _adapted(parts: Parts, sign: float, steps: int, target: str) -> nn.Module:
    """Moves the image by gradients of its own before it is classified."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        network = model.networks[0]
        with torch.enable_grad():
            x = images.detach()
            first = network(x).argmax(dim=1)
            delta = torch.zeros_like(x)
            for _ in range(steps):
                delta.requires_grad_()
                logits = network(x + delta)
                if target == "first":
                    loss = F.cross_entropy(logits, first, reduction="sum")
                elif target == "uniform":
                    loss = F.cross_entropy(
                        logits, torch.full_like(logits, 1 / logits.shape[1]), reduction="sum"
                    )
                else:  # entropy
                    loss = -(logits.softmax(1) * logits.log_softmax(1)).sum()
                (gradient,) = torch.autograd.grad(loss, delta)
                moved = delta + sign * 0.05 * gradient.sign()
                delta = moved.clamp(-0.15, 0.15).detach()
        answer: Tensor = network(images + delta)
        return answer

    return FromFunction([parts.robust], forward)


class _BatchAdapted(nn.Module):
    """BatchNorm that uses the statistics of the images it judges."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for module in self.network.children():
            if isinstance(module, nn.BatchNorm2d):
                x = F.batch_norm(x, None, None, module.weight, module.bias, training=True)
            else:
                x = module(x)
        return x


INPUTS: dict[str, Specimen] = {
    "jpeg": Specimen(
        "coefficients of the cosine transform, rounded",
        "JPEG, Das et al., arXiv:1705.02900; broken in arXiv:1802.00420",
        _before(_jpeg),
        plain_inside,
    ),
    "bit_depth": Specimen(
        "pixels of 8 levels",
        "Guo et al., arXiv:1711.00117; broken in arXiv:1802.00420",
        _before(_bits),
        plain_inside,
    ),
    "feature_squeezing": Specimen(
        "fewer bits, then a median filter",
        "Xu et al., arXiv:1704.01155",
        _before(_squeezed),
        plain_inside,
    ),
    "median_filter": Specimen(
        "half of a median filter, without its gradient",
        "Xu et al., arXiv:1704.01155",
        _before(_median),
        plain_inside,
    ),
    "thermometer": Specimen(
        "trained on thermometer codes of ten levels",
        "Buckman et al. (ICLR 2018); broken in arXiv:1802.00420",
        _thermometer,
        _soft_thermometer,
    ),
    "projection": Specimen(
        "projected onto the data's principal directions, without a gradient",
        "Defense-GAN, Samangouei et al., arXiv:1805.06605; broken in arXiv:1802.00420",
        _projected,
        _projected_smoothly,
    ),
    "nearest_neighbors": Specimen(
        "votes of the five nearest training images",
        "deep k-nearest neighbors, Papernot and McDaniel, arXiv:1803.04765; arXiv:1903.08333",
        _nearest,
        _soft_nearest,
    ),
    "k_winners": Specimen(
        "a network in which only the strongest units of a layer pass",
        "k-winners-take-all, Xiao et al., arXiv:1905.10510; broken in arXiv:2002.08347",
        _k_winners,
        _itself_and_plain,
    ),
    "jagged": Specimen(
        "x + 0.02 sin(400 x) before the network",
        "shattered gradients, Athalye et al., arXiv:1802.00420",
        _before(_jag),
        plain_inside,
    ),
    "hashed_noise": Specimen(
        "noise that the image's own pixels decide",
        "fixed randomness; Athalye et al., arXiv:1802.00420",
        _before(_hashed_noise),
        plain_inside,
    ),
    "anti_adversary": Specimen(
        "moves the image toward what it is taken for",
        "V7; Alfarra et al., arXiv:2103.14347; broken in arXiv:2202.13711",
        lambda parts: _adapted(parts, -1.0, 3, "first"),
        robust_inside,
    ),
    "hedge": Specimen(
        "moves the image away from all classes alike",
        "hedge defense, Wu et al., arXiv:2106.04938; broken in arXiv:2202.13711",
        lambda parts: _adapted(parts, 1.0, 3, "uniform"),
        robust_inside,
    ),
    "entropy_adaptation": Specimen(
        "moves the image until the network is sure",
        "test-time adaptation, Wang et al., arXiv:2105.08714; broken in arXiv:2202.13711",
        lambda parts: _adapted(parts, -1.0, 3, "entropy"),
        robust_inside,
    ),
    "batch_adaptation": Specimen(
        "BatchNorm by the statistics of the judged batch",
        "test-time normalization, Nado et al., arXiv:2006.10963",
        lambda parts: _BatchAdapted(parts.plain),
        plain_inside,
    ),
}
