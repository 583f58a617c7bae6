"""What the zoo's models are made of: small trained networks for digits, each trained once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dwf.data import load
from dwf.data.batches import to_unit_range
from dwf.evaluation.honest import build_small_network, train_quickly

EPSILON = 0.15  # on digits
WIDTH, NUM_CLASSES = 10, 10


class Parts:
    """Networks for digits that are trained when first asked for, in seconds each."""

    @cached_property
    def plain(self) -> nn.Module:
        """A network without a defense."""
        return frozen(train_quickly(build_small_network(0, width=WIDTH), epsilon=0.0, num_epochs=8))

    @cached_property
    def plain_again(self) -> nn.Module:
        """Another such network."""
        network = build_small_network(1, width=WIDTH)
        return frozen(train_quickly(network, seed=1, epsilon=0.0, num_epochs=8))

    @cached_property
    def robust(self) -> nn.Module:
        """A network trained adversarially at the zoo's radius."""
        network = build_small_network(2, width=WIDTH)
        return frozen(train_quickly(network, seed=2, epsilon=EPSILON, num_epochs=8))

    @cached_property
    def robust_again(self) -> nn.Module:
        """Another such network."""
        network = build_small_network(3, width=WIDTH)
        return frozen(train_quickly(network, seed=3, epsilon=EPSILON, num_epochs=8))

    @cached_property
    def untrained(self) -> nn.Module:
        """A network with its initial weights."""
        return frozen(build_small_network(7, width=WIDTH))

    @cached_property
    def training_images(self) -> Tensor:
        """[N, 1, 8, 8] in [0, 1]."""
        return to_unit_range(load("digits").images)

    @cached_property
    def training_labels(self) -> Tensor:
        """[N]."""
        return load("digits").labels

    @cached_property
    def test_images(self) -> Tensor:
        """[N, 1, 8, 8] in [0, 1]."""
        return to_unit_range(load("digits", split="test").images)

    @cached_property
    def test_labels(self) -> Tensor:
        """[N]."""
        return load("digits", split="test").labels

    @cached_property
    def principal(self) -> Tensor:
        """[64, 16]: the first principal directions of the training images."""
        flat = self.training_images.flatten(1)
        directions: Tensor = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)[2][:16]
        return directions.T.contiguous()


def frozen(network: nn.Module) -> nn.Module:
    """The network in eval mode without gradients to its weights."""
    return network.eval().requires_grad_(False)


def trained(network: nn.Module, seed: int = 0, epsilon: float = 0.0, **how: Any) -> nn.Module:
    """A network trained on digits, plainly unless ``epsilon`` says otherwise."""
    return frozen(train_quickly(network, seed=seed, epsilon=epsilon, **{"num_epochs": 8, **how}))


class Wrapped(nn.Module):
    """A network between a function of the images and one of the logits."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._before, self._after = before, after

    def forward(self, images: Tensor) -> Tensor:
        x = images if self._before is None else self._before(images)
        logits: Tensor = self.network(x)
        return logits if self._after is None else self._after(logits)


class FromFunction(nn.Module):
    """A module whose forward is a function of several networks and the images."""

    def __init__(
        self, networks: Sequence[nn.Module], function: Callable[..., Tensor], **tensors: Tensor
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, images: Tensor) -> Tensor:
        return self._function(self, images)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """``value``, bit for bit, with the gradient of ``other``."""
    found: Tensor = _StraightThrough.apply(value, other)
    return found


def label_only(logits: Tensor, size: float = 10.0) -> Tensor:
    """Rows of 0 with ``size`` at the largest logit; without a gradient."""
    chosen = nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1])
    return chosen.to(logits) * size


@dataclass(frozen=True)
class Specimen:
    """A broken or overestimating model of the zoo, and how its truth is found.

    Attributes:
        description: what it does.
        source: the paper that proposed the mechanism, or broke it.
        make: from the parts to the model.
        smooth: what an adaptive attack differentiates in the model's place; the model judges.
        eight_bits: the adaptive attack keeps images on the 8-bit grid.
        num_votes: single passes whose mean accuracy is the truth of a random model.
        remembers: the model knows the judged images; its truth is that of other images.
    """

    description: str
    source: str
    make: Callable[[Parts], nn.Module]
    smooth: Callable[[Parts, nn.Module], Sequence[nn.Module]]
    eight_bits: bool = False
    num_votes: int = 1
    remembers: bool = False


def plain_inside(parts: Parts, model: nn.Module) -> Sequence[nn.Module]:
    """The undefended network inside is what to differentiate."""
    return [parts.plain]


def robust_inside(parts: Parts, model: nn.Module) -> Sequence[nn.Module]:
    """The robust network inside is what to differentiate."""
    return [parts.robust]
