"""The stored form of what an evaluation measures of a mixture: its gate and its experts.

Axes: E experts, K classes. Accuracies and shares are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from dwf.typed_json import Between, Count, Fraction, NonNegative, Place

Entropy = Annotated[float, Between(-1e-6)]  # in nats; rounding may leave it below zero
Cosine = Annotated[float, Between(-1, 1)]


@dataclass(frozen=True)
class Gate:
    """Mean gate weights under each of some attacks.

    ``mean_weights``: by attack, [class][expert]. ``entropy``: by attack, mean over images in nats.
    """

    attacks: list[str]
    experts: list[str]
    mean_weights: dict[str, list[list[Fraction | None]]]
    entropy: dict[str, Entropy]

    def check(self, place: Place) -> None:
        """Raise unless each attack has an entropy, and a row of weights for each class."""
        for attack in self.attacks:
            here = place.at("mean_weights").at(attack)
            rows = self.mean_weights.get(attack)
            if not rows:
                raise here.error("a list with one row per class", rows)
            for k, row in enumerate(rows):
                here.at(f"class {k}").require_length(row, len(self.experts))
            if attack not in self.entropy:
                raise place.at("entropy").at(attack).error("a finite number", None)


@dataclass(frozen=True)
class Experts:
    """Accuracy of each expert alone, by attack on the whole model, [expert]."""

    names: list[str]
    accuracy: dict[str, list[Fraction]]

    def check(self, place: Place) -> None:
        """Raise unless each attack has one accuracy for each expert."""
        for attack, values in self.accuracy.items():
            place.at("accuracy").at(attack).require_length(values, len(self.names))


@dataclass(frozen=True)
class GateLoad:
    """Gate weights on some images.

    ``entropy`` is the mean in nats. ``mean_weight`` and ``top_share`` are [E]: the mean weight of
    each expert, and the share of images that prefer it. ``dead`` names the experts with both below
    0.01.
    """

    entropy: Entropy
    mean_weight: list[Fraction]
    top_share: list[Fraction]
    dead: list[str]


@dataclass(frozen=True)
class GateLoads:
    """The gate on clean images, and on images crafted on the mixture."""

    clean: GateLoad
    attacked: GateLoad


@dataclass(frozen=True)
class RoutingFlips:
    """Share of images for which the gate prefers another expert.

    ``attacked``: after an attack on the mixture. ``again``: when it is asked a second time about
    the same image; 0 unless it is random.
    """

    attacked: Fraction
    again: Fraction


@dataclass(frozen=True)
class AccuracyByMember:
    """Accuracy of each expert and then the mixture, each [E + 1].

    ``mixture_attacked``: on images crafted on the mixture. ``self_attacked``: of each on images
    crafted on itself.
    """

    clean: list[Fraction]
    mixture_attacked: list[Fraction]
    self_attacked: list[Fraction]


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Experts and gate under attack; :func:`dwf.evaluation.diagnostics.diagnose` measures them.

    Attributes:
        names: the E experts and then "mixture".
        transfer: [E + 1][E + 1], accuracy on images crafted on the row, judged by the column.
        worst_case: share of images that the mixture gets right when clean and in every row.
        gate_draws: how often the gate was asked about each image; 1 unless it is random, and then
            ``gate`` and ``routing_flips`` are means over draws.
        gradient_cosine: [E][E], of the experts' loss gradients at the clean image, mean over the
            images where both have one; None if there are none.
    """

    num_images: Count
    epsilon: NonNegative
    step_size: NonNegative
    num_steps: Count
    eot_samples: Count = 1
    protocol: str = "pixels"
    clamp: str = "pixels"
    seed: int = 0
    names: list[str]
    accuracy: AccuracyByMember
    transfer: list[list[Fraction]]
    worst_case: Fraction
    gate_draws: Count = 1
    gate: GateLoads
    routing_flips: RoutingFlips
    gradient_cosine: list[list[Cosine | None]]
    seconds: NonNegative = 0.0

    def check(self, place: Place) -> None:
        """Raise unless every list has one value for each expert, or for each and the mixture."""
        if not self.names:
            raise place.at("names").error("at least one name", self.names)
        num_members, num_experts = len(self.names), len(self.names) - 1
        for kind in ("clean", "mixture_attacked", "self_attacked"):
            values = getattr(self.accuracy, kind)
            place.at("accuracy").at(kind).require_length(values, num_members)
        require_table(self.transfer, num_members, num_members, place.at("transfer"))
        require_table(self.gradient_cosine, num_experts, num_experts, place.at("gradient_cosine"))
        for when, load in (("clean", self.gate.clean), ("attacked", self.gate.attacked)):
            here = place.at("gate").at(when)
            here.at("mean_weight").require_length(load.mean_weight, num_experts)
            here.at("top_share").require_length(load.top_share, num_experts)


def require_table(
    table: Sequence[Sequence[object]], num_rows: int, num_columns: int, place: Place
) -> None:
    """Raise unless the table at ``place`` has this shape."""
    place.require_length(table, num_rows, "rows")
    for i, row in enumerate(table):
        place.at(i).require_length(row, num_columns)
