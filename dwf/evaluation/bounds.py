"""Bound robust accuracy from below: images that no attack in the ball can break, by proof.

:func:`certified` reads the traced graph of a network made of affine layers and ReLUs, or of other
monotone activations, and bounds every margin over the whole ball:

* interval bound propagation (Gowal et al., arXiv:1810.12715) for all of them;
* linear relaxation, backward from each margin (CROWN, Zhang et al., arXiv:1811.00866, with the
  intervals of Zhang et al., arXiv:1906.06316, tightened by itself where there are few units).

Without a ReLU the second is exact, so of linear models the bound is the robust accuracy itself. For
networks that were not trained for it both say little beyond small radii: a bound of 0 is no
weakness of the network.

Autograd computes the backward walk: between ReLUs the network is affine, and the gradient of an
affine map is its transpose. Values are float64; margins below `SURE` of the largest logit prove
nothing about a model that computes in float32.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dwf.attacks.losses import Model
from dwf.evaluation.measures import parts

log = logging.getLogger("dwf")

SURE = 1e-5
# If the surest few images prove nothing, the others will not either.
FIRST_LOOK, BATCH_SIZE = 8, 100
# Units whose intervals are tightened, each by two backward walks.
MAX_TIGHTENED = 600
# What a bound lacks to the margin itself, tightening divides by 1.2 to 2.5 (measured on perceptrons
# and convolutions for digits, epsilon 0.005 to 0.15).
TIGHTENING_GAINS = 2.5
# What intervals lack, the relaxation behind ReLUs divides by 2.4 to 3.3 (measured on convolutions
# for digits and on a ResNet-10, whose intervals lack ten million times the margin).
RELAXATION_GAINS = 100.0
ROWS_AT_ONCE = 512  # images times columns that are walked back together
_DUAL_STEPS = 40


class CannotBound(Exception):
    """The network holds something that is not bounded here; the message names it."""


def looks(places: Tensor) -> list[Tensor]:
    """Places of images, the surest first, in batches for `certified`, few in the first."""
    return [places[:FIRST_LOOK], *parts(places[FIRST_LOOK:], BATCH_SIZE)]


def certified(
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    epsilon: float,
    norm: str = "linf",
) -> Tensor | None:
    """[N] bool on the CPU: images that are right anywhere in the ball.

    The ball is that of the attacks: within ``epsilon`` in ``norm`` and inside [0, 1]. The model is
    not changed.

    Args:
        batches: images [B, C, H, W] and labels [B], N in all.
    Returns:
        None if the network is of another kind, or if the first batch proves nothing; then no
        further one is asked for.
    """
    if not isinstance(model, nn.Module):
        return None
    network, proven = None, []
    for images, labels in batches:
        try:
            if network is None:
                network = read_network(model, images[:1])
            proven.append(_proven(network, images.double(), labels, epsilon, norm))
        except Exception as error:  # a foreign model may fail on other batches, or as a graph
            log.debug("no bounds: %s", error)
            return None
        if not bool(proven[0].any()):
            return None
    return torch.cat(proven) if proven else None


def _proven(
    network: fx.GraphModule, images: Tensor, labels: Tensor, epsilon: float, norm: str
) -> Tensor:
    """[N] bool on the CPU: images whose margins all stay positive.

    Bounds are relaxed, and then tightened, for images that are not proven without, and may be with
    it.
    """
    logits = network(images)
    own = labels.unsqueeze(1)
    there = (logits.gather(1, own) - logits).scatter(1, own, torch.inf).amin(dim=1)
    bounded = by_intervals(network, Ball(images, epsilon, norm), labels)
    lower = bounded.lower.amin(dim=1)
    may = (there > 0) & (lower <= 0)
    if bounded.walk.relus:
        may &= there - lower <= RELAXATION_GAINS * there
    rows = may.nonzero()[:, 0]
    if len(rows):
        some, its = images[rows], labels[rows]
        lower[rows] = margins(network, some, its, epsilon, norm, tighten=False).amin(dim=1)
    rows = (may & (lower <= 0) & (there - lower <= TIGHTENING_GAINS * there)).nonzero()[:, 0]
    if len(rows):
        lower[rows] = margins(network, images[rows], labels[rows], epsilon, norm).amin(dim=1)
    return (lower > 0).cpu()


def margins(
    network: fx.GraphModule,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str,
    *,
    tighten: bool = True,
) -> Tensor:
    """[N, K] float64: a lower bound of logit y minus logit k over the ball; infinite at k = y.

    `SURE` of the largest logit is taken off. ``network``: of `read_network`, in float64.
    ``tighten``: the intervals of few units, by the relaxation itself; most of the cost.
    """
    ball = Ball(images, epsilon, norm)
    bounded = by_intervals(network, ball, labels)
    if not bounded.walk.only_relu:
        return bounded.lower
    max_tightened = MAX_TIGHTENED if tighten else 0
    most = max(max_tightened, bounded.lower.shape[1])
    relaxed = Relaxed(network, bounded.walk.relus, ball, max_tightened, most).margins(labels)
    relaxed = (relaxed - bounded.unsure).scatter(1, labels.unsqueeze(1), torch.inf)
    return torch.maximum(bounded.lower, relaxed)


class ByIntervals(NamedTuple):
    """Bounds [N, K] as those of `margins`, what was taken off them [N, 1], and how they came."""

    lower: Tensor
    unsure: Tensor
    walk: Intervals


def by_intervals(network: fx.GraphModule, ball: Ball, labels: Tensor) -> ByIntervals:
    walk = Intervals(network)
    out = walk.run(ball.interval())
    own = labels.unsqueeze(1)
    unsure = SURE * torch.maximum(out.low.abs(), out.high.abs()).amax(dim=1, keepdim=True)
    lower = (out.low.gather(1, own) - out.high - unsure).scatter(1, own, torch.inf)
    return ByIntervals(lower, unsure, walk)


@dataclass(frozen=True, eq=False)
class Interval:
    """All values within ``radius`` >= 0 of ``center``, elementwise."""

    center: Tensor
    radius: Tensor

    @property
    def low(self) -> Tensor:
        """The smallest values."""
        return self.center - self.radius

    @property
    def high(self) -> Tensor:
        """The largest values."""
        return self.center + self.radius


def _between(low: Tensor, high: Tensor) -> Interval:
    return Interval((low + high) / 2, (high - low) / 2)


@dataclass(frozen=True, eq=False)
class Ball:
    images: Tensor
    epsilon: float
    norm: str
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # how far each pixel may move; in L2, as far as the box goes
        object.__setattr__(self, "low", (-self.images).clamp(min=-self.epsilon))
        object.__setattr__(self, "high", (1 - self.images).clamp(max=self.epsilon))

    def interval(self) -> Interval:
        return _between(self.images + self.low, self.images + self.high)

    def smallest(self, gradient: Tensor) -> Tensor:
        """[N]: a lower bound of gradient . x over the ball; in L-inf the minimum."""
        here = (gradient * self.images).flatten(1).sum(dim=1)
        g, low, high = (x.flatten(1) for x in (gradient, self.low, self.high))
        if self.norm == "linf":
            return here + torch.minimum(g * low, g * high).sum(dim=1)
        # L2 and the box: any multiplier of |d|^2 - epsilon^2 gives a bound, the best the minimum
        most = 2 / self.epsilon * g.norm(dim=1, keepdim=True).clamp(min=1e-12)
        least = 1e-12 * most
        best = torch.full_like(here, -torch.inf)
        for _ in range(_DUAL_STEPS):
            middle = (least * most).sqrt()
            move = torch.minimum(torch.maximum(-g / middle, low), high)
            size = move.square().sum(dim=1, keepdim=True)
            dual = (g * move).sum(dim=1) + middle[:, 0] / 2 * (size[:, 0] - self.epsilon**2)
            best = torch.maximum(best, dual)
            long = size > self.epsilon**2
            least, most = torch.where(long, middle, least), torch.where(long, most, middle)
        return here + torch.maximum(best, torch.minimum(g * low, g * high).sum(dim=1))


# -- reading a network ----------------------------------------------------------------------------

# Activations that never fall, and pooling that keeps that.
_MONOTONE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Hardsigmoid, nn.MaxPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_AFFINE_MODULES = (
    nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_MONOTONE = {F.relu, torch.relu, F.leaky_relu, torch.tanh, torch.sigmoid, F.max_pool2d, "relu"}
# Linear maps with weights >= 0: they take centers and radii alike.
_AVERAGES = {
    F.avg_pool2d, F.adaptive_avg_pool2d, torch.flatten, torch.mean, "flatten", "mean", "view",
    "reshape", "contiguous", "squeeze",
}  # fmt: skip
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {F.relu, torch.relu, "relu"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "channel_affine") or super().is_leaf_module(m, module_qualified_name)


def read_network(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The graph of a copy of the model in float64, eval mode; it computes what the model does."""
    dtypes = {x.dtype for x in model.parameters() if x.is_floating_point()}
    if not dtypes <= {torch.float32, torch.float64}:
        raise CannotBound(f"weights of {dtypes}")
    try:
        own = copy.deepcopy(model).eval().requires_grad_(False).double()
        network = fx.GraphModule(own, _Tracer().trace(own))
    except Exception as error:  # whatever copying or tracing a foreign model raises
        raise CannotBound(str(error)) from error
    modules = dict(network.named_modules())
    for module in modules.values():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise CannotBound(f"{type(module).__name__} with a hook or a forward of its own")
    with torch.no_grad():
        still = Intervals(network).run(Ball(images.double(), 0.0, "linf").interval())
        logits = model(images.to(next(iter(dtypes), torch.float32)))
    scale = max(float(still.center.abs().max()), 1e-30) if still.center.numel() else 1.0
    if logits.shape != still.center.shape or not torch.allclose(
        logits.double() / scale, still.center / scale, atol=1e-4
    ):
        raise CannotBound("its graph does not compute what the model does")
    return network


class Intervals(fx.Interpreter):
    """Intervals of all values of a network; keeps those in front of ReLUs, by node.

    Raises:
        CannotBound: at the first module or function that is not known.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.relus: dict[fx.Node, Interval] = {}
        self.only_relu = True
        self._node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        (x,) = args
        if not isinstance(x, Interval) or kwargs:
            raise CannotBound(str(target))
        if type(module) in _MONOTONE_MODULES:
            return self._monotone(module, x, is_relu=type(module) is nn.ReLU)
        if type(module) is nn.Linear:
            return Interval(module(x.center), F.linear(x.radius, module.weight.abs()))
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            radius = F.conv2d(
                x.radius, module.weight.abs(), None, module.stride, module.padding,
                module.dilation, module.groups,
            )  # fmt: skip
            return Interval(module(x.center), radius)
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) or hasattr(module, "channel_affine"):
            if getattr(module, "running_mean", self) is None:
                raise CannotBound("BatchNorm without statistics")
            # the slope of each channel is what one more of everything changes
            slope = module(torch.ones_like(x.center)) - module(torch.zeros_like(x.center))
            return Interval(module(x.center), slope.abs() * x.radius)
        if type(module) in _AFFINE_MODULES and type(module) is not nn.Conv2d:
            return Interval(module(x.center), module(x.radius))
        raise CannotBound(f"{target}, {type(module).__name__}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _SUMS:
            return self._sum(target, args, kwargs)
        rest = args[1:]
        x = args[0] if args else None
        others = [*rest, *kwargs.values()]
        if not isinstance(x, Interval) or any(isinstance(y, Interval | Tensor) for y in others):
            raise CannotBound(str(target))
        if target in _MONOTONE:
            apply = self._applied(target, rest, kwargs)
            return self._monotone(apply, x, is_relu=target in _RELUS)
        if target in _AVERAGES:
            apply = self._applied(target, rest, kwargs)
            return Interval(apply(x.center), apply(x.radius))
        raise CannotBound(str(target))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "size" and isinstance(args[0], Interval):
            return args[0].center.size(*args[1:])
        return self.call_function(target, args, kwargs)

    @staticmethod
    def _applied(target: Any, rest: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            call = getattr(x, target) if isinstance(target, str) else None
            found: Tensor = call(*rest, **kwargs) if call else target(x, *rest, **kwargs)
            return found

        return apply

    def _monotone(self, apply: Callable[[Tensor], Tensor], x: Interval, *, is_relu: bool) -> Any:
        assert self._node is not None
        if is_relu:
            self.relus[self._node] = x
        else:
            self.only_relu = False
        low, high = x.low, x.high  # an activation may work in place
        return _between(apply(low), apply(high))

    def _sum(self, target: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or len(args) != 2:
            raise CannotBound(str(target))
        first, second = args
        if not isinstance(first, Interval):
            first, second = second, first
        if not isinstance(first, Interval):
            return first + second
        if isinstance(second, Interval):
            return Interval(first.center + second.center, first.radius + second.radius)
        return Interval(first.center + second, first.radius)


# -- linear relaxation ----------------------------------------------------------------------------


class _LinearRelu(torch.autograd.Function):
    """A ReLU between its linear bounds; its backward pass walks along the lower bound of a sum.

    Forward returns zeros: then what reaches the next ReLU is the bias of the affine map between
    them. Backward turns the coefficients of the ReLU's outputs into those of its inputs; what the
    bounds and the biases contribute is the gradient of ``constants`` [N].
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, low: Tensor, high: Tensor, constants: Tensor) -> Tensor:
        ctx.save_for_backward(bias, low, high)
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        bias, low, high = ctx.saved_tensors
        (coefficients,) = gradients
        # above: the line from (low, 0) to (high, high); below: 0 or x, what is nearer
        slope = high.clamp(min=0) / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=1e-300)
        slope = torch.where(low >= 0, torch.ones_like(slope), slope)
        offset = torch.where(low >= 0, torch.zeros_like(slope), -slope * low.clamp(max=0))
        below = (high > -low).to(slope)
        below = torch.where(low >= 0, torch.ones_like(slope), below)
        below = torch.where(high <= 0, torch.zeros_like(slope), below)
        negative = coefficients.clamp(max=0)
        passed = coefficients.clamp(min=0) * below + negative * slope
        return passed, None, None, (negative * offset + passed * bias).flatten(1).sum(dim=1)


class Relaxed(fx.Interpreter):
    """Lower bounds of sums of a ReLU network's values over a ball.

    Images are repeated, so that one backward walk bounds a column of values in each copy: small
    networks cost calls, not rows. ``most_columns`` are ever bounded, so no more copies are made.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        intervals: dict[fx.Node, Interval],
        ball: Ball,
        max_tightened: int,
        most_columns: int,
    ) -> None:
        super().__init__(network)
        self._max_tightened = max_tightened
        self._num_images = len(ball.images)
        self._copies = min(max(ROWS_AT_ONCE // max(self._num_images, 1), 1), most_columns)
        images = ball.images.repeat(self._copies, 1, 1, 1)
        self._intervals, self._ball = intervals, Ball(images, ball.epsilon, ball.norm)
        self._leaf = torch.zeros_like(images).requires_grad_()
        self._constants = images.new_zeros(len(images)).requires_grad_()
        self._behind_relu = False
        self.ranges: list[tuple[Tensor, Tensor]] = []  # of what each ReLU reads, [N, ...]

    def margins(self, labels: Tensor) -> Tensor:
        """[N, K]: of logit y minus logit k."""
        with torch.enable_grad():
            logits = self.run(self._leaf)
            own = logits.gather(1, labels.repeat(self._copies).unsqueeze(1))
            return self._lower((own - logits), range(logits.shape[1]))

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._intervals:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        bias, interval = args[0], self._intervals[n]
        low, high = interval.low, interval.high
        if self._behind_relu:
            low, high = self._tightened(bias.flatten(1), low, high)
        self.ranges.append((low, high))
        self._behind_relu = True
        shape = (self._copies, *(1 for _ in low.shape[1:]))
        low, high = low.repeat(shape), high.repeat(shape)
        return _LinearRelu.apply(bias, low, high, self._constants)

    def _tightened(self, bias: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals of a ReLU's inputs no wider than they are, if few of them hold 0 inside."""
        shape = low.shape
        low, high = low.flatten(1).clone(), high.flatten(1).clone()
        open_ = ((low < 0) & (high > 0)).any(dim=0).nonzero()[:, 0].tolist()
        if len(open_) <= self._max_tightened:
            low[:, open_] = torch.maximum(low[:, open_], self._lower(bias, open_))
            high[:, open_] = torch.minimum(high[:, open_], -self._lower(-bias, open_))
            high = torch.maximum(high, low)  # rounding
        return low.view(shape), high.view(shape)

    def _lower(self, values: Tensor, columns: Sequence[int]) -> Tensor:
        """[N, len(columns)]: bounds of these columns of ``values``, repeated [copies N, M]."""
        rows = torch.arange(len(values), device=values.device).view(self._copies, -1)
        found = [values.new_zeros(0, self._num_images)]
        for first in range(0, len(columns), self._copies):
            part = torch.tensor(columns[first : first + self._copies], device=values.device)
            value = values[rows[: len(part)], part[:, None]]
            gradient, constants = torch.zeros_like(self._leaf), torch.zeros_like(self._constants)
            if value.requires_grad:
                its = torch.autograd.grad(
                    value.sum(),
                    (self._leaf, self._constants),
                    retain_graph=True,
                    allow_unused=True,
                )
                gradient, constants = (
                    old if new is None else new
                    for old, new in zip((gradient, constants), its, strict=True)
                )
            bound = (self._ball.smallest(gradient) + constants).view_as(rows)
            found.append(value + bound[: len(part)])
        return torch.cat(found).T.detach()
