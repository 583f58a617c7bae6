"""Compare a model's fast path with autograd before the model is blamed for its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from dwf.attacks.autograd import Autograd
from dwf.attacks.losses import Model, margin
from dwf.attacks.target import AttackTarget, attack_target
from dwf.evaluation import findings
from dwf.evaluation.limits import PLAN_GRADIENT_BELOW
from dwf.evaluation.record import Finding
from moe_kernels import CannotPlan

NUM_IMAGES = 16


def trusted(
    searched: Model, model: Model, images: Tensor, labels: Tensor
) -> tuple[Model, Finding | None]:
    """``searched``, or the model without its plan if the plan's gradients are not autograd's.

    Looks at the first few images. The caller has put the model into eval mode, without gradients
    to weights.
    """
    images, labels = images[:NUM_IMAGES], labels[:NUM_IMAGES]
    target = attack_target(searched, images)
    if target.plan is None or not target.plan.deterministic or len(images) == 0:
        return searched, None
    try:
        mine = target.plan.gradient(images, labels, margin)[0].flatten(1).double()
    except CannotPlan:
        return searched, None  # attacks find out and say so
    truth = Autograd(model, None).gradient(images, labels, margin)[0].flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(mine, truth, dim=1)
    # where neither has a gradient there is nothing to compare
    cosine = cosine[(mine.abs().amax(dim=1) > 0) | (truth.abs().amax(dim=1) > 0)]
    if len(cosine) == 0 or not float(cosine.median()) < PLAN_GRADIENT_BELOW:
        return searched, None
    finding = findings.plan_gradient(float(cosine.median()))
    return AttackTarget(model, reason="its plan's gradients are not autograd's"), finding
