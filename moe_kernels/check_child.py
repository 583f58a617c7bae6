"""Check one implementation and print the verdict: the program that isolation.py starts."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

import torch

from moe_kernels import op


def main(arguments: Sequence[str]) -> None:
    """Print {"fault": null or a description} as the last line of the output.

    Args:
        arguments: the module that registers the implementation, and the names of op,
            implementation, device and dtype.
    """
    module, name, implementation, device, dtype = arguments
    importlib.import_module(module)
    # A GPU that is full or taken says nothing about the implementation: no verdict then.
    torch.zeros(1, device=device).item()
    fault = op.registry()[name].check(
        implementation, torch.device(device), getattr(torch, dtype.removeprefix("torch."))
    )
    print(json.dumps({"fault": fault}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
