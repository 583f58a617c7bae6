"""Define what every mixture of experts offers, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from dwf.checks import ConfigError
from dwf.models.describe import describe_all, one_line
from dwf.models.planned import Planned, PlanParts
from dwf.models.wrap import PixelModel

M = TypeVar("M", bound=nn.Module)


class ExpertModel(nn.Module, ABC):
    """A model made of experts that can be judged and attacked one by one.

    ``model(images)`` maps [B, C, H, W] in [0, 1] to logits [B, K]. Tables and figures call the
    experts by ``expert_names``.
    """

    expert_names: list[str]
    # Whether the answer is the gate's sum of the experts' logits or probabilities; False for
    # mixtures of feature maps inside a network, which evaluations can check less of.
    mixes_logits: bool = True

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return len(self.expert_names)

    def __repr__(self) -> str:
        return one_line(self, *self.described_parts())

    def described_parts(self) -> list[str]:
        """The parts that ``repr`` names; all experts and their networks by default."""
        networks = (self.expert(e) for e in range(self.num_experts))
        return [describe_all(getattr(expert, "network", expert) for expert in networks)]

    def networks(self) -> Sequence[nn.Module]:
        """Submodules that do most of the work and choose nothing: attacks use their plans.

        By default the experts, if they are submodules.
        """
        own = set(self.modules())
        return [x for x in map(self.expert, range(self.num_experts)) if x in own]

    @abstractmethod
    def expert(self, index: int) -> nn.Module:
        """The model with one expert for every image: images to logits [B, K], weights shared."""

    @abstractmethod
    def gate_weights(self, images: Tensor) -> Tensor:
        """The weight of each expert for each image, [B, E] >= 0; rows sum to 1.

        Hard routing gives one-hot rows, or rows with k entries.
        """

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        """Gate weights of a softened routing, [B, E] >= 0; rows sum to 1.

        An attack follows them to move the gate: they keep the gate's order of the experts, and
        their gradient does not vanish. By default ``gate_weights``; models whose gate chooses or
        may saturate override this, see `softened`.
        """
        return self.gate_weights(images)

    def softened_inside(self, temperature: float | None) -> nn.Module | None:
        """The model with soft values in place of a choice inside its layers, for attacks.

        Without a temperature the gate's scores count as they are; see
        `dwf.models.soft_routing.soft_choice`. None, as by default, where gate weights mix logits
        and a view can soften them from outside; models that route feature maps override this.
        """
        return None

    def surrogates(self) -> dict[str, nn.Module]:
        """Further functions, by name, for attacks to differentiate in the model's place."""
        return {}

    def without_chance(self) -> ExpertModel:
        """The model without the randomness of its gate, weights shared; itself if it has none."""
        return self


class PlannedExperts(Planned, ExpertModel):
    """A model of experts that is attacked by autograd around the plans of its `networks`."""

    def plan_parts(self) -> PlanParts:
        return PlanParts(self.networks(), composed=True)


class ModelOfNetworks(PlannedExperts):
    """A model whose experts are whole networks behind one shared normalization.

    Args:
        experts: modules that map images to logits [B, K].
        normalize: first layer shared by all.
        expert_names: "expert 0" and so on by default.

    Raises:
        ConfigError: no experts, one that is not a module, or not one name for each.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        normalize: nn.Module | None = None,
        *,
        expert_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        members, self.expert_names = checked_experts(experts, expert_names)
        self.normalize = nn.Identity() if normalize is None else normalize
        self.experts = nn.ModuleList(members)

    def networks(self) -> Sequence[nn.Module]:
        return networks_inside(self.experts)

    def expert(self, index: int) -> PixelModel:
        """One network as a model: images in [0, 1] to logits [B, K], weights shared."""
        return PixelModel(self.normalize, self.experts[index])


def networks_inside(parts: Iterable[nn.Module]) -> list[nn.Module]:
    """The parts, and in place of a mixture its networks: what plans can be made of."""
    found: list[nn.Module] = []
    for part in parts:
        found += part.networks() if isinstance(part, ExpertModel) else [part]
    return found


def checked_experts(
    experts: Iterable[M], names: Sequence[str] | None = None
) -> tuple[list[M], list[str]]:
    """The experts of a mixture and their names, by default "expert 0" and so on.

    Raises:
        ConfigError: no experts, one that is not a module, or not one name for each.
    """
    members = list(experts)
    if not members:
        raise ConfigError("experts: an empty list, expected at least one module")
    for e, expert in enumerate(members):
        if not isinstance(expert, nn.Module):
            raise ConfigError(
                f"experts[{e}]: expected a torch.nn.Module, found {type(expert).__name__}"
            )
    found = list(names or [f"expert {e}" for e in range(len(members))])
    if len(found) != len(members):
        raise ConfigError(f"expert_names: {len(found)} names for {len(members)} experts")
    return members, found


def softened(scores: Tensor) -> Tensor:
    """Softmax of each row of ``scores`` [B, E] after scaling it to standard deviation 1.

    The gradient then does not vanish, however sure the gate is.
    """
    scores = scores.float()
    scores = scores - scores.detach().mean(dim=1, keepdim=True)
    spread = scores.detach().square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    return (scores / spread).softmax(dim=1)
