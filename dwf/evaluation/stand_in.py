"""Train a smooth stand-in on a model's own answers, to attack a model whose gradients lead nowhere.

A small convolutional network with smooth activations learns to answer as the model does, on clean
images and on images moved within epsilon: by noise, and toward the decisions of the stand-in
itself. It needs labels of the model alone.

Source: substitute models, Papernot et al., arXiv:1602.02697.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.pgd import fgsm
from dwf.models.seeded import seeded_weights

WIDTH, BATCH_SIZE = 24, 64


def smooth_stand_in(
    model: Model,
    images: Tensor,
    *,
    epsilon: float,
    num_classes: int,
    num_steps: int,
    seed: int = 0,
) -> nn.Module:
    """A network trained for ``num_steps`` batches of images [N, C, H, W] to answer as ``model``.

    The model is asked for ``num_steps * 64`` labels. Torch's random state and the model stay.
    """
    device = images.device
    with seeded_weights(seed):
        network = _network(images.shape[1], num_classes).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    with undisturbed(model, device, seed=seed), torch.enable_grad():
        for step in range(num_steps):
            part = torch.randint(
                0, len(images), (min(BATCH_SIZE, len(images)),), generator=generator, device=device
            )
            x = _moved(network, images[part], epsilon, step, generator)
            with torch.no_grad():
                answers = ask(model, x).argmax(dim=1)
            network.train()
            loss = F.cross_entropy(network(x), answers)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _network(in_channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, WIDTH, 3, padding=1),
        nn.BatchNorm2d(WIDTH),
        nn.SiLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * WIDTH),
        nn.SiLU(),
        nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1),
        nn.BatchNorm2d(2 * WIDTH),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * 16, num_classes),
    )


def _moved(
    network: nn.Module, images: Tensor, epsilon: float, step: int, generator: torch.Generator
) -> Tensor:
    """Images as they are, under noise, or moved along the stand-in's own gradient, in turn."""
    if step % 3 == 0:
        return images
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    noisy = (images + epsilon * (2 * noise - 1).sign() * noise).clamp(0, 1)
    if step % 3 == 1:
        return noisy
    with torch.no_grad():
        answers = network.eval()(images).argmax(dim=1)
    return fgsm(network, noisy, answers, epsilon=epsilon)
