"""A step that is launched as one CUDA graph, or as it is, with the reason why.

A captured step reads and writes tensors that stay where they are. It runs as it is the first time
(which compiles kernels, lets implementations be chosen and allocates workspaces), is captured the
second time, and replayed from then on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

log = logging.getLogger("moe_kernels")


class Graphed:
    """`step`, captured into a CUDA graph at its second call; it never fails because of that.

    Attributes:
        reason: why there is no graph; None once there is one.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # made at the first call
        self._may_capture = device.type == "cuda"
        self.reason: str | None = "it ran less than twice"
        if not self._may_capture:
            self.reason = f"the device is {device.type}"

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif not self._may_capture or torch.cuda.is_current_stream_capturing():
            self._step()
        elif self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._warm_up(self._stream)
        else:
            self._capture(self._stream)

    def _warm_up(self, stream: torch.cuda.Stream) -> None:
        # Autograd runs a node's backward on the stream of its forward, and the default stream
        # cannot be captured: the first run is where the capture will be.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(self._device)
        try:
            with (
                torch.cuda.stream(now),  # put back also if the end of the capture raises
                # thread_local: another thread may pin memory for a data loader meanwhile
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()
        except Exception as error:  # whatever the step's code raises where it may not wait
            self._may_capture = False
            self.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            log.warning("a step runs without a CUDA graph: %s", self.reason)
            torch.cuda.synchronize(self._device)
            self._free_generator(stream)
            self._step()
            return
        self._graph, self.reason = graph, None
        graph.replay()

    def _free_generator(self, stream: torch.cuda.Stream) -> None:
        # Before torch 2.15 a failed capture leaves the device's generator in its capture; the end
        # of one that succeeds takes it out.
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError), torch.cuda.graph(graph, stream=stream):
            torch.zeros(1, device=self._device)
