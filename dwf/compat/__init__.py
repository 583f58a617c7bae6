"""Other tools' call signatures over our attacks, so that old scripts run unchanged.

    from dwf.compat import AutoAttack            # in place of: from autoattack import AutoAttack
    adversary = AutoAttack(model, norm="Linf", eps=8 / 255)
    x_adv = adversary.run_standard_evaluation(x_test, y_test, bs=250)

    from dwf.compat import benchmark, load_cifar10    # in place of: from robustbench import ...
    clean, robust = benchmark(model, n_examples=1000, eps=8 / 255, aa_state_path="state")

The arguments, attributes and defaults are those of AutoAttack and RobustBench; the attacks, the
checks and the float32 verdict are ours. The only place where their spellings live.

Sources: Croce and Hein, arXiv:2003.01690; Croce et al., arXiv:2010.09670.
"""

from dwf.compat.autoattack import AutoAttack
from dwf.compat.robustbench import (
    benchmark,
    clean_accuracy,
    load_cifar10,
    load_cifar100,
    load_model,
)

__all__ = [
    "AutoAttack",
    "benchmark",
    "clean_accuracy",
    "load_cifar10",
    "load_cifar100",
    "load_model",
]
