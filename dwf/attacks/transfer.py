"""Attack a list of models, and show the images of each to all of them.

print(dwf.transfer({"a": a, "b": b}, images, labels, epsilon=8 / 255))

The diagonal is the white-box attack; the rest says how far adversarial images transfer (Papernot et
al., arXiv:1605.07277).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dwf.attacks.door import model_name
from dwf.attacks.losses import Model
from dwf.attacks.minimum_norm import without_plan
from dwf.attacks.objects import APGD, Attack
from dwf.attacks.saved_images import load_images
from dwf.attacks.setup import Setup
from dwf.checks import ConfigError, ImageError, check_count, check_image_tensor, check_labels

# What adversarial images come from: a model, images [N, C, H, W], or a file of saved ones.
Source = Model | Tensor | str | Path
# Settings of the attack that also belong to the verdict of a judge.
_OF_A_VERDICT = ("eot_samples", "bn_mode", "seed")


@dataclass(frozen=True, repr=False)
class TransferTable:
    """How models answer the images that were crafted on others.

    Attributes:
        attack: the attack with its settings, as text.
        sources: names of what the images were crafted on.
        judges: names of the models that answered.
        clean: [T, N] bool, whether each judge is right about each clean image.
        stands: [S, T, N] bool, the same for the images of each source.
    """

    attack: str
    sources: tuple[str, ...]
    judges: tuple[str, ...]
    clean: Tensor
    stands: Tensor

    @property
    def accuracy(self) -> Tensor:
        """[S, T] float64: the accuracy of each judge on the images of each source."""
        return self.stands.double().mean(dim=2)

    @property
    def clean_accuracy(self) -> Tensor:
        """[T] float64: the accuracy of each judge on the clean images."""
        return self.clean.double().mean(dim=1)

    @property
    def worst_case(self) -> Tensor:
        """[T] float64: the share of images that a judge gets right clean and from every source."""
        return (self.clean & self.stands.all(dim=0)).double().mean(dim=1)

    def __str__(self) -> str:
        lines = [("clean", self.clean_accuracy)]
        lines += zip(self.sources, self.accuracy, strict=True)
        lines.append(("worst case", self.worst_case))
        left = max(len(name) for name, _ in lines)
        widths = [max(len(name), 8) for name in self.judges]

        def joined(first: str, cells: Sequence[str]) -> str:
            aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            return "  ".join([f"{first:<{left}}", *aligned])

        title = f"{self.attack}, n = {self.clean.shape[1]}: accuracy of each column on the row's"
        body = [joined(name, [f"{100 * x:.2f} %" for x in row.tolist()]) for name, row in lines]
        return "\n".join([title, joined("", self.judges), *body])

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        return f"<pre>{html.escape(str(self), quote=False)}</pre>"

    def __repr__(self) -> str:
        return f"TransferTable({len(self.sources)} sources, {len(self.judges)} judges)"


def transfer(
    sources: Sequence[Source] | Mapping[str, Source],
    images: Tensor,
    labels: Tensor,
    *,
    judges: Sequence[Model] | Mapping[str, Model] | None = None,
    attack: type[Attack] = APGD,
    batch_size: int = 250,
    **settings: Any,
) -> TransferTable:
    """Craft adversarial images on each source, and ask every judge about them.

    An image's result does not depend on ``batch_size``. Which answers are right is decided by the
    judges themselves, in float32.

    Args:
        sources: models, or adversarial images of ``images`` made before: a tensor [N, C, H, W] or a
            file of :func:`dwf.attacks.save_images`. A list, or a mapping with names.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        judges: models; by default the models among the sources.
        attack: class of the attack, as ``dwf.PGD``.
        settings: of the attack, as ``epsilon=8 / 255``. With ``eot_samples``, ``bn_mode`` or
            ``seed``, judges are asked so as well.
    Raises:
        ConfigError: no source, no judge, or a file with other labels.
        ImageError: images of a source have another shape.
        TypeError: no such setting. And as the attack.
    """
    batch_size = check_count(batch_size, "batch_size")
    check_labels(labels, len(check_image_tensor(images)))
    if len(images) == 0:
        raise ImageError("images: none, there is nothing to attack")
    crafted_on = _named(sources, "sources")
    models = {name: x for name, x in crafted_on.items() if callable(x)}
    asked = models if judges is None else _named(judges, "judges")
    if not asked:
        raise ConfigError("judges: none, and no source is a model")
    attacks = {name: attack(model, **settings) for name, model in models.items()}
    how = {name: settings[name] for name in _OF_A_VERDICT if name in settings}

    def answers(found: Tensor) -> Tensor:
        return torch.stack([_right(m, found, labels, batch_size, how) for m in asked.values()])

    stands = []
    for name, source in crafted_on.items():
        if name in attacks:
            found = _crafted(attacks[name], images, labels, batch_size)
        else:
            found = _made_before(cast("Tensor | str | Path", source), name, images, labels)
        stands.append(answers(found))
    return TransferTable(
        attack=_title(next(iter(attacks.values()), None), settings),
        sources=tuple(crafted_on),
        judges=tuple(asked),
        clean=answers(images),
        stands=torch.stack(stands),
    )


def _named(given: Any, name: str) -> dict[str, Any]:
    """The members under their names; those of a list are called after what they are."""
    if isinstance(given, Mapping):
        found = {str(key): value for key, value in given.items()}
    elif isinstance(given, list | tuple):
        found = {}
        for value in given:
            first = _name_of(value)
            again = (f"{first} {number}" for number in range(2, len(given) + 2))
            found[next(key for key in (first, *again) if key not in found)] = value
    else:
        raise ConfigError(f"{name}: {type(given).__name__}, expected a list or a mapping by names")
    if not found:
        raise ConfigError(f"{name}: empty")
    for key, value in found.items():
        is_data = name == "sources" and isinstance(value, Tensor | str | Path)
        if not callable(value) and not is_data:
            raise ConfigError(f"{name}: {key} is {type(value).__name__}, expected a model")
    return found


def _name_of(source: Any) -> str:
    if isinstance(source, str | Path):
        return Path(source).stem
    return "images" if isinstance(source, Tensor) else model_name(source)


def _crafted(attack: Attack, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Adversarial images [N, C, H, W] on the device of ``images``."""
    batches = _batches(attack.model, images, labels, batch_size)
    found = [attack(x, y, sample_index=index) for x, y, index in batches]
    return torch.cat(found).to(images.device)


def _made_before(source: Tensor | str | Path, name: str, images: Tensor, labels: Tensor) -> Tensor:
    if isinstance(source, Tensor):
        found = check_image_tensor(source, name)
    else:
        found, known = load_images(source)
        if not torch.equal(known.cpu(), labels.long().cpu()):
            raise ConfigError(f"{name}: labels of the file are not those of the images")
    if found.shape != images.shape:
        raise ImageError(f"{name}: images {list(found.shape)}, expected {list(images.shape)}")
    return found.to(images.device)


def _right(
    model: Model, images: Tensor, labels: Tensor, batch_size: int, how: Mapping[str, Any]
) -> Tensor:
    """[N] bool on the CPU: whether the model itself answers with the label."""
    parts = []
    for x, y, index in _batches(model, images, labels, batch_size):
        setup = Setup(
            model=without_plan(model),
            images=x,
            labels=y,
            sample_index=index,
            allow_probabilities=True,
            **how,
        )
        with setup.opened() as (batch, source):
            parts.append(~batch.are_fooled(source, batch.images).cpu())
    return torch.cat(parts)


def _batches(
    model: Model, images: Tensor, labels: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and sample_index on the model's device."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = images.device if parameter is None else parameter.device
    index = torch.arange(len(images), device=device)
    parts = (torch.split(x, batch_size) for x in (images, labels, index))
    for x, y, its in zip(*parts, strict=True):
        yield x.to(device), y.to(device), its


def _title(attack: Attack | None, settings: Mapping[str, Any]) -> str:
    """The attack and its settings as text."""
    if attack is None:
        return "images made before"
    shown = {"epsilon": attack.epsilon, **settings}
    texts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
    return f"{type(attack).__name__}({', '.join(texts)})"
