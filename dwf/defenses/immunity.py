"""Immunity: five experts told apart by their heatmaps, behind a gate that is shuffled at test time.

| point              | the paper says                           | we assume                        |
|--------------------|------------------------------------------|----------------------------------|
| model              | 5 CNNs, y = sum_e g_e(x) y_e,            | logits y_e; 5 equal networks, or |
|                    | g = softmax(linear(x))                   | any that ``backbones`` names     |
| random switch      | gate parameters permuted at evaluation,  | the rows of weight and bias, for |
|                    | a new structure each time                | each batch; or for each image    |
| MI loss            | maximizes the mutual information between | Jensen-Shannon divergence of the |
|                    | place and expert in Grad-CAM heatmaps    | experts' heatmaps, negated       |
| PS loss            | minimizes the variance over images of    | the trace of their covariance in |
|                    | each heatmap's center of mass            | the batch, mean over experts     |
| heatmap            | Grad-CAM                                 | of the true class, on the last   |
|                    |                                          | feature maps, divided by its sum |
| the gate's weights | not known to us                          | start at zero and learn slowly,  |
|                    |                                          | see the presets                  |
| weights of losses  | not known to us                          | 1, 0.1 and 0.1; to be tuned      |
| adversarial phase  | "standard or adversarial training"       | PGD on the unpermuted mixture;   |
|                    |                                          | all three losses on its images   |
| budgets, schedules | not known to us                          | 8/255, 2/255; those of a         |
|                    |                                          | baseline on one network          |

No code was released, and no formula or loss weight is known to us. This is a reconstruction from
published descriptions, not the paper's system, and every result of it has to say so.

A random permutation throws the learned gate away. Clean accuracy survives it only as far as experts
are interchangeable, and an attack that does not average over draws follows gradients of another
mixture than the one that answers: it overstates robustness. More accuracy under PGD without
adversarial training than with it is the mark of masked gradients. So a table needs
``eot_samples`` of 20 or more, the controls ``unpermuted()`` and ``uniform()``, and each expert
attacked alone.

Source: arXiv:2402.18787. Grad-CAM: arXiv:1610.02391.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.door import undisturbed
from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_choice, check_count, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch, ImageDataset, evaluation_batches
from dwf.defenses.building import ModelFacts, model_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, pretrain_schedule
from dwf.models import (
    NETWORKS,
    LinearGate,
    Mixture,
    MixtureOutput,
    Normalize,
    RandomSwitch,
    SwitchedMixture,
    build_network,
)
from dwf.models.grad_cam import captured, grad_cam, heatmaps
from dwf.models.planned import PlanParts
from dwf.models.random_gate import SCOPES
from dwf.models.torchvision_networks import LAST_LAYERS, build_torchvision_network

# Shares of a heatmap below this count as this in logarithms: the slope at zero is infinite.
_SMALLEST_SHARE = 1e-12


@dataclass(frozen=True)
class ImmunityOptions(Options, defense="immunity"):
    """Settings of Immunity.

    ``backbones`` names a network for each expert (resnet18, googlenet, densenet121, ...); empty is
    ``model.network`` for all. ``attack`` "pgd" is adversarial training. ``mi_weight`` and
    ``ps_weight`` multiply the two losses of heatmaps; both 0 make no heatmaps. ``switch`` says when
    the gate is permuted anew at evaluation, ``switch_top`` that only so many largest gate logits
    take part.
    """

    num_experts: int = 5
    backbones: tuple[str, ...] = ()
    attack: Literal["none", "pgd"] = "none"
    mi_weight: float = 0.1
    ps_weight: float = 0.1
    switch: Literal["batch", "image", "off"] = "batch"
    switch_top: int | None = None

    def __post_init__(self) -> None:
        check_count(self.num_experts, "options.num_experts", minimum=2)
        if self.backbones and len(self.backbones) != self.num_experts:
            raise ConfigError(
                f"options.backbones: {len(self.backbones)} names for {self.num_experts} experts"
            )
        for name in self.backbones:
            check_choice(name, [*NETWORKS, *LAST_LAYERS], "options.backbones")
        check_choice(self.attack, ("none", "pgd"), "options.attack")
        for key in ("mi_weight", "ps_weight"):
            check_positive(getattr(self, key), f"options.{key}", zero_allowed=True)
        check_choice(self.switch, SCOPES, "options.switch")
        if self.switch_top is not None:
            check_count(self.switch_top, "options.switch_top", minimum=2)
            if self.switch_top > self.num_experts:
                raise ConfigError(
                    f"options.switch_top: {self.switch_top} of {self.num_experts} experts"
                )


@dataclass(frozen=True)
class ImmunityOutput(MixtureOutput):
    """A mixture's output, and of each expert the last feature maps [B, C, h, w]."""

    features: tuple[Tensor, ...]


class Immunity(SwitchedMixture):
    """A switched mixture whose experts' last feature maps can be looked at.

    Args:
        last_layers: of each expert the name of the submodule whose output is pooled and classified.

    ``model(images, return_aux=True)`` gives an ImmunityOutput. In train mode the gate is the
    learned one, in eval mode it is permuted.
    """

    evaluation_notes = (
        "Immunity is reconstructed from descriptions, and its gate is random: accuracy under an "
        "attack that does not average over draws may be masked gradients. Compare the rows with "
        "unpermuted() and uniform(), and with each expert alone",
    )

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: RandomSwitch,
        normalize: nn.Module | None = None,
        *,
        last_layers: Sequence[str],
        expert_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(experts, gate, normalize, expert_names=expert_names)
        if len(last_layers) != self.num_experts:
            raise ConfigError(
                f"last_layers: {len(last_layers)} names for {self.num_experts} experts"
            )
        self.last_layers = list(last_layers)

    def plan_parts(self) -> PlanParts:
        return super().plan_parts()  # features are for return_aux, which a plan does not have

    @overload
    def forward(self, images: Tensor, return_aux: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_aux: Literal[True]) -> ImmunityOutput: ...
    def forward(self, images: Tensor, return_aux: bool = False) -> Tensor | ImmunityOutput:
        if not return_aux:
            return super().forward(images)
        layers = [
            expert.get_submodule(name)
            for expert, name in zip(self.experts, self.last_layers, strict=True)
        ]
        with captured(layers) as features:
            output = super().forward(images, return_aux=True)
        return ImmunityOutput(**vars(output), features=tuple(features))


class HeatmapScores(NamedTuple):
    """``i_score``: how differently the experts look, in [0, log E], high is good; ``c_score``: how
    far each expert's center of mass wanders between images, low is good."""

    i_score: float
    c_score: float


def build(config: Config, facts: ModelFacts) -> Immunity:
    """Untrained experts and switched gate behind one shared normalization."""
    options = options_of(config, ImmunityOptions)
    names = options.backbones or (config.model.network,) * options.num_experts
    experts: list[nn.Module] = []
    last_layers = []
    for e, name in enumerate(names):
        make = build_torchvision_network if name in LAST_LAYERS else build_network
        network: Any = make(
            name,
            num_classes=facts.num_classes,
            width=config.model.width,
            in_channels=facts.image_shape[0],
            seed=derive_seed(config.seed, "expert", e),
        )
        experts.append(network)
        last_layers.append(LAST_LAYERS.get(name) or network.last_layer)
    gate = LinearGate(facts.image_shape, len(names))
    return Immunity(
        experts,
        RandomSwitch(gate, scope=options.switch, top=options.switch_top),
        Normalize(facts.mean, facts.std),
        last_layers=last_layers,
        expert_names=[f"{e} {name}" for e, name in enumerate(names)],
    )


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``: experts and gate together."""
    model = model_of(model, config, Immunity)
    schedule = pretrain_schedule(config)
    # attacks see the mixture that is trained; eval mode would shuffle its gate
    step = partial(
        immunity_step, options=options_of(config, ImmunityOptions), attacked=model.unpermuted()
    )
    return [Phase("train", model, schedule, step, gate_prefix="gate.")]


def immunity_step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    options: ImmunityOptions,
    attacked: Mixture,
) -> StepResult:
    """CE(f(x), y) + mi_weight L_MI + ps_weight L_PS; x attacked by PGD on ``attacked`` if wanted.

    The variance in L_PS is that of the images seen at once: of a process's part of the batch.
    """
    images, labels = batch.images, batch.labels
    if options.attack == "pgd":
        images = crafter.pgd(attacked, batch)
    output: ImmunityOutput = forward(images, return_aux=True)  # type: ignore[call-arg]
    loss = F.cross_entropy(output.logits.float(), batch.wanted)
    if options.mi_weight or options.ps_weight:
        maps = expert_heatmaps(output, labels)
        loss = loss - options.mi_weight * mutual_information(maps).mean()
        loss = loss + options.ps_weight * center_variance(maps)
    num_clean = 0 if options.attack == "pgd" else len(labels)
    return StepResult(loss, output.logits.detach(), labels, num_clean)


def expert_heatmaps(output: ImmunityOutput, labels: Tensor, *, create_graph: bool = True) -> Tensor:
    """Where each expert looks for the class ``labels`` [B]: [E, B, h, w], each summing to 1."""
    E, B, _ = output.expert_logits.shape
    index = labels.view(1, B, 1).expand(E, B, 1)
    scores = output.expert_logits.float().gather(2, index)
    return heatmaps(grad_cam(scores, output.features, create_graph=create_graph))


def mutual_information(maps: Tensor) -> Tensor:
    """Between place u and an expert e drawn uniformly, of each image: [E, B, h, w] to [B], in nats.

    I = 1/E sum_e sum_u H_e(u) log(H_e(u) / Hbar(u)), Hbar the mean over experts: 0 where all look
    at the same places, log E where no two look at one.
    """
    logs = maps.clamp(min=_SMALLEST_SHARE).log()
    mean_log = maps.mean(dim=0).clamp(min=_SMALLEST_SHARE).log()
    return (maps * (logs - mean_log)).sum(dim=(2, 3)).mean(dim=0)


def centers_of_mass(maps: Tensor) -> Tensor:
    """sum_u u H(u) of heatmaps [E, B, h, w]: rows and columns in [0, 1], [E, B, 2]."""
    h, w = maps.shape[2:]
    rows = (torch.arange(h, device=maps.device, dtype=maps.dtype) + 0.5) / h
    columns = (torch.arange(w, device=maps.device, dtype=maps.dtype) + 0.5) / w
    along_rows = (maps.sum(dim=3) * rows).sum(dim=2)
    along_columns = (maps.sum(dim=2) * columns).sum(dim=2)
    return torch.stack([along_rows, along_columns], dim=2)


def center_variance(maps: Tensor) -> Tensor:
    """Mean over experts of the trace of their centers' covariance over the B images: a scalar."""
    centers = centers_of_mass(maps)
    return centers.var(dim=1, correction=0).sum(dim=1).mean()


def heatmap_scores(
    model: Immunity,
    dataset: ImageDataset,
    *,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> HeatmapScores:
    """IScore and CScore of a model in eval mode on a data set: mean I, and L_PS over all images.

    The model and all random states are as before.
    """
    device = torch.device(device)
    information = 0.0
    centers = []
    with undisturbed(model, device):
        for images, labels, _ in evaluation_batches(dataset, batch_size, device):
            maps = expert_heatmaps(model(images, return_aux=True), labels, create_graph=False)
            information += float(mutual_information(maps.detach()).double().sum())
            centers.append(centers_of_mass(maps.detach()).double())
    together = torch.cat(centers, dim=1)
    variance = together.var(dim=1, correction=0).sum(dim=1).mean()
    return HeatmapScores(information / len(dataset), float(variance))
