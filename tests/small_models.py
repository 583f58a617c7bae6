"""Models of a few hundred weights, images for them, and everything an attack must not change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dwf.checks import ModelError
from dwf.data import ImageDataset

SHAPE = (3, 8, 8)
NUM_CLASSES = 5


class Linear(nn.Module):
    """``logits[b, k] = sum_i weight[k, i] * image[b, i] + bias[k]``, multiplied and then summed.

    Unlike a matrix product it computes an image to equal bits in every batch.
    """

    def __init__(
        self, shape: tuple[int, ...] = SHAPE, num_classes: int = NUM_CLASSES, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_classes, *shape, generator=generator) / 4)
        self.bias = nn.Parameter(torch.randn(num_classes, generator=generator) / 4)

    def forward(self, images: Tensor) -> Tensor:
        return (images.unsqueeze(1) * self.weight).flatten(2).sum(dim=2) + self.bias


class SmallNet(nn.Module):
    """Convolution, BatchNorm, a smooth activation, dropout, linear: everything with a mode."""

    def __init__(
        self,
        shape: tuple[int, ...] = SHAPE,
        num_classes: int = NUM_CLASSES,
        seed: int = 0,
        channels: int = 4,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(shape[0], channels, 3, padding=1)
            self.bn = nn.BatchNorm2d(channels)
            self.dropout = nn.Dropout(0.5)
            self.linear = nn.Linear(channels * shape[1] * shape[2], num_classes)
            nn.init.normal_(self.bn.running_mean)
            nn.init.uniform_(self.bn.running_var, 0.5, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        hidden = nn.functional.softplus(self.bn(self.conv(images)))
        return self.linear(self.dropout(hidden.flatten(1)))


class Curved(nn.Module):
    """A network of one hidden layer, whose classes are near each other around gray."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(192, 24, generator=generator) / 8)
        self.second = nn.Parameter(torch.randn(24, NUM_CLASSES, generator=generator))

    def forward(self, images):
        return ((2 * images - 1).flatten(1) @ self.first).tanh() @ self.second


class Noisy(nn.Module):
    """A network whose logits are different at every pass."""

    def __init__(self, network: nn.Module, std: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return logits + self.std * torch.randn_like(logits) * images.mean(dim=(1, 2, 3))[:, None]


class Mapped(nn.Module):
    """A network whose output passes through a function."""

    def __init__(self, network: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(self.network(images))


class Injected(ModelError):
    """Raised on purpose."""


class FailsAt(nn.Module):
    """A network that raises at its n-th pass, and has changed what it could by then."""

    def __init__(self, network: nn.Module, call: int) -> None:
        super().__init__()
        self.network = network
        self.call = call
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits = self.network(images)
        if self.calls == self.call:
            torch.rand(())
            raise Injected(self.call)
        return logits


def make_images(num_images: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """Uniform 8-bit pixels as float32 in [0, 1], black and white ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, *shape), generator=generator).float() / 255


def make_labels(num_images: int, num_classes: int = NUM_CLASSES, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, num_classes, (num_images,), generator=generator)


def make_dataset(
    num_images: int,
    shape: tuple[int, int, int] = SHAPE,
    num_classes: int = NUM_CLASSES,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
) -> ImageDataset:
    """A test split of random images."""
    return ImageDataset(
        name="random",
        images=(make_images(num_images, shape, seed) * 255).round().to(torch.uint8),
        labels=make_labels(num_images, num_classes, seed) if labels is None else labels,
        num_classes=num_classes,
        class_names=tuple(str(k) for k in range(num_classes)),
        mean=(0.4, 0.5, 0.6)[: shape[0]],
        std=(0.2, 0.25, 0.3)[: shape[0]],
        digest="none",
        split="test",
    )


def labeled_by(model, num_images=60, wrong=6):
    """Random images, of which the model gets all but the first few right."""
    dataset = make_dataset(num_images)
    with torch.no_grad():
        labels = model.eval()(dataset.images.float() / 255).argmax(dim=1)
    labels[:wrong] = (labels[:wrong] + 1) % NUM_CLASSES
    return make_dataset(num_images, labels=labels)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that belongs to the caller: random state, weights, gradients, buffers, modes.

    Tensors count by their bits and by who they are. Comparable with ``==``.
    """
    state: dict[str, Any] = {"rng": _bits(torch.get_rng_state())}
    for name, module in model.named_modules():
        state[f"mode {name}"] = module.training
    for name, buffer in model.named_buffers():
        state[f"buffer {name}"] = id(buffer), _bits(buffer)
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        state[f"parameter {name}"] = id(parameter), _bits(parameter), parameter.requires_grad
        state[f"grad {name}"] = None if grad is None else (id(grad), _bits(grad))
    return state


def disordered(model: nn.Module) -> nn.Module:
    """Put a model into a state nobody would guess: some modes, some gradients, some frozen."""
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
    return model


def _bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
