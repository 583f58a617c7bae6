"""Compare modules by everything but their weights, and run them without changing their state."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_VALUES = (bool, int, float, str, type(None))
_PLAIN = frozenset(_VALUES)


class _Itself:
    """Compares an object by identity, and keeps it alive so that no other one gets its address."""

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)


def all_modules(network: nn.Module) -> list[nn.Module]:
    """What `modules()` yields, in a fraction of its time: attacks look through all at each call."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [network]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += reversed(module._modules.values())
    return list(found.values())


def kept_tensors(network: nn.Module) -> list[Tensor]:
    """Every tensor that a module or one inside keeps, registered or not."""
    loose = [x for module in all_modules(network) for x in vars(module).values()]
    registered = *network.parameters(), *network.buffers()
    return [*registered, *(x for x in loose if isinstance(x, Tensor))]


def structure(network: nn.Module) -> list[Any]:
    """Everything that decides what a network computes, except the numbers in its tensors.

    Two results are equal if a plan of the one network is a plan of the other. Modules and their
    attributes are compared by identity, plain values by value. The outermost module may be a
    wrapper made for this call: it is compared by its class and its contents.
    """
    found: list[Any] = [type(network), *_own_tensors(network)]
    for module in all_modules(network):
        own = None if module is network else _Itself(module)
        found.append((own, tuple(module._modules), has_hooks(module)))
        found += [
            (key, value if type(value) in _PLAIN else _fact(value))
            for key, value in vars(module).items()
            if key not in _INTERNAL and not isinstance(value, Tensor)
        ]
        found += ((key, value is None) for key, value in module._parameters.items())
        found += ((key, value is None) for key, value in module._buffers.items())
    first = next(network.parameters(), None)
    return [*found, None if first is None else first.device]


def has_hooks(module: nn.Module) -> bool:
    """Whether something besides `forward` runs when it is called or differentiated."""
    return any(getattr(module, name) for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether something runs when any module is called."""
    return any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS)


@contextlib.contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode, as `eval()` understands it; the modes are the same as before afterwards."""
    modes = [(x, x.training) for x in module.modules()]
    if any(training for _, training in modes):
        with contextlib.suppress(NotImplementedError):  # exported programs have no mode
            module.eval()
    try:
        yield
    finally:
        for x, training in modes:
            if x.training is not training:
                x.training = training


class RandomState:
    """The state of every generator that a forward may draw from, to be compared and restored."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = _cuda_states()
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        state = () if numpy is None else numpy.random.get_state()
        self._numpy = [x.tolist() if hasattr(x, "tolist") else x for x in state]

    def restore(self) -> bool:
        """Put everything back; whether there was something to put back."""
        now = RandomState()
        same = (
            torch.equal(now._torch, self._torch)
            and all(torch.equal(a, b) for a, b in zip(now._cuda, self._cuda, strict=False))
            and now._python == self._python
            and now._numpy == self._numpy
        )
        if same:
            return False
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy:
            sys.modules["numpy"].random.set_state(tuple(self._numpy))
        return True


def _cuda_states() -> list[Tensor]:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []


def _own_tensors(module: nn.Module) -> list[_Itself]:
    """Parameters and buffers of the outermost module, which a new wrapper might not share."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [_Itself(x) for x in (*held, *vars(module).values()) if isinstance(x, Tensor)]


def _fact(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_fact(x) for x in value)
    return value if isinstance(value, _VALUES) else _Itself(value)
