"""Losses that an attack maximizes: logits [B, K] and labels [B] to one loss an image, [B]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwf.checks import ConfigError, check_choice

Model = Callable[[Tensor], Any]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image [B], in float32 whatever the precision of the logits.

    Attacks sum it over the batch: the same sign as the mean's gradient, and no underflow.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The highest logit of another class minus the label's, [B]: positive where the model errs.

    Source: f_6 of Carlini and Wagner, arXiv:1608.04644.
    """
    logits = logits.float()
    own = logits.gather(1, labels.unsqueeze(1))
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.amax(dim=1) - own.squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, [B]: the margin over the gap of the first to the third logit.

    It does not change with the scale of the logits. With fewer than three classes it is the margin.
    Source: eq. (5) of arXiv:2003.01690.
    """
    difference = margin(logits, labels)
    if logits.shape[1] < 3:
        return difference
    top = logits.float().topk(3, dim=1).values
    return difference / (top[:, 0] - top[:, 2] + 1e-12)


@dataclass(frozen=True, eq=False)
class TargetLoss:
    """A loss that compares each image's logits with something else than its label.

    Attributes:
        function: ``function(logits, targets)`` gives the losses [B]; labels are ignored.
        targets: [B, ...], one row per image.
        are_classes: targets name classes, so they are checked against the logits' width.
    """

    function: Loss
    targets: Tensor
    are_classes: bool = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.function(logits, self.targets)

    def subset(self, keep: Tensor) -> TargetLoss:
        """The loss of some of the images: a mask [B] or an index."""
        return replace(self, targets=self.targets[keep])


@dataclass(frozen=True)
class Objective:
    """A loss without the rows it compares logits with, so that equal losses are equal objects.

    Attributes:
        function: ``function(logits, rows)`` gives the losses [B].
        of_targets: the rows are a `TargetLoss`'s targets, not the labels.
        are_classes: as of `TargetLoss`.
    """

    function: Loss
    of_targets: bool = False
    are_classes: bool = False

    def of(self, rows: Tensor) -> Loss:
        """The loss with these rows, [B, ...]."""
        if not self.of_targets:
            return self.function
        return TargetLoss(self.function, rows, self.are_classes)


def of_rows(loss: Loss, keep: Tensor) -> Loss:
    """The loss of some of the images: a mask [B] or an index."""
    return loss.subset(keep) if isinstance(loss, TargetLoss) else loss


def parted(loss: Loss, labels: Tensor) -> tuple[Objective, Tensor]:
    """A loss as its objective and its rows [B, ...]; ``objective.of(rows)`` is the loss again."""
    if isinstance(loss, TargetLoss):
        return Objective(loss.function, True, loss.are_classes), loss.targets
    return Objective(loss), labels


def toward(loss: Loss, targets: Tensor) -> TargetLoss:
    """Minus the loss with ``targets`` [B] for labels: an attack that maximizes it seeks them."""
    return TargetLoss(Minus(loss), targets, are_classes=True)


@dataclass(frozen=True)
class Minus:
    """A loss times -1."""

    loss: Loss

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -self.loss(logits, labels)


def targeted_dlr(labels: Tensor, targets: Tensor) -> TargetLoss:
    """Difference of logits ratio toward ``targets`` [B], away from ``labels`` [B].

    (z_t - z_y) / (z_1 - (z_3 + z_4) / 2), where z_1 to z_4 are the highest logits in order. With
    fewer than four classes it is z_t - z_y. Source: eq. (6) of arXiv:2003.01690.
    """
    return TargetLoss(_targeted_dlr, torch.stack([labels, targets], dim=1), are_classes=True)


def _targeted_dlr(logits: Tensor, classes: Tensor) -> Tensor:
    logits = logits.float()
    label, target = logits.gather(1, classes).unbind(dim=1)
    if logits.shape[1] < 4:
        return target - label
    top = logits.topk(4, dim=1).values
    return (target - label) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# The losses that an attack can be told by name; with targets there is one more.
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED_DLR = "dlr-targeted"


def check_loss(loss: str | Loss) -> None:
    """Require a loss by name or as a function; ConfigError."""
    if isinstance(loss, str):
        check_choice(loss, [*LOSSES, TARGETED_DLR], "loss")
    elif not callable(loss):
        raise ConfigError(f"loss: {loss!r}, expected a name or a function (logits, labels) to [B]")


def objective(loss: str | Loss, labels: Tensor, targets: Tensor | None = None) -> Loss:
    """The function that an attack maximizes, from what its caller named.

    Args:
        loss: "ce", "dlr", "margin", "dlr-targeted", or ``loss(logits, labels)`` to [B].
        labels: [B] int64.
        targets: [B] int64, classes to be reached: minus the loss toward them is maximized. With
            targets "dlr" is "dlr-targeted", which is maximized itself.
    Raises:
        ConfigError: an unknown name; "dlr-targeted" without targets.
    """
    check_loss(loss)
    if targets is not None and loss in ("dlr", TARGETED_DLR):
        return targeted_dlr(labels, targets)
    if loss == TARGETED_DLR:
        raise ConfigError(f"loss: {loss!r} needs targets")
    function = LOSSES[loss] if isinstance(loss, str) else loss
    return function if targets is None else toward(function, targets)


def name_of(loss: Loss) -> str | None:
    """The name of a loss in `LOSSES`, None if it has none there."""
    return next((name for name, known in LOSSES.items() if known is loss), None)


def kl_from(clean_logits: Tensor) -> TargetLoss:
    """KL(p, q) of each image [B]: p from ``clean_logits`` [B, K], q from the attacked logits.

    Without a gradient to p.
    """
    return TargetLoss(_kl_from, clean_logits.detach().float().log_softmax(dim=1))


def _kl_from(logits: Tensor, log_p: Tensor) -> Tensor:
    return kl_divergence(log_p, logits.float().log_softmax(dim=1))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) = sum_k p_k (log p_k - log q_k) of each row [B], from log-probabilities [B, K].

    Differentiable in both; finite where p underflows to 0, also its gradient.
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
