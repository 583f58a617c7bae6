"""Tell what this installation of moe_kernels can do here: `python -m moe_kernels.info`.

Says which versions are at work, what was compiled and what was skipped, on which back ends plans
run, and for every op, device and dtype which implementation is used and why the others are not.
`--selftest` checks each implementation that can run against the definition in plain torch, with a
line on standard error as soon as an op is done; the exit code is 1 if one is wrong or none could be
tested. `--json` prints the same facts for a program.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moe_kernels import compile_pool, lang, native, op
from moe_kernels.native import FLOATS
from moe_kernels.plan import choose
from moe_kernels.timing import driver_version

VARIABLES = (
    "MOE_KERNELS_IMPLEMENTATION",
    "MOE_KERNELS_STRICT",
    "MOE_KERNELS_CACHE_DIR",
    "TRITON_INTERPRET",
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that an op uses for one device and dtype.

    `others` says, by name, why it is no other implementation for this device.
    """

    op: str
    device: str
    dtype: str
    implementation: str
    others: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Proof:
    """The self-test of one implementation; `fault` is None if it is right."""

    op: str
    device: str
    dtype: str
    implementation: str
    fault: str | None


def collect(
    *, selftest: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """All facts as JSON-ready values; without `selftest` its entry is None.

    An implementation is chosen by checking and, on a GPU, timing it, so this runs the ops.

    Args:
        progress: gets a line for each op that the self-test is done with.
    """
    say = progress or (lambda line: None)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    # The self-test first: what it checked the choices know.
    proofs = [proof for device in devices for proof in _proofs(device, say)] if selftest else None
    choices = [choice for device in devices for choice in _choices(device)]
    return {
        "versions": {
            "divided-we-fall": _version("divided-we-fall"),
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "triton": lang.missing or lang.triton.__version__,
        },
        "gpus": [_gpu(device) for device in devices if device.type == "cuda"],
        "native": {
            "cpu": native.has_cpu,
            "cuda": native.has_cuda,
            "cuda_archs": list(native.module.cuda_archs) if native.has_cuda else [],
            "missing": native.missing,
            "file": native.module.__file__ if native.has_cpu else None,
            "hidden_build": None if (hidden := native.hidden_build()) is None else str(hidden),
        },
        "build": native.build_story(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "plans": [row for device in devices for row in _back_ends(device)],
        "ops": [dataclasses.asdict(choice) for choice in choices],
        "selftest": proofs if proofs is None else [dataclasses.asdict(proof) for proof in proofs],
    }


def _back_ends(device: torch.device) -> list[dict[str, str]]:
    """The back ends that plans may run on, and for each dtype when they do."""
    rows = []
    for name in choose.candidates(device):
        for dtype in (torch.bfloat16, torch.float32):
            reason = choose.obstacle(name, device, dtype)
            default = "by default" if dtype is choose.default_dtype(device) else "if asked for"
            rows.append(
                {
                    "device": str(device),
                    "back_end": name,
                    "dtype": _name(dtype),
                    "used": reason or default,
                }
            )
    return rows


def _choices(device: torch.device) -> list[Choice]:
    return [
        Choice(name, str(device), _name(dtype), *_explain(one, device, dtype))
        for name, one in op.registry().items()
        for dtype in FLOATS
    ]


def _explain(one: op.Op, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The implementation used, and for each other one for this device why it is not."""
    chosen = one.selected(device, dtype)
    faults = {x.implementation: x.fault for x in one.selftest(device) if x.dtype == dtype}
    others: dict[str, str] = {}
    for candidate in one.implementations:
        if candidate.name == chosen or candidate.runs_on != device.type:
            continue
        reason = candidate.obstacle(device, dtype) or faults.get(candidate.name)
        if reason is None:
            reason = "slower here" if device.type == "cuda" else f"{chosen} comes first"
        others[candidate.name] = reason
    return chosen, others


def _proofs(device: torch.device, say: Callable[[str], None]) -> Iterator[Proof]:
    if device.type == "cuda":
        began = time.monotonic()
        with torch.cuda.device(device):
            launches = compile_pool.launches_of_checks(torch.cuda.get_device_capability(device))
            compile_pool.compile_all(launches)
        say(f"self-test: compiled for {device} in {time.monotonic() - began:.1f} s")
    for one in op.registry().values():
        began = time.monotonic()
        results = one.selftest(device)
        if results:
            wrong = sum(x.fault is not None for x in results)
            took = time.monotonic() - began
            say(
                f"self-test: {one.name} on {device}: {len(results) - wrong} right, {wrong} wrong "
                f"in {took:.1f} s"
            )
        for x in results:
            yield Proof(x.op, str(device), _name(x.dtype), x.implementation, x.fault)


def _gpu(device: torch.device) -> dict[str, Any]:
    capability = torch.cuda.get_device_capability(device)
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, capability)),
        "driver": driver_version(),
        "compiled_kernels": native.supports_device(capability),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed, run from its source"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def selftest_summary(facts: dict[str, Any]) -> str:
    """The result of the self-test in a few words; "nothing was tested" if it had nothing to test.

    Args:
        facts: what `collect` returns; its "selftest" is not None.
    """
    tested = len(facts["selftest"])
    wrong = sum(x["fault"] is not None for x in facts["selftest"])
    return f"{tested - wrong} right, {wrong} wrong" if tested else "nothing was tested"


def exit_code(facts: dict[str, Any]) -> int:
    """1 if a self-test was asked for and found a wrong implementation or none to test, else 0."""
    proofs = facts["selftest"]
    return int(proofs is not None and (not proofs or any(x["fault"] is not None for x in proofs)))


def render(facts: dict[str, Any]) -> str:
    """The facts as text for a terminal."""
    lines = _table(_environment(facts))
    lines += ["", "What plans run on, the first that suits the networks (on a GPU the fastest):"]
    lines += _table([tuple(row.values()) for row in facts["plans"]])
    lines += ["", "What each op uses:"]
    lines += _table([(x["op"], x["device"], x["dtype"], x["implementation"]) for x in facts["ops"]])
    lines += ["", "Why not another:", *_table(_reasons(facts))]
    if facts["selftest"] is not None:
        lines += ["", "Self-test against plain torch:"]
        lines += _table(
            [
                (x["op"], x["device"], x["dtype"], x["implementation"], x["fault"] or "right")
                for x in facts["selftest"]
            ]
        )
        lines.append(selftest_summary(facts))
    return "\n".join(lines)


def _environment(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions, GPUs, build and variables, as name and text."""
    rows = list(facts["versions"].items())
    for gpu in facts["gpus"]:
        runs = "run" if gpu["compiled_kernels"] else "do not run"
        text = (
            f"{gpu['name']}, capability {gpu['capability']}, driver {gpu['driver']}; "
            f"compiled kernels {runs} on it"
        )
        rows.append((gpu["device"], text))
    if not facts["gpus"]:
        rows.append(("GPU", "none that torch can use"))
    story = facts["build"]
    rows.append(("build", story["line"] if story else "no record"))
    rows.append(("compiled", facts["native"]["file"] or f"nothing: {facts['native']['missing']}"))
    return [*rows, *facts["environment"].items()]


def _reasons(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Device, implementation, dtypes and why: one row per reason, not one per op and dtype."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for x in facts["ops"]:
        for name, reason in x["others"].items():
            dtypes = reasons.setdefault((x["device"], name, reason), [])
            if x["dtype"] not in dtypes:
                dtypes.append(x["dtype"])
    return [(device, name, ", ".join(found), why) for (device, name, why), found in reasons.items()]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as indented lines with aligned columns; "none" without rows."""
    if not rows:
        return ["  none"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moe_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--selftest", action="store_true", help="check every implementation")
    options = parser.parse_args(argv)
    facts = collect(selftest=options.selftest, progress=_say)
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    if options.json and options.selftest and not facts["selftest"]:
        print(selftest_summary(facts), file=sys.stderr)
    return exit_code(facts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
