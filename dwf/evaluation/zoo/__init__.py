"""Models to prove a verdict on: broken ones of published mechanisms, and honest ones.

`dwf doctor --zoo` runs them through `evaluate` as users do, see :mod:`dwf.evaluation.zoo.trial`.
"""

from dwf.evaluation.zoo.chance import CHANCE
from dwf.evaluation.zoo.deceptions import DECEPTIONS
from dwf.evaluation.zoo.honest_models import HONEST_ZOO
from dwf.evaluation.zoo.inputs import INPUTS
from dwf.evaluation.zoo.outputs import OUTPUTS
from dwf.evaluation.zoo.parts import EPSILON, Parts, Specimen

BROKEN_ZOO: dict[str, Specimen] = {**DECEPTIONS, **INPUTS, **OUTPUTS, **CHANCE}

__all__ = ["BROKEN_ZOO", "EPSILON", "HONEST_ZOO", "Parts", "Specimen"]
