"""Differentiate a model by autograd, with some of its parts computed by plans.

For models that combine networks in a way that no plan knows, as hard routing with straight-through
gradients: the networks do almost all of the arithmetic, and everything around them stays the
model's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_kernels.graphs import Graphs
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.mixing import Loss, gradients
from moe_kernels.plan.modules import RandomState, evaluated, has_hooks, kept_tensors, structure
from moe_kernels.plan.plan import Plan


class ComposedPlan:
    """A model in eval mode whose parts are replaced by their plans.

    A snapshot of the parts' weights: of the last `refresh`. Everything else is always current: the
    copy shares all tensors, and where one is replaced, `fits` says so.

    Args:
        model: maps images [B, C, H, W] to logits [B, K].
        parts: submodules that map images or feature maps to rows [B, K] or to feature maps. One
            that has methods ``features`` and ``classifier`` may be asked for either. One may have a
            module ``planned_as`` that computes the same, for its plan to be made of.
        dtype: as of `Plan`, for each part.
        shared: the parts' plans, for several models that are made of the same parts.
    Raises:
        CannotPlan: no parts, or the model cannot be copied; at the first batch, if a part that it
            calls cannot be planned. A part that is called later, and cannot be, computes by itself.
    """

    deterministic = False  # as far as we know

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[nn.Module],
        dtype: torch.dtype | None = None,
        *,
        shared: PartPlans | None = None,
    ) -> None:
        if not parts:
            raise CannotPlan("it has no parts to be planned")
        for name, module in model.named_modules():
            if has_hooks(module):
                raise CannotPlan(f"{name or 'the model'} has hooks")
        self._model, self._parts, self._dtype = model, list(parts), dtype
        self._structure, self._tensors = structure(model), kept_tensors(model)
        self._shared = PartPlans() if shared is None else shared
        self._stand_ins = [self._stand_in(part) for part in parts]
        replaced = zip(parts, self._stand_ins, strict=True)
        memo: dict[int, Any] = {id(x): x for x in self._tensors} | {id(x): y for x, y in replaced}
        try:
            self._composed = copy.deepcopy(model, memo)
        except Exception as error:  # whatever its parts raise
            raise CannotPlan(f"it cannot be copied: {error}") from error
        self._ready: set[tuple[int, ...]] = set()  # shapes of images
        self._graphs, self._captured = Graphs(), self._memory()

    @property
    def graphs(self) -> Graphs:
        """Those of its steps; none of memory that has moved."""
        if self._captured != (memory := self._memory()):
            self._graphs.forget()
            self._captured = memory
        return self._graphs

    def _memory(self) -> list[int]:
        """Changes when something that a step reads has moved."""
        ages = [stand_in.age for stand_in in self._stand_ins]
        return [*ages, *(x.data_ptr() for x in self._tensors)]

    @property
    def back_end(self) -> str:
        """The back ends of the parts that were called, and their dtypes."""
        names = sorted(set().union(*(stand_in.back_ends for stand_in in self._stand_ins)))
        return f"autograd around {', '.join(names)}"

    def __str__(self) -> str:
        """As `back_end`: what an evaluation stores about its search."""
        return self.back_end

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        with torch.no_grad(), evaluated(self._composed):
            return cast(Tensor, self._composed(images))

    @torch.enable_grad()
    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        loss: Loss = "ce",
    ) -> tuple[Tensor, Tensor]:
        """Gradient [B, C, H, W] of the summed loss, and logits [B, K]; see `Plan`."""
        leaf = images.detach().float().requires_grad_()
        with evaluated(self._composed):
            logits = self._composed(leaf)
        if isinstance(loss, str):
            total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        else:
            total = loss(logits, labels).sum()
        (grad,) = gradients(total, [leaf])
        return grad, logits.detach()

    def gflop_per_image(self, image_shape: Sequence[int]) -> float | None:
        """None: what is around the parts is not counted."""
        return None

    def prepare(self, images: Tensor) -> None:
        """Make ready for images of this size, which the first call would do as well.

        Raises:
            CannotPlan: a part cannot be planned, or the model draws random numbers or fails.
        """
        if tuple(images.shape[1:]) in self._ready:
            return
        for stand_in in self._stand_ins:
            stand_in.fault = None
        state = RandomState()
        try:
            self(images)
        except Exception as error:  # whatever the model's code raises where a part is replaced
            raise CannotPlan(f"its parts cannot be replaced: {error}") from error
        if state.restore():
            raise CannotPlan("it draws random numbers")
        for stand_in in self._stand_ins:
            if stand_in.fault is not None:
                raise stand_in.fault
        self._ready.add(tuple(images.shape[1:]))

    def refresh(self) -> None:
        """Take over the parts' weights of this moment; see `Plan.refresh`."""
        for stand_in in self._stand_ins:
            stand_in.refresh()

    def _stand_in(self, part: nn.Module) -> Any:
        """What replaces a part: a module with `refresh`, `back_ends`, `age` and `fault`."""
        return self._shared.of(part, self._dtype)

    def fits(self, model: nn.Module, parts: Sequence[nn.Module], dtype: torch.dtype | None) -> bool:
        """Whether a refresh would make this the plan of this model and these parts."""
        return (
            _are_same(parts, self._parts)
            and model is self._model
            and dtype is self._dtype
            and structure(model) == self._structure
            and _are_same(kept_tensors(model), self._tensors)
        )


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


class PartPlans:
    """Plans of parts, by part and dtype: models that share them share the work of making them."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.dtype | None], _StandIn] = {}

    def of(self, part: nn.Module, dtype: torch.dtype | None) -> _StandIn:
        """What stands for the part, with its weights of this moment."""
        known = self._known.get((id(part), dtype))  # which keeps the part alive
        if known is None or not known.fits(dtype):
            known = self._known[id(part), dtype] = _StandIn(part, dtype)
        else:
            known.refresh()
        return known

    def keep(self, parts: Sequence[nn.Module]) -> None:
        """Drop the plans of all other parts."""
        wanted = {id(part) for part in parts}
        self._known = {key: plan for key, plan in self._known.items() if key[0] in wanted}

    def __deepcopy__(self, memo: dict[int, Any]) -> PartPlans:
        return self


class _StandIn(nn.Module):
    """A part's plan as a module that autograd can differentiate with respect to its input.

    Attributes:
        fault: why the part has no plan; it then computes by itself.
    """

    fault: CannotPlan | None = None

    def __init__(self, part: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._split = hasattr(part, "features") and hasattr(part, "classifier")
        computed = _Features(part) if self._split else getattr(part, "planned_as", part)
        if not list(computed.children()):  # a convolution, whose call a trace has to show
            computed = nn.Sequential(part).train(part.training)
        # in a list, no submodules: their parameters are not differentiated
        self._replaced = [part, computed]
        self._plan = Plan([computed], dtype=dtype, maps=True)
        self.refresh = self._plan.refresh

    def fits(self, dtype: torch.dtype | None) -> bool:
        """Whether a refresh would make this stand for what the part is now."""
        return self._plan.fits(self._replaced[1:], None, dtype)

    @property
    def back_ends(self) -> set[str]:
        return self._plan.back_ends

    @property
    def age(self) -> int:
        """Another one when the plan's memory has moved."""
        return self._plan.graphs.age

    def forward(self, x: Tensor) -> Tensor:
        rows = self.features(x)
        return self.classifier(rows) if self._split else rows

    def features(self, x: Tensor) -> Tensor:
        """What the part returns, or what its last layer reads if it is split."""
        if len(x):
            try:
                return cast(Tensor, _Differentiable.apply(x, self._plan))
            except CannotPlan as error:
                self.fault = error
        return _in_eval_mode(self._replaced[1], x)

    def classifier(self, rows: Tensor) -> Tensor:
        """What the part's last layer returns."""
        return _in_eval_mode(cast(nn.Module, self._replaced[0].classifier), rows)


def _in_eval_mode(module: nn.Module, x: Tensor) -> Tensor:
    """The modes of a model's copy are not those of the modules that it shares with the model."""
    with evaluated(module):
        return cast(Tensor, module(x))


class _Features(nn.Module):
    """A network without its last layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.network).features(x))


class _Differentiable(torch.autograd.Function):
    """What a plan returns for images or maps, with their gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, plan: Plan) -> Tensor:
        rows, ctx.way_back = plan.differentiable(images)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way_back(grad), None
