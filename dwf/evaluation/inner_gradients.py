"""Count the gradients that a model takes inside its own forward pass.

A forward that optimizes (purification, test-time adaptation, an anti-adversary layer) is not
differentiated as it computes, so attacks by its gradient are weak. AutoAttack's check_dynamic looks
for the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.autograd

_lock = threading.Lock()


def num_inner_gradients(forward: Callable[[], Any]) -> int:
    """Calls of autograd's engine, by grad() or backward(), while ``forward()`` runs."""
    with _counted() as calls:
        forward()
    return len(calls)


@contextmanager
def _counted() -> Iterator[list[None]]:
    calls: list[None] = []
    # both of torch's ways to a gradient look this up in their module
    module: Any = torch.autograd
    with _lock:
        engine = module._engine_run_backward

        def counting(*arguments: Any, **options: Any) -> Any:
            calls.append(None)
            return engine(*arguments, **options)

        module._engine_run_backward = counting
        try:
            yield calls
        finally:
            module._engine_run_backward = engine
