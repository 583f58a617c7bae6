"""Define ops that have several implementations; check them, and dispatch calls to the best.

An op is defined by a schema, a body in plain torch and a derivative. Implementations register over
the body. At first use on a device each is checked against the body on small examples; one that is
wrong, or does not run, is dropped with one log line. Among the right ones

- the CPU and torch's deterministic mode take the first of native, triton, reference: no clock is
  read, so that another process computes the same bits;
- CUDA takes the fastest on the shapes at hand, and remembers it on disk (select.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_kernels import derivatives, isolation, lang, oracle, select
from moe_kernels.native import FLOATS
from moe_kernels.select import Function, Implementation, named_implementation

log = logging.getLogger("moe_kernels")

F = TypeVar("F", bound=Function)

# Any: torch leaves the methods of this class without types.
_library: Any = torch.library.Library("moe_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_registry: dict[str, Op] = {}
# Reentrant: the check of one op may run another.
_lock = threading.RLock()


class CheckResult(NamedTuple):
    """One line of the self-test; `fault` is None if the implementation is right."""

    op: str
    implementation: str
    dtype: torch.dtype
    fault: str | None


class _Key(NamedTuple):
    """Calls with equal keys share their choice."""

    device: torch.device
    dtype: torch.dtype
    shape_class: Hashable
    deterministic: bool


class Op:
    """A `torch.library` operator whose implementation is checked and chosen at first use.

    Args:
        schema: as in `torch.library.define`, without namespace; tensors, optional ones too, and
            numbers only. An op that changes an argument returns nothing.
        body: the definition in plain torch. Runs below autograd, on any floating dtype.
        fake: the outputs' shapes and dtypes, from inputs without data.
        examples: argument lists for the check. A tuple is replaced by a normally distributed
            tensor of that shape, a function by its result for a `torch.Generator`.
        backward: the op that maps (gradients of the outputs, tensor inputs) to the gradients of
            the tensor inputs. Without it, asking for a derivative raises.
        fixed_dtypes: the dtype of arguments that have to have it; all other tensors share one.
        exact: implementations have to reproduce the body bit for bit, not just as accurately.
        key: maps the arguments to a value; on CUDA, calls with equal values share their choice. By
            default the size of the largest tensor, within a factor of 16.
    """

    def __init__(
        self,
        schema: str,
        *,
        body: Function,
        fake: Function,
        examples: Sequence[tuple[Any, ...]],
        backward: Op | None = None,
        fixed_dtypes: dict[str, torch.dtype] | None = None,
        exact: bool = False,
        key: Callable[..., Hashable] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.implementations: list[Implementation] = []
        self._body = Implementation(
            name="reference", device="any", dtypes=(), built=True, function=body
        )
        self._examples = examples
        self._exact = exact
        self._shape_class = key or _size_class
        self._chosen: dict[_Key, Implementation] = {}
        self._unfit: set[tuple[Implementation, _Key]] = set()
        self._faults: dict[tuple[Implementation, torch.device, torch.dtype], str | None] = {}

        _library.define(schema, tags=[torch.Tag.pt2_compliant_tag])
        self.overload = getattr(torch.ops.moe_kernels, self.name).default
        arguments = self.overload._schema.arguments
        tensors = [i for i, x in enumerate(arguments) if _is_tensor(x.type)]
        fixed = {i: (fixed_dtypes or {}).get(arguments[i].name) for i in tensors}
        self._tensors = tensors
        self._free = [i for i in tensors if fixed[i] is None]
        self._fixed = [(i, dtype) for i, dtype in fixed.items() if dtype is not None]
        self._mutated = [i for i in tensors if (x := arguments[i].alias_info) and x.is_write]
        _library.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moe_kernels::{self.name}", fake, lib=_library)
        if self._mutated:
            derivatives.refuse(_library, self.overload, tensors, self._mutated)
        else:
            derivatives.register(_library, self.name, tensors, backward)
        _registry[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def implementation(
        self,
        name: str,
        *,
        device: str,
        dtypes: Sequence[torch.dtype] = FLOATS,
        built: bool = True,
        capability: tuple[int, int] | None = None,
        isolated: bool = False,
        examples: Sequence[tuple[Any, ...]] = (),
    ) -> Callable[[F], F]:
        """Register the decorated function as an implementation.

        It receives the op's arguments: contiguous tensors on one device of type `device`, all of
        one dtype out of `dtypes`, except where the op fixes a tensor's dtype. For sizes that it
        cannot handle it returns NotImplemented, having changed nothing, and another one runs.

        Args:
            name: one of `select.NAMES`; "native" and "clusters" are compiled code.
            device: "cpu" or "cuda".
            built: whether this installation has its code.
            capability: the only compute capability that it runs on.
            isolated: a mistake in it may crash or hang; check it in a child process first.
            examples: argument lists for its check, besides the op's.
        """

        def register(function: F) -> F:
            self.implementations.append(
                Implementation(
                    name=name,
                    device=device,
                    dtypes=tuple(dtypes),
                    built=built,
                    function=function,
                    capability=capability,
                    isolated=isolated,
                    examples=tuple(examples),
                )
            )
            self.implementations.sort(key=lambda x: select.NAMES.index(x.name))
            return function

        return register

    def selected(
        self, device: torch.device, dtype: torch.dtype, inputs: tuple[Any, ...] | None = None
    ) -> str:
        """The name of the implementation that a call uses; chooses it if no call has done so.

        Args:
            inputs: of the call; by default the largest example.
        """
        inputs = inputs or max(self.example_inputs(device, dtype), key=_size)
        return self._choose(self._key(device, dtype, inputs), inputs).name

    def selftest(self, device: torch.device) -> list[CheckResult]:
        """Check every implementation that can run on the device, dropped ones included."""
        results = []
        for dtype in FLOATS:
            for candidate in self.implementations:
                if candidate.obstacle(device, dtype) is None:
                    fault = self._fault(candidate, device, dtype)
                    results.append(CheckResult(self.name, candidate.name, dtype, fault))
        return results

    def check(self, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Check an implementation in this process, even an isolated one; None if it is right.

        Raises:
            ValueError: if no implementation of this name takes such tensors.
        """
        for candidate in self.implementations:
            if candidate.name == name and candidate.obstacle(device, dtype) is None:
                return self._check(candidate, device, dtype)
        raise ValueError(f"{self.name}: no implementation {name!r} runs on {device} for {dtype}")

    def _dispatch(self, *args: Any) -> Any:
        tensors = [args[i] for i in self._tensors]
        device = tensors[0].device
        dtype = self.common_dtype(args, device)
        if (name := named_implementation()) is not None:
            return self._run(iter([self._find(name, device, dtype), self._body]), device, args)
        if dtype is None or dtype not in FLOATS:
            return self._run(iter([self._body]), device, args)
        key = self._key(device, dtype, args)
        ways = self._ways(self._chosen.get(key) or self._choose(key, args), key)
        return self._run(ways, device, args, functools.partial(self._drop, key))

    def _ways(self, chosen: Implementation, key: _Key) -> Iterator[Implementation]:
        """The chosen implementation, then others for sizes that it declines; the body last."""
        yield chosen
        for other in self._candidates(key):
            known = (other, key.device, key.dtype) in self._faults
            if other is self._body or (
                other is not chosen
                and (known or not _capturing(key.device))
                and self._fault(other, key.device, key.dtype) is None
            ):
                yield other

    def _run(
        self,
        ways: Iterator[Implementation],
        device: torch.device,
        args: Sequence[Any],
        on_failure: Callable[[Implementation, Exception], None] | None = None,
    ) -> Any:
        """The outputs of the first way that takes these sizes.

        Args:
            on_failure: is told what a way raises, before the next one runs; without it that is
                raised.
        """
        # The body as well: its sums would run in the order of the strides.
        args = [
            x.contiguous() if isinstance(x, Tensor) and i not in self._mutated else x
            for i, x in enumerate(args)
        ]
        for way in ways:
            if way is self._body:
                break
            try:
                with _current_device(device):
                    outputs = way.function(*args)
            except Exception as error:  # a kernel may fail in any way
                if on_failure is None:
                    raise
                on_failure(way, error)
                continue
            if outputs is not NotImplemented:
                return outputs
        # Autocast is still at work at this depth and would change the body's dtypes.
        with torch.autocast(device.type, enabled=False):
            outputs = self._body.function(*args)
        if isinstance(outputs, tuple):
            return tuple(x.contiguous() for x in outputs)
        return outputs if outputs is None else outputs.contiguous()

    def _drop(self, key: _Key, way: Implementation, error: Exception) -> None:
        """Use no more for such calls what failed at one, say for want of shared memory."""
        if _capturing(key.device) or isinstance(error, torch.OutOfMemoryError):
            raise error
        with _lock:
            self._unfit.add((way, key))
            self._chosen.pop(key, None)
        log.warning(
            "%s: %s failed on %s and is not used any more for such sizes: %s: %s",
            self.name,
            way.name,
            key.device,
            type(error).__name__,
            str(error).strip() or "(no message)",
        )

    def common_dtype(self, args: tuple[Any, ...], device: torch.device) -> torch.dtype | None:
        """The dtype of the tensors, or None if this call is for the body alone."""
        dtype: torch.dtype = args[self._free[0]].dtype
        if (
            any(args[i].dtype is not dtype for i in self._free if args[i] is not None)
            or any(args[i].dtype is not x for i, x in self._fixed if args[i] is not None)
            or any(args[i].device != device for i in self._tensors if args[i] is not None)
            or not all(args[i].is_contiguous() for i in self._mutated)
        ):
            return None
        return dtype

    def _key(self, device: torch.device, dtype: torch.dtype, args: tuple[Any, ...]) -> _Key:
        if device.type != "cuda":
            return _Key(device, dtype, 0, True)
        shape_class = self._shape_class(*args)
        return _Key(device, dtype, shape_class, torch.are_deterministic_algorithms_enabled())

    def _choose(self, key: _Key, args: tuple[Any, ...]) -> Implementation:
        if _capturing(key.device):
            # A check or a clock inside a capture would break it.
            log.warning(
                "%s: first used during CUDA graph capture, the reference is captured; run the "
                "step once before capturing it",
                self.name,
            )
            return self._body
        with _lock:
            if key not in self._chosen:
                self._chosen[key] = (
                    self._first_right(key) if key.deterministic else self._fastest(key, args)
                )
            return self._chosen[key]

    def _candidates(self, key: _Key) -> Iterator[Implementation]:
        """The implementations that take such tensors, in fixed order; the body last."""
        able = [
            x
            for x in self.implementations
            if x.obstacle(key.device, key.dtype) is None and (x, key) not in self._unfit
        ]
        # Who starts Triton's interpreter wants to see it run.
        yield from sorted(able, key=lambda x: lang.interpreted and x.name != "triton")
        yield self._body

    def _first_right(self, key: _Key) -> Implementation:
        return next(
            x for x in self._candidates(key) if self._fault(x, key.device, key.dtype) is None
        )

    def _fastest(self, key: _Key, args: tuple[Any, ...]) -> Implementation:
        right = {
            x.name: x
            for x in self._candidates(key)
            if self._fault(x, key.device, key.dtype) is None
        }
        columns = {
            name: functools.partial(self._outputs, x, key.device) for name, x in right.items()
        }
        name = select.fastest(self.name, columns, args, key.device, key.dtype, key.shape_class)
        return right[name]

    def _find(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Implementation:
        """The implementation that was asked for by name."""
        if name == "reference":
            return self._body
        reasons = []
        for candidate in self.implementations:
            if candidate.name != name:
                continue
            reason = candidate.obstacle(device, dtype)
            if reason is None and dtype is not None and not _capturing(device):
                reason = self._fault(candidate, device, dtype)
            if reason is None:
                return candidate
            reasons.append(reason)
        why = "; ".join(reasons) or "the op has none of that name"
        tensors = "a mixture of dtypes or a strided in-place tensor" if dtype is None else dtype
        raise ValueError(
            f"{self.name}: implementation {name!r} was asked for, but {why}; found {tensors} on "
            f"{device}"
        )

    def _fault(
        self, candidate: Implementation, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """None, or what is wrong with the implementation; checked and logged once."""
        key = (candidate, device, dtype)
        if candidate is self._body:
            return None
        with _lock:
            if key not in self._faults:
                fault = None
                if candidate.isolated:
                    fault = isolation.fault_in_child(
                        op=self.name,
                        implementation=candidate.name,
                        function=candidate.function,
                        device=device,
                        dtype=dtype,
                        memory=select.choices(),
                    )
                self._faults[key] = fault or self._check(*key)
                if fault := self._faults[key]:
                    facts = self.name, candidate.name, device, dtype, fault
                    log.warning("%s: %s is not used on %s for %s: %s", *facts)
            return self._faults[key]

    def _check(
        self, candidate: Implementation, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        compare = oracle.unequal_bits if self._exact else oracle.errors
        ours, body = (functools.partial(self._outputs, x, device) for x in (candidate, self._body))
        for inputs in self.example_inputs(device, dtype, candidate.examples):
            try:
                with _checked_on(device):
                    faults = compare(ours, body, inputs)
            except Exception as error:
                # A kernel may fail in any way: a missing compiler, a driver, an illegal launch.
                return f"it fails: {type(error).__name__}: {str(error).strip() or '(no message)'}"
            if faults:
                return f"it is wrong: {faults[0]}"
        return None

    def _outputs(self, chosen: Implementation, device: torch.device, *args: Any) -> Any:
        """The outputs of a call, or copies of the arguments that it changes."""
        if not self._mutated:
            return self._run(iter([chosen, self._body]), device, args)
        copied = tuple(x.clone() if i in self._mutated else x for i, x in enumerate(args))
        self._run(iter([chosen, self._body]), device, copied)
        return tuple(copied[i] for i in self._mutated)

    def example_inputs(
        self, device: torch.device, dtype: torch.dtype, more: Sequence[tuple[Any, ...]] = ()
    ) -> list[tuple[Any, ...]]:
        """The argument lists of the check, and `more`, on a device and in a dtype."""
        # The caller's random state stays as it is.
        generator = torch.Generator().manual_seed(0)
        inputs = []
        for example in (*self._examples, *more):
            values = [_make(value, generator) for value in example]
            for i in self._free:
                if values[i] is not None:
                    values[i] = values[i].to(dtype)
            inputs.append(tuple(x.to(device) if isinstance(x, Tensor) else x for x in values))
        return inputs


def registry() -> dict[str, Op]:
    """All ops by name."""
    return dict(_registry)


def decompositions() -> dict[Any, Function]:
    """The body of every op, for ``torch.export.ExportedProgram.run_decompositions``.

    A program whose ops are decomposed computes in plain torch, and runs where this package is not
    installed.
    """
    return {op.overload: op._body.function for op in _registry.values()}


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels launch on the current device, which need not be the tensors'."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _checked_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU some definitions have no deterministic algorithm."""
    return oracle.any_algorithm() if device.type == "cuda" else contextlib.nullcontext()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_tensor(kind: Any) -> bool:
    optional = isinstance(kind, torch.OptionalType)
    return isinstance(kind.getElementType() if optional else kind, torch.TensorType)


def _size_class(*args: Any) -> int:
    # Within a factor of 16 in size the fastest implementation is taken to be the same.
    return (_size(args).bit_length() + 3) // 4


def _size(args: tuple[Any, ...]) -> int:
    return max(x.numel() for x in args if isinstance(x, Tensor))


def _make(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, tuple):
        return torch.randn(value, generator=generator, dtype=torch.float32, device="cpu")
    return value(generator) if callable(value) else value
