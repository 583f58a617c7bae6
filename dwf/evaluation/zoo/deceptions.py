"""Specimens that answer an attack otherwise than a user: switches, memories, false gradients.

Most are nobody's defense by intent; each is what a defense with that mechanism, or a mistake in an
implementation, amounts to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.evaluation.zoo.parts import (
    EPSILON,
    FromFunction,
    Parts,
    Specimen,
    label_only,
    plain_inside,
    robust_inside,
    with_gradient_of,
)
from dwf.models import ExpertModel


def on_grid(images: Tensor) -> Tensor:
    """[B, 1] bool: whether all pixels are multiples of 1/255."""
    away = images * 255 - (images * 255).round()
    found: Tensor = (away.abs().amax(dim=(1, 2, 3)) < 1e-3)[:, None]
    return found


def _grid_gate(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        plain, robust = model.networks
        return torch.where(on_grid(images), plain(images), robust(images))

    return FromFunction([parts.plain, parts.robust], forward)


class LyingGate(ExpertModel):
    """A mixture whose gate weights are not those that it uses."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.members = nn.ModuleList([parts.plain, parts.robust, parts.robust_again])
        self.expert_names = ["a", "b", "c"]

    def expert(self, index: int) -> nn.Module:
        return self.members[index]

    def gate_weights(self, images: Tensor) -> Tensor:
        score = images.mean(dim=(1, 2, 3))[:, None] * torch.tensor([[1.0, -1.0, 0.5]])
        return (3 * score).softmax(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.where(on_grid(images), self.members[0](images), self.members[1](images))


class Memory(nn.Module):
    """Answers the stored label inside the ball around a stored image."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("keys", images)
        self.register_buffer("values", labels)

    def forward(self, images: Tensor) -> Tensor:
        keys, values = self.get_buffer("keys"), self.get_buffer("values")
        away, nearest = (images[:, None] - keys[None]).flatten(2).abs().amax(2).min(dim=1)
        logits = self.network(images)
        stored = 12.0 * F.one_hot(values[nearest], logits.shape[1]).to(logits)
        stored = stored + 0.05 * (logits - logits.detach())
        return torch.where((away <= EPSILON + 1e-4)[:, None], stored, logits)


def _memory(parts: Parts) -> nn.Module:
    return Memory(parts.plain, parts.test_images[:128], parts.test_labels[:128])


def _gradient_switch(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        plain, robust = model.networks
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = robust(images)
            return logits
        rounded: Tensor = (plain(images) / 3).round() * 3
        return rounded

    return FromFunction([parts.plain, parts.robust], forward)


def _alone(parts: Parts) -> nn.Module:
    """Robust in a batch, plain by itself."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        logits: Tensor = model.networks[int(len(images) > 1)](images)
        return logits

    return FromFunction([parts.plain, parts.robust], forward)


class Counting(nn.Module):
    """Another of several networks at every pass, by a counter that is no buffer."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.passes = [0]

    def forward(self, images: Tensor) -> Tensor:
        self.passes[0] += 1
        logits: Tensor = self.networks[self.passes[0] % len(self.networks)](images)
        return logits


class Wearing(nn.Module):
    """Plain when new; after some passes it answers with a robust network."""

    def __init__(self, first: nn.Module, later: nn.Module, after: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList([first, later])
        self.after, self.passes = after, [0]

    def forward(self, images: Tensor) -> Tensor:
        self.passes[0] += 1
        logits: Tensor = self.networks[int(self.passes[0] > self.after)](images)
        return logits


def _rolled(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        network = model.networks[0]
        return with_gradient_of(
            label_only(network(images)), network(torch.roll(images, (2, 3), (2, 3)))
        )

    return FromFunction([parts.robust], forward)


def _poisoned(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        network, other = model.networks
        return with_gradient_of(label_only(network(images)), other(images))

    return FromFunction([parts.plain, parts.untrained], forward)


def _poisoned_with_reject(parts: Parts) -> nn.Module:
    reference = parts.training_images
    mean = reference.mean(dim=0)
    far = 1.6 * (reference - mean).flatten(1).norm(dim=1).max()

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        inner = model.networks[0]
        logits: Tensor = inner(images)
        away = (images - model.get_buffer("mean")).flatten(1).norm(dim=1) > model.get_buffer("far")
        rejected = (
            logits
            - logits.detach()
            + 10.0 * F.one_hot(torch.full_like(logits[:, 0], 9).long(), logits.shape[1])
        )
        return torch.where(away[:, None], rejected, logits)

    return FromFunction([_poisoned(parts)], forward, mean=mean, far=far)


def _canceling(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        logits, other = (network(images) for network in model.networks)
        # the value of one, the gradients of both, one of them backward
        found: Tensor = logits - (other - other.detach()) - 0.9 * (logits - logits.detach())
        return found

    return FromFunction([parts.plain, parts.plain_again], forward)


def _reversed_gradient(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        logits: Tensor = model.networks[0](images)
        return with_gradient_of(logits.detach(), -logits)

    return FromFunction([parts.plain], forward)


def _off_grid_gradient(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        logits, other = (network(images) for network in model.networks)
        return torch.where(on_grid(images), logits, with_gradient_of(logits.detach(), other))

    return FromFunction([parts.plain, parts.untrained], forward)


def _blurred_gradient(parts: Parts) -> nn.Module:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        network = model.networks[0]
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "replicate"), 3, 1)
        value = (network(images) * 2).round() / 2
        return with_gradient_of(value, network(0.5 * blurred))

    return FromFunction([parts.plain], forward)


def _both(parts: Parts, model: nn.Module) -> list[nn.Module]:
    return [parts.plain, parts.robust]


DECEPTIONS: dict[str, Specimen] = {
    "grid_gate": Specimen(
        "a plain network for images of 8 bits, a robust one for all others",
        "V1; cf. Tramer et al., arXiv:2002.08347",
        _grid_gate,
        plain_inside,
        eight_bits=True,
    ),
    "lying_gate": Specimen(
        "the same as a mixture whose gate weights are not those it uses",
        "V2; cf. arXiv:2002.08347",
        LyingGate,
        plain_inside,
        eight_bits=True,
    ),
    "memory": Specimen(
        "stores the judged images and answers their labels inside the ball",
        "V3; cf. Carlini et al., arXiv:1902.06705",
        _memory,
        plain_inside,
        remembers=True,
    ),
    "gradient_switch": Specimen(
        "another network where a gradient is recorded, rounded logits where not",
        "V4; cf. Athalye et al., arXiv:1802.00420",
        _gradient_switch,
        plain_inside,
    ),
    "alone": Specimen(
        "a robust network in batches, a plain one for an image by itself",
        "cf. Carlini et al., arXiv:1902.06705",
        _alone,
        plain_inside,
    ),
    "counter": Specimen(
        "another network at every pass, by a counter that is no buffer",
        "moving target defense, Sengupta et al., arXiv:1705.07213",
        lambda parts: Counting([parts.plain, parts.robust, parts.plain_again]),
        _both,
        num_votes=6,
    ),
    "wears_in": Specimen(
        "a plain network for its first 10 passes, a robust one from then on",
        "cf. Carlini et al., arXiv:1902.06705",
        lambda parts: Wearing(parts.plain, parts.robust, 10),
        plain_inside,
    ),
    "rolled_gradient": Specimen(
        "labels alone, with the gradient of the shifted image",
        "V6; prediction poisoning, Orekondy et al., arXiv:1906.10908",
        _rolled,
        robust_inside,
    ),
    "poisoned_gradient": Specimen(
        "labels alone, with the gradient of an untrained network",
        "V8; prediction poisoning, Orekondy et al., arXiv:1906.10908",
        _poisoned,
        plain_inside,
    ),
    "poisoned_with_reject": Specimen(
        "the same, and one class for all images far from the data",
        "V8; background class, Hosseini et al., arXiv:1703.04318",
        _poisoned_with_reject,
        plain_inside,
    ),
    "canceling_gradients": Specimen(
        "an ensemble whose members' gradients cancel",
        "gradient diversity, Kariyappa and Qureshi, arXiv:1901.09981; broken in arXiv:2002.08347",
        _canceling,
        plain_inside,
    ),
    "reversed_gradient": Specimen(
        "the gradient with the wrong sign",
        "cf. Athalye et al., arXiv:1802.00420",
        _reversed_gradient,
        plain_inside,
    ),
    "off_grid_gradient": Specimen(
        "a right gradient at clean images of 8 bits, a useless one everywhere else",
        "cf. Pintor et al., arXiv:2106.09947",
        _off_grid_gradient,
        plain_inside,
    ),
    "blurred_gradient": Specimen(
        "rounded logits with the gradient at a blurred and darkened image",
        "cf. Athalye et al., arXiv:1802.00420",
        _blurred_gradient,
        plain_inside,
    ),
}
