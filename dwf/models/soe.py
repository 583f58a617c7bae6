"""Let the most confident of several networks answer: Synergy-of-Experts.

    p_i = softmax(logits_i)     a_i = sigmoid(head_i(features_i))     r_i = max_k p_i[k] * a_i
    logits[b] = logits_e[b],    e = argmax_i r_i[b]

``r`` is the rectified confidence, in [0, 1]. The choice has no gradient, so an attack on the model
sees one network at a time; ``surrogate`` gives it a gradient of the choice too.

Source: Cui et al., Synergy-of-Experts (NeurIPS 2022), as its authors' program computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from dwf.checks import check_positive
from dwf.models.describe import Output
from dwf.models.experts import ModelOfNetworks, softened
from dwf.models.networks import SmallNetwork
from dwf.models.planned import Planned, PlanParts
from dwf.models.routed import combine, one_hot_choice, straight_through
from dwf.models.seeded import seeded_weights


@dataclass(frozen=True, repr=False)
class SoeOutput(Output):
    """Logits and confidences of one pass of an SoE model.

    Attributes:
        logits: [B, K].
        gate_weights: [B, E], one-hot, without gradient.
        expert_logits: [E, B, K].
        confidence: a of the formulas above, [E, B] float32.
        rectified: r of the formulas above, [E, B] float32.
    """

    logits: Tensor
    gate_weights: Tensor
    expert_logits: Tensor
    confidence: Tensor
    rectified: Tensor


class SynergyOfExperts(ModelOfNetworks):
    """Networks, each with a confidence head; the most confident one answers.

    Args:
        experts: networks; their heads are linear layers on ``features``.
        normalize: first layer shared by all.
        expert_names: "expert 0" and so on by default.
        seed: fixes the heads' initial weights without touching torch's RNG.

    Raises:
        ConfigError: no networks, one that is not a module, or not one name for each.
    """

    def __init__(
        self,
        experts: Iterable[SmallNetwork],
        normalize: nn.Module | None = None,
        *,
        expert_names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        members = list(experts)
        super().__init__(members, normalize, expert_names=expert_names)
        with seeded_weights(seed):
            self.heads = nn.ModuleList(nn.Linear(x.classifier.in_features, 1) for x in members)

    def gate_weights(self, images: Tensor) -> Tensor:
        output: SoeOutput = self(images, True)
        return output.gate_weights

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        output: SoeOutput = self(images, True)
        return softened(output.rectified.T)

    def surrogate(self, temperature: float = 1.0) -> Surrogate:
        """The same function with a gradient of the choice, for an attack to follow."""
        return Surrogate(self, temperature)

    def surrogates(self) -> dict[str, nn.Module]:
        """The model with a gradient of its choice."""
        return {"confidence": self.surrogate()}

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> SoeOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | SoeOutput:
        x = self.normalize(images)
        answers, scores = [], []
        for expert, head in zip(self.experts, self.heads, strict=True):
            features = expert.features(x)  # type: ignore[operator]
            answers.append(expert.classifier(features))  # type: ignore[operator]
            scores.append(head(features).float().squeeze(1))
        expert_logits = torch.stack(answers)  # [E, B, K]
        confidence = torch.stack(scores).sigmoid()  # [E, B]
        rectified = expert_logits.float().softmax(dim=2).amax(dim=2) * confidence
        gate_weights = one_hot_choice(rectified.detach().T)
        logits = combine(gate_weights, expert_logits)
        if not return_aux:
            return logits
        return SoeOutput(logits, gate_weights, expert_logits, confidence, rectified)


class Surrogate(Planned):
    """An SoE model whose choice has the gradient of softmax(temperature * r); logits are equal."""

    def __init__(self, model: SynergyOfExperts, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.model = model
        self.temperature = temperature

    def plan_parts(self) -> PlanParts:
        return PlanParts(self.model.networks(), composed=True)

    def forward(self, images: Tensor) -> Tensor:
        output: SoeOutput = self.model(images, True)
        soft = (self.temperature * output.rectified.T).softmax(dim=1)
        return combine(straight_through(output.gate_weights, soft), output.expert_logits)
