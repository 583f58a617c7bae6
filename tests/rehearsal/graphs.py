"""Record and replay CUDA graphs, with the rules of captures and the lifetimes of their memory.

What runs in a capture is computed at once, on memory that is put back at its end: a capture runs
nothing. Memory made in it is NaN until the first replay. Captures that share a pool share memory:
a replay sets to NaN what another of the pool's graphs made there, where their memory may overlap.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rehearsal import streams
from rehearsal.events import here, note, problem
from rehearsal.tensors import CudaError, alive, fill_with_nan, memory_of

_pool_numbers = itertools.count(1)
# The captures of each pool that are still there, in order.
_pools: dict[Any, list[weakref.ref[CUDAGraph]]] = {}


def capturing() -> CUDAGraph | None:
    """The graph that is being captured, if one is."""
    return _underway[0] if _underway else None


_underway: list[CUDAGraph] = []
_NOTHING, _ALIVE, _ALL = range(3)


def forbid(what: object) -> None:
    """Raise in a capture, which is invalid from then on."""
    if graph := capturing():
        graph.broken_by = f"{what} at {here()}"
        raise CudaError(f"CUDA error: operation not permitted when stream is capturing ({what})")


def graph_pool_handle() -> tuple[int, int]:
    """A pool of its own."""
    return (0, next(_pool_numbers))


class CUDAGraph:
    """As torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.broken_by = ""
        self._calls: list[Callable[[], None]] = []
        self._captured = False
        self._pool: tuple[int, int] | None = None
        self._made: dict[int, Tensor] = {}  # by address, as the others
        self._read: dict[int, str] = {}
        self._kept = _NOTHING  # of what it made, since it ran last
        self._before: dict[int, tuple[Tensor, Any]] = {}

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        """Begin to record on the current stream."""
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise CudaError(f"Unknown capture error mode {capture_error_mode}")
        if capturing() is not None:
            raise CudaError("CUDA graphs: another capture is underway")
        if self._captured:
            raise CudaError("This CUDAGraph instance already owns a captured graph.")
        if streams.current_stream() == streams.DEFAULT:
            raise CudaError("CUDA graphs must be captured on a non-default stream.")
        self._pool = tuple(pool) if pool else graph_pool_handle()
        self._random = streams.generator.get_state()
        _underway.append(self)

    def capture_end(self) -> None:
        """End the recording, and put back what the recorded work wrote."""
        if capturing() is not self:
            raise CudaError("CUDA graphs: no capture is underway")
        _underway.clear()
        streams.generator.set_state(self._random)
        for written, before in self._before.values():
            written.untyped_storage().copy_(before)
        self._before.clear()
        for made in self._made.values():
            fill_with_nan(made)
        if self.broken_by:
            raise CudaError(
                "CUDA error: operation failed due to a previous error during capture "
                f"({self.broken_by})"
            )
        self._captured = True
        _pools.setdefault(self._pool, []).append(weakref.ref(self))
        note("captures")

    def replay(self) -> None:
        """Run what was recorded."""
        if not self._captured:
            raise CudaError("Called CUDAGraph::replay without a preceding successful capture.")
        forbid("replay of a graph")
        for address, first in self._read.items():
            if alive[address] <= 0:
                problem(f"a graph uses memory that nobody holds any more (first at {first})")
        note("replays")
        for call in self._calls:
            call()
        self._overwrite_others()

    def reset(self) -> None:
        """Forget what was recorded."""
        if self._captured:
            _pools[self._pool].remove(weakref.ref(self))
        self.__init__()  # type: ignore[misc]

    def pool(self) -> tuple[int, int]:
        """The pool of this graph's memory."""
        if self._pool is None:
            raise CudaError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def record(
        self, call: Callable[[], Any], used: Sequence[Tensor], written: Sequence[Tensor]
    ) -> Any:
        """Run a kernel and add it.

        Args:
            call: computes from CPU tensors; may return new ones, which replays write again.
            used: all tensors that it is given.
            written: those of them that it may change.
        """
        for tensor in used:
            self._use(tensor, any(tensor is x for x in written))
        known = {memory_of(x) for x in used}
        outputs = call()
        found = [x for x in _tensors(outputs) if memory_of(x)]
        fresh = [x for x in found if memory_of(x) not in known]
        self._made.update((memory_of(x), x) for x in fresh)
        if fresh or written:
            self._calls.append(lambda: _again(call, outputs))
        return outputs

    def _use(self, tensor: Tensor, changes: bool) -> None:
        address = memory_of(tensor)
        if address and address not in self._made:
            self._read.setdefault(address, here())
            if changes and address not in self._before:
                self._before[address] = (tensor, tensor.untyped_storage().clone())

    def _overwrite_others(self) -> None:
        """The pool gave memory that died in one capture to the captures after it."""
        graphs = [x for ref in _pools[self._pool] if (x := ref()) is not None]
        _pools[self._pool] = [weakref.ref(x) for x in graphs]
        me = graphs.index(self)
        self._kept = _ALL
        for place, other in enumerate(graphs):
            kept = _ALL if other is self else _NOTHING if place > me else _ALIVE
            if kept < other._kept:  # else it has not run since it was overwritten
                other._kept = kept
                for address, tensor in other._made.items():
                    if address not in self._read and (place > me or alive[address] <= 0):
                        fill_with_nan(tensor)


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def _again(call: Callable[[], Any], outputs: Any) -> None:
    for old, new in zip(_tensors(outputs), _tensors(call()), strict=True):
        if memory_of(old) != memory_of(new):
            old.copy_(new)


class graph:
    """As torch.cuda.graph: capture the block, in a pool and on a stream if given."""

    _shared_stream: Any = None

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
        **_: Any,
    ) -> None:
        if stream is None and graph._shared_stream is None:
            graph._shared_stream = streams.Stream()
        self._graph, self._mode = cuda_graph, capture_error_mode
        self._pool = pool.pool() if isinstance(pool, CUDAGraph) else pool
        self._on = streams.stream(stream or graph._shared_stream)

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._on.__enter__()
        self._graph.capture_begin(self._pool, capture_error_mode=self._mode)

    def __exit__(self, *error: Any) -> None:
        # As torch does: the stream stays the current one if the end of the capture raises.
        self._graph.capture_end()
        self._on.__exit__(*error)
