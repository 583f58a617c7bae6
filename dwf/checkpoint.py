"""Write and read checkpoints: folders of safetensors and JSON, whole or absent, hashed.

    checkpoints/step-00001200/{model,ema,optimizer}.safetensors  state.json  manifest.json
    checkpoints/{last,best,best-ema,pretrained}.json               {"checkpoint": "step-00001200"}

The folder is filled under a temporary name; the manifest with the sha256 of every other file comes
last; one rename makes it visible. Reading compares every hash. A pointer is a separate file: a
folder cannot be replaced in one step. Names in pointers and manifests are names, never paths. No
file is ever unpickled.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dwf.checks import CheckpointError
from dwf.files import (
    atomic_write_bytes,
    atomic_write_json,
    open_regular,
    read_json,
    require_hashes,
    sha256,
    sync_folder,
)
from dwf.typed_json import Place, require_object

FORMAT = 1
NAME = re.compile(r"step-\d+")
FILE = re.compile(r"\w+\.(safetensors|json)")
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
        if _holds(final, manifest):
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


def _holds(checkpoint: Path, manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint is there, with this manifest and all its files undamaged."""
    try:
        return read_json(checkpoint / "manifest.json") == manifest and all(
            sha256(checkpoint / file) == expected for file, expected in manifest["sha256"].items()
        )
    except OSError:
        return False


def point(folder: Path, pointer: str, name: str) -> None:
    """Let a pointer (last, best, best-ema, pretrained) name a checkpoint."""
    atomic_write_json(folder / f"{pointer}.json", {"checkpoint": name})


def resolve(folder: Path, pointer: str) -> Path:
    """The folder of the checkpoint that a pointer names.

    Raises:
        CheckpointError: no such pointer; the message lists those there are. Or one that names no
            checkpoint.
    """
    path = folder / f"{pointer}.json"
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.json"))
        raise CheckpointError(f"{path}: not found; this run has {known or 'no checkpoint yet'}")
    value = read_json(path)
    name = value.get("checkpoint") if isinstance(value, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CheckpointError(
            f"{path}: expected a key 'checkpoint' with a name like 'step-00001200', "
            f"found {value!r:.80}"
        )
    return folder / name


def place_of(weights: str) -> tuple[str, str]:
    """The pointer and the file's stem of named weights: "ema" is the average at the last step."""
    pointer = "last" if weights == "ema" else weights
    return pointer, "ema" if weights.endswith("ema") else "model"


def load(checkpoint: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Read a checkpoint after comparing every file with its manifest.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or not what its name says. The
            message offers the newest older checkpoint.
    """
    try:
        return _load(checkpoint)
    except OSError as error:
        if not isinstance(error, CheckpointError):
            error = CheckpointError(f"{checkpoint}: not readable, {error}")
        older = [p.name for p in checkpoints(checkpoint.parent) if p.name < checkpoint.name]
        if not older:
            raise error
        raise CheckpointError(
            f'{error}; to go on from {older[-1]}, write {{"checkpoint": "{older[-1]}"}} '
            f"to {checkpoint.parent / 'last.json'}; training does so itself"
        ) from error


def load_newest(folder: Path) -> tuple[Path, dict[str, Tensors], dict[str, Any], str]:
    """Read the checkpoint that ``last`` names, or the newest undamaged one if that is damaged.

    Returns:
        Its folder, tensors and state, and what was wrong with the one that ``last`` names.
    Raises:
        CheckpointError: none is undamaged; about the one that ``last`` names.
    """
    try:
        path = resolve(folder, "last")
        return path, *load(path), ""
    except CheckpointError as error:
        for path in reversed(checkpoints(folder)):
            try:
                return path, *_load(path), str(error)
            except OSError:
                continue
        raise


def _load(checkpoint: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    place = checkpoint / "manifest.json"
    manifest = read_json(place)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or not all(map(FILE.fullmatch, hashes)):
        raise CheckpointError(f"{place}: not a manifest")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{place}: format {manifest.get('format')!r:.40}, this version reads {FORMAT}"
        )
    if "state.json" not in hashes or "model.safetensors" not in hashes:
        raise CheckpointError(f"{place}: not a manifest, model.safetensors or state.json missing")
    require_hashes(checkpoint, hashes)
    paths = [checkpoint / file for file in sorted(hashes)]
    tensors = {p.stem: read_tensors(p) for p in paths if p.suffix == ".safetensors"}
    state = read_json(checkpoint / "state.json")
    return tensors, require_object(state, Place(checkpoint / "state.json"))


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file; anything else (a pickle, a web page) is a CheckpointError."""
    try:
        with open_regular(path):  # a pipe would never end
            return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    # what safetensors, and torch for the sizes and types in a header, may raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
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
    """Delete all but the newest checkpoints and those that a pointer names.

    Raises:
        CheckpointError: something cannot be deleted.
    """
    named = set()
    for pointer in folder.glob("*.json"):
        with contextlib.suppress(CheckpointError):  # one that is damaged names nothing
            named.add(resolve(folder, pointer.stem).name)
    try:
        for old in checkpoints(folder)[:-keep]:
            if old.name not in named:
                _remove(old)
        for unfinished in folder.glob(".step-*"):
            shutil.rmtree(unfinished)
    except OSError as error:
        raise CheckpointError(f"{folder}: an old checkpoint could not be deleted, {error}") from (
            error
        )


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away in one step, so that no half of it is ever seen."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(doomed))
