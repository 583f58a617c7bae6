"""Capture steps in CUDA graphs: `Graphed` is one step, `Graphs` the last few of a plan.

A captured step reads and writes tensors that stay where they are. It runs as it is the first time
(which compiles kernels, lets implementations be chosen and allocates workspaces), is captured the
second time, and replayed from then on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

log = logging.getLogger("moe_kernels")


class Graphed:
    """A step that is captured at its second call; a capture that fails costs nothing but time.

    Keeps the graph and not the step, which may therefore refer to the owner of this object.

    Attributes:
        reason: why there is no graph; None once there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # made at the first call
        self._may_capture = device.type == "cuda"
        self.reason: str | None = "it ran less than twice"
        if not self._may_capture:
            self.reason = f"the device is {device.type}"

    def __call__(self, step: Callable[[], None]) -> None:
        """Run ``step``, the same one on the same tensors every time, or replay its graph."""
        if self._graph is not None:
            self._graph.replay()
        elif not self._may_capture or torch.cuda.is_current_stream_capturing():
            step()
        elif self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._warm_up(step, self._stream)
        else:
            self._capture(step, self._stream)

    def _warm_up(self, step: Callable[[], None], stream: torch.cuda.Stream) -> None:
        # Autograd runs a node's backward on the stream of its forward, and the default stream
        # cannot be captured: the first run is where the capture will be.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _capture(self, step: Callable[[], None], stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(self._device)
        try:
            with (
                torch.cuda.stream(now),  # put back also if the end of the capture raises
                # thread_local: another thread may pin memory for a data loader meanwhile
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                step()
        except Exception as error:  # whatever the step's code raises where it may not wait
            self._may_capture = False
            self.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            log.warning("a step runs without a CUDA graph: %s", self.reason)
            torch.cuda.synchronize(self._device)
            self._free_generator(stream)
            step()
            return
        self._graph, self.reason = graph, None
        graph.replay()

    def _free_generator(self, stream: torch.cuda.Stream) -> None:
        # Before torch 2.15 a failed capture leaves the device's generator in its capture; the end
        # of one that succeeds takes it out.
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError), torch.cuda.graph(graph, stream=stream):
            torch.zeros(1, device=self._device)


class Graphs:
    """The last few captured steps, each with the tensors that it works on.

    Whoever owns the memory that a step reads beside those tensors keeps the graphs too, and calls
    `forget` when that memory moves.
    """

    _MAX_GRAPHS = 4  # a graph keeps its activations

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Graphed, tuple[Tensor, ...]]] = {}

    def run(self, key: Hashable, step: Callable[..., None], state: Sequence[Tensor]) -> None:
        """``step(*state)``, which changes ``state[0]`` in place; captured from the second call on.

        Args:
            key: everything that decides what the step does but the numbers in ``state``.
            step: on a GPU it is called with copies of ``state`` that stay where they are.
            state: tensors on one device, of the same shapes and dtypes for the same key.
        """
        device = state[0].device
        if device.type != "cuda":
            step(*state)
            return
        if key not in self._kept:
            if len(self._kept) >= self._MAX_GRAPHS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = Graphed(device), tuple(x.clone() for x in state)
        graphed, own = self._kept[key]
        for mine, given in zip(own, state, strict=True):
            mine.copy_(given)
        graphed(lambda: step(*own))
        state[0].copy_(own[0])

    def forget(self) -> None:
        """Drop all graphs: something they read has moved."""
        self._kept.clear()

    @property
    def status(self) -> str:
        """Whether the step of the newest key was captured, or why not."""
        if not self._kept:
            return "no graph: no step ran on a GPU"
        reason = next(reversed(self._kept.values()))[0].reason
        return "captured" if reason is None else f"no graph: {reason}"
