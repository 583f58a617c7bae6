"""Write a trained model as one file for other programs, and check it before it is written.

    safetensors    weights, with the normalization; the file of a run also has its configuration,
                   from which `load_exported` rebuilds the model
    torch-export   a program for torch.export.load: any batch size, needs plain torch only
    onnx           a program for other runtimes; needs the extra "export"

The file's bytes are read back and run. If their float32 logits differ from the model's by more than
1e-4, there is an ExportError and no file.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.export import ExportedProgram

import moe_kernels
from dwf import checkpoint
from dwf.attacks.door import ask, undisturbed
from dwf.attacks.source import float32_verdicts
from dwf.checks import (
    CheckpointError,
    ConfigError,
    DwfError,
    ImageError,
    check_choice,
    check_images,
    check_logits,
)
from dwf.config import from_dict
from dwf.defenses import ModelFacts, get, load
from dwf.files import atomic_write_bytes, parse_json, read_json
from dwf.typed_json import Place, from_json
from dwf.version import DISTRIBUTION, __version__
from moe_kernels.errors import in_one_line

# Orders of magnitude above rounding, and below what changes a prediction that means something.
LARGEST_DIFFERENCE = 1e-4
SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
_NUM_IMAGES = 8

Function = Callable[[Tensor], Tensor]


class ExportError(DwfError, ValueError):
    """A model cannot be exported, or the exported file computes something else."""


@dataclass(frozen=True)
class Exported:
    """A written file; ``largest_difference`` is that between its logits and the model's."""

    path: Path
    format: str
    num_bytes: int
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.format}, {self.num_bytes / 1e6:.3g} MB, logits within "
            f"{self.largest_difference:.1e} of the model's"
        )


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    images: Tensor,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a model, in eval mode, as one file; return what was written.

    The file's tensors are on the CPU; its reader may move them. The model is not changed.

    Args:
        format: "safetensors", "torch-export" or "onnx".
        images: [B, C, H, W] in [0, 1], for tracing and for the comparison; the program takes any B.
        metadata: texts for the header of a safetensors file.
    Raises:
        ExportError: the model is random, its logits are not finite, it cannot be traced, the file
            computes other logits, or a package is missing.
        CheckpointError: the file could not be written.
        ConfigError, PixelRangeError, ...: bad arguments, before any work.
    """
    path = Path(path)
    check_choice(format, list(SUFFIXES), "format")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if len(check_images(images)) == 0:
        raise ImageError("images: expected at least one, to compare logits")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: {path.parent} is not a folder")
    if path.suffix != SUFFIXES[format]:  # torch.export.load, for one, wants it
        raise ConfigError(f"{path}: a {format} file is called *{SUFFIXES[format]}")
    if format == "onnx":
        _require("onnx", "onnxscript")
    device = next((p.device for p in model.parameters()), images.device)
    with undisturbed(model, device), torch.no_grad(), float32_verdicts(device):
        images = images.detach().float().to(device)
        expected = _logits(model, images)
        images = images.cpu()
        data, function = _WRITERS[format](_twin(model), images, dict(metadata or {}))
        differences = [
            _difference(function, images[:rows], expected[:rows]) for rows in (1, len(images))
        ]
    difference = max(differences, key=lambda x: (math.isnan(x), x))
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"{path}: logits of the {format} file differ from the model's by {difference:.3g}, "
            f"more than {LARGEST_DIFFERENCE:g}; nothing was written"
        )
    atomic_write_bytes(path, data)
    return Exported(path, format, len(data), difference)


def export_run(
    run: str | Path, path: str | Path, *, format: str, weights: str | None = None
) -> Exported:
    """Write the model of a run folder, compared on eight random images; see `export`.

    Args:
        weights: "last", "best", "ema", "best-ema" or "pretrained", as for `dwf.load`; by default
            those that the configuration reports.
    """
    folder = Path(run)
    model = load(folder, weights)
    weights = weights or from_dict(read_json(folder / "config.json")).weights
    pointer, _ = checkpoint.place_of(weights)
    state = read_json(checkpoint.resolve(folder / "checkpoints", pointer) / "state.json")
    shape = state["facts"]["image_shape"]
    metadata = {
        "config": json.dumps(read_json(folder / "config.json")),
        "facts": json.dumps(state["facts"]),
        "run": folder.name,
        "weights": weights,
    }
    images = moe_kernels.uniform_noise(0, torch.arange(_NUM_IMAGES), shape)
    return export(model, path, format=format, images=images, metadata=metadata)


def load_exported(path: str | Path) -> nn.Module:
    """Rebuild the model of a safetensors file that was exported from a run: eval mode, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or was not exported from a run.
    """
    path = Path(path)
    weights = checkpoint.read_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, {error}") from error
    if not {"config", "facts"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: holds weights without the config of a run; build the model yourself and give "
            "it these with safetensors.torch.load_model"
        )
    return _rebuilt(metadata, weights, path)


def _safetensors(
    model: nn.Module, images: Tensor, metadata: dict[str, str]
) -> tuple[bytes, Function]:
    # cloned, because safetensors refuses tensors that share memory (tied weights)
    tensors = {name: x.contiguous().clone() for name, x in model.state_dict().items()}
    facts = {"format": "pt", "dwf": __version__, "model": type(model).__name__}
    data = safetensors.torch.save(tensors, metadata={**facts, **metadata})
    weights, source = safetensors.torch.load(data), Path("the exported file")
    if {"config", "facts"} <= metadata.keys():
        return data, _rebuilt(metadata, weights, source)
    for tensor in model.state_dict().values():
        tensor.zero_()  # nothing but the file can fill them
    checkpoint.load_weights(model, weights, source)
    return data, model


def _rebuilt(metadata: Mapping[str, str], weights: dict[str, Tensor], source: Path) -> nn.Module:
    config = from_dict(parse_json(metadata["config"], source))
    facts = parse_json(metadata["facts"], source)
    model = get(config.defense).build(config, from_json(ModelFacts, facts, Place(source, "facts")))
    checkpoint.load_weights(model, weights, source)
    return model.eval()


def _torch_export(
    model: nn.Module, images: Tensor, metadata: dict[str, str]
) -> tuple[bytes, Function]:
    stream = io.BytesIO()
    torch.export.save(_program(model, images), stream)
    stream.seek(0)
    return stream.getvalue(), torch.export.load(stream).module()


def _onnx(model: nn.Module, images: Tensor, metadata: dict[str, str]) -> tuple[bytes, Function]:
    program = _program(model, images)
    try:
        made = torch.onnx.export(
            program,
            (),
            kwargs={},
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except Exception as error:  # whatever an operator without a translation raises
        raise ExportError(
            f"{_name(model)}: not translated to ONNX, {in_one_line(error)}"
        ) from error
    assert made is not None
    proto = made.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # source lines of the machine that exports
    data: bytes = proto.SerializeToString()
    return data, _onnx_function(data)


def _onnx_function(data: bytes) -> Function:
    """The file as a function, run by onnxruntime or, without it, by the reference of ONNX."""
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        run = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run
    else:
        import onnx
        import onnx.reference

        run = onnx.reference.ReferenceEvaluator(onnx.load_from_string(data)).run

    def function(images: Tensor) -> Tensor:
        (logits,) = run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return function


_WRITERS: dict[str, Callable[[nn.Module, Tensor, dict[str, str]], tuple[bytes, Function]]] = {
    "safetensors": _safetensors,
    "torch-export": _torch_export,
    "onnx": _onnx,
}


def _program(model: nn.Module, images: Tensor) -> ExportedProgram:
    """The model as a graph of plain torch operations, for any number of images."""
    # Without gradients, some mixtures compute each image by its expert alone: their control flow
    # then depends on the images, which no graph can.
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    if len(images) == 1:  # torch would take the batch size for a constant
        images = images.repeat(2, 1, 1, 1)
    shapes = ({0: torch.export.Dim("batch")},)
    faults: list[Exception] = []
    # the second way is slow, and follows Python more closely: it knows len(images), for one
    for strict in (False, True):
        try:
            with torch.enable_grad():
                program = torch.export.export(
                    model, (images,), dynamic_shapes=shapes, strict=strict
                )
            break
        except Exception as error:  # torch promises no type for what it cannot trace
            faults.append(error)
    else:
        raise ExportError(
            f"{_name(model)}: torch.export cannot trace it for every batch size, "
            f"{in_one_line(faults[0])}"
        ) from faults[0]
    program = cast(ExportedProgram, program.run_decompositions(moe_kernels.decompositions()))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines of the machine that exports
    return program


def _twin(model: nn.Module) -> nn.Module:
    """A copy on the CPU; each tensor has its own storage, or the file would hold a larger one."""
    twin = copy.deepcopy(model).cpu()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return twin


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits [B, K] on the CPU; an ExportError if two passes differ."""
    logits = check_logits(ask(model, images), len(images)).float().cpu()
    if not bool(logits.isfinite().all()):
        raise ExportError(f"{_name(model)}: logits that are not finite, so nothing to compare")
    difference = float((ask(model, images).float().cpu() - logits).abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"{_name(model)}: random, two passes differ by {difference:.3g}; a file would hold one "
            "draw for ever"
        )
    return logits


def _difference(function: Function, images: Tensor, expected: Tensor) -> float:
    found = function(images)
    if found.shape != expected.shape:
        raise ExportError(
            f"logits {list(found.shape)} from the exported file, {list(expected.shape)} expected"
        )
    return float((found.float() - expected).abs().max())


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{', '.join(missing)} not installed: run `pip install {' '.join(missing)}`, or "
            f'install {DISTRIBUTION} with its extra "export"'
        )


def _name(model: nn.Module) -> str:
    return type(model).__name__
