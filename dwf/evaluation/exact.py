"""Prove by integer programming what bounds leave open, for small ReLU networks in L-infinity.

Whether a margin falls to zero in the ball is a mixed-integer linear problem: with z = a x + b in
front of a ReLU, low <= z <= high and h behind it,

    h >= 0,   h >= z,   h <= z - low (1 - s),   h <= high s,   s in {0, 1}

and only the units whose interval holds zero inside need an s. Branch and bound of HiGHS decides it,
to its tolerance of 1e-6, which is far below the margin that `dwf.evaluation.bounds` asks for.

Source: Tjeng et al., arXiv:1711.07356.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, fx, nn

from dwf.evaluation.bounds import MAX_TIGHTENED, Ball, Relaxed, by_intervals, read_network

# A problem of more units, or more of them undecided, or more nodes of its tree, stays open.
# Forty undecided take up to a second.
MAX_UNITS, MAX_UNDECIDED, MAX_NODES = 2000, 40, 300
_INFEASIBLE = 2  # of scipy's milp

Matrix = Any  # sparse, of scipy


def settled(model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """[N] bool on the CPU: images that are right anywhere in the ball; False where undecided.

    Args:
        model: of the kind that `dwf.evaluation.bounds.certified` bounds; not changed.
        images: [N, C, H, W].
        labels: [N].
        epsilon: radius of the L-infinity ball, which ends at 0 and 1.
    Raises:
        CannotBound: the network holds something that is not bounded.
    """
    found = torch.zeros(len(images), dtype=torch.bool)
    if len(images) == 0:
        return found
    network = read_network(model, images[:1])
    images = images.double()
    ball = Ball(images, epsilon, "linf")
    bounded = by_intervals(network, ball, labels)
    relus, unsure = bounded.walk.relus, bounded.unsure
    maps = affine_maps(network, list(relus), images[:1]) if bounded.walk.only_relu else None
    if maps is None:
        return found
    relaxed = Relaxed(network, relus, ball, MAX_TIGHTENED, MAX_TIGHTENED)
    lower = relaxed.margins(labels)
    for n in range(len(images)):
        image, own = images[n].flatten(), int(labels[n])
        box = (image - epsilon).clamp(min=0), (image + epsilon).clamp(max=1)
        ranges = [(low[n].flatten(), high[n].flatten()) for low, high in relaxed.ranges]
        problem = _Problem.of(maps, box, ranges)
        rivals = (lower[n] <= unsure[n]).nonzero()[:, 0].tolist()
        found[n] = problem is not None and all(
            problem.is_above(own, rival, float(unsure[n])) for rival in rivals if rival != own
        )
    return found


@dataclass(frozen=True)
class Affine:
    """Values as an affine map of the image's pixels and of all units behind ReLUs so far.

    Attributes:
        bias: [M].
        weights: [M, P + number of these units].
    """

    bias: np.ndarray[Any, Any]
    weights: Matrix


@torch.enable_grad()
def affine_maps(
    network: fx.GraphModule, relus: Sequence[fx.Node], image: Tensor
) -> list[Affine] | None:
    """What each ReLU reads, in the order of the graph, and last the logits.

    ``image``: [1, C, H, W], for its shape. None for a network of more than `MAX_UNITS` units.
    """
    walk = _Walk(network, relus)
    leaf = torch.zeros_like(image).requires_grad_()
    logits = walk.run(leaf)
    if sum(x.numel() for x in walk.units) > MAX_UNITS:
        return None
    leaves = [leaf, *walk.units]
    return [
        _affine(values.flatten(), leaves[: i + 1]) for i, values in enumerate((*walk.read, logits))
    ]


class _Walk(fx.Interpreter):
    """Runs a network with a leaf of zeros in place of what is behind each ReLU."""

    def __init__(self, network: fx.GraphModule, relus: Sequence[fx.Node]) -> None:
        super().__init__(network)
        self._relus = set(relus)
        self.read: list[Tensor] = []
        self.units: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._relus:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        self.read.append(args[0])
        self.units.append(torch.zeros_like(args[0]).requires_grad_())
        return self.units[-1]


def _affine(values: Tensor, leaves: Sequence[Tensor]) -> Affine:
    each = torch.eye(len(values), dtype=values.dtype, device=values.device)
    slopes = torch.autograd.grad(
        values, leaves, each, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    columns = [
        values.new_zeros(len(values), leaf.numel()) if slope is None else slope.flatten(1)
        for leaf, slope in zip(leaves, slopes, strict=True)
    ]
    matrix = sparse.csr_array(torch.cat(columns, dim=1).cpu().numpy())
    return Affine(values.detach().cpu().numpy(), matrix)


@dataclass(frozen=True)
class _Problem:
    """The network around one image: variables are pixels, units, and a choice for each open one."""

    logits: Affine
    constraints: list[LinearConstraint]
    bounds: Bounds
    num_choices: int

    @classmethod
    def of(
        cls,
        maps: Sequence[Affine],
        box: tuple[Tensor, Tensor],
        ranges: Sequence[tuple[Tensor, Tensor]],
    ) -> _Problem | None:
        """None where too many units are undecided."""
        low, high = (torch.cat(x).cpu().numpy() for x in zip(*ranges, strict=True))
        undecided = (low < 0) & (high > 0)
        num_choices, num_units, num_pixels = int(undecided.sum()), len(low), len(box[0])
        if num_choices > MAX_UNDECIDED:
            return None
        width = num_pixels + num_units
        weights = sparse.vstack([_wider(each.weights, width) for each in maps[:-1]], format="csr")
        bias = np.concatenate([each.bias for each in maps[:-1]])
        behind = sparse.csr_array(sparse.eye(num_units, width, k=num_pixels))
        above = behind - weights  # h - (z - b)
        active = low >= 0
        at, choice = undecided.nonzero()[0], np.arange(num_choices)
        none = sparse.csr_array((num_units, num_choices))

        def chosen(factor: Any) -> Matrix:
            return sparse.csr_array((factor, (choice, choice)), shape=(num_choices, num_choices))

        constraints = [
            # h = z, and elsewhere h >= z
            LinearConstraint(sparse.hstack([above, none]), bias, np.where(active, bias, np.inf)),
            # h - z - low s <= -low
            LinearConstraint(
                sparse.hstack([above[at], chosen(-low[at])]), -np.inf, bias[at] - low[at]
            ),
            # h - high s <= 0
            LinearConstraint(sparse.hstack([behind[at], chosen(-high[at])]), -np.inf, 0.0),
        ]
        bounds = Bounds(
            np.concatenate([box[0].cpu().numpy(), np.maximum(low, 0), np.zeros(num_choices)]),
            np.concatenate([box[1].cpu().numpy(), np.maximum(high, 0), np.ones(num_choices)]),
        )
        return cls(maps[-1], constraints, bounds, num_choices)

    def is_above(self, own: int, rival: int, sure: float) -> bool:
        """Whether logit ``own`` minus logit ``rival`` exceeds ``sure`` everywhere."""
        width = self.bounds.lb.size
        row = self.logits.weights[[own]] - self.logits.weights[[rival]]
        gap = LinearConstraint(
            _wider(row, width), -np.inf, sure - self.logits.bias[own] + self.logits.bias[rival]
        )
        result = milp(
            np.zeros(width),
            integrality=np.arange(width) >= width - self.num_choices,
            bounds=self.bounds,
            constraints=[*self.constraints, gap],
            options={"node_limit": MAX_NODES},
        )
        return bool(result.status == _INFEASIBLE)


def _wider(matrix: Matrix, width: int) -> Matrix:
    """The matrix with columns of zeros at its end."""
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), (matrix.shape[0], width))
