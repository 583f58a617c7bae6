"""Tell from a search's progress which images it may leave: those it would not break if it went on.

Searches gain most in their first steps. One that has lowered the margin for long, and would still
have to lower it by more than half as much again, has nothing to hope for. One that has gained next
to nothing tells nothing, as where gradients are masked: it goes on.

That is a rule of thumb. An ensemble holds it to account: of the images that an attack gave up some
are drawn, the controls, and searched to the end all the same. If one of them falls, the rule is
wrong about this model, and all that were given up are searched to the end; see
`dwf.attacks.ensemble`.
"""

from __future__ import annotations

from torch import Tensor

# Still missing, as a share of what was gained: several times what searches gain after they are
# asked. `benchmarks/suite_time.py` holds the images broken against those of the original suite.
TOO_FAR = 0.5
# Gained, as a share of what was missing at the start: less is no progress to judge by.
FEWEST_GAINED = 0.02


def is_hopeless(missing_at_first: Tensor, missing: Tensor) -> Tensor:
    """[B] bool: from what was missing [B] until the model is fooled, at the start and now."""
    gained = missing_at_first - missing
    told = gained >= FEWEST_GAINED * missing_at_first
    return told & (missing > TOO_FAR * gained)
