"""Check an implementation in a child process before it may run in this one.

A kernel that crashes, hangs or writes out of bounds ends the whole process, or at least its GPU
context. Here it ends a child, and the op goes on without it. The verdict is remembered (select.py)
as long as GPU, driver, torch and the compiled code stay the same, unless another try might tell
otherwise: a machine that is busy lets a good kernel run out of time. The child runs check_child.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_kernels import native, timing
from moe_kernels.select import Choices

_TIME_LIMIT_S = 60.0
_RIGHT = "right"


def fault_in_child(
    *,
    op: str,
    implementation: str,
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    memory: Choices,
) -> str | None:
    """A description of the fault that a child process finds in an implementation, or None.

    Args:
        op, implementation: their names.
        function: the implementation; the child imports its module, which has to register it.
        device, dtype: of the tensors on which it is checked.
        memory: remembers verdicts between processes.
    """
    facts = (
        "isolated check",
        op,
        implementation,
        timing.device_name(device),
        timing.driver_version(),
        torch.__version__,
        dtype,
        _fingerprint(function.__code__.co_filename),
    )
    key = " | ".join(map(str, facts))
    known = memory.get(key)
    if known is None:
        arguments = (function.__module__, op, implementation, str(device), str(dtype))
        known, final = _ask_child(arguments)
        if final:
            memory.put(key, known)
    return None if known == _RIGHT else known


def _ask_child(arguments: Sequence[str]) -> tuple[str, bool]:
    """The child's verdict, _RIGHT or a fault; and whether another try would say the same."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "moe_kernels.check_child", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"in a child process it did not end within {_TIME_LIMIT_S:g} s", False
    except OSError as error:
        return f"no child process could be started: {error}", False
    if child.returncode < 0:
        number = -child.returncode
        return f"it ends a child process by signal {number}: {signal.strsignal(number)}", True
    if child.returncode > 0:
        last = (child.stderr.strip() or "(no message)").splitlines()[-1]
        return f"a child process could not check it: {last}", False
    fault: str | None = json.loads(child.stdout.strip().splitlines()[-1])["fault"]
    return _RIGHT if fault is None else f"in a child process: {fault}", True


@functools.cache
def _fingerprint(source: str) -> str:
    """A hash of the code under check: the implementation's source and the compiled module."""
    files = [source]
    if native.has_cpu:
        files.append(str(native.module.__file__))
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
