"""Step matrices along their orthogonalized momentum: Muon, and Adam for all other parameters.

For a weight W [n, ...], read as a matrix [n, m], with gradient G, decay d, rate r:

    V <- momentum V + G
    U <- V momentum + G                              (Nesterov's look ahead)
    W <- (1 - r d) W - r 0.2 sqrt(max(n, m)) O,      O = the nearest orthogonal matrix to U

O is U with all singular values moved near 1, by five steps of a Newton-Schulz iteration. The factor
0.2 sqrt(max(n, m)) gives a step the size of Adam's, so one learning rate suits both kinds.
Parameters of one axis take Adam's step with decoupled decay.

| point                 | the papers                            | here                             |
|-----------------------|---------------------------------------|----------------------------------|
| which weights         | hidden matrices; first and last layer | every weight of two or more axes |
|                       | by Adam                               |                                  |
| the iteration runs in | bfloat16                              | float32                          |

Sources: Jordan et al., "Muon: an optimizer for hidden layers" (2024), which has the coefficients;
the factor 0.2 is of Liu et al., arXiv:2502.16982; for adversarial training, arXiv:2605.26929.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
BETAS, SMALLEST = (0.9, 0.999), 1e-8


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more axes, Adam for the others; see the module.

    Groups have ``lr``, ``momentum`` and ``weight_decay``.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                move = self._of_matrix if parameter.ndim > 1 else self._of_vector
                parameter.add_(move(parameter, parameter.grad, group), alpha=-group["lr"])

    def _of_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        ahead = gradient + group["momentum"] * momentum
        matrix = ahead.reshape(len(ahead), -1)
        direction = orthogonalized(matrix) * (0.2 * math.sqrt(max(matrix.shape)))
        moved: Tensor = direction.view_as(ahead)
        return moved

    def _of_vector(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = BETAS
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        taken = float(state["step"])
        spread = (square / (1 - second**taken)).sqrt().add_(SMALLEST)
        moved: Tensor = mean / (1 - first**taken) / spread
        return moved


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the nearest matrix [n, m] with orthonormal rows or columns; zero stays zero.

    The singular values of the result lie between 0.7 and 1.2, unless they were very small.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().T if tall else matrix.float()
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = (x.T if tall else x).to(matrix.dtype)
    return found
