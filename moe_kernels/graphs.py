"""Capture steps in CUDA graphs: `Graphed` is one step, `Graphs` the last few of a model.

A captured step reads and writes tensors that stay where they are. It runs as it is the first time
(which compiles kernels, lets implementations be chosen and allocates workspaces), is captured the
second time, and replayed from then on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels.errors import in_one_line

log = logging.getLogger("moe_kernels")


class Graphed:
    """A step that is captured at its second call; a capture that fails costs nothing but time.

    Keeps the graph and not the step, which may therefore refer to the owner of this object.

    Args:
        pool: memory that graphs share which never run at the same time; by default one of its own.

    Attributes:
        reason: why there is no graph; None once there is one.
        may_capture: whether a later call may still be captured.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self._device = device
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # made at the first call
        self._returned: Any = None
        self.may_capture = device.type == "cuda"
        self.reason: str | None = "it ran less than twice"
        if not self.may_capture:
            self.reason = f"the device is {device.type}"

    def __call__(self, step: Callable[[], Any], *, eager: bool = False) -> Any:
        """Run ``step``, the same one on the same tensors every time, or replay its graph.

        Args:
            eager: run it as it is, also if there is a graph.
        Returns:
            What the step returned when it last ran; Python code does not run in a replay.
        """
        if not self.may_capture or torch.cuda.is_current_stream_capturing():
            self._returned = step()
        elif self._stream is None or eager:
            self._returned = self._beside(step)
        elif self._graph is not None:
            self._graph.replay()
        else:
            self._returned = self._capture(step, self._stream)
        return self._returned

    def _beside(self, step: Callable[[], Any]) -> Any:
        # Autograd runs a node's backward on the stream of its forward, and the default stream
        # cannot be captured: the first run is where the capture will be.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            returned = step()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return returned

    def _capture(self, step: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(self._device)
        try:
            with (
                torch.cuda.stream(now),  # put back also if the end of the capture raises
                # thread_local: another thread may pin memory for a data loader meanwhile
                torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                returned = step()
        except Exception as error:  # whatever the step's code raises where it may not wait
            self.may_capture = False
            self.reason = in_one_line(error)
            log.warning("a step runs without a CUDA graph: %s", self.reason)
            torch.cuda.synchronize(self._device)
            self._free_generator(stream)
            return step()
        self._graph, self.reason = graph, None
        graph.replay()
        return returned

    def _free_generator(self, stream: torch.cuda.Stream) -> None:
        # Before torch 2.15 a failed capture leaves the device's generator in its capture; the end
        # of one that succeeds takes it out.
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError), torch.cuda.graph(graph, stream=stream):
            torch.zeros(1, device=self._device)


class Graphs:
    """The last few captured steps of a model, each with the tensors that it works on.

    Whoever owns the memory that a step reads beside those tensors keeps the graphs too, and calls
    `forget` when that memory moves. All graphs share one pool of memory, so no two of them may run
    at the same time. After a capture that failed nothing is captured until `forget`.

    Attributes:
        age: how often `forget` was called.
    """

    _MAX_GRAPHS = 32

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Graphed, tuple[Tensor, ...]]] = {}
        self._newest: Graphed | None = None
        self._failure: str | None = None
        self._pool: Any = None
        self.age = 0

    @contextlib.contextmanager
    def loop(
        self,
        key: Hashable,
        step: Callable[..., Any],
        state: Sequence[Tensor],
        given: Sequence[Tensor] = (),
    ) -> Iterator[tuple[Callable[..., Any], tuple[Tensor, ...]]]:
        """``step(*state, *given)``, to be taken again and again; captured at the second time.

        Args:
            key: everything that decides what the step does but the numbers in the tensors, their
                shapes and their dtypes.
            step: changes tensors of ``state`` in place, and no other.
            state, given: tensors on one device; ``given`` is read alone.
        Yields:
            A function that takes the step, as `Graphed` does, and the tensors of ``state`` that it
            changes: on a GPU copies that stay where they are, elsewhere ``state`` itself. After the
            block the results are in ``state``.
        """
        device = state[0].device
        if device.type != "cuda":
            yield functools.partial(step, *state, *given), tuple(state)
            return
        tensors = (*state, *given)
        key = key, tuple((x.shape, x.dtype) for x in tensors)
        # taken out: a loop inside this one that does the same has tensors of its own
        graphed, own = self._kept.pop(key) if key in self._kept else self._made(tensors)
        for mine, its in zip(own, tensors, strict=True):
            mine.copy_(its)
        self._newest, age = graphed, self.age
        own_state = own[: len(state)]
        yield functools.partial(graphed, functools.partial(step, *own)), own_state
        for mine, its in zip(own_state, state, strict=True):
            its.copy_(mine)
        if age == self.age:
            self._keep(key, graphed, own)

    def _made(self, tensors: Sequence[Tensor]) -> tuple[Graphed, tuple[Tensor, ...]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graphed = Graphed(tensors[0].device, self._pool)
        if self._failure is not None:
            graphed.may_capture, graphed.reason = False, self._failure
        return graphed, tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)

    def _keep(self, key: Hashable, graphed: Graphed, own: tuple[Tensor, ...]) -> None:
        """As the one used last; the one that was not used for longest goes."""
        if not graphed.may_capture:
            self._failure = graphed.reason
        self._kept.pop(key, None)
        if len(self._kept) >= self._MAX_GRAPHS:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = graphed, own

    def forget(self) -> None:
        """Drop all graphs: something they read has moved."""
        self._kept.clear()
        self._newest = self._failure = None
        self.age += 1

    @property
    def status(self) -> str:
        """Whether the newest step was captured, or why not."""
        if self._newest is None:
            return "no graph: no step ran on a GPU"
        reason = self._newest.reason
        return "captured" if reason is None else f"no graph: {reason}"
