"""Attack a mixture through views of itself; the unmodified model judges.

A view differentiates a part of the model instead of the whole: one expert, a frozen gate, the gate
alone, soft values in place of a choice. It can find what hides behind the gate, and cannot break
what the model itself gets right. At the end a run through the whole model starts at the best image
of all views: the relay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dwf.attacks.door import ask
from dwf.attacks.losses import margin
from dwf.attacks.pgd import pgd
from dwf.attacks.source import judge, voted
from dwf.attacks.surrogate import JUDGE_EVERY, through_surrogate
from dwf.attacks.table import AttackEntry, CraftedInParts, Passes
from dwf.attacks.target import AttackReport, AttackTarget, attack_target
from dwf.evaluation.measures import parts
from dwf.models.views import View

RELAY = "relay"
NUM_SOFT_STARTS = 2
# Where views won: so many steps, from other starts, show whether they find still more.
AGAIN_STEPS = 100
STEPS_PER_RADIUS = 10
# Settings of a PGD that an attack through a soft view shares.
SHARED = ("epsilon", "norm", "num_steps", "eot_samples", "seed", "allow_probabilities")


def prepared(views: Sequence[View], images: Tensor) -> list[View]:
    """The same views; those that hold for any images are made once, with their plans."""
    return [view if view.row_aligned else _prepared(view, images) for view in views]


def _prepared(view: View, images: Tensor) -> View:
    target = attack_target(view.make(images), images)
    return view._replace(make=lambda _: target)


def attack_through_views(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    views: Sequence[View],
    sample_index: Tensor,
    report: AttackReport,
    num_votes: int = 1,
    **settings: Any,
) -> CraftedInParts:
    """PGD through each view in turn, then the relay, on images that the model gets right.

    Args:
        report: gets the sum of all runs' passes.
        num_votes: passes whose mean logits judge a random model.
        settings: of :func:`dwf.attacks.pgd`.
    Returns:
        Adversarial images [B, C, H, W], and for each the number of the view that broke it [B];
        len(views) is the relay, and means nothing for images that stand.
    """
    found, by = images.clone(), torch.full_like(labels, len(views))
    # through a view, the model's own margin says which image is the best start for the relay
    best, best_margin = images.clone(), images.new_full(labels.shape, -torch.inf)
    standing = torch.arange(len(images), device=images.device)
    for number in range(len(views) + 1):
        if len(standing) == 0:
            break
        is_relay = number == len(views)
        attacked = target if is_relay else views[number].make(images[standing])
        own = AttackReport()
        x, y, index = images[standing], labels[standing], sample_index[standing]
        if not is_relay and views[number].soft:  # momentum, the margin, and a random start too
            adversarial = through_surrogate(
                target,
                x,
                y,
                surrogate=attacked,
                row_aligned=views[number].row_aligned,
                num_restarts=NUM_SOFT_STARTS,
                sample_index=index,
                report=own,
                **{name: settings[name] for name in SHARED if name in settings},
            )
        else:
            adversarial = pgd(
                attacked,
                x,
                y,
                random_start=not is_relay,
                start=best[standing] if is_relay else None,
                sample_index=index,
                report=own,
                **settings,
            )
        report.num_forwards += own.num_forwards + num_votes * len(standing)
        report.num_backwards += own.num_backwards
        logits = voted(target.model, adversarial, num_votes)
        correct = judge(logits, labels[standing])[0]
        found[standing] = adversarial
        by[standing[~correct]] = number
        now = margin(logits, labels[standing])
        better = now > best_margin[standing]
        best[standing[better]] = adversarial[better]
        best_margin[standing[better]] = now[better].float()
        standing = standing[correct]
    return CraftedInParts(found, by)


def _cost_of_views(settings: Mapping[str, Any], num_classes: int) -> Passes:
    num_soft = sum(view.soft for view in settings["views"])
    num_runs = len(settings["views"]) - num_soft + 1
    samples, num_steps = settings.get("eot_samples", 1), settings["num_steps"]
    gradients = num_steps * (num_runs + NUM_SOFT_STARTS * num_soft) * samples
    asked = NUM_SOFT_STARTS * num_soft * (num_steps // JUDGE_EVERY + 2) * samples
    verdicts = (num_runs + num_soft) * settings["num_votes"]
    return Passes(gradients + asked + verdicts, gradients)


def views_entry(views: Sequence[View], num_votes: int = 1) -> AttackEntry:
    """The row of the table of attacks for a mixture with these views."""
    return AttackEntry(
        "views",
        "views",
        attack_through_views,
        _cost_of_views,
        {"num_steps": 50, "views": views, "num_votes": num_votes},
        steps_per_radius=STEPS_PER_RADIUS,
        parts=[*(view.name for view in views), RELAY],
    )


def fall_again(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    left: Tensor,
    views: Sequence[View],
    epsilon: float,
    norm: str,
    num_steps: int = AGAIN_STEPS,
    seed: int,
    sample_index: Tensor,
    batch_size: int,
    allow_probabilities: bool = False,
) -> Tensor:
    """[N] bool: images of ``left`` [N] that fall when views attack with these steps and this seed.

    The model is deterministic; it is judged by one pass.
    """
    fell = torch.zeros_like(left)
    for part in parts(torch.nonzero(left)[:, 0], batch_size):
        adversarial = attack_through_views(
            target,
            images[part],
            labels[part],
            views=views,
            sample_index=sample_index[part],
            report=AttackReport(),
            epsilon=epsilon,
            norm=norm,
            step_size=epsilon / STEPS_PER_RADIUS,
            num_steps=num_steps,
            seed=seed,
            allow_probabilities=allow_probabilities,
        ).images
        fell[part] = ~judge(ask(target.model, adversarial), labels[part])[0]
    return fell
