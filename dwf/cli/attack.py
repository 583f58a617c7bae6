"""``dwf attack``: make adversarial images with one attack, toward a class if wanted.

An accuracy under one attack is no robust accuracy: ``dwf eval`` measures that, by several attacks
in turn and with a verdict.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from dwf import data
from dwf.attacks import save_images
from dwf.attacks.door import ask
from dwf.attacks.norms import length
from dwf.attacks.objects import OBJECTS, Attack
from dwf.attacks.source import float32_verdicts
from dwf.checks import ConfigError
from dwf.cli.evaluate import radius
from dwf.cli.subject import Subject, add_subject, find_subject
from dwf.config import parse_setting
from dwf.data import ImageDataset, evaluation_batches
from dwf.files import require_writable
from dwf.models import planned
from dwf.progress import LiveLine

ATTACKS = {kind.function.__name__: kind for kind in OBJECTS}


def add_attack(verbs: Any) -> None:
    """Add ``dwf attack`` to the parser's verbs."""
    verb = verbs.add_parser(
        "attack", help="make adversarial images with one attack, toward a class if wanted"
    )
    add_subject(verb)
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="num_steps=50 norm=l2 ...")
    verb.add_argument("--attack", choices=tuple(ATTACKS), default="pgd", help="pgd by default")
    verb.add_argument("--epsilon", type=radius, help="8/255; that of RUN by default")
    verb.add_argument(
        "--target", type=int, metavar="CLASS", help="make the model answer this class"
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="safetensors file for the images")
    verb.set_defaults(run=_attack)


def _attack(options: argparse.Namespace, argv: list[str]) -> int:
    if options.model is not None and options.folder is not None and "=" in str(options.folder):
        options.overrides.insert(0, str(options.folder))  # the first setting, not RUN
        options.folder = None
    kind = ATTACKS[options.attack]
    settings = read_settings(kind, options.overrides)
    subject = find_subject(options)
    settings |= epsilon_of(kind, settings, options.epsilon, subject)
    attack = kind(planned(subject.model), seed=subject.seed, **settings)
    dataset = _images(subject, options.target)
    if options.out is not None:  # known before the attack, not after it
        require_writable(options.out.parent, dataset.images.numel() * 4)
    live = LiveLine(quiet=options.quiet)
    found = craft(
        attack,
        dataset,
        target=options.target,
        batch_size=subject.settings.batch_size,
        progress=live.show,
    )
    live.clear()
    print(f"{subject.title} on {dataset.name} {dataset.split}, n = {len(dataset)}")
    print(f"{attack}")
    print("\n".join(found.lines(attack.norm)))
    if options.out is not None:
        save_images(options.out, found.images, dataset.labels, made_by=repr(attack))
        print(f"images: {options.out}")
    return 0


def read_settings(kind: type[Attack], overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of an attack from texts like ``num_steps=50``, read by its annotations.

    Raises:
        ConfigError: no such setting (it lists all), or a value of another type.
    """
    hints = get_type_hints(kind.function)
    of_options = ("model", "epsilon", "seed")
    known = [f.name for f in dataclasses.fields(kind) if f.init and f.name not in of_options]
    settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"{override!r}: expected KEY=VALUE with a KEY of {known}")
        settings[key] = parse_setting(text, hints[key], key)
    return settings


def epsilon_of(
    kind: type[Attack], settings: dict[str, Any], epsilon: float | None, subject: Subject
) -> dict[str, float]:
    """The radius to attack with; none for an attack that then minimizes the distance."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    if epsilon is not None:
        return {"epsilon": epsilon}
    if defaults["epsilon"] is None:
        return {}
    if settings.get("norm", defaults["norm"]) != "linf":
        raise ConfigError("--epsilon: name one for norm l2, 0.5 for example")
    return {"epsilon": subject.settings.epsilon}


def _images(subject: Subject, target: int | None) -> ImageDataset:
    """The test images, without those of the target class."""
    dataset = data.load(subject.data.name, root=subject.data.root, split="test")
    if subject.settings.num_images is not None:
        dataset = dataset.subset(torch.arange(min(subject.settings.num_images, len(dataset))))
    if target is None:
        return dataset
    if not 0 <= target < dataset.num_classes:
        raise ConfigError(f"--target: {target} is no class of 0 to {dataset.num_classes - 1}")
    return dataset.subset((dataset.labels != target).nonzero()[:, 0])


@dataclass(frozen=True)
class Crafted:
    """Adversarial images, and what the model answers.

    Attributes:
        images: [N, C, H, W] float32 on the CPU.
        labels: [N] int64.
        clean_answers: [N] int64, classes of the images as they were.
        answers: [N] int64, classes of the adversarial images.
        distances: [N], in the attack's norm.
        target: the class that was aimed at.
    """

    images: Tensor
    labels: Tensor
    clean_answers: Tensor
    answers: Tensor
    distances: Tensor
    target: int | None

    def lines(self, norm: str) -> list[str]:
        """Accuracies, success of the target, and distances, as text."""

        def share(answers: Tensor, classes: Tensor | int) -> str:
            return f"{100 * float((answers == classes).double().mean()):6.2f} %"

        lines = [
            f"clean accuracy       {share(self.clean_answers, self.labels)}",
            f"under this attack    {share(self.answers, self.labels)}",
        ]
        if self.target is not None:
            before = share(self.clean_answers, self.target).strip()
            name = f"answers class {self.target}"
            lines.append(f"{name:<20} {share(self.answers, self.target)}   (clean {before})")
        mean, largest = float(self.distances.mean()), float(self.distances.max())
        lines.append(f"{norm} distance: mean {mean:.4g}, largest {largest:.4g}")
        return lines


def craft(
    attack: Attack,
    dataset: ImageDataset,
    *,
    target: int | None = None,
    batch_size: int = 250,
    progress: Callable[[str], None] = lambda line: None,
) -> Crafted:
    """Attack all images of a data set, toward class ``target`` if one is given.

    Raises:
        ConfigError: the attack takes no targets, or there is no image.
    """
    if len(dataset) == 0:
        raise ConfigError(f"{dataset.name}: no images to attack")
    model: Any = attack.model
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    parts: list[Crafted] = []
    for batch in evaluation_batches(dataset, batch_size, device):
        images, labels, sample_index = batch
        targets = None if target is None else torch.full_like(labels, target)
        progress(f"{len(parts) * batch_size}/{len(dataset)} images")
        adversarial = attack(images, labels, sample_index, targets=targets)
        with torch.no_grad(), float32_verdicts(device):
            clean_answers, answers = (ask(model, x).argmax(dim=1) for x in (images, adversarial))
        parts.append(
            Crafted(
                images=adversarial.cpu(),
                labels=labels.cpu(),
                clean_answers=clean_answers.cpu(),
                answers=answers.cpu(),
                distances=length(adversarial - images, attack.norm).cpu(),
                target=target,
            )
        )
    return Crafted(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        clean_answers=torch.cat([part.clean_answers for part in parts]),
        answers=torch.cat([part.answers for part in parts]),
        distances=torch.cat([part.distances for part in parts]),
        target=target,
    )
