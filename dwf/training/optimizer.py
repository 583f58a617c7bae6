"""SGD as DWF uses it, a cosine over iterations, and an average of the weights.

All three are functions of (parameters, step) with state in named tensors, so that a checkpoint
holds them and a resumed run continues to the same bits.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dwf.checkpoint import Tensors, load_weights
from dwf.checks import CheckpointError
from dwf.defenses import Phase


class Optimizer:
    """SGD with momentum and weight decay for one phase; gate and experts in groups of their own.

    Source: section 4 of arXiv:2512.20821 (SGD, momentum, weight decay, cosine over iterations).
    """

    def __init__(self, phase: Phase, num_steps: int) -> None:
        schedule = phase.schedule
        self._num_steps = num_steps
        self._names = {p: name for name, p in phase.module.named_parameters()}
        gate: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for parameter, name in self._names.items():
            in_gate = phase.gate_prefix is not None and name.startswith(phase.gate_prefix)
            (gate if in_gate else rest).append(parameter)
        groups = [{"params": rest, "initial": schedule.learning_rate}]
        if gate:
            groups.append({"params": gate, "initial": schedule.gate_learning_rate})
        self._sgd = torch.optim.SGD(
            groups,
            lr=schedule.learning_rate,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
        )

    def set_step(self, step: int) -> float:
        """Set lr_t = lr_0 (1 + cos(pi t / T)) / 2 in every group; return the first group's."""
        factor = (1 + math.cos(math.pi * step / self._num_steps)) / 2
        for group in self._sgd.param_groups:
            group["lr"] = group["initial"] * factor
        return float(self._sgd.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        self._sgd.zero_grad(set_to_none=True)

    def step(self) -> None:
        self._sgd.step()

    def state(self) -> Tensors:
        """Momentum of each parameter, by name."""
        return {
            name: self._sgd.state[p]["momentum_buffer"]
            for p, name in self._names.items()
            if self._sgd.state.get(p, {}).get("momentum_buffer") is not None
        }

    def load(self, state: Tensors) -> None:
        """Take over what :meth:`state` gave; CheckpointError for a name of no parameter."""
        unexpected = sorted(state.keys() - self._names.values())
        if unexpected:
            raise CheckpointError(
                f"optimizer.safetensors: {unexpected[0]!r} is no parameter of this phase; another "
                "version of the program trained it that far"
            )
        for p, name in self._names.items():
            if name in state:
                buffer = torch.empty_like(p)  # keeps the parameter's memory format
                self._sgd.state[p]["momentum_buffer"] = buffer.copy_(state[name])


class WeightAverage:
    """Exponential moving average of a model's weights; buffers are those of the newest step.

    The decay grows from 0 as (1 + t) / (10 + t) up to ``decay``, so that short runs are not held
    back by their first steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        t = self.num_updates
        weight = 1 - min(self._decay, (1 + t) / (10 + t))
        averages: list[Tensor] = list(self.model.parameters())
        values: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, values, weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def load(self, weights: Tensors, num_updates: int, source: Path) -> None:
        load_weights(self.model, weights, source)
        self.num_updates = num_updates
