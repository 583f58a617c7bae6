"""Define the phases of a defense: each has a module, a schedule, and a step from batch to loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.checks import ConfigError
from dwf.config import Config, PhaseConfig
from dwf.data import Batch
from dwf.defenses.crafter import Crafter


class StepResult(NamedTuple):
    """``loss`` to minimize, and the rows behind it: ``logits`` [R, K], ``labels`` [R].

    The first ``num_clean`` rows are benign, the rest attacked.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    num_clean: int


# ``step(model, forward, batch, crafter)`` gives the loss of a batch. It attacks ``model``, the
# module itself, and trains through ``forward``, which may be its distributed wrapper.
Step = Callable[[nn.Module, Model, Batch, Crafter], StepResult]


class Update(NamedTuple):
    """One change of the weights by the gradient of ``step``.

    ``is_trained(name)`` says whether it changes the parameter of that name, as
    ``Module.named_parameters`` has it; the others keep their value and their momentum. None changes
    all parameters of the phase's module.
    """

    step: Step
    is_trained: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Phase:
    """One stage of training.

    Attributes:
        name: unique in its defense; metrics, checkpoints and seeds carry it.
        module: its parameters are trained.
        schedule: optimizer, batch size and epochs.
        step: one update of the weights per batch; or several, as a sequence of Updates.
        gate_prefix: parameters whose names begin so train with the gate's learning rate.
        rates: factors of the learning rate, by the beginning of parameters' names.
        state: tensors that steps keep from batch to batch, beside the weights. Steps fill it,
            checkpoints contain it. A phase with state trains on one process.
    """

    name: str
    module: nn.Module
    schedule: PhaseConfig
    step: Step | Sequence[Update]
    gate_prefix: str | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] | None = None

    @property
    def updates(self) -> Sequence[Update]:
        """The updates that each batch makes, in order."""
        return [Update(self.step)] if callable(self.step) else self.step


def pretrain_schedule(config: Config) -> PhaseConfig:
    """The schedule of a defense with one phase.

    Raises:
        ConfigError: the configuration has none.
    """
    if config.pretrain is None:
        raise ConfigError(f"pretrain: None, but it is the schedule of {config.defense}")
    return config.pretrain
