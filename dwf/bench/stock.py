"""Run stock torch as fast as it goes: full float32, CUDA graphs, compiled where that works."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# One compilation serves all nine experts; without fullgraph a tenth would run uncompiled, silently.
# The default mode: max-autotune takes minutes to look for convolutions faster than cuDNN's.
COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}


def without_tf32(function: Callable[..., T]) -> Callable[..., T]:
    """Float32 convolutions in full precision, and cuDNN's default choice of algorithm."""

    @functools.wraps(function)
    def run(*args: Any) -> T:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return function(*args)

    return run


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step into a CUDA graph; calling the result replays it.

    `step` reads and writes tensors that stay where they are, and leaves no gradient behind.
    """
    # Not the default stream, which cannot be captured; and warm-up and capture on the same one,
    # because autograd runs a node's backward on the stream of its forward.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, lets cuDNN choose, allocates its workspaces
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def first_that_runs(
    build: Callable[..., T], device: torch.device, *, compiles: bool = False
) -> tuple[T, str]:
    """Build the fastest variant that works here; return it, and its name with what failed before.

    `build(compiled=, graphed=)` raises if its variant does not work. On a CPU only `compiles`
    tries torch.compile: it takes longer than all measurements of a small case.
    """
    refused: list[str] = []
    ways = [(True, True), (False, True), (True, False), (False, False)]
    if device.type != "cuda":
        refused.append("CPU: no CUDA graph" if compiles else "CPU: no CUDA graph, not compiled")
        ways = [(True, False), (False, False)] if compiles else [(False, False)]
    for compiled, graphed in ways:
        names = ["channels_last"]
        names += ["torch.compile (each expert)"] if compiled else []
        names += ["CUDA graph"] if graphed else []
        ran = ", ".join(names)
        try:
            return build(compiled=compiled, graphed=graphed), "; ".join([ran, *refused])
        except Exception as error:
            if (compiled, graphed) == ways[-1]:
                raise
            # Compilers and captures fail in as many types as there are reasons.
            message = (str(error).splitlines() or [""])[0][:160]
            refused.append(f"not {ran}: {type(error).__name__}: {message}")
    raise AssertionError("ways is not empty")
