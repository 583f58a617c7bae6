"""Watch an attack step by step, and find where each expert of a mixture looks.

PGD from several random starts, watched after every step: a loss that still rises at the end, or an
accuracy that still falls, is an attack that has not converged, and its number an upper bound.
Grad-CAM of each expert for the label's logit, on clean images: experts that look at the same places
fail together.

Losses and verdicts are those of the float32 model; steps may follow a faster plan of it.

Axes: R restarts, S + 1 states (the start, then after each step), N images, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.attacks.door import undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.norms import uniform_in_ball
from dwf.attacks.pgd import pgd
from dwf.attacks.source import float32_verdicts, judge, voted
from dwf.attacks.target import AttackTarget, attack_target
from dwf.checks import ConfigError
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, evaluation_batches
from dwf.data.batches import at_equal_distances
from dwf.evaluation.record import LossOverSteps, Traces
from dwf.evaluation.result import Arrays
from dwf.models import ExpertModel
from dwf.models.grad_cam import captured, grad_cam, heatmaps

NUM_STEPS, NUM_RESTARTS = 50, 3
# Step size as a share of epsilon: 50 steps can then cross the ball two and a half times.
STEP = 0.1
MAX_IMAGES = 200
NUM_HEATMAPS = 4
QUANTILES = (0.1, 0.9)


def trace(
    model: Model,
    dataset: ImageDataset,
    settings: EvaluationConfig | None = None,
    *,
    epsilon: float | None = None,
    norm: str = "linf",
    num_steps: int = NUM_STEPS,
    num_restarts: int = NUM_RESTARTS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    allow_probabilities: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[Traces, Arrays]:
    """Follow PGD on ``settings.diagnostic_images`` images, at most 200, at equal distances.

    Restart r is what ``pgd(..., random_start=True)`` does in its restart r, but no image stops when
    it is broken. ``epsilon`` is that of the settings by default. The model and all random
    states are as before.

    Returns:
        The record, and the arrays that it was computed from: ``trace_loss`` [R, S + 1, N] float32
        and ``trace_correct`` [R, S + 1, N] bool, of each state by itself; ``trace_sample_index``
        [N]. With heatmaps ``cam_maps`` [E, G, h, w], each of which sums to 1, ``cam_images``
        [G, C, H, W] and ``cam_labels`` [G].
    Raises:
        ConfigError: ``settings.diagnostic_images`` is 0.
    """
    settings = settings or EvaluationConfig()
    if settings.diagnostic_images == 0:
        raise ConfigError("evaluation.diagnostic_images: 0 images, expected at least one")
    started, device = time.perf_counter(), torch.device(device)
    wanted = min(settings.diagnostic_images, MAX_IMAGES)
    sample_index = at_equal_distances(len(dataset), wanted)
    count = len(sample_index)
    size = max(settings.batch_size // num_restarts, 1)
    few = dataset.subset(sample_index)
    radius = settings.epsilon if epsilon is None else epsilon
    walk = _Walk(
        epsilon=radius,
        norm=norm,
        step_size=STEP * radius,
        num_steps=num_steps,
        num_restarts=num_restarts,
        eot_samples=settings.eot_samples,
        seed=seed,
        allow_probabilities=allow_probabilities,
    )
    seen: list[tuple[Tensor, Tensor]] = []
    cams: Arrays = {}
    with undisturbed(model, device, seed=seed), torch.no_grad(), float32_verdicts(device):
        for number, (images, labels, places) in enumerate(evaluation_batches(few, size, device)):
            if progress is not None:
                progress(f"tracing PGD: {number * size}/{count} images")
            if number == 0:
                target = attack_target(model, images)
                cams = _heatmaps_of(model, images[:NUM_HEATMAPS], labels[:NUM_HEATMAPS])
            index = sample_index.to(device)[places]
            seen.append(walk.watch(target, images, labels, index))
    loss = torch.cat([part for part, _ in seen], dim=2)
    correct = torch.cat([part for _, part in seen], dim=2)
    record = Traces(
        num_images=count,
        epsilon=walk.epsilon,
        norm=norm,
        step_size=walk.step_size,
        num_steps=num_steps,
        num_restarts=num_restarts,
        eot_samples=walk.eot_samples,
        seed=seed,
        loss=_over_images(loss),
        accuracy=_standing(correct).tolist(),
        experts=list(model.expert_names) if cams and isinstance(model, ExpertModel) else [],
        seconds=round(time.perf_counter() - started, 3),
    )
    arrays = {
        "trace_loss": loss.numpy(),
        "trace_correct": correct.numpy(),
        "trace_sample_index": sample_index.numpy(),
        **cams,
    }
    return record, arrays


@dataclass(frozen=True)
class _Walk:
    """PGD, one step at a time."""

    epsilon: float
    norm: str
    step_size: float
    num_steps: int
    num_restarts: int
    eot_samples: int
    seed: int
    allow_probabilities: bool

    def watch(
        self, target: AttackTarget, images: Tensor, labels: Tensor, sample_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and verdict [R, S + 1, B] on the CPU."""
        # all restarts in one batch: small models cost calls, not images
        shape, runs = tuple(images.shape[1:]), self.num_restarts
        noise = torch.cat(
            [
                uniform_in_ball(self.seed, sample_index, shape, self.norm, stream=restart)
                for restart in range(runs)
            ]
        )
        images, labels = images.repeat(runs, 1, 1, 1), labels.repeat(runs)
        state = (images + self.epsilon * noise).clamp(0, 1)
        losses, verdicts = [], []
        for step in range(self.num_steps + 1):
            if step > 0:
                state = self._step(target, images, labels, state, draw=step)
            logits = voted(target.model, state, self.eot_samples).float()
            losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
            verdicts.append(judge(logits, labels)[0].cpu())
        size = (self.num_steps + 1, runs, -1)
        return (
            torch.stack(losses).view(size).transpose(0, 1),
            torch.stack(verdicts).view(size).transpose(0, 1),
        )

    def _step(
        self, target: AttackTarget, images: Tensor, labels: Tensor, state: Tensor, draw: int
    ) -> Tensor:
        return pgd(
            target,
            images,
            labels,
            epsilon=self.epsilon,
            step_size=self.step_size,
            num_steps=1,
            random_start=False,
            start=state,
            norm=self.norm,
            eot_samples=self.eot_samples,
            seed=self.seed + draw,
            allow_probabilities=self.allow_probabilities,
        )


def _over_images(loss: Tensor) -> LossOverSteps:
    """Mean and quantiles of the finite losses [R, S + 1, N] at each state."""
    mean: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for values in loss.double().transpose(0, 1).flatten(1):
        finite = values[values.isfinite()]
        known = len(finite) > 0
        mean.append(float(finite.mean()) if known else None)
        low.append(float(finite.quantile(QUANTILES[0])) if known else None)
        high.append(float(finite.quantile(QUANTILES[1])) if known else None)
    return LossOverSteps(mean, low, high)


def _standing(correct: Tensor) -> Tensor:
    """[R, S + 1]: share of images right in all states [R, S + 1, N] up to this one."""
    states = correct.flatten(0, 1).int().cummin(dim=0).values
    return states.double().mean(dim=1).view(correct.shape[:2])


def _heatmaps_of(model: Model, images: Tensor, labels: Tensor) -> Arrays:
    """Grad-CAM of each expert for the label; nothing unless every expert has feature maps."""
    if not isinstance(model, ExpertModel):
        return {}
    maps = []
    for e in range(model.num_experts):
        expert = model.expert(e).eval()
        layer = last_feature_layer(expert, images)
        if layer is None:
            return {}
        with captured([layer]) as features, torch.enable_grad():
            logits = expert(images)
            score = logits.float().gather(1, labels.unsqueeze(1))
            if not score.requires_grad:  # it does not depend on these maps, or hides that it does
                return {}
            maps += grad_cam(score, features[-1:], create_graph=False)
    return {
        "cam_maps": heatmaps([part.detach().float() for part in maps]).cpu().numpy(),
        "cam_images": images.cpu().numpy(),
        "cam_labels": labels.cpu().numpy(),
    }


def last_feature_layer(network: nn.Module, images: Tensor) -> nn.Module | None:
    """The last submodule, at or after a convolution, that returns feature maps [B, C, h, w].

    Maps of a single place (h = w = 1) show nothing and do not count; None if there are no others.
    """
    last: list[nn.Module] = []
    convolved = False

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal convolved
        convolved = convolved or isinstance(module, nn.Conv2d)
        is_map = isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1
        if convolved and is_map:
            last[:] = [module]

    handles = [m.register_forward_hook(look) for m in network.modules() if m is not network]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return last[0] if last else None
