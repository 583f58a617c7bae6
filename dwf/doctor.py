"""Say what this installation can do, and prove that its evaluations can be believed.

Without options, ``dwf doctor`` shows versions, the build, devices, which implementation each op
uses and why not another, room on the disk, and data sets. ``--selftest`` proves every kernel
against its definition in plain torch. ``--canaries`` trains an honest network and mixture on
digits, breaks them in every way of `dwf.evaluation.canaries`, and requires that the verdict finds
each fault. ``--zoo`` judges broken models of published mechanisms, whose truth an adaptive attack
knows, and honest ones (`dwf.evaluation.zoo`). The last lines are findings: what needs attention,
with the remedy.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dwf import data
from dwf.checks import check_choice
from dwf.data.named import data_root
from dwf.evaluation.canaries import CANARIES, Trial, is_caught, judge, judge_canary
from dwf.evaluation.honest import Honest, honest_models
from dwf.evaluation.record import Finding
from dwf.evaluation.zoo import BROKEN_ZOO, HONEST_ZOO
from dwf.evaluation.zoo.trial import as_json, run_zoo, summary
from dwf.typed_json import to_json
from moe_kernels import info

# A run of the paper's size keeps a few checkpoints of 0.8 GB each.
ENOUGH_DISK_GB = 5.0
NUM_IMAGES = 64


def examination(
    *,
    selftest: bool = False,
    canaries: bool = False,
    zoo: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All facts as JSON values.

    ``findings`` is what needs attention: dictionaries of name, severity ("note" for what costs
    speed or a download, "invalid" for what is wrong), message and remedy. ``zoo``: names of models
    of the zoo, all for an empty list, none for None.

    Raises:
        ConfigError: a name that the zoo does not have.
    """
    for name in zoo or ():
        check_choice(name, [*BROKEN_ZOO, *HONEST_ZOO], "zoo")
    kernels = info.collect(selftest=selftest, progress=progress)
    facts: dict[str, Any] = {
        "kernels": kernels,
        "folders": [_disk(role, path) for role, path in _folders().items()],
        "data": data.listing(),
        "canaries": run_canaries(progress=progress) if canaries else None,
        "zoo": None
        if zoo is None
        else [as_json(row) for row in run_zoo(names=list(zoo) or None, progress=progress)],
    }
    facts["findings"] = to_json(_findings(facts))
    return facts


def run_canaries(
    honest: Honest | None = None,
    *,
    names: Sequence[str] | None = None,
    num_images: int = NUM_IMAGES,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Judge the honest models, then each canary (or those of ``names``), on digits.

    Each row has name, verdict, findings, seconds, and ``right``: an honest model that is not
    INVALID, a canary that is caught (`dwf.evaluation.canaries.is_caught`).
    """
    say = progress or _silent
    if honest is None:
        say("training an honest network and an honest mixture on digits")
        honest = honest_models()
    digits = data.load("digits", split="test")
    digits = digits.subset(torch.arange(min(num_images, len(digits))))
    rows = []
    accuracy = {}
    for kind, model in (("network", honest.network), ("mixture", honest.mixture)):
        say(f"judging the honest {kind}")
        started = time.perf_counter()
        trial = judge(model, digits)
        accuracy[kind] = trial.robust_accuracy
        right = trial.verdict != "INVALID"
        rows.append(_row(f"honest {kind}", trial, started, right=right))
    for name in names if names is not None else CANARIES:
        say(f"judging {name}")
        started = time.perf_counter()
        trial = judge_canary(name, honest, digits)
        right = is_caught(name, trial, accuracy[CANARIES[name].of])
        rows.append(_row(name, trial, started, right=right))
    return rows


def _row(name: str, trial: Trial, started: float, *, right: bool) -> dict[str, Any]:
    canary = CANARIES.get(name)
    return {
        "name": name,
        "broken": canary is not None,
        "description": canary.description if canary else "trained as it should be",
        "verdict": trial.verdict,
        "findings": to_json(trial.findings),
        "right": right,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _folders() -> dict[str, Path]:
    return {"runs": Path.cwd(), "data": data_root(None)}


def _disk(role: str, path: Path) -> dict[str, Any]:
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return {
        "role": role,
        "path": str(path),
        "free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
        "writable": os.access(existing, os.W_OK),
    }


def _findings(facts: dict[str, Any]) -> list[Finding]:
    """What needs attention, in the order of the facts."""
    return [
        *_kernel_findings(facts["kernels"]),
        *_selftest_findings(facts["kernels"]["selftest"]),
        *_folder_findings(facts["folders"]),
        *_canary_findings(facts["canaries"] or ()),
        *_zoo_findings(facts["zoo"] or ()),
    ]


def _kernel_findings(kernels: dict[str, Any]) -> Iterator[Finding]:
    """What computes more slowly here than it could."""
    if not kernels["gpus"]:
        yield Finding(
            "no_gpu",
            "note",
            "torch can use no GPU here",
            "digits and small networks train on the CPU; for more install a torch with CUDA and a "
            "driver that suits it",
        )
    native = kernels["native"]
    if native["hidden_build"] is not None:
        yield Finding(
            "hidden_build",
            "note",
            f"this source tree is not built and hides the installed {native['hidden_build']}",
            "run `pip install -e .` in the tree, or start Python in another folder; until then "
            "plain torch computes the same more slowly",
        )
    elif not native["cpu"]:
        yield Finding(
            "no_compiled_kernels",
            "note",
            f"no compiled kernels: {native['missing']}",
            "install a C++ compiler (and nvcc), then dwf again, from its source tree by "
            "`pip install -e .`; until then plain torch computes the same more slowly",
        )
    for gpu in kernels["gpus"]:
        if native["cuda"] and not gpu["compiled_kernels"]:
            yield Finding(
                "gpu_not_compiled_for",
                "note",
                f"{gpu['device']}: compiled kernels do not run on capability "
                f"{gpu['capability']}, Triton does",
                "reinstall on this machine, or with this capability in MOE_KERNELS_CUDA_ARCHS",
            )


def _selftest_findings(proofs: Sequence[dict[str, Any]] | None) -> Iterator[Finding]:
    """Kernels that are wrong, or a self-test without any; None if it was not asked for."""
    if proofs is not None and not proofs:
        yield Finding(
            "nothing_tested",
            "invalid",
            "self-test: nothing was tested, because neither compiled nor Triton kernels run here",
            "the other findings say why; plain torch, the definition itself, computes everything",
        )
    for proof in proofs or ():
        if proof["fault"] is not None:
            yield Finding(
                "wrong_kernel",
                "invalid",
                "{op} on {device} in {dtype}, {implementation}: {fault}".format(**proof),
                "it is not used; update driver, torch and triton, and report it if it stays",
            )


def _folder_findings(folders: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Folders without room or without permission to write."""
    for folder in folders:
        where = f"{folder['path']} ({folder['role']})"
        elsewhere = {
            "data": "set DWF_DATA_ROOT to another folder",
            "runs": "give --out FOLDER",
        }[folder["role"]]
        if not folder["writable"]:
            yield Finding("read_only", "note", f"{where} is not writable", elsewhere)
        elif folder["free_gb"] < ENOUGH_DISK_GB:
            yield Finding(
                "disk",
                "note",
                f"{where} has {folder['free_gb']} GB free",
                f"make room, or {elsewhere}",
                folder["free_gb"],
                ENOUGH_DISK_GB,
            )


def _canary_findings(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Broken models that were not caught, and honest ones that were."""
    for row in rows:
        if not row["right"]:
            seen = ", ".join(finding["name"] for finding in row["findings"]) or "nothing"
            yield Finding(
                "canary_missed" if row["broken"] else "false_alarm",
                "invalid",
                f"{row['name']}: {row['verdict']}, found {seen}",
                "do not believe evaluations of this installation; run --selftest and report it",
            )


def _zoo_findings(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Broken models with a number that is too high and unflagged, and honest ones condemned."""
    for row in rows:
        if row["outcome"] in ("fooled", "false alarm"):
            seen = ", ".join(row["findings"]) or "nothing"
            yield Finding(
                "zoo_fooled" if row["kind"] == "broken" else "false_alarm",
                "invalid",
                f"{row['name']}: {row['verdict']} with {row['robust']} %, truth {row['truth']} %, "
                f"found {seen}",
                "do not believe evaluations of this installation; run --selftest and report it",
            )


def render(facts: dict[str, Any]) -> str:
    """The facts as text for a terminal."""
    lines = [info.render(facts["kernels"]), "", "Disk:"]
    lines += [
        f"  {x['role']:<6}{x['free_gb']:>8.1f} GB free  {x['path']}" for x in facts["folders"]
    ]
    lines += ["", "Data sets:", *(f"  {line}" for line in facts["data"])]
    if facts["canaries"] is not None:
        lines += ["", *_canary_table(facts["canaries"])]
    if facts["zoo"] is not None:
        lines += ["", summary(facts["zoo"])]
    lines += ["", "Findings:"]
    lines += [f"  {_line(finding)}" for finding in facts["findings"]] or ["  none"]
    return "\n".join(lines)


def _canary_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"  {'canary':<20} {'verdict':<8} {'right':<6} findings"]
    for row in rows:
        names = " ".join(f["name"] for f in row["findings"] if f["severity"] != "note") or "-"
        right = "yes" if row["right"] else "NO"
        lines.append(f"  {row['name']:<20} {row['verdict']:<8} {right:<6} {names}")
    broken = [row for row in rows if row["broken"]]
    caught = sum(row["right"] for row in broken)
    return [f"Canaries: {caught} of {len(broken)} broken models caught", *lines]


def _line(finding: dict[str, Any]) -> str:
    return f"{finding['severity']}: {finding['name']}: {finding['message']}; {finding['remedy']}"


def exit_code(facts: dict[str, Any]) -> int:
    """1 if something is wrong, 0 if it is only slow or absent."""
    return int(any(finding["severity"] == "invalid" for finding in facts["findings"]))


def _silent(line: str) -> None:
    """Ignore progress."""
