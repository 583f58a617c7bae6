"""Route each image through one of several pathways, narrow networks inside a wide one.

Every 3x3 convolution of a residual block has a slice of channels for each pathway; a pathway is the
same slice of every layer. Stem, 1x1 shortcuts, BatchNorm and the last linear layer are shared. One
router decides for the whole network:

    gate_logits = gate(images)                           [B, E]
    routing     = onehot(argmax gate_logits),            gradient to the chosen logit alone
    conv(x)[b]  = sum_e routing[b, e] * conv_e(x[b])

The gradient is the released code's. One that goes to all logits, and soft values in place of the
choice, are for attacks: ``surrogates`` and ``softened_inside``.

Source: arXiv:2308.10110.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.checks import ConfigError, ModelOutputError, check_count, check_positive
from dwf.models.describe import Output, describe
from dwf.models.experts import PlannedExperts, softened
from dwf.models.known_faults import shortcut_conv
from dwf.models.networks import BasicBlock, ResNet
from dwf.models.pathway_convs import (
    OfAllPathways,
    OfImage,
    OfOnePathway,
    OfPlanes,
    PathwayConv2d,
    PlannedConv2d,
    Routing,
    Taken,
)
from dwf.models.planned import PlanParts
from dwf.models.replaced import with_replaced
from dwf.models.routed import one_hot_choice, straight_through
from dwf.models.seeded import seeded_weights
from dwf.models.soft_routing import soft_choice
from dwf.models.wrap import PixelModel


def route(gate_logits: Tensor, *, to_all: bool = False) -> Tensor:
    """One-hot rows [B, E] of the largest logit.

    Their gradient goes to the chosen logit unchanged, and to no other; ``to_all``: to every logit.
    A row with a logit that is not finite has NaN in it: argmax of NaN would be a choice.
    """
    hard = one_hot_choice(gate_logits)
    return straight_through(hard, gate_logits if to_all else hard * gate_logits)


class PathwayBlock(nn.Module):
    """Two 3x3 convolutions with pathways and a shortcut, 1x1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, num_pathways: int, stride: int) -> None:
        super().__init__()
        self.conv1 = PathwayConv2d(in_channels, channels, num_pathways, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = PathwayConv2d(channels, channels, num_pathways)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                shortcut_conv(in_channels, channels, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x, routing)))
        out = self.bn2(self.conv2(out, routing))
        return F.relu(out + self.shortcut(x))


class PathwayResNet(nn.Module):
    """A ResNet of basic blocks with E pathways, each of ``width_ratio`` times its channels.

    The stem keeps ``width`` channels; in stage i a pathway has ``int(width_ratio * width * 2**i)``
    channels. Initial weights depend on ``seed`` alone; torch's RNG is untouched.

    Raises:
        ConfigError: fewer than two pathways, or a ratio that leaves no channels.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        *,
        num_pathways: int = 2,
        width_ratio: float = 0.5,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count(num_pathways, "num_pathways", minimum=2)
        check_positive(width_ratio, "width_ratio")
        if int(width_ratio * width) < 1:
            raise ConfigError(
                f"width_ratio: {width_ratio:g} of width {width} leaves no channels, "
                f"expected at least {1 / width:.3g}"
            )
        self.num_pathways = num_pathways
        with seeded_weights(seed):
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.blocks = nn.ModuleList()
            before = width
            for i, count in enumerate(num_blocks):
                channels = int(width_ratio * width * 2**i)
                for j in range(count):
                    stride = 2 if i > 0 and j == 0 else 1
                    self.blocks.append(PathwayBlock(before, channels, num_pathways, stride))
                    before = channels
            self.linear = nn.Linear(before, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Logits [B, K]; the network of one pathway needs no routing."""
        out = F.relu(self.bn1(self.conv1(x)))
        for block in self.blocks:
            out = block(out, routing)
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits

    def pathway(self, index: int) -> nn.Module:
        """The network of one pathway, weights shared: normalized images to logits."""
        return self._with_convolutions(lambda conv: OfOnePathway(conv, index))

    def _with_convolutions(self, make: Callable[[PathwayConv2d], nn.Module]) -> nn.Module:
        """This network with other modules for its convolutions with pathways."""
        network: nn.Module = self
        for name, module in self.named_modules():
            if isinstance(module, PathwayConv2d):
                network = with_replaced(network, name, make(module))
        return network


class AllPathways(nn.Module):
    """A network with weights for its pathways, as a function of one tensor.

    Maps [B, C + E, H, W], normalized images and behind them a plane for each pathway that holds its
    weight, to logits [B, K]; `with_planes` makes such images. A plan can be made of ``planned_as``,
    which computes the same.
    """

    def __init__(self, network: PathwayResNet) -> None:
        super().__init__()
        self.network = network
        if type(network.conv1) is nn.Conv2d:  # a user may have put another module there
            self.planned_as = _AllPathwaysPlanned(network)

    @staticmethod
    def with_planes(x: Tensor, weights: Tensor) -> Tensor:
        """Images [B, C, H, W] and weights [B, E], as one tensor."""
        planes = weights.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return torch.cat([x, planes], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        num_planes = self.network.num_pathways
        logits: Tensor = self.network(x[:, :-num_planes], x[:, -num_planes:, 0, 0])
        return logits


class _AllPathwaysPlanned(nn.Module):
    """What `AllPathways` computes, in layers that plans know; eager, it takes longer."""

    def __init__(self, network: PathwayResNet) -> None:
        super().__init__()
        num_planes = network.num_pathways
        joined = network._with_convolutions(OfAllPathways)
        self.network = with_replaced(joined, "conv1", OfImage(network.conv1, num_planes))
        self.planes = OfPlanes(network.conv1, num_planes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x, self.planes(x).mean(dim=(2, 3)))
        return logits


class _PaddedShortcut(PlannedConv2d):
    """Every second pixel, and channels of zeros on both sides; no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels + 2 * (channels // 2), 1, 2)
        self._extra = channels // 2
        same = torch.eye(channels)[:, :, None, None]
        weight = F.pad(same, (0, 0, 0, 0, 0, 0, self._extra, self._extra))
        self.register_buffer("weight", weight, persistent=False)  # of the model's device

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self._extra, self._extra))


def build_router(num_pathways: int, *, width: int = 16, in_channels: int = 3, seed: int) -> ResNet:
    """Build the router: a ResNet-20 with one logit for each pathway and zero-padded shortcuts.

    Three stages of three blocks with ``width``, 2 and 4 times that many channels. Initial weights
    depend on ``seed`` alone; torch's RNG is untouched.
    """
    with seeded_weights(seed):
        router = ResNet(
            BasicBlock, (3, 3, 3), num_classes=num_pathways, width=width, in_channels=in_channels
        )
    for block in router.modules():
        if isinstance(block, BasicBlock) and len(block.shortcut) > 0:
            block.shortcut = nn.Sequential(_PaddedShortcut(block.conv1.in_channels))
    return router.to(memory_format=torch.channels_last)


@dataclass(frozen=True, repr=False)
class PathwayOutput(Output):
    """``logits`` [B, K]; ``gate_logits`` [B, E]; ``gate_weights`` [B, E], one-hot."""

    logits: Tensor
    gate_logits: Tensor
    gate_weights: Tensor


class PathwayMixture(PlannedExperts):
    """A network with pathways, and the gate that chooses one for each image.

    Args:
        network: see PathwayResNet.
        gate: module from images in [0, 1] to ``gate_logits`` [B, E]; ``build_router`` makes one.
        normalize: first layer of the network, not of the gate.

    In eval mode each image takes only its pathway, under attack as well: the gate's gradient goes
    to the chosen logit alone. In train mode all pathways are computed. An image whose gate logits
    are not finite gets logits of NaN, never a pathway.

    Raises:
        ModelOutputError: at the first batch, if the gate does not give one logit for each pathway.
    """

    def __init__(
        self, network: PathwayResNet, gate: nn.Module, normalize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.expert_names = [f"pathway {e}" for e in range(network.num_pathways)]
        self.normalize = nn.Identity() if normalize is None else normalize
        self.network = network
        self.gate = gate
        self._made_of: list[nn.Module] = []
        self._made: tuple[tuple[nn.Module, ...], nn.Module]

    def described_parts(self) -> list[str]:
        return [f"{self.num_experts} pathways", f"gate {describe(self.gate)}"]

    def expert(self, index: int) -> PixelModel:
        return PixelModel(self.normalize, self.pathways[index])

    @property
    def pathways(self) -> tuple[nn.Module, ...]:
        """The network of each pathway; the same modules each time, so that plans of them last."""
        return self._parts()[0]

    @property
    def all_pathways(self) -> nn.Module:
        """The network as a function of images and weights, see `AllPathways`; one that lasts."""
        return self._parts()[1]

    def _parts(self) -> tuple[tuple[nn.Module, ...], nn.Module]:
        inside = list(self.network.modules())
        if self._made_of != inside:
            self._made_of = inside
            each = tuple(map(self.network.pathway, range(self.num_experts)))
            self._made = each, AllPathways(self.network)
        return self._made

    def networks(self) -> Sequence[nn.Module]:
        return [self.gate, *self.pathways, self.all_pathways]

    def plan_parts(self) -> PlanParts:
        return PlanParts([self.gate], composed=True)  # the choice has a gradient in all layers

    def gate_weights(self, images: Tensor) -> Tensor:
        return route(self.gate_logits(images))

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        return softened(self.gate_logits(images))

    def softened_inside(self, temperature: float | None) -> nn.Module:
        """Every convolution mixes the maps of all pathways."""
        return _Rerouted(self, functools.partial(soft_choice, temperature=temperature))

    def surrogates(self) -> dict[str, nn.Module]:
        """The gradient of the choice to every logit of the gate."""
        return {"gradient to all pathways": _Rerouted(self, functools.partial(route, to_all=True))}

    @overload
    def forward(
        self, images: Tensor, return_aux: Literal[False] = False, detach_gate: bool = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, images: Tensor, return_aux: Literal[True], detach_gate: bool = False
    ) -> PathwayOutput: ...
    def forward(
        self, images: Tensor, return_aux: bool = False, detach_gate: bool = False
    ) -> Tensor | PathwayOutput:
        """``detach_gate``: no gradient from the logits to the gate."""
        gate_logits = self.gate_logits(images)
        weights = route(gate_logits.detach() if detach_gate else gate_logits)
        x = self.normalize(images)
        # BatchNorm in train mode needs the whole batch
        if any(module.training for module in self.modules()):
            logits = self.network(x, weights)
        else:
            logits = self._divided(x, weights)
        return PathwayOutput(logits, gate_logits, weights) if return_aux else logits

    def gate_logits(self, images: Tensor) -> Tensor:
        """Scores of the pathways [B, E]; the largest is chosen."""
        gate_logits: Tensor = self.gate(images)
        if gate_logits.shape != (images.shape[0], self.num_experts):
            raise ModelOutputError(
                f"gate: expected gate_logits [{len(images)}, {self.num_experts}], "
                f"found {list(gate_logits.shape)}"
            )
        return gate_logits

    def _divided(self, x: Tensor, weights: Tensor) -> Tensor:
        """Logits of all images, each computed by its own pathway, with the gradient of `route`."""
        choice = weights.argmax(dim=1)
        rows = [(choice == e).nonzero().flatten() for e in range(self.num_experts)]
        parts = []
        for e, own in enumerate(rows):
            its_weights = weights[own, e] if weights.requires_grad else None
            parts.append(self.network(x[own], Taken(e, its_weights)))
        logits = torch.cat(parts)
        logits = logits[torch.cat(rows).argsort()]
        return logits.masked_fill(~weights.isfinite().all(dim=1, keepdim=True), torch.nan)


class _Rerouted(nn.Module):
    """A mixture of pathways whose gate logits become weights by another function."""

    def __init__(self, model: PathwayMixture, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._weigh = weigh

    def forward(self, images: Tensor) -> Tensor:
        weights = self._weigh(self.model.gate_logits(images))
        x = AllPathways.with_planes(self.model.normalize(images), weights)
        logits: Tensor = self.model.all_pathways(x)
        return logits
