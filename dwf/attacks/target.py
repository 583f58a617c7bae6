"""Prepare a model to be attacked: find its plan, or the reason why it has none.

A plan computes what the model computes, faster: an object with the members of `AttackPlan` is one,
and `moe_kernels.Plan` is ours. Attacks search by the plan; which images are fooled is decided by
the model itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

import moe_kernels
from dwf.attacks.door import ask, model_name
from dwf.attacks.losses import Loss, Model
from dwf.checks import DwfError
from moe_kernels import CannotPlan
from moe_kernels.errors import in_one_line
from moe_kernels.graphs import Graphs

log = logging.getLogger("dwf")


class AttackPlan(Protocol):
    """Logits and gradients of a model, computed in another way than by its modules.

    To give attacks a faster way through a model, write a class with these members and attack an
    object of it in the model's place, or return one from the model's ``attack_plan(dtype=None)``.
    If it has a ``prepare(images)``, attacks call that first; it raises `moe_kernels.CannotPlan` for
    images that the plan does not hold for. If it has a list ``called``, only those modules' code
    runs in its calls, and an attack copies nothing else of the model to put it back.
    """

    @property
    def deterministic(self) -> bool:
        """Whether equal images give equal results, so that one pass stands for many samples."""
        ...

    @property
    def back_end(self) -> str:
        """What it runs on, for reports."""
        ...

    @property
    def graphs(self) -> Graphs | None:
        """Where attacks keep CUDA graphs of `gradient`; None if it must not be captured.

        The plan empties it, by `Graphs.forget`, when memory that `gradient` reads moves.
        """
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        ...

    def gradient(
        self, images: Tensor, labels: Tensor, loss: Loss | str = "ce"
    ) -> tuple[Tensor, Tensor]:
        """Gradient [B, C, H, W] float32 of the loss, summed over the batch, and logits [B, K].

        Args:
            labels: [B], or whatever [B, ...] the loss compares logits with.
            loss: "ce" for the cross-entropy, else ``loss(logits, labels)`` to [B].
        """
        ...

    def gflop_per_image(self, image_shape: Sequence[int]) -> float | None:
        """Operations of one logits-and-gradient pass of an image [C, H, W]; None if not known."""
        ...


@dataclass(repr=False)
class AttackReport:
    """What ran in an attack, and how fast. Empty before the attack.

    Attributes:
        back_end: "autograd", or what the plan ran on.
        reason: why there was no plan.
        graph: whether steps were captured in a CUDA graph, or why not.
        num_images: the size of the batch.
        passes: gradients, counted per image.
        num_forwards, num_backwards: image-passes; a gradient is one of each.
        seconds: wall time of the attack.
        gflop_per_image: of one pass, as torch counts; None where there is no plan to count.
        given_up: [B] bool, images that stand and that a search left early; None of attacks that
            were not to give up.
    """

    back_end: str = ""
    reason: str | None = None
    graph: str = ""
    num_images: int = 0
    passes: int = 0
    num_forwards: int = 0
    num_backwards: int = 0
    seconds: float = 0.0
    gflop_per_image: float | None = None
    given_up: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def steps_per_s(self) -> float:
        """Gradients of the whole batch per second."""
        return self.passes / max(self.num_images, 1) / max(self.seconds, 1e-9)

    @property
    def tflop_per_s(self) -> float | None:
        """10^12 operations per second of the plan; None where there is no plan to count."""
        if self.gflop_per_image is None:
            return None
        return self.gflop_per_image * self.passes / max(self.seconds, 1e-9) / 1e3

    def __str__(self) -> str:
        rate = "" if self.tflop_per_s is None else f", {self.tflop_per_s:.3g} TFLOP/s"
        reason = "" if self.reason is None else f" ({self.reason})"
        return (
            f"{self.back_end}{reason}; {self.graph}; {self.passes} image-passes in "
            f"{self.seconds:.3g} s: {self.steps_per_s:.3g} steps/s{rate}"
        )

    def __repr__(self) -> str:
        return f"AttackReport({self if self.back_end else 'empty'})"


@dataclass(frozen=True, repr=False)
class AttackTarget:
    """A model made ready to be attacked with the weights of this moment.

    Give it to several attacks in a row, in place of the model, to make ready only once.

    Attributes:
        model: what is attacked, and what decides who is fooled.
        plan: the fast path, or None.
        reason: why there is no plan, or none but autograd's with products in bfloat16.
        dtype: of autograd's activations on a GPU where there is no plan; None is the model's own.
    """

    model: Model
    plan: AttackPlan | None = None
    reason: str | None = None
    dtype: torch.dtype | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """What the model itself returns."""
        logits: Tensor = ask(self.model, images)
        return logits

    def __str__(self) -> str:
        return str(self.plan) if self.plan is not None else f"autograd ({self.reason})"

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        return f"AttackTarget({name}, {self})"


def inner_model(model: Model) -> Model:
    """The module inside DataParallel, DistributedDataParallel and torch.compile.

    It may have a plan, and an attack on it starts no communication.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = cast(Model, model.module)
        elif type(model).__name__ == "OptimizedModule":  # importing its class takes seconds
            model = cast(Any, model)._orig_mod
        else:
            return model


def attack_target(
    model: Model | AttackTarget,
    images: Tensor,
    *,
    bn_mode: str = "eval",
    dtype: torch.dtype | None = None,
) -> AttackTarget:
    """The model with its plan, if it offers one that holds for images of this size.

    Args:
        model: or a plan; or an AttackTarget, which keeps its plan where the other arguments allow.
        images: [B, C, H, W]; their size and device count.
        bn_mode: with "train" there is no plan: BatchNorm is folded into it.
        dtype: of the plan's activations, by default that of `attack_plan`; without a plan that of
            autocast on a GPU, by default none.

    Why a model that offers a plan has none is logged once. Under
    ``moe_kernels.implementation("reference")`` there is no plan.
    """
    known: AttackPlan | None = None
    before: str | None = None  # why there was no better plan
    if isinstance(model, AttackTarget):
        if model.plan is None:
            return model
        known, before, model = model.plan, model.reason, model.model
    model = inner_model(model)
    plan, reason = _plan_or_reason(model, known, images, bn_mode, dtype)
    return AttackTarget(model, plan, reason or before, None if plan is not None else dtype)


def _plan_or_reason(
    model: Model,
    known: AttackPlan | None,
    images: Tensor,
    bn_mode: str,
    dtype: torch.dtype | None,
) -> tuple[AttackPlan | None, str | None]:
    if bn_mode != "eval":
        return None, "BatchNorm uses batch statistics"
    if moe_kernels.named_implementation() == "reference":
        return None, "the reference was asked for"
    if hasattr(model, "gradient") and hasattr(model, "back_end"):  # a plan itself
        return cast(AttackPlan, model), None
    if len(images) == 0:
        return None, "no images"
    if known is None and not hasattr(model, "attack_plan"):
        return None, "the model offers no plan, see dwf.accelerate"
    try:
        plan = known or cast(Any, model).attack_plan(dtype=dtype)
        if hasattr(plan, "prepare"):
            plan.prepare(images)
    except (DwfError, torch.OutOfMemoryError):
        raise
    except CannotPlan as error:
        reason = str(error)
    except Exception as error:  # whatever a model's code raises where a plan looks at it
        reason = in_one_line(error)
    else:
        return plan, None
    _log_once(f"{model_name(model)} is attacked by autograd: {reason}")
    return _reduced_plan(model, images, dtype), reason


def _reduced_plan(model: Model, images: Tensor, dtype: torch.dtype | None) -> AttackPlan | None:
    """Autograd with products in bfloat16, if the model offers it and float32 was not asked for."""
    if dtype not in (None, torch.bfloat16) or not hasattr(model, "autograd_plan"):
        return None
    try:
        plan = cast(Any, model).autograd_plan()
        plan.prepare(images)
    except (DwfError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # CannotPlan, or whatever a model's code raises
        log.info("%s keeps its own precision: %s", model_name(model), in_one_line(error))
        return None
    return cast(AttackPlan, plan)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
