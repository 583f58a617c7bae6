"""RobustBench's functions over our evaluation.

Source: Croce et al., arXiv:2010.09670.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwf import data
from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.source import float32_verdicts
from dwf.checks import (
    ConfigError,
    check_choice,
    check_count,
    check_images,
    check_labels,
    check_logits,
)
from dwf.compat.autoattack import NORMS
from dwf.config import EvaluationConfig, from_dict
from dwf.data import ImageDataset
from dwf.data.batches import to_unit_range
from dwf.defenses import load
from dwf.evaluation import evaluate
from dwf.evaluation.table import robustbench_json
from dwf.files import atomic_write_json, read_json

log = logging.getLogger("dwf")
# What a preprocessing does to a picture; a name of RobustBench's is for ImageNet, which is not here
Preprocessing = Callable[[Any], Tensor]
Path_ = str | os.PathLike[str]


def benchmark(
    model: Model,
    n_examples: int = 10_000,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: Path_ | None = None,
    corruptions_data_dir: Path_ | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: Path_ | None = None,
    preprocessing: str | Preprocessing | None = None,
    aa_state_path: Path_ | None = None,
) -> tuple[float, float]:
    """(clean accuracy, robust accuracy) by the standard suite: RobustBench's ``benchmark``.

    The table with its verdict goes to the log.

    Args:
        dataset: a name or path as in :func:`dwf.data.load`, or RobustBench's enumeration.
        threat_model: "Linf" or "L2". "corruptions" is not here, nor ``corruptions_data_dir``.
        to_disk: write ``model_info/<dataset>/<threat_model>/<model_name>.json``.
        eps: 8/255 in L-inf and 0.5 in L2 by default.
        log_path: a file to append the table to.
        preprocessing: a function from a PIL image to a tensor [C, H, W] in [0, 1].
        aa_state_path: a file to keep outcomes in, and to continue from if it exists.
    Raises:
        ConfigError: ``to_disk`` without a name, or an argument that has no meaning here.
        DataError: no such data set in ``data_dir``.
    """
    dataset, threat_model = _word(dataset), _word(threat_model)
    check_choice(threat_model, list(NORMS), "threat_model")
    if corruptions_data_dir is not None:
        raise ConfigError("corruptions_data_dir: threat model 'corruptions' is not supported")
    if to_disk and model_name is None:
        raise ConfigError("to_disk: name the model with model_name=")
    if isinstance(preprocessing, str):
        raise ConfigError(
            f"preprocessing: {preprocessing!r} is RobustBench's for ImageNet, which is not here; "
            "pass a function from a PIL image to a tensor, or evaluate(model, your_loader)"
        )
    test_set = data.load(dataset, root=data_dir, split="test")
    n_examples = check_count(n_examples, "n_examples")
    if preprocessing is not None:
        test_set = _preprocessed(test_set, preprocessing, n_examples)
    radius = eps if eps is not None else 8 / 255 if threat_model == "Linf" else 0.5
    if isinstance(model, nn.Module) and device is not None:
        model = model.to(device)
    result = evaluate(
        model,
        test_set,
        EvaluationConfig(num_images=n_examples, batch_size=batch_size),
        suite="standard",
        epsilon=radius,
        norm=NORMS[threat_model],
        device=device,
        partial=None if aa_state_path is None else Path(aa_state_path),
    )
    log.info(str(result))
    if log_path is not None:
        with open(log_path, "a", encoding="utf-8") as stream:
            stream.write(f"{result}\n")
    if result.verdict != "VALID":
        log.warning(f"benchmark: the verdict is {result.verdict}")
    if to_disk:
        path = Path("model_info") / dataset / threat_model / f"{model_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, robustbench_json(result, str(model_name)))
    return result.clean_accuracy, result.robust_accuracy


def load_model(
    model_name: str,
    model_dir: Path_ = "runs",
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    norm: str | None = None,
) -> nn.Module:
    """A trained model from the run folder ``model_dir/model_name``: RobustBench's ``load_model``.

    ``norm`` is RobustBench's old name of ``threat_model``.

    Raises:
        CheckpointError: no such run. ConfigError: a run of another data set.
    """
    dataset = _word(dataset)
    check_choice(_word(norm if norm is not None else threat_model), list(NORMS), "threat_model")
    folder = Path(model_dir) / model_name
    model = load(folder)
    trained_on = from_dict(read_json(folder / "config.json")).data.name
    if Path(trained_on).stem != Path(dataset).stem:
        raise ConfigError(f"dataset: {dataset!r}, but {folder} was trained on {trained_on!r}")
    return model


def load_cifar10(
    n_examples: int | None = None,
    data_dir: Path_ | None = None,
    transforms_test: Preprocessing | None = None,
) -> tuple[Tensor, Tensor]:
    """Test images [N, 3, 32, 32] float32 in [0, 1] and labels [N] of CIFAR-10.

    Args:
        n_examples: only the first so many.
        data_dir: where the files lie; by default as in :func:`dwf.data.load`.
        transforms_test: a function from a PIL image to a tensor, in place of `ToTensor`.
    """
    return _test_images("cifar10", n_examples, data_dir, transforms_test)


def load_cifar100(
    n_examples: int | None = None,
    data_dir: Path_ | None = None,
    transforms_test: Preprocessing | None = None,
) -> tuple[Tensor, Tensor]:
    """Test images and labels of CIFAR-100, as `load_cifar10`."""
    return _test_images("cifar100", n_examples, data_dir, transforms_test)


def clean_accuracy(
    model: Model,
    x: Tensor,
    y: Tensor,
    batch_size: int = 100,
    device: torch.device | str | None = None,
) -> float:
    """Share of the images that the model gets right, in float32 and eval mode.

    Args:
        x: [N, C, H, W] in [0, 1].
        y: [N] integers.
        device: where the model lives; by default that of ``x``.
    """
    x, y = check_images(x, "x"), check_labels(y, len(x), name="y")
    batch_size, right = check_count(batch_size, "batch_size"), 0
    home = x.device if device is None else torch.device(device)
    with undisturbed(model, home, seed=0), torch.no_grad(), float32_verdicts(home):
        for images, labels in zip(
            torch.split(x, batch_size), torch.split(y, batch_size), strict=True
        ):
            logits = check_logits(
                ask(model, images.to(home)), len(images), allow_probabilities=True
            )
            right += int((logits.argmax(dim=1).cpu() == labels.cpu()).sum())
    return right / max(len(x), 1)


def _word(value: Any) -> str:
    """A name, also of a member of RobustBench's enumerations."""
    return str(getattr(value, "value", value))


def _test_images(
    name: str, n_examples: int | None, data_dir: Path_ | None, transform: Preprocessing | None
) -> tuple[Tensor, Tensor]:
    dataset = data.load(name, root=data_dir, split="test")
    if n_examples is not None:
        count = min(check_count(n_examples, "n_examples"), len(dataset))
        dataset = dataset.subset(torch.arange(count))
    if transform is not None:
        dataset = _preprocessed(dataset, transform, len(dataset))
    return to_unit_range(dataset.images), dataset.labels


def _preprocessed(dataset: ImageDataset, function: Preprocessing, count: int) -> ImageDataset:
    """The first images after a function from a PIL image to a tensor."""
    from PIL import Image

    def items() -> Any:
        for image, label in zip(dataset.images[:count], dataset.labels, strict=False):
            pixels = image.squeeze(0) if len(image) == 1 else image.permute(1, 2, 0)
            yield function(Image.fromarray(pixels.numpy())), label

    return data.as_dataset(items(), name=dataset.name, split=dataset.split)
