"""List the attacks of each suite, row by row.

    paper      the grid of DWF's tables, every attack on every image
    quick      APGD-CE, targeted APGD-DLR, a mixture's views, and a short Square
    standard   AutoAttack's four attacks, with the views before the last of them
    full       standard, and the gradient attacks again with twice the steps and new starts

In quick and standard, images leave searches that hardly would break them, as
`dwf.attacks.prospect` tells; controls, and what questions the suite, may have them searched to the
end. Full never gives up.

Square comes last because it needs no gradients: what it breaks, gradients should have broken. All
suites but the first run attacks in turn, each on the images that still stand, and a row's accuracy
is what stands after it. Measurements that doubt them follow, see :mod:`dwf.evaluation.doubts`.

Rows in turn name attacks of `dwf.attacks.table`; "views" is that of `view_attacks.views_entry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dwf.attacks.table import ATTACKS, Passes
from dwf.config import EvaluationConfig
from dwf.evaluation.view_attacks import views_entry
from dwf.models.views import View


class RowInTurn(NamedTuple):
    """An attack of a suite: its key in the table, its length, and its stream of random starts."""

    key: str
    length: int | None = None  # that of the table
    stream: int = 0


# Enough queries to see a masked gradient: where one is, the first hundreds break most of what
# gradients left.
QUICK = (
    RowInTurn("apgd-ce"),
    RowInTurn("apgd-t"),
    RowInTurn("views"),
    RowInTurn("square", length=500),
)
STANDARD = (
    RowInTurn("apgd-ce"),
    RowInTurn("apgd-t"),
    RowInTurn("fab-t"),
    RowInTurn("views"),
    RowInTurn("square"),
)
# Of the full suite, at the largest radius only.
DOUBLED = (RowInTurn("apgd-ce", length=200, stream=1), RowInTurn("apgd-t", length=200, stream=1))
# Images leave searches whose progress says that they would not break them.
GIVE_UP = ("quick", "standard")
IN_TURN = {"quick": QUICK, "standard": STANDARD, "full": STANDARD}
SUITES = ("paper", *IN_TURN)


@dataclass(frozen=True)
class AttackSpec:
    """One row of a table of results.

    Attributes:
        name: as shown.
        kind: clean, fgsm, pgd, multi_start or adaptive in the paper's grid; in turn "clean", a key
            of the table of attacks, or pgd-again, single-step and noise, which doubt the others.
        num_steps: gradients, or queries and draws where there are none.
        stream: added to the seed, for other random starts.
        gives_up: whether images leave its searches early.
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
    gives_up: bool = False


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
    gives_up: bool = False,
) -> list[AttackSpec]:
    """The rows of a suite of attacks in turn: for each radius, ascending, one of each attack.

    Args:
        has_views: the model offers views of itself to be attacked in its place, as mixtures do.
        gives_up: images leave searches early, where the suite may: not those of a model that is
            known to be no function of the image, whose draws look like progress.

    The repetition of the full suite is at the largest radius only.
    """
    table = {**ATTACKS, "views": views_entry(())}
    eot_samples = settings.eot_samples

    def row(attack: RowInTurn, epsilon: float, after: str) -> AttackSpec:
        entry = table[attack.key]
        return AttackSpec(
            f"{entry.name}{after}",
            entry.key,
            epsilon,
            step_size=epsilon / entry.steps_per_radius if entry.steps_per_radius else None,
            num_steps=attack.length or entry.settings[entry.length],
            random_start=entry.random_start,
            eot_samples=eot_samples,
            norm=norm,
            stream=attack.stream,
            gives_up=gives_up and name in GIVE_UP and "gives_up" in entry.settings,
        )

    specs = [AttackSpec("clean", "clean", norm=norm)]
    for epsilon in sorted(set(epsilons)):
        at = f" {epsilon:.4g}" if len(set(epsilons)) > 1 else ""
        attacks = [attack for attack in IN_TURN[name] if has_views or attack.key != "views"]
        specs += [row(attack, epsilon, at) for attack in attacks]
    if name == "full":
        specs += [row(attack, max(epsilons), " doubled") for attack in DOUBLED]
    return specs


def passes_of(specs: Sequence[AttackSpec], num_classes: int, views: Sequence[View] = ()) -> Passes:
    """Passes for one image that no attack of these rows breaks: what an evaluation costs at most.

    Rows of the paper's grid share work: one gradient serves all FGSM radii, and the longest PGD
    contains the shorter ones.
    """
    table = {**ATTACKS, "views": views_entry(views)}
    forwards, backwards = len(specs), 0  # the verdicts
    shared = 0
    for spec in specs:
        if spec.kind in table:
            attack = table[spec.kind]
            options = {attack.length: spec.num_steps, "eot_samples": spec.eot_samples}
            cost = attack.passes(num_classes, **options)
            forwards, backwards = forwards + cost.num_forwards, backwards + cost.num_backwards
        elif spec.random_start or spec.eot_samples > 1:
            gradients = spec.num_steps * spec.num_restarts * spec.eot_samples
            forwards, backwards = forwards + gradients, backwards + gradients
        else:
            shared = max(shared, spec.num_steps)
    return Passes(forwards + shared, backwards + shared)
