"""Change the weights by SGD, Adam or Muon, schedule learning rates, and average weights.

All three are functions of (parameters, step) with state in named tensors, so that a checkpoint
holds them and a resumed run continues to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwf.checkpoint import Tensors
from dwf.checks import CheckpointError
from dwf.config import PhaseConfig
from dwf.defenses import Phase
from dwf.training.muon import Muon

# tensors that the optimizers keep for a parameter
SLOTS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")
# of torch's OneCycleLR: where the rate is highest, and its shares of that at both ends
ONE_CYCLE_TOP, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1 / 250_000


def learning_rate_factor(schedule: PhaseConfig, t: float) -> float:
    """The factor of the learning rate when the share ``t`` of a phase is done, in [0, 1]."""
    at, factors = schedule.at, schedule.factors
    if t < schedule.warm_up:
        return t / schedule.warm_up
    t = (t - schedule.warm_up) / (1 - schedule.warm_up)
    if schedule.schedule == "one-cycle":
        if t < ONE_CYCLE_TOP:
            return 1 - (1 - ONE_CYCLE_START) * _falling(t / ONE_CYCLE_TOP)
        left = _falling((t - ONE_CYCLE_TOP) / (1 - ONE_CYCLE_TOP))
        return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * left
    if schedule.schedule == "cosine":
        return _falling(t)
    if schedule.schedule == "polynomial":
        return float((1 - t) ** 0.9)
    if schedule.schedule == "steps":
        passed = [factor for start, factor in zip(at, factors, strict=True) if t >= start]
        return passed[-1] if passed else 1.0
    return float(np.interp(t, at, factors))


def _falling(t: float) -> float:
    """Half a cosine, from 1 to 0."""
    return (1 + math.cos(math.pi * t)) / 2


def _settings(phase: Phase, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """First learning rate and weight decay of a parameter."""
    schedule = phase.schedule
    in_gate = phase.gate_prefix is not None and name.startswith(phase.gate_prefix)
    rate = schedule.gate_learning_rate if in_gate else schedule.learning_rate
    for prefix, factor in phase.rates.items():
        rate *= factor if name.startswith(prefix) else 1.0
    decayed = schedule.decay_vectors or parameter.ndim > 1
    return rate, schedule.weight_decay if decayed else 0.0


def _optimizer(groups: list[dict[str, Any]], schedule: PhaseConfig) -> torch.optim.Optimizer:
    rate, decay = schedule.learning_rate, schedule.weight_decay
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, weight_decay=decay)
    if schedule.optimizer == "muon":
        return Muon(groups, lr=rate, momentum=schedule.momentum, weight_decay=decay)
    return torch.optim.SGD(
        groups,
        lr=rate,
        momentum=schedule.momentum,
        weight_decay=decay,
        nesterov=schedule.nesterov,
    )


class Optimizer:
    """SGD, Adam or Muon for one phase; the gate has its own learning rate.

    Source: section 4 of arXiv:2512.20821 (SGD, momentum, weight decay, cosine over iterations);
    Kingma and Ba, arXiv:1412.6980.
    """

    def __init__(self, phase: Phase, num_steps: int) -> None:
        self._schedule = schedule = phase.schedule
        self._num_steps = num_steps
        self._names = {p: name for name, p in phase.module.named_parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter, name in self._names.items():
            groups.setdefault(_settings(phase, name, parameter), []).append(parameter)
        self._optimizer = _optimizer(
            [
                {"params": members, "initial": rate, "weight_decay": decay}
                for (rate, decay), members in groups.items()
            ],
            schedule,
        )

    def set_step(self, step: int) -> float:
        """Set every group's learning rate for this step; return the schedule's own."""
        factor = learning_rate_factor(self._schedule, step / self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial"] * factor
        return self._schedule.learning_rate * factor

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, is_trained: Callable[[str], bool] | None = None) -> None:
        """Change the parameters, or only those for whose names ``is_trained`` is true.

        The others keep their value and their momentum. A gradient longer than ``max_gradient`` is
        shortened first.
        """
        if is_trained is not None:
            for parameter, name in self._names.items():
                if not is_trained(name):
                    parameter.grad = None
        if self._schedule.max_gradient is not None:
            torch.nn.utils.clip_grad_norm_(self._names, self._schedule.max_gradient)
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
