"""Write and read checkpoints: folders of safetensors and JSON, whole or absent, hashed.

    checkpoints/step-00001200/{model,ema,optimizer}.safetensors  state.json  manifest.json
    checkpoints/{last,best,pretrained}.json                      {"checkpoint": "step-00001200"}

The folder is filled under a temporary name; the manifest with the sha256 of every other file comes
last; one rename makes it visible. Reading compares every hash. A pointer is a separate file: a
folder cannot be replaced in one step. No file is ever unpickled.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dwf.checks import CheckpointError
from dwf.files import atomic_write_bytes, atomic_write_json, read_json, sha256, sync_folder

FORMAT = 1
Tensors = dict[str, Tensor]


def save(folder: Path, global_step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> str:
    """Write one checkpoint; return its name.

    Args:
        folder: the run's ``checkpoints`` folder.
        tensors: file stem to named tensors.
        state: JSON values.
    Raises:
        CheckpointError: with the file and the system's reason; older checkpoints stay whole.
    """
    name = f"step-{global_step:08d}"
    temporary = folder / f".{name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for stem, named in tensors.items():
            # cloned, because safetensors refuses tensors that share memory (tied weights)
            data = to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in named.items()})
            atomic_write_bytes(temporary / f"{stem}.safetensors", data)
        atomic_write_json(temporary / "state.json", state)
        hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "sha256": hashes}
        atomic_write_json(temporary / "manifest.json", manifest)
        final = folder / name
        if final.exists() and read_json(final / "manifest.json") == manifest:
            shutil.rmtree(temporary)  # a resumed run came by again with the same bits
            return name
        _remove(final)
        temporary.rename(final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{temporary}: could not be written, {error}") from error
    return name


def point(folder: Path, pointer: str, name: str) -> None:
    """Let a pointer (last, best, pretrained) name a checkpoint."""
    atomic_write_json(folder / f"{pointer}.json", {"checkpoint": name})


def resolve(folder: Path, pointer: str) -> Path:
    """The folder of the checkpoint that a pointer names.

    Raises:
        CheckpointError: no such pointer; the message lists those there are.
    """
    path = folder / f"{pointer}.json"
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.json"))
        raise CheckpointError(f"{path}: not found; this run has {known or 'no checkpoint yet'}")
    value = read_json(path)
    name = value.get("checkpoint") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: expected a key 'checkpoint', found {value!r}")
    return folder / name


def load(checkpoint: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Read a checkpoint after comparing every file with its manifest.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or not what its name says. The
            message offers the newest older checkpoint.
    """
    try:
        manifest = read_json(checkpoint / "manifest.json")
        if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
            raise CheckpointError(f"{checkpoint / 'manifest.json'}: not a manifest")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{checkpoint / 'manifest.json'}: format {manifest.get('format')!r}, "
                f"this version reads {FORMAT}"
            )
        for file, expected in manifest["sha256"].items():
            path = checkpoint / file
            if not path.exists():
                raise CheckpointError(f"{path}: not found")
            if (found := sha256(path)) != expected:
                raise CheckpointError(
                    f"{path}: damaged, sha256 {found[:16]}..., expected {expected[:16]}..."
                )
        paths = [checkpoint / file for file in sorted(manifest["sha256"])]
        tensors = {p.stem: read_tensors(p) for p in paths if p.suffix == ".safetensors"}
        return tensors, read_json(checkpoint / "state.json")
    except OSError as error:
        if not isinstance(error, CheckpointError):
            error = CheckpointError(f"{checkpoint}: not readable, {error}")
        older = [p.name for p in checkpoints(checkpoint.parent) if p.name < checkpoint.name]
        if not older:
            raise error
        raise CheckpointError(
            f'{error}; to go on from {older[-1]}, write {{"checkpoint": "{older[-1]}"}} '
            f"to {checkpoint.parent / 'last.json'}"
        ) from error


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file; anything else (a pickle, a web page) is a CheckpointError."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, {error}") from error


def load_weights(model: nn.Module, weights: Tensors, source: Path) -> None:
    """Put tensors into a model; a CheckpointError names the first key that does not fit."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    if missing or unexpected:
        raise CheckpointError(
            f"{source}: another architecture, missing {missing[:3]} and unexpected "
            f"{unexpected[:3]} of {len(missing)} and {len(unexpected)} keys"
        )
    for key, value in own.items():
        if weights[key].shape != value.shape:
            raise CheckpointError(
                f"{source}: {key} has shape {list(weights[key].shape)}, "
                f"the model's has {list(value.shape)}"
            )
    model.load_state_dict(weights)


def checkpoints(folder: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "manifest.json").exists())


def prune(folder: Path, keep: int = 2) -> None:
    """Delete all but the newest checkpoints and those that a pointer names."""
    named = {read_json(p).get("checkpoint") for p in folder.glob("*.json")}
    for old in checkpoints(folder)[:-keep]:
        if old.name not in named:
            _remove(old)
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished)


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away in one step, so that no half of it is ever seen."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(doomed))
