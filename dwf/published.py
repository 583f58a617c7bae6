"""Pack a trained model with what is known about it, for a hub or a colleague, and load it again.

    model.safetensors   weights, configuration and facts of the data set, as `dwf export` writes it
    config.json         the configuration of the run
    evaluation.json     the most searching evaluation of these weights, if there is one
    README.md           a card: what it is, its numbers and verdict, how to load it
    manifest.json       the sha256 of the other files

A folder, or one .zip file of these without compression. `load` compares every hash first, unpickles
nothing, and takes no other file out of an archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from torch import nn

from dwf import defenses
from dwf.checks import CheckpointError, ConfigError, DwfError
from dwf.config import from_dict
from dwf.defenses import get
from dwf.evaluation import Evaluation
from dwf.export import export_run, load_exported
from dwf.files import atomic_write_bytes, make_folder, read_bytes, read_json, require_hashes
from dwf.typed_json import Place, require_object
from dwf.version import DISTRIBUTION, __version__

FORMAT = 1
FILES = ("model.safetensors", "config.json", "evaluation.json", "README.md")
MANIFEST = "manifest.json"
# suites by how hard they search
SUITES = ("paper", "quick", "standard", "full")


def publish(run: str | Path, out: str | Path, *, weights: str | None = None) -> Path:
    """Pack the model of a run folder; return where it lies.

    Args:
        out: a folder that is empty or new, or a path that ends with .zip.
        weights: as for `dwf.load`; by default those that the run's configuration reports.
    Raises:
        ConfigError: ``out`` is a folder with something in it.
        CheckpointError: no run, or damaged files.
    """
    folder, out = Path(run), Path(out)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: not a run folder, config.json not found")
    config = from_dict(read_json(folder / "config.json"))
    weights = weights or config.weights
    if out.suffix != ".zip" and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: holds something already; name a new folder, or a .zip file")
    evaluation = best_evaluation(folder, weights)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        export_run(folder, path, format="safetensors", weights=weights)
        files = {
            "model.safetensors": path.read_bytes(),
            "config.json": _json(config.to_dict()),
            "README.md": card(folder, weights, evaluation).encode(),
        }
    if evaluation is not None:
        # where it was made is nobody's business
        table = {**evaluation.to_json(), "run": folder.name, "environment": {}}
        files["evaluation.json"] = _json(table)
    hashes = {key: hashlib.sha256(data).hexdigest() for key, data in sorted(files.items())}
    files[MANIFEST] = _json({"format": FORMAT, "kind": "dwf model", "sha256": hashes})
    if out.suffix == ".zip":
        make_folder(out.absolute().parent)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for key, data in files.items():
                archive.writestr(zipfile.ZipInfo(key), data)  # without a date
        atomic_write_bytes(out, stream.getvalue())
    else:
        make_folder(out)
        for key, data in files.items():  # the manifest last: without it the folder is no model
            atomic_write_bytes(out / key, data)
    return out


def load(
    path: str | Path, weights: str | None = None, *, model: nn.Module | None = None
) -> nn.Module:
    """The model of a run folder or of what :func:`publish` wrote, in eval mode on the CPU.

    Maps images [B, C, H, W] in [0, 1] to logits [B, K].

    Args:
        path: a run folder, or a published folder or .zip file.
        weights: of a run: "last" step, "best" robust validation accuracy, "ema" (the average of the
            weights), "best-ema" (the average at its best), or "pretrained" (DWF before end-to-end
            training); by default those that its configuration reports. A published model has one
            set of weights.
        model: the module that was given to ``train``, if one was; its weights are replaced.
    Raises:
        CheckpointError: nothing there, damaged or changed files, or another architecture.
        ConfigError: weights or a model named for a published model.
    """
    path = Path(path)
    is_archive = path.suffix == ".zip" and not path.is_dir()
    if not is_archive and not (path / MANIFEST).exists():
        return defenses.load(path, weights, model=model)
    if weights is not None or model is not None:
        raise ConfigError(f"{path}: a published model, which has no other weights to choose from")
    if not is_archive:
        _verify(path)
        return load_exported(path / "model.safetensors")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _unpack(path, folder)
        _verify(folder)
        return load_exported(folder / "model.safetensors")


def best_evaluation(run: Path, weights: str) -> Evaluation | None:
    """The most searching evaluation of these weights in a run folder, and of the most images."""
    found = []
    for path in sorted((run / "evaluations").glob("*.json")):
        try:
            evaluation = Evaluation.read(path)
        except CheckpointError:  # it is the report's business to say so
            continue
        base = evaluation.suite.split("-")[0]
        if evaluation.weights == weights and base in SUITES and "expert" not in evaluation.suite:
            found.append((SUITES.index(base), evaluation.num_images, evaluation))
    return max(found, key=lambda item: item[:2])[2] if found else None


def card(run: Path, weights: str, evaluation: Evaluation | None) -> str:
    """The model's README in Markdown, with the header that hubs read."""
    config = from_dict(read_json(run / "config.json"))
    title = get(config.defense).title
    network = f"{config.model.network} of width {config.model.width}"
    lines = [
        "---",
        "library_name: dwf",
        "tags: [image-classification, adversarial-robustness]",
        "---",
        "",
        f"# {title}, {network}, on {Path(config.data.name).name}",
        "",
    ]
    if evaluation is None:
        lines += ["**Not evaluated.** No number is known about these weights."]
    else:
        worst = evaluation.worst_case
        low, high = (100 * bound for bound in worst.interval)
        lines += [
            f"**{evaluation.verdict}**: {100 * worst.accuracy:.1f} % worst case "
            f"({low:.1f} to {high:.1f}, 95 %), {100 * evaluation.clean_accuracy:.1f} % clean; "
            f"suite {evaluation.suite}, {evaluation.norm} radius {evaluation.epsilon:.4g}, "
            f"{worst.num_images} images of {evaluation.data.name} {evaluation.data.split}.",
        ]
        lines += [f"- {finding.name}: {finding.message}" for finding in evaluation.findings]
        lines += ["", "```", str(evaluation), "```"]
    lines += [
        "",
        f"Weights: {weights}. Trained by `dwf train {config.preset}` with the settings of "
        f"config.json, seed {config.seed}; written by {DISTRIBUTION} {__version__}.",
        "",
        "```python",
        "import dwf",
        "",
        'model = dwf.load("this folder or .zip file")  # compares every hash; unpickles nothing',
        "logits = model(images)  # [B, C, H, W] in [0, 1]; the normalization is inside",
        "```",
        "",
    ]
    return "\n".join(lines)


def _verify(folder: Path) -> None:
    """Compare each file of a published folder with its manifest; CheckpointError."""
    place = Place(folder / MANIFEST)
    manifest = require_object(read_json(folder / MANIFEST), place)
    hashes = manifest.get("sha256")
    if manifest.get("kind") != "dwf model" or not isinstance(hashes, dict):
        raise CheckpointError(f"{folder / MANIFEST}: not the manifest of a published model")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r:.40}, this version reads "
            f"{FORMAT}"
        )
    if "model.safetensors" not in hashes or not set(hashes) <= set(FILES):
        raise CheckpointError(f"{folder / MANIFEST}: names {sorted(hashes)!s:.200}")
    require_hashes(folder, hashes)


def _unpack(path: Path, folder: Path) -> None:
    """Take the files of a published archive out of it; CheckpointError for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as archive:
            for entry in archive.infolist():
                if entry.filename not in (*FILES, MANIFEST):
                    raise CheckpointError(f"{path}: holds {entry.filename!r:.80}, no such file")
                if entry.compress_type != zipfile.ZIP_STORED:  # nor can it grow while it is read
                    raise CheckpointError(f"{path}: {entry.filename} is compressed; not ours")
                (folder / entry.filename).write_bytes(archive.read(entry))
    except DwfError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    except Exception as error:  # which ones parsers raise on random bytes has no list
        raise CheckpointError(f"{path}: not a readable archive, {error}") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
