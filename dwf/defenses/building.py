"""Build the model of a defense from a configuration and a data set, and check one that is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from dwf.checks import ConfigError
from dwf.config import Config, Options, derive_seed
from dwf.models import SmallNetwork, build_network

Model = TypeVar("Model", bound=nn.Module)
Kind = TypeVar("Kind", bound=Options)


@dataclass(frozen=True)
class ModelFacts:
    """What a data set decides about a model: shape [C, H, W], classes, mean and std per channel."""

    image_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def network_of(
    config: Config, facts: ModelFacts, *names: object, num_classes: int | None = None
) -> SmallNetwork:
    """The network of ``config.model``; its weights depend on the run's seed and ``names``."""
    return build_network(
        config.model.network,
        num_classes=facts.num_classes if num_classes is None else num_classes,
        width=config.model.width,
        in_channels=facts.image_shape[0],
        seed=derive_seed(config.seed, *names),
    )


def options_of(config: Config, kind: type[Kind]) -> Kind:
    """The defense's own settings, of their type; Config has made sure that they are."""
    assert isinstance(config.options, kind)
    return config.options


def model_of(model: nn.Module, config: Config, kind: type[Model]) -> Model:
    """The model, of the type that the defense trains.

    Raises:
        ConfigError: a user gave a model of another type.
    """
    if not isinstance(model, kind):
        raise ConfigError(
            f"model: defense {config.defense} trains {kind.__name__}, found {type(model).__name__}"
        )
    return model
