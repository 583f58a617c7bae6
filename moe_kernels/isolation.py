"""Check an implementation in a process of its own before it may run in this one.

A kernel that crashes, hangs or touches memory that is not its own takes the whole process along, or
at least its GPU context. Here it takes a child, and the op goes on without it. The verdict is
remembered (choices.py) as long as GPU, driver, torch and the compiled code stay the same.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
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
from moe_kernels.choices import Choices, driver_version

_TIME_LIMIT_S = 60.0
_RIGHT = "right"
_CHILD = "import sys; from moe_kernels.isolation import main; main(sys.argv[1:])"


def fault_in_child(
    op: str,
    implementation: str,
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    memory: Choices,
) -> str | None:
    """What a child process finds wrong with an implementation, or None.

    Args:
        op, implementation: their names.
        function: the implementation; the child imports its module, which has to register it.
        memory: where verdicts are kept.
    """
    facts = (
        "isolated check",
        *(op, implementation, timing.device_name(device), driver_version(), torch.__version__),
        *(dtype, _fingerprint(function.__code__.co_filename)),
    )
    key = " | ".join(map(str, facts))
    known = memory.get(key)
    if known is None:
        arguments = (function.__module__, op, implementation, str(device), str(dtype))
        known, final = _ask_child(arguments)
        if final:
            memory.put(key, known)
    return None if known == _RIGHT else known


def main(arguments: Sequence[str]) -> None:
    """The child: check one implementation and print the verdict as the last line of the output."""
    # Not at the top: op.py imports this module.
    from moe_kernels import op

    module, name, implementation, device, dtype = arguments
    importlib.import_module(module)
    # A GPU that is full or taken says nothing about the implementation: no verdict then.
    torch.zeros(1, device=device).item()
    fault = op.registry()[name].check(
        implementation, torch.device(device), getattr(torch, dtype.removeprefix("torch."))
    )
    print(json.dumps({"fault": fault}), flush=True)


def _ask_child(arguments: Sequence[str]) -> tuple[str, bool]:
    """The verdict, and whether another try would say the same."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"in a process of its own it did not end within {_TIME_LIMIT_S:g} s", True
    except OSError as error:
        return f"no process of its own could be started: {error}", False
    if child.returncode < 0:
        number = -child.returncode
        return f"it ends a process of its own by signal {number}: {signal.strsignal(number)}", True
    if child.returncode > 0:
        last = (child.stderr.strip() or "(no message)").splitlines()[-1]
        return f"a process of its own could not check it: {last}", False
    fault: str | None = json.loads(child.stdout.strip().splitlines()[-1])["fault"]
    return _RIGHT if fault is None else f"in a process of its own: {fault}", True


@functools.cache
def _fingerprint(source: str) -> str:
    """Of the code that a verdict is about: an implementation's source and the compiled module."""
    files = [source, *([native.module.__file__] if native.has_cpu else [])]
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
