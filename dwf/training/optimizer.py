"""Change the weights by SGD or Adam, schedule learning rates, and average weights.

All three are functions of (parameters, step) with state in named tensors, so that a checkpoint
holds them and a resumed run continues to the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dwf.checkpoint import Tensors, load_weights
from dwf.checks import CheckpointError
from dwf.config import PhaseConfig
from dwf.defenses import Phase

# tensors that the two optimizers keep for a parameter
SLOTS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")


def learning_rate_factor(schedule: PhaseConfig, t: float) -> float:
    """The factor of the learning rate when the share ``t`` of a phase is done, in [0, 1]."""
    at, factors = schedule.at, schedule.factors
    if schedule.schedule == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    if schedule.schedule == "polynomial":
        return float((1 - t) ** 0.9)
    if schedule.schedule == "steps":
        passed = [factor for start, factor in zip(at, factors, strict=True) if t >= start]
        return passed[-1] if passed else 1.0
    return float(np.interp(t, at, factors))


class Optimizer:
    """SGD or Adam for one phase; the gate has its own learning rate.

    Source: section 4 of arXiv:2512.20821 (SGD, momentum, weight decay, cosine over iterations);
    Kingma and Ba, arXiv:1412.6980.
    """

    def __init__(self, phase: Phase, num_steps: int) -> None:
        self._schedule = schedule = phase.schedule
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
        rate, decay = schedule.learning_rate, schedule.weight_decay
        self._optimizer: torch.optim.Optimizer
        if schedule.optimizer == "adam":
            self._optimizer = torch.optim.Adam(groups, lr=rate, weight_decay=decay)
        else:
            self._optimizer = torch.optim.SGD(
                groups,
                lr=rate,
                momentum=schedule.momentum,
                weight_decay=decay,
                nesterov=schedule.nesterov,
            )

    def set_step(self, step: int) -> float:
        """Set every group's learning rate for this step; return the first group's."""
        factor = learning_rate_factor(self._schedule, step / self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial"] * factor
        return float(self._optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, is_trained: Callable[[str], bool] | None = None) -> None:
        """Change the parameters, or only those for whose names ``is_trained`` is true.

        The others keep their value and their momentum.
        """
        if is_trained is not None:
            for parameter, name in self._names.items():
                if not is_trained(name):
                    parameter.grad = None
        self._optimizer.step()

    def state(self) -> Tensors:
        """Moments of each parameter, as "momentum_buffer/NAME" or the like."""
        return {
            f"{slot}/{name}": value
            for p, name in self._names.items()
            for slot, value in self._optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, state: Tensors) -> None:
        """Take over what :meth:`state` gave; CheckpointError for a name of no parameter."""
        parameters = {name: p for p, name in self._names.items()}
        for key, value in state.items():
            slot, _, name = key.partition("/")
            if slot not in SLOTS or name not in parameters:
                raise CheckpointError(
                    f"optimizer.safetensors: {key!r} is of no parameter of this phase; another "
                    "version of the program trained it that far"
                )
            p = parameters[name]
            # a moment keeps the parameter's device and memory format; Adam's counter is neither
            own = torch.empty_like(value if slot == "step" else p)
            if own.shape != value.shape:
                raise CheckpointError(
                    f"optimizer.safetensors: {key} has shape {list(value.shape)}, "
                    f"the parameter has {list(p.shape)}"
                )
            self._optimizer.state[p][slot] = own.copy_(value)


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
        """Move the average toward the model's weights of this step."""
        self.num_updates += 1
        t = self.num_updates
        weight = 1 - min(self._decay, (1 + t) / (10 + t))
        averages: list[Tensor] = list(self.model.parameters())
        values: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, values, weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state(self) -> dict[str, Tensor]:
        """The averaged model's tensors by name."""
        return dict(self.model.state_dict())

    def load(self, weights: Tensors, num_updates: int, source: Path) -> None:
        """Take over a state of so many updates; ``source`` is the file that an error names."""
        load_weights(self.model, weights, source)
        self.num_updates = num_updates
