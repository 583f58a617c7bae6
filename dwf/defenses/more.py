"""MoRE: experts for different strengths of attack, and a whole network as the gate that mixes them.

| point            | its code does                              | we assume                        |
|------------------|--------------------------------------------|----------------------------------|
| experts          | clean; L-inf 6/255, 8/255; L2 60/255,      | clean and L-inf only: there is   |
|                  | 80/255; fog and snow as an option          | no L2 attack here yet            |
| expert training  | SGD .1, weight decay 5e-4                  | the same; all of a batch         |
|                  |                                            | attacked; 100 epochs, cosine     |
| gate             | softmax of a ResNet-18                     | a network like the experts       |
| mixture phase    | last layers and gate, Adam, 100 epochs of  | the same; the experts' BatchNorm |
|                  | 100 images, rate 0, .1, .005, 0 at 0, 40,  | keeps its statistics, too        |
|                  | 80, 100 % of the way                       |                                  |
| passes           | an epoch: two clean ones, then one for     | a batch: the same passes, each   |
|                  | each attack                                | with its own change of the       |
|                  |                                            | weights                          |
| what is attacked | an untrained ResNet-18 beside the mixture  | the mixture itself               |
| attacked space   | normalized images, clamped to [0, 1]       | pixels in [0, 1]                 |
| attack           | PGD-10, 2/255, random start                | the same                         |

Source: Cheng et al., arXiv:2104.10586, and its authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from dwf.checks import ConfigError, check_epsilon
from dwf.config import Config, Options
from dwf.data import Batch
from dwf.defenses.building import ModelFacts, model_of, network_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, Step, Update
from dwf.defenses.steps import attacked_step, plain_step
from dwf.models import Mixture, Normalize

NUM_CLEAN_PASSES = 2


@dataclass(frozen=True)
class MoreOptions(Options, defense="more"):
    """``expert_epsilon``: the L-inf radius that each expert trains at; 0 is a clean expert."""

    expert_epsilon: tuple[float, ...] = (0.0, 6 / 255, 8 / 255)

    def __post_init__(self) -> None:
        if not self.expert_epsilon:
            raise ConfigError("options.expert_epsilon: empty, expected one radius for each expert")
        for epsilon in self.expert_epsilon:
            check_epsilon(epsilon, "options.expert_epsilon")

    @property
    def attacked(self) -> tuple[float, ...]:
        """The radii of attacks that the mixture trains on."""
        return tuple(sorted({epsilon for epsilon in self.expert_epsilon if epsilon > 0}))


class FrozenExperts(Mixture):
    """A mixture in whose train mode only the gate changes its mode: experts stay in eval mode."""

    def train(self, mode: bool = True) -> FrozenExperts:
        super().train(mode)
        self.experts.eval()
        return self


def build(config: Config, facts: ModelFacts) -> FrozenExperts:
    """Untrained experts and a gate of the same architecture, behind one shared normalization."""
    options = options_of(config, MoreOptions)
    num_experts = len(options.expert_epsilon)
    return FrozenExperts(
        [network_of(config, facts, "expert", e) for e in range(num_experts)],
        network_of(config, facts, "gate", num_classes=num_experts),
        Normalize(facts.mean, facts.std),
        expert_names=[f"{e} {_kind(epsilon)}" for e, epsilon in enumerate(options.expert_epsilon)],
    )


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase for each expert on ``pretrain``, then the gate and last layers on ``joint``."""
    options = options_of(config, MoreOptions)
    mixture = model_of(model, config, FrozenExperts)
    result: list[Phase] = []
    if config.pretrain is not None:
        if mixture.num_experts != len(options.expert_epsilon):
            raise ConfigError(
                f"model: {mixture.num_experts} experts, but options.expert_epsilon is for "
                f"{len(options.expert_epsilon)}; set it, or pretrain=None"
            )
        for e, epsilon in enumerate(options.expert_epsilon):
            name = f"expert-{e}-{_kind(epsilon)}"
            result.append(Phase(name, mixture.expert(e), config.pretrain, step_at(epsilon)))
    if config.joint is not None:
        radii = [0.0] * NUM_CLEAN_PASSES + [*options.attacked]
        updates = [Update(step_at(epsilon), trains_in_mixture) for epsilon in radii]
        result.append(Phase("joint", mixture, config.joint, updates, gate_prefix="gate."))
    return result


def _kind(epsilon: float) -> str:
    return f"linf-{epsilon:.3g}" if epsilon > 0 else "clean"


def trains_in_mixture(name: str) -> bool:
    """Whether a parameter of the mixture is of the gate or of an expert's last layer."""
    return name.startswith("gate.") or (
        name.startswith("experts.") and (".linear." in name or ".fc." in name)
    )


def step_at(epsilon: float) -> Step:
    """CE(f(x'), y), where x' attacks f, an expert or the mixture, within ``epsilon``; 0 is x."""
    if epsilon == 0:
        return plain_step
    return partial(attacked_step, craft=partial(linf, epsilon=epsilon))


def linf(crafter: Crafter, model: nn.Module, batch: Batch, *, epsilon: float) -> Tensor:
    """PGD of the configured steps inside another radius."""
    return crafter.changed(epsilon=epsilon).pgd(model, batch)
