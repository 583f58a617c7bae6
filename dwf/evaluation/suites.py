"""Named lists of attacks: what a table of results consists of."""

from __future__ import annotations

from dataclasses import dataclass

from dwf.config import EvaluationConfig


@dataclass(frozen=True)
class AttackSpec:
    """One row of a table. ``kind``: clean, fgsm, pgd, multi_start or adaptive."""

    name: str
    kind: str
    epsilon: float = 0.0
    step_size: float | None = None
    num_steps: int = 0
    num_restarts: int = 1
    random_start: bool = False
    eot_samples: int = 1


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
