"""Call a model that is not ours, and leave it as it was: `ask` and `undisturbed`.

Every pass through a foreign model goes through `ask`: it gives images in the model's own dtype,
lends no tensor that the model could change, fills up batches for models of one fixed batch size,
and says in one line which model failed. All that happens inside `undisturbed`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from dwf.attacks.losses import Model
from dwf.checks import DwfError, ModelError, check_choice
from moe_kernels import CannotPlan
from moe_kernels.plan.modules import RandomState, all_modules

log = logging.getLogger("dwf")

BN_MODES = ("eval", "train")
# Batch sizes to try on a model that refuses another one: exported programs and traces have one.
_SIZES = (1, 2, 4, 8, 10, 16, 32, 50, 64, 100, 128, 256)
# Attributes of modules that are put back; others are objects, which may have any state.
_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None), Tensor)

_lock = threading.RLock()
_fixed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


# One pass ---------------------------------------------------------------------------------------


def ask(model: Model, images: Tensor) -> Any:
    """What a model returns for images [B, C, H, W], differentiable where the model is.

    The model sees a copy in its own floating dtype. A model that takes batches of one size alone is
    given such batches, filled up with the first image.

    Raises:
        ModelError: the model raises; the message names it, what it said, and the images' shape.
    """
    about_to_call()
    size = _fixed_size(model)
    if size is not None:
        return _in_batches_of(size, model, images)
    try:
        return model(_lent(model, images))
    except (DwfError, CannotPlan, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code raises
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            raise
        size = _working_size(model, images, str(error))
        if size is None:
            raise _failure(model, images, error) from error
    log.warning(
        "%s takes batches of %d images alone: others are filled up", model_name(model), size
    )
    _fixed[model] = size
    return _in_batches_of(size, model, images)


def model_name(model: Model) -> str:
    """The model's class, or the name of a function."""
    return getattr(model, "__name__", type(model).__name__)


def dtype_of(model: Model) -> torch.dtype:
    """The dtype of a model's first floating parameter or buffer; float32 if it has none."""
    if isinstance(model, nn.Module):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def _lent(model: Model, images: Tensor) -> Tensor:
    return images.to(dtype_of(model), copy=True)


def _failure(model: Model, images: Tensor, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or ["(no message)"]
    return ModelError(
        f"model {model_name(model)} fails on images {list(images.shape)} {images.dtype}: "
        f"{type(error).__name__}: {lines[-1] if lines[0].startswith('The following') else lines[0]}"
    )


def _fixed_size(model: Model) -> int | None:
    try:
        return _fixed.get(model)
    except TypeError:  # no weak reference to it
        return None


def _working_size(model: Model, images: Tensor, message: str) -> int | None:
    """A batch size that the model takes; its message may say which."""
    try:
        weakref.ref(model)
    except TypeError:
        return None
    if len(images) == 0:
        return None
    if _takes(model, images[:1], len(images)):
        return None  # it failed by chance
    told = [int(number) for number in re.findall(r"\b\d{1,4}\b", message)][:8]
    for size in dict.fromkeys([*told, *_SIZES]):
        if size not in (0, len(images)) and _takes(model, images[:1], size):
            return size
    return None


def _takes(model: Model, image: Tensor, size: int) -> bool:
    """Whether the model has logits for so many copies of an image."""
    copies = image.detach().expand(size, *image.shape[1:])
    with contextlib.suppress(Exception), torch.no_grad():
        output = model(_lent(model, copies))
        return isinstance(output, Tensor) and output.dim() == 2 and len(output) == size
    return False


def _in_batches_of(size: int, model: Model, images: Tensor) -> Tensor:
    outputs = []
    for part in torch.split(images, size) if len(images) else [images]:
        missing = size - len(part)
        filler = (part[:1] if len(part) else part.new_zeros(1, *part.shape[1:])).detach()
        whole = torch.cat([part, filler.expand(missing, *part.shape[1:])]) if missing else part
        try:
            outputs.append(model(_lent(model, whole))[: len(part)])
        except (DwfError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _failure(model, whole, error) from error
    return torch.cat(outputs)


# What stays as it was ---------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(
    model: Model,
    device: torch.device,
    *,
    bn_mode: str = "eval",
    seed: int = 0,
    trusted: bool = False,
    called: Sequence[nn.Module] | None = None,
) -> Iterator[None]:
    """Put a model into the state an attack needs, and put everything back afterwards.

    Inside: gradients enabled (also under ``no_grad`` and ``inference_mode``), parameters frozen,
    every module in eval mode, or BatchNorm in train mode with ``bn_mode="train"``; random models
    draw from ``seed``. Restored, also after an exception: mode of each module, parameters, buffers,
    plain attributes, ``requires_grad``, ``.grad``, and the states of all generators that the model
    may draw from. One thread at a time is inside: torch's random state belongs to the process.

    Args:
        trusted: the model is known to change none of its parameters, so no copy of them is made.
        called: the only modules whose code runs before `about_to_call` tells of more, as `ask`
            does: what the others hold is not copied before. None: any may run at once.
    """
    check_choice(bn_mode, BN_MODES, "bn_mode")
    with _lock, contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(own_random_state(device, seed, model))
        if isinstance(model, nn.Module):
            modules = all_modules(model)
            own = [p for module in modules for p in module._parameters.values() if p is not None]
            if any(map(is_lazy, own)):
                raise ModelError(f"model {model_name(model)} is lazy: call it once before")
            first = modules
            if called is not None and not any(map(_has_own_modes, modules)):
                stack.enter_context(_kept_when_called(modules, parameters=not trusted))
                first = [x for one in called for x in all_modules(one)]
            stack.callback(_Kept(first, parameters=not trusted).restore)
            stack.enter_context(_frozen(model, modules))
            if bn_mode == "train":
                for module in modules:
                    if isinstance(module, _BatchNorm):
                        module.train()
        yield


@contextlib.contextmanager
def own_random_state(device: torch.device, seed: int, model: Model | None = None) -> Iterator[None]:
    """Seed every generator that a model may draw from, and restore all states after the block.

    These are torch's on the CPU and ``device``, numpy's, Python's, and those among the attributes
    of the model's modules.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(RandomState().restore)
        seed &= 2**64 - 1  # any integer, as for the start noise
        for generator in _own_generators(model):
            stack.callback(_seed(generator, seed))
        # not torch.manual_seed: that would reseed every GPU, not only the one in use
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        yield


_NUMBERS = frozenset((bool, int, float, str, type(None)))  # and other plain values
# Torch's parameters, submodules and hooks: there are many, and no generators among them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _own_generators(model: Model | None) -> list[Any]:
    """Generators that a model's modules keep, also inside a list or dict."""
    if not isinstance(model, nn.Module):
        return []
    found: dict[int, Any] = {}
    for module in all_modules(model):
        for name, value in vars(module).items():
            if name in _OF_EVERY_MODULE or type(value) in _NUMBERS:
                continue
            inside = value.values() if isinstance(value, dict) else value
            values = [value, *inside] if isinstance(value, dict | list | tuple) else [value]
            found |= {id(x): x for x in values if type(x) not in _NUMBERS and _is_generator(x)}
    return list(found.values())


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, numpy.random.Generator | numpy.random.RandomState
    )


def _seed(generator: Any, seed: int) -> Callable[[], None]:
    """Seed a generator; what puts its state back."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        generator.manual_seed(seed)
        return lambda: _ignored(generator.set_state(state))
    if isinstance(generator, random.Random):
        before = generator.getstate()
        generator.seed(seed)
        return lambda: generator.setstate(before)
    numpy: Any = sys.modules["numpy"]
    if isinstance(generator, numpy.random.RandomState):
        told = generator.get_state()
        generator.seed(seed % 2**32)
        return lambda: _ignored(generator.set_state(told))
    bits = generator.bit_generator
    kept = bits.state
    bits.state = type(bits)(seed).state
    return lambda: setattr(bits, "state", kept)


def _ignored(result: object) -> None:
    """For a callback that returns something."""


@contextlib.contextmanager
def _frozen(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode and frozen parameters inside the block, afterwards what was before."""
    modes = [(module, module.training) for module in modules]
    own = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    flags = [(p, p.requires_grad, p.grad) for p in own.values()]
    try:
        for parameter, requires_grad, _ in flags:
            if requires_grad:
                parameter.requires_grad_(False)
        if any(module.training or _has_own_modes(module) for module in modules):
            with contextlib.suppress(NotImplementedError):  # exported programs have no mode
                model.eval()
        yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training
        for parameter, requires_grad, grad in flags:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad


def _has_own_modes(module: nn.Module) -> bool:
    """Whether its own code runs when its mode changes."""
    cls = type(module)
    return cls.train is not nn.Module.train or cls.eval is not nn.Module.eval


class _Kept:
    """What modules hold at this moment, to be put back: tensors and plain attributes.

    Args:
        parameters: whether parameters and unregistered tensors may change, besides buffers.
    """

    def __init__(self, modules: Sequence[nn.Module], *, parameters: bool) -> None:
        self._tensors = [
            (module, name, tensor, tensor.detach().clone() if parameters or is_buffer else None)
            for module in modules
            for is_buffer, store in ((False, module._parameters), (True, module._buffers))
            for name, tensor in store.items()
            if tensor is not None
        ]
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = [
            (module, name, value, _copy(value) if parameters else value)
            for module in modules
            for name, value in vars(module).items()
            if name != "training" and isinstance(value, _PLAIN)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bits and objects."""
        for module, name, tensor, saved in self._tensors:
            if saved is not None:
                # .data: the bits are the old ones, so a graph that saved it stays valid
                tensor.data = tensor.data if tensor.shape == saved.shape else saved
                tensor.data.copy_(saved)
            if getattr(module, name, None) is not tensor:
                setattr(module, name, tensor)  # the forward has put another one there
        for module, name, value, copied in self._attributes:
            if isinstance(value, Tensor) and copied is not value and not torch.equal(value, copied):
                value.data.copy_(copied)
            if vars(module).get(name, _PLAIN) is not value:
                vars(module)[name] = value


_uncopied: list[Callable[[], None]] = []


def about_to_call() -> None:
    """Copy what models inside `undisturbed` hold where that waits for this: their code may run."""
    while _uncopied:
        _uncopied.pop()()


@contextlib.contextmanager
def _kept_when_called(modules: Sequence[nn.Module], *, parameters: bool) -> Iterator[None]:
    """Put back what the modules held at the first `about_to_call` inside the block."""
    kept: list[_Kept] = []

    def keep() -> None:
        kept.append(_Kept(modules, parameters=parameters))

    _uncopied.append(keep)
    try:
        yield
    finally:
        if keep in _uncopied:
            _uncopied.remove(keep)
        for own in kept:
            own.restore()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
