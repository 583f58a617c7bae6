"""Named lists of attacks: what a table of results consists of.

    paper      the grid of DWF's tables, every attack on every image
    quick      APGD-CE, targeted APGD-DLR, a mixture's views, and a short Square
    standard   AutoAttack's four attacks, with the views before the last of them
    full       that, and the gradient attacks again with twice the steps and new starts

Square comes last because it needs no gradients: what it breaks, gradients should have broken. All
but the first are attacks in turn, each on the images that still stand, and a row's accuracy is
what stands after it. Measurements that doubt them follow, see :mod:`dwf.evaluation.doubts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dwf.config import EvaluationConfig

SUITES = ("paper", "quick", "standard", "full")
VIEW_STEPS = 50
# Enough to see a masked gradient: where one is, the first hundreds of queries break most of what
# gradients left.
QUICK_QUERIES = 500


@dataclass(frozen=True)
class AttackSpec:
    """One row of a table.

    ``kind``: clean, fgsm, pgd, multi_start or adaptive in the paper's grid; clean, apgd-ce, apgd-t,
    fab-t, square, views, pgd-again, single-step or noise in turn. ``num_steps`` counts gradients,
    or queries and draws where there are none. ``stream`` is added to the seed, for other random
    starts.
    """

    name: str
    kind: str
    epsilon: float = 0.0
    step_size: float | None = None
    num_steps: int = 0
    num_restarts: int = 1
    random_start: bool = False
    eot_samples: int = 1
    norm: str = "linf"
    stream: int = 0


def paper_suite(settings: EvaluationConfig) -> list[AttackSpec]:
    """The grid of DWF's tables.

    Clean; FGSM at nine radii; PGD with 10 to 50 steps; PGD-100 from three random starts; PGD-100
    with expectation over the model's randomness. With one EoT sample on a deterministic model the
    last is plain PGD-100, and says so.

    Source: tables of arXiv:2512.20821.
    """
    epsilon, step_size = settings.epsilon, settings.step_size
    rows = [AttackSpec("clean", "clean")]
    rows += [
        AttackSpec(f"FGSM {radius:.4g}", "fgsm", radius, radius, 1)
        for radius in settings.fgsm_epsilon
    ]
    rows += [
        AttackSpec(f"PGD-{steps}", "pgd", epsilon, step_size, steps)
        for steps in sorted(set(settings.num_steps))
    ]
    if settings.multi_start_steps:
        rows.append(
            AttackSpec(
                f"multi-start PGD-{settings.multi_start_steps} x{settings.num_restarts}",
                "multi_start",
                epsilon,
                step_size,
                settings.multi_start_steps,
                num_restarts=settings.num_restarts,
                random_start=True,
            )
        )
    if settings.adaptive_steps:
        rows.append(
            AttackSpec(
                f"adaptive PGD-{settings.adaptive_steps}",
                "adaptive",
                epsilon,
                step_size,
                settings.adaptive_steps,
                eot_samples=settings.eot_samples,
            )
        )
    return rows


def suite_in_turn(
    name: str,
    settings: EvaluationConfig,
    epsilons: Sequence[float],
    norm: str = "linf",
    *,
    has_views: bool = False,
) -> list[AttackSpec]:
    """The rows of a suite of attacks in turn: for each radius, ascending, one of each attack.

    Args:
        has_views: the model offers views of itself to be attacked in its place, as mixtures do.

    The repetition of the full suite is at the largest radius only.
    """
    eot: dict[str, Any] = {"eot_samples": settings.eot_samples, "norm": norm}
    specs = [AttackSpec("clean", "clean", norm=norm)]
    for epsilon in sorted(set(epsilons)):
        at = f" {epsilon:.4g}" if len(set(epsilons)) > 1 else ""
        specs.append(
            AttackSpec(f"APGD-CE{at}", "apgd-ce", epsilon, num_steps=100, random_start=True, **eot)
        )
        specs.append(
            AttackSpec(f"APGD-T{at}", "apgd-t", epsilon, num_steps=100, random_start=True, **eot)
        )
        if name != "quick":
            specs.append(AttackSpec(f"FAB-T{at}", "fab-t", epsilon, num_steps=100, **eot))
        if has_views:
            step = epsilon / 10
            specs.append(
                AttackSpec(f"views{at}", "views", epsilon, step, num_steps=VIEW_STEPS, **eot)
            )
        queries = QUICK_QUERIES if name == "quick" else 5000
        specs.append(AttackSpec(f"Square{at}", "square", epsilon, num_steps=queries, **eot))
    if name == "full":
        again: dict[str, Any] = {"num_steps": 200, "random_start": True, "stream": 1, **eot}
        specs += [
            AttackSpec(f"{label} doubled", kind, max(epsilons), **again)
            for label, kind in (("APGD-CE", "apgd-ce"), ("APGD-T", "apgd-t"))
        ]
    return specs
