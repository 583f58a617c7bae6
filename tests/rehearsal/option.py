"""Start the rehearsal when this is imported, if pytest's command line asks for it.

The device has to be there before moe_kernels is imported, and pytest parses options after that.
Workers of pytest-xdist have other arguments; the environment of their parent tells them.
"""

from __future__ import annotations

import os
import shlex
import sys

import rehearsal

OPTION = "--rehearse-gpu"
_VARIABLE = "DWF_REHEARSE_GPU"


def _asked() -> bool:
    words = [*sys.argv, *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    return OPTION in words or ("PYTEST_XDIST_WORKER" in os.environ and _VARIABLE in os.environ)


# Why there is no rehearsal though pytest was given the option.
obstacle = "only the command line and PYTEST_ADDOPTS may have it"
if _asked():
    os.environ[_VARIABLE] = "1"
    try:
        rehearsal.start()
    except rehearsal.Unavailable as error:
        obstacle = str(error)
