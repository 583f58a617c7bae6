"""Measure the experts and the gate of a mixture under attack.

Three questions, asked of a limited number of images:

- Is the mixture more than its experts? Every expert, and the mixture, is attacked by itself, and
  each of them judges all of the adversarial images: accuracy of expert j on images crafted on
  expert i is the transfer matrix.
- Does the attack move the gate? Entropy, load and choice before and after the attack.
- Do the experts fail alike? The cosine of their input gradients.

Every attack is PGD of the evaluation's radius and step size without random start; verdicts, gate
weights and gradients are those of the float32 model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks import input_gradient, pgd
from dwf.attacks.door import undisturbed
from dwf.attacks.source import float32_verdicts, judge
from dwf.attacks.space import AttackSpace, attack_space
from dwf.attacks.target import AttackTarget
from dwf.checks import ConfigError, ModelOutputError
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, evaluation_batches
from dwf.data.batches import at_equal_distances
from dwf.evaluation.mixture_record import (
    AccuracyByMember,
    Diagnostics,
    GateLoad,
    GateLoads,
    RoutingFlips,
)
from dwf.evaluation.result import Arrays
from dwf.models import ExpertModel

# An expert is dead if the gate prefers it for a smaller share of the images than this, and gives it
# a smaller mean weight as well: a soft gate may use an expert that it never prefers.
DEAD_BELOW = 0.01
# How often a random gate is asked about the same images: one draw may be for a whole batch.
DRAWS = 20


@dataclass(frozen=True)
class _OfBatch:
    """Outcomes of one batch; ``gate_weights`` are on clean and on attacked images."""

    correct: Tensor  # [E + 2, E + 1, B] bool
    gate_weights: Tensor  # [2, draws, B, E]
    cosine: Tensor  # [B, E, E]


def diagnose(
    model: ExpertModel,
    dataset: ImageDataset,
    settings: EvaluationConfig | None = None,
    *,
    protocol: str = "pixels",
    clamp: str = "unit",
    seed: int = 0,
    device: torch.device | str = "cpu",
    allow_probabilities: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[Diagnostics, Arrays]:
    """Attack a mixture and each of its experts; compare what each of them makes of the images.

    ``settings.diagnostic_images`` images are taken at equal distances, so that a data set sorted by
    class is seen whole. The other arguments are those of ``evaluate``; the model and all random
    states are as before, and results depend on ``seed`` only.

    Returns:
        The record, and the arrays that it was computed from: ``diagnostic_correct``
        [E + 2, E + 1, N] bool, whether each expert and the mixture is right on clean images, on
        those crafted on each expert, and on those crafted on the mixture;
        ``diagnostic_gate_weights`` [2, draws, N, E], of clean images and of those crafted on the
        mixture; ``diagnostic_sample_index`` [N], their places in the data set.
    Raises:
        ConfigError: ``settings.diagnostic_images`` is 0.
        ModelOutputError: gate weights of another shape than [B, E].
    """
    settings = settings or EvaluationConfig()
    if settings.diagnostic_images == 0:
        raise ConfigError("evaluation.diagnostic_images: 0 images, expected at least one")
    started, device = time.perf_counter(), torch.device(device)
    sample_index = at_equal_distances(len(dataset), settings.diagnostic_images)
    count = len(sample_index)
    dataset = dataset.subset(sample_index)
    models = [*(model.expert(e) for e in range(model.num_experts)), model]
    views = [attack_space(x, protocol, clamp, dataset.mean, dataset.std) for x in models]
    options = {
        "seed": seed,
        "allow_probabilities": allow_probabilities,
    }
    budget: dict[str, Any] = {
        "epsilon": settings.epsilon,
        "step_size": settings.step_size,
        "num_steps": settings.diagnostic_steps,
        "eot_samples": settings.eot_samples,
    }
    batches = evaluation_batches(dataset, settings.batch_size, device)
    seen: list[_OfBatch] = []
    with undisturbed(model, device, seed=seed), torch.no_grad(), float32_verdicts(device):
        for x in models:
            x.eval()  # the wrapper of an expert is no part of the model
        for number, (images, labels, _) in enumerate(batches):
            if progress is not None:
                progress(f"attacking each expert: {number * settings.batch_size}/{count} images")
            attacked = [_attack(view, images, labels, budget, options) for view in views]
            if not seen:
                draws = DRAWS if _is_random(model, images) else 1
            seen.append(
                _OfBatch(
                    _verdicts(models, [images, *attacked], labels),
                    _gate_weights(model, [images, attacked[-1]], draws),
                    pairwise_cosine(_gradients(views[:-1], images, labels, options)),
                )
            )
    correct = torch.cat([x.correct for x in seen], dim=2)
    clean, moved = torch.cat([x.gate_weights for x in seen], dim=2)  # each [draws, N, E]
    names = model.expert_names
    accuracy = correct.double().mean(dim=2)  # [E + 2, E + 1]
    transfer = accuracy[1:]
    record = Diagnostics(
        num_images=count,
        **budget,
        protocol=protocol,
        clamp=views[-1].clamp,
        seed=seed,
        names=[*names, "mixture"],
        accuracy=AccuracyByMember(
            clean=accuracy[0].tolist(),
            mixture_attacked=transfer[-1].tolist(),
            self_attacked=transfer.diagonal().tolist(),
        ),
        transfer=transfer.tolist(),
        worst_case=float(correct[:, -1].all(dim=0).double().mean()),
        gate_draws=len(clean),
        gate=GateLoads(clean=gate_load(clean, names), attacked=gate_load(moved, names)),
        routing_flips=RoutingFlips(
            attacked=routing_flips(clean, moved),
            again=routing_flips(clean, clean.roll(1, dims=0)),
        ),
        gradient_cosine=_mean_where_finite(torch.cat([x.cosine for x in seen])),
        seconds=round(time.perf_counter() - started, 3),
    )
    arrays = {
        "diagnostic_correct": correct.numpy(),
        "diagnostic_gate_weights": torch.stack([clean, moved]).numpy(),
        "diagnostic_sample_index": sample_index.numpy(),
    }
    return record, arrays


def _attack(
    view: AttackSpace,
    images: Tensor,
    labels: Tensor,
    budget: dict[str, Any],
    options: dict[str, Any],
) -> Tensor:
    found = pgd(view, view.enter(images), labels, random_start=False, **budget, **options)
    return view.leave(found)


def _gradients(
    views: Sequence[AttackSpace], images: Tensor, labels: Tensor, options: dict[str, Any]
) -> Tensor:
    """Of each expert's loss at the images, [E, B, C, H, W]; not by a plan, which may round."""
    reason = "its gradient is looked at"
    exact = [replace(view, model=AttackTarget(view.model, reason=reason)) for view in views]
    return torch.stack(
        [input_gradient(view, view.enter(images), labels, **options) for view in exact]
    )


def _verdicts(models: Sequence[nn.Module], attacked: list[Tensor], labels: Tensor) -> Tensor:
    """[attacks, models, B] bool: who is right about which image."""
    rows = [torch.stack([judge(x(images), labels)[0] for x in models]) for images in attacked]
    return torch.stack(rows).cpu()


def _is_random(model: ExpertModel, images: Tensor) -> bool:
    """Whether the gate says something else when it is asked again."""
    first, again = model.gate_weights(images), model.gate_weights(images)
    expected = [len(images), model.num_experts]
    if list(first.shape) != expected:
        raise ModelOutputError(
            f"gate_weights: expected [B, E] = {expected}, found {list(first.shape)}"
        )
    return bool((first - again).abs().max() > 1e-4)


def _gate_weights(model: ExpertModel, batches: list[Tensor], draws: int) -> Tensor:
    """[batches, draws, B, E]."""
    asked = [torch.stack([model.gate_weights(images) for _ in range(draws)]) for images in batches]
    return torch.stack(asked).float().cpu()


def gate_load(gate_weights: Tensor, names: Sequence[str]) -> GateLoad:
    """Entropy and load of gate weights [..., E].

    An image whose gate failed (NaN) trusts nobody: it counts as an image, and for no expert.
    """
    gate_weights = gate_weights.flatten(0, -2)
    weights = gate_weights.double().nan_to_num(0.0, 0.0, 0.0)
    mean_weight = weights.mean(dim=0)
    preferred = _preferred(gate_weights).unsqueeze(1)
    top_share = (preferred == torch.arange(len(names))).double().mean(dim=0)
    dead = (mean_weight < DEAD_BELOW) & (top_share < DEAD_BELOW)
    return GateLoad(
        entropy=float(torch.special.entr(weights).sum(dim=1).mean()),
        mean_weight=mean_weight.tolist(),
        top_share=top_share.tolist(),
        dead=[name for name, is_dead in zip(names, dead.tolist(), strict=True) if is_dead],
    )


def routing_flips(before: Tensor, after: Tensor) -> float:
    """Share of images whose largest gate weight [..., E] belongs to another expert afterwards."""
    return float((_preferred(before) != _preferred(after)).double().mean())


def _preferred(gate_weights: Tensor) -> Tensor:
    """The expert of largest weight of each image [...]; -1 where the gate failed."""
    failed = ~gate_weights.isfinite().all(dim=-1)
    return gate_weights.argmax(dim=-1).masked_fill(failed, -1)


def pairwise_cosine(gradients: Tensor) -> Tensor:
    """Cosines [B, E, E] of the gradients [E, B, ...] of each image; NaN where one is zero or not
    finite."""
    rows = gradients.flatten(2).transpose(0, 1).float()  # [B, E, pixels]
    # first by the largest entry: the squares of a confident network's gradient underflow
    rows = rows / rows.abs().amax(dim=2, keepdim=True)
    rows = rows / rows.norm(dim=2, keepdim=True)
    cosine: Tensor = rows @ rows.transpose(1, 2)
    return cosine.clamp(-1, 1).cpu()


def _mean_where_finite(cosine: Tensor) -> list[list[float | None]]:
    """Mean over images [N, E, E] of what is finite; None where nothing is."""
    finite = cosine.isfinite()
    total = cosine.double().masked_fill(~finite, 0.0).sum(dim=0)
    count = finite.sum(dim=0)
    return [
        [float(t) / int(n) if n else None for t, n in zip(*row, strict=True)]
        for row in zip(total, count, strict=True)
    ]
