"""Mix the logits of several experts softly, by the softmax of a gate.

    logits[b] = sum_e softmax(gate(x)[b])[e] * expert_e(x)[b],     x = normalize(images)

Every expert sees every image; logits are mixed, not probabilities.
Source: eqs. (1)-(2) of arXiv:2512.20821.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

import moe_kernels
from dwf.checks import ConfigError, ModelOutputError
from dwf.models.describe import Output, describe
from dwf.models.experts import ModelOfNetworks, softened
from dwf.models.planned import PlanParts
from dwf.models.wrap import PixelModel


@dataclass(frozen=True, repr=False)
class MixtureOutput(Output):
    """Logits and gate of one pass of a mixture.

    Attributes:
        logits: [B, K].
        gate_logits: [B, E].
        gate_weights: [B, E]; rows sum to 1.
        expert_logits: [E, B, K].
    """

    logits: Tensor
    gate_logits: Tensor
    gate_weights: Tensor
    expert_logits: Tensor


class Mixture(ModelOfNetworks):
    """Experts, a gate, and the weighted sum of the experts' logits.

    Args:
        experts: modules that map images to logits [B, K]; their architectures may differ.
        gate: module that maps the same images to ``gate_logits`` [B, E].
        normalize: first layer shared by experts and gate. Leave it out if the experts normalize by
            themselves (see ``as_pixel_model``).
        expert_names: names for tables and figures; "expert 0" and so on by default.

    ``model(images)`` gives logits [B, K] and nothing else, so that anything can attack it;
    ``model(images, return_aux=True)`` gives a MixtureOutput.

    Raises:
        ConfigError: no experts, or one that is not a module.
        ModelOutputError: at the first batch, if outputs do not fit together; names the expert.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        gate: nn.Module,
        normalize: nn.Module | None = None,
        *,
        expert_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(experts, normalize, expert_names=expert_names)
        if not isinstance(gate, nn.Module):
            raise ConfigError(f"gate: expected a torch.nn.Module, found {type(gate).__name__}")
        self.gate = gate

    def gate_weights(self, images: Tensor) -> Tensor:
        weights: Tensor = self.gate(self.normalize(images)).softmax(dim=1)
        return weights

    def soft_gate_weights(self, images: Tensor) -> Tensor:
        return softened(self.gate(self.normalize(images)))

    def described_parts(self) -> list[str]:
        return [*super().described_parts(), f"gate {describe(self.gate)}"]

    def plan_parts(self) -> PlanParts:
        experts = [self.expert(e) for e in range(self.num_experts)]
        return PlanParts(experts, gate=PixelModel(self.normalize, self.gate))

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> MixtureOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | MixtureOutput:
        x = self.normalize(images)
        outputs = [expert(x) for expert in self.experts]
        gate_logits = self.gate(x)
        self._check(images, gate_logits, outputs)
        expert_logits = torch.stack(outputs)  # [E, B, K]
        logits = moe_kernels.softmax_combine(gate_logits, expert_logits)
        if not return_aux:
            return logits
        return MixtureOutput(logits, gate_logits, gate_logits.softmax(dim=1), expert_logits)

    def _check(self, images: Tensor, gate_logits: Tensor, outputs: list[Tensor]) -> None:
        B = images.shape[0]  # len() would fix the batch size of an exported program
        if _shape(gate_logits) != [B, self.num_experts]:
            raise ModelOutputError(
                f"gate: expected gate_logits [{B}, {self.num_experts}], found {_shape(gate_logits)}"
            )
        expected = _shape(outputs[0])
        if len(expected) != 2 or expected[0] != B:
            raise ModelOutputError(f"experts[0]: expected logits [{B}, K], found {expected}")
        for e, output in enumerate(outputs):
            if _shape(output) != expected:
                raise ModelOutputError(
                    f"experts[{e}]: expected logits {expected} like experts[0], "
                    f"found {_shape(output)}"
                )


def _shape(output: object) -> list[int] | str:
    return list(output.shape) if isinstance(output, Tensor) else type(output).__name__
