"""Fused kernels for mixtures of networks, each held to its definition in plain torch.

Importing this package touches no GPU and compiles nothing.
"""

from .linf_step import linf_step_
from .noise import uniform_noise
from .op import decompositions, implementation, named_implementation
from .softmax_combine import softmax_combine, softmax_combine_cross_entropy

__all__ = [
    "decompositions",
    "implementation",
    "linf_step_",
    "named_implementation",
    "softmax_combine",
    "softmax_combine_cross_entropy",
    "uniform_noise",
]
