"""Train networks that are attacked alike side by side: one attack crafts the images of all.

An attack on E small networks at once is faster than E attacks, above all on a GPU. What a network
learns does not depend on it: each has its own batches, draws and optimizer, and ends with the bits
that it would have had alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import nn

from dwf.attacks.losses import Model
from dwf.config import PhaseConfig
from dwf.data import Batch
from dwf.defenses.crafter import Craft, Crafter
from dwf.defenses.phase import Phase, StepResult
from dwf.defenses.steps import attacked_step, cross_entropy_step
from dwf.models import Group


@dataclass(frozen=True)
class SideBySide:
    """E phases, each of which trains a network by cross-entropy on images that ``craft`` attacks.

    The training loop runs them side by side, or one after another, as ``pretrain_together`` says.

    Attributes:
        networks: by the name of the phase.
        schedule: of each phase.
        craft: attacks a network and its batch [B], or a Group of E networks and E * B rows.
    """

    networks: Mapping[str, nn.Module]
    schedule: PhaseConfig
    craft: Craft

    @property
    def phases(self) -> list[Phase]:
        """One phase for each network, to run one after another."""
        step = partial(attacked_step, craft=self.craft)
        return [
            Phase(name, network, self.schedule, step) for name, network in self.networks.items()
        ]

    @property
    def independent(self) -> bool:
        """Whether no two networks share a parameter; only then can they train side by side."""
        parameters = [p for network in self.networks.values() for p in network.parameters()]
        return len(parameters) == len(set(parameters))

    def part(self, first: int, count: int) -> SideBySide:
        """``count`` of the networks, from the one at ``first`` on."""
        return replace(self, networks=dict([*self.networks.items()][first : first + count]))

    def crafted(self, crafter: Crafter, batches: Sequence[Batch]) -> list[Batch]:
        """Replace the images of E batches by adversarial ones, in one attack on all networks."""
        rows = Batch.joined(batches)
        images = self.craft(crafter, self._group, rows).chunk(len(batches))
        return [batch._replace(images=x) for batch, x in zip(batches, images, strict=True)]

    @cached_property
    def _group(self) -> Group:
        return Group(self.networks.values())


def crafted_step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
    """CE(f(x'), y), the step of each network side by side: the batch holds x' already."""
    return cross_entropy_step(forward, batch.images, batch.wanted, 0)


# What a defense trains, in order.
Phases = Sequence[Phase | SideBySide]


def one_by_one(phases: Phases) -> list[Phase]:
    """All phases of a defense, one after another."""
    return [
        phase
        for entry in phases
        for phase in (entry.phases if isinstance(entry, SideBySide) else [entry])
    ]
