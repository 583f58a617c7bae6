"""Rehearse a GPU: a device "cuda:0" made of Python, on which the whole CUDA path runs on CPUs.

Tensors say that they are on cuda:0 and compute on the CPU; what CUDA would refuse is refused, and
CUDA graphs are recorded and replayed with the rules and lifetimes of real ones. It shows whether
code would run, never how fast. Enforced:

- tensors of two devices do not meet, and no generator of the CPU draws on the device;
- in a capture nothing waits for the device or copies to or from the host: it raises, and the
  capture is invalid;
- memory made in a capture is NaN until the first replay;
- a replay whose memory nobody holds any more is a problem (`take_problems`), and a test fails;
- `counted` counts waits, copies, captures, replays and launches by file and line.

Not covered: the order of work between streams, several devices, inference_mode, and the numerics of
cuDNN, TF32 and Triton's compiler. `start` has to run before dwf and moe_kernels are imported.
"""

from __future__ import annotations

import os
import tempfile

import torch

from rehearsal.events import KINDS, Counts, counted, take_problems

__all__ = ["KINDS", "Counts", "Unavailable", "counted", "running", "start", "take_problems"]

running = False


class Unavailable(RuntimeError):
    """This version of torch lacks something private that the rehearsal rests on."""


def start() -> None:
    """Begin, for the rest of this process.

    Raises:
        Unavailable: what torch lacks, in one line.
    """
    global running
    if running:
        return
    try:
        _start_device()
    except (AttributeError, ImportError, TypeError) as error:
        raise Unavailable(
            f"torch {torch.__version__} lacks a private part that the rehearsal needs: {error}"
        ) from error
    running = True
    # Choices by a clock that means nothing are not kept where a real GPU's are.
    if "MOE_KERNELS_CACHE_DIR" not in os.environ:
        os.environ["MOE_KERNELS_CACHE_DIR"] = tempfile.mkdtemp(prefix="rehearsal-")
    from rehearsal import kernels

    kernels.start()


def _start_device() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from rehearsal import autocast, device, names, tensors, torch_cuda

    tensors.DeviceTensor.compute = staticmethod(device.compute)
    _setup_privateuseone_for_python_backend(tensors.NAME, backend_module=torch_cuda.BackEnd())
    torch_cuda.start()
    autocast.start()
    names.Names().__enter__()
    device.Dispatch().__enter__()
