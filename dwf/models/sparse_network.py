"""Put sparse layers into a ResNet, and offer their experts as a mixture does.

Source: sections 3 and 4 of arXiv:2509.05086.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dwf.checks import ConfigError, check_choice
from dwf.models.describe import Output, describe
from dwf.models.experts import PlannedExperts, softened
from dwf.models.networks import BasicBlock, Bottleneck, ResNet
from dwf.models.replaced import with_replaced
from dwf.models.seeded import seeded_weights
from dwf.models.sparse import GATES, SoftSparseLayer, SparseLayer, check_top_k
from dwf.models.wrap import PixelModel

PLACES = ("block", "residual", "conv")


def make_sparse(
    network: nn.Module,
    place: str,
    *,
    stage: int | None = None,
    num_experts: int = 4,
    top_k: int = 1,
    gate: str = "gap_fc",
    noisy: bool = False,
    exclude_shortcut: bool = False,
    seed: int = 0,
) -> str:
    """Turn layers of one stage into sparse ones, in place, with new weights for the whole network.

    Convolutions start from Kaiming's normal distribution, each expert's from separate draws; seed
    alone decides them, and torch's RNG is untouched.

    Args:
        place: "block", every residual block; "residual", the last block alone; "conv", every
            convolution, also in shortcuts unless ``exclude_shortcut``.
        stage: 1 is the first; by default the last.
    Returns:
        The name of the layer that ``SparseModel`` shows: the last block, or the first convolution
        of the last block.
    Raises:
        ConfigError: no `ResNet`; no such stage, place or gate; more experts chosen than there are.
    """
    if not isinstance(network, ResNet):
        raise ConfigError(
            f"model.network: sparse layers go into a ResNet, found {describe(network)}"
        )
    check_choice(place, PLACES, "moe")
    check_choice(gate, list(GATES), "gate")
    check_top_k(top_k, num_experts)
    number = len(network.stages) if stage is None else stage
    if number not in range(1, len(network.stages) + 1):
        raise ConfigError(
            f"stage: {stage}, but this network has {len(network.stages)}, counted from 1"
        )
    name = network.stages[number - 1]
    blocks = dict(network.get_submodule(name).named_children())
    last = f"{name}.{len(blocks) - 1}"
    if place == "residual":
        targets = [last]
    elif place == "block":
        targets = [f"{name}.{j}" for j in blocks]
    else:
        targets = [
            f"{name}.{j}.{inner}"
            for j, block in blocks.items()
            for inner, module in block.named_modules()
            if isinstance(module, nn.Conv2d)
            and not (exclude_shortcut and inner.startswith("shortcut"))
        ]
    with seeded_weights(seed):
        _initialize(network)
        for target in targets:
            dense = network.get_submodule(target)
            experts = [_initialize(copy.deepcopy(dense)) for _ in range(num_experts)]
            made = GATES[gate](_in_channels(dense), num_experts)
            network.set_submodule(target, SparseLayer(experts, made, top_k=top_k, noisy=noisy))
    network.to(memory_format=torch.channels_last)
    return f"{last}.conv1" if place == "conv" else last


def _initialize(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return module


def _in_channels(module: nn.Module) -> int:
    first = module.conv1 if isinstance(module, (BasicBlock, Bottleneck)) else module
    assert isinstance(first, nn.Conv2d)
    return first.in_channels


@dataclass(frozen=True, repr=False)
class SparseOutput(Output):
    """``logits`` [B, K], and the gate's probabilities [B, E] of each sparse layer by its name."""

    logits: Tensor
    probabilities: dict[str, Tensor]


class SparseModel(PlannedExperts):
    """A network with sparse layers behind its normalization: [0, 1] images to logits [B, K].

    ``expert_names``, ``expert`` and ``gate_weights`` are about one layer, ``subpath``; with one
    expert of that layer forced, the other layers keep routing. ``model(images, return_aux=True)``
    gives a SparseOutput.
    """

    mixes_logits = False

    def __init__(self, normalize: nn.Module, network: nn.Module, subpath: str) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.subpath = subpath
        self.expert_names = [f"expert {e}" for e in range(len(self.layer(subpath).experts))]

    @property
    def layers(self) -> dict[str, SparseLayer]:
        """All sparse layers by name, in the order of the network's modules."""
        modules = self.network.named_modules()
        return {name: module for name, module in modules if isinstance(module, SparseLayer)}

    def layer(self, name: str) -> SparseLayer:
        """A sparse layer by name; a ConfigError lists all names otherwise."""
        check_choice(name, list(self.layers), "layer")
        return self.layers[name]

    def described_parts(self) -> list[str]:
        return [describe(self.network), f"{self.num_experts} experts in {', '.join(self.layers)}"]

    def networks(self) -> Sequence[nn.Module]:
        """The experts, and the largest modules of several layers without sparse ones."""
        return _parts(self.network)

    def expert(self, index: int, layer: str | None = None) -> nn.Module:
        """The model with one expert of one layer, by default of ``subpath``, for every image.

        The expert counts with weight 1; all weights are shared.
        """
        name = self.subpath if layer is None else layer
        forced = self.layer(name).experts[index]
        return self._with(with_replaced(self.network, name, forced))

    def gate_weights(self, images: Tensor) -> Tensor:
        """Weights [B, E] in the layer ``subpath``, without noise; zero where not chosen.

        Rows of k >= 2 entries sum to 1 less about 1e-5.
        """
        layer = self.layer(self.subpath)
        p = self(images, return_aux=True).probabilities[self.subpath]
        return layer.weights_of_all(p)

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        p = self(images, return_aux=True).probabilities[self.subpath]
        return softened(p.clamp(min=torch.finfo(p.dtype).tiny).log())

    def softened_inside(self, temperature: float | None) -> nn.Module:
        """All sparse layers mix the feature maps of all their experts."""
        network = self.network
        for name, layer in self.layers.items():
            network = with_replaced(network, name, SoftSparseLayer(layer, temperature))
        return self._with(network)

    def _with(self, network: nn.Module) -> nn.Module:
        """Another network behind the normalization; without sparse layers it offers a plan."""
        if any(isinstance(x, SparseLayer) for x in network.modules()):
            return nn.Sequential(self.normalize, network)
        return PixelModel(self.normalize, network)

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> SparseOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | SparseOutput:
        if not return_aux:
            return self._logits(images)
        found: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for name, layer in self.layers.items():
                keep = partial(_keep, found, name)
                stack.enter_context(layer.gate.register_forward_hook(keep))
            logits = self._logits(images)
        return SparseOutput(logits, found)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


def _parts(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, SparseLayer):
            found += child.experts
        elif any(isinstance(x, SparseLayer) for x in child.modules()):
            found += _parts(child)
        elif any(isinstance(x, nn.Conv2d) for x in list(child.modules())[1:]):
            found.append(child)
    return found


def _keep(found: dict[str, Tensor], name: str, gate: nn.Module, inputs: Any, p: Tensor) -> None:
    found[name] = p
