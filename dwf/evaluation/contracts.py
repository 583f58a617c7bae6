"""Contracts: what a model must keep for any attack on it to mean something.

:func:`contracts` looks at a model before any attack and only measures; ``findings`` say which
measurements are reasons to doubt. A thousand images are enough.

Source: the checklist of Carlini et al., arXiv:1902.06705.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.source import float32_verdicts
from dwf.checks import check_count, check_images, check_labels, check_logits
from dwf.evaluation import model_findings
from dwf.evaluation.limits import DEAD_GATE_BELOW
from dwf.evaluation.measures import (
    Seen,
    answer_difference,
    are_probabilities,
    held,
    known_places,
    largest_entry,
    parts,
    seen,
)
from dwf.evaluation.record import Finding
from dwf.models.experts import ExpertModel

# Images in a batch, and passes over all images.
BATCH_SIZE = 500
NUM_PASSES = 3
# Weights that move less than this from image to image are those of a gate that does not choose.
GATE_MOVES = 1e-6
# Moving an image by this share of the way to gray shows whether the gate's weights are smooth: they
# move, and by less than SMOOTH_BELOW; those of a hard gate stay or jump.
NUDGE, SMOOTH_BELOW = 1e-3, 0.1


@dataclass(frozen=True, eq=False)
class Contracts:
    """What a model showed before any attack. Masks are [N] bool on the CPU.

    Attributes:
        finite: images whose logits are finite.
        probabilities: all rows are probabilities, not logits.
        difference, in_company: of two passes, of two batches around an image, see
            `answer_difference`.
        changed_tensors, training_modules: names of parameters and buffers that a pass in eval mode
            changes, and of modules that stay in train mode after ``eval()``.
        bad_weights: names of parameters and buffers that hold NaN or infinity.
        gate_finite: images whose gate weights are finite; None without a gate, as are the next.
        gate_blind: images at which the weights have a gradient of exactly zero, although they
            differ from image to image.
        gate_cut: those of them at which the weights move smoothly with the image all the same.
        mean_weights, max_weights: [E], of the gate over these images.
    """

    sample_index: Tensor
    labels: Tensor
    logits: Tensor  # [N, K] float32
    finite: Tensor
    probabilities: bool
    difference: float
    in_company: float
    changed_tensors: list[str]
    training_modules: list[str]
    bad_weights: list[str]
    max_pixel: float
    gate_finite: Tensor | None = None
    gate_blind: Tensor | None = None
    gate_cut: Tensor | None = None
    mean_weights: list[float] | None = None
    max_weights: list[float] | None = None

    def findings(
        self,
        *,
        declared_random: bool = False,
        eot_samples: int = 1,
        num_votes: int = 1,
        allow_probabilities: bool = False,
        views: bool = False,
        preferred: Tensor | None = None,
    ) -> list[Finding]:
        """The reasons to doubt what attacks on this model will say.

        Args:
            declared_random: the caller says that the model is random.
            eot_samples, num_votes: passes for each gradient, and for each verdict.
            allow_probabilities: the caller says that the model returns probabilities.
            views: the evaluation attacks views of the mixture as well.
            preferred: [M, ...], experts that the gate prefers on other images and under attack; one
                image a row. None if nobody looked.
        """
        found = held(
            model_findings.non_finite_weights(self.bad_weights),
            model_findings.non_finite(seen(~self.finite, self.sample_index)),
            model_findings.not_logits(self.probabilities, declared=allow_probabilities),
            model_findings.random_output(
                self.difference,
                declared=declared_random,
                eot_samples=eot_samples,
                num_votes=num_votes,
                training=self.training_modules,
            ),
            model_findings.batch_dependent(self.difference, self.in_company),
            model_findings.state_changed(self.changed_tensors),
            model_findings.constant_output(self.logits.argmax(dim=1), self.labels),
            model_findings.input_scale(self.max_pixel),
        )
        if self.gate_finite is not None:
            assert self.gate_blind is not None
            assert self.gate_cut is not None
            bad_gate, blind = ~self.gate_finite, seen(self.gate_blind, self.sample_index)
            cut = seen(self.gate_cut, self.sample_index)
            found += held(
                model_findings.non_finite(seen(bad_gate, self.sample_index), what="gate_weights"),
                model_findings.dead_gate(
                    self.mean_weights or [], self.max_weights or [], self._wakes(preferred)
                ),
                model_findings.blind_gate(blind, cut=cut, views=views),
            )
        return found

    def _wakes(self, preferred: Tensor | None) -> Seen | None:
        """Images at which an expert is preferred that has no weight on clean ones."""
        if preferred is None or self.mean_weights is None:
            return None
        dead = [100 * weight < DEAD_GATE_BELOW for weight in self.mean_weights]
        return seen(torch.tensor(dead)[preferred].flatten(1).any(dim=1))


def contracts(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    sample_index: Tensor | None = None,
) -> Contracts:
    """Three passes over clean images and one gradient of the gate, if there is one.

    The model, its buffers and all random states are as before.

    Raises:
        PixelRangeError, LabelError, ModelOutputError, ...: as :func:`dwf.attacks.pgd`, except that
            probabilities are measured, not refused.
    """
    check_images(images)
    labels = check_labels(labels, len(images))
    check_count(batch_size, "batch_size")
    module = model if isinstance(model, nn.Module) else None
    device = images.device
    with undisturbed(model, device, seed=seed), float32_verdicts(device), torch.no_grad():
        before = {name: tensor.clone() for name, tensor in _tensors(module)}
        order = torch.arange(len(images), device=device)
        logits = _logits(model, images, order, batch_size)
        again = _logits(model, images, order, batch_size)
        # other neighbors, and another number of them
        company = _logits(model, images, order.flip(0), max(1, min(batch_size, len(images)) // 2))
        after = dict(_tensors(module))
        check_labels(labels, len(images), logits.shape[1])
        gate = _gate(model, images, batch_size) if isinstance(model, ExpertModel) else {}
        return Contracts(
            sample_index=known_places(sample_index, images).cpu(),
            labels=labels.cpu(),
            logits=logits.cpu(),
            finite=logits.isfinite().all(dim=1).cpu(),
            probabilities=are_probabilities(logits),
            difference=answer_difference(logits, again),
            in_company=answer_difference(logits, company),
            changed_tensors=[
                name for name, old in before.items() if not _same_bits(old, after.get(name))
            ],
            training_modules=[name for name, m in module.named_modules() if m.training]
            if module is not None
            else [],
            bad_weights=[name for name, x in _tensors(module) if _is_bad(x)],
            max_pixel=float(images.max()) if images.numel() else 1.0,
            **gate,
        )


def _tensors(module: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    if module is None:
        return []
    return [*module.named_parameters(), *module.named_buffers()]


def _logits(model: Model, images: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """Logits [N, K] float32 of all images, passed in this order in batches of this size."""
    rows: list[Tensor] = []
    for part in parts(order, batch_size):
        output = check_logits(ask(model, images[part].float()), len(part), allow_probabilities=True)
        rows.append(output.float())
    logits = torch.cat(rows) if rows else check_logits(ask(model, images.float()), 0)
    return torch.empty_like(logits).index_copy_(0, order, logits)


def _gate(model: ExpertModel, images: Tensor, batch_size: int) -> dict[str, Any]:
    """The fields of :class:`Contracts` about the gate."""
    weights, slopes, nudges = [], [], []
    for part in parts(images.float(), batch_size):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            w = model.gate_weights(leaf)
            # any direction but the sum, which is 1
            total = (w * torch.linspace(1, 2, w.shape[1], device=w.device)).sum()
            gradient = None
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        nudged = model.gate_weights(part + NUDGE * (0.5 - part)).double().cpu()
        weights.append(w.detach().double().cpu())
        nudges.append(largest_entry(nudged - weights[-1]))
        slopes.append(
            torch.zeros(len(part), dtype=torch.float32)
            if gradient is None
            else largest_entry(gradient).cpu()
        )
    all_weights = (
        torch.cat(weights) if weights else torch.zeros(0, model.num_experts, dtype=torch.float32)
    )
    finite = all_weights.isfinite().all(dim=1)
    none = torch.zeros_like(finite)
    if not bool(finite.any()):
        return {"gate_finite": finite, "gate_blind": none, "gate_cut": none}
    sound, nudge = all_weights[finite], torch.cat(nudges)
    chooses = bool((sound.amax(dim=0) - sound.amin(dim=0)).max() > GATE_MOVES)
    blind = (torch.cat(slopes) == 0) & finite & chooses
    return {
        "gate_finite": finite,
        "gate_blind": blind,
        "gate_cut": blind & (nudge > GATE_MOVES) & (nudge < SMOOTH_BELOW),
        "mean_weights": sound.mean(dim=0).tolist(),
        "max_weights": sound.amax(dim=0).tolist(),
    }


def _same_bits(old: Tensor, new: Tensor | None) -> bool:
    if new is None or old.shape != new.shape or old.dtype != new.dtype:
        return False
    return torch.equal(_bytes(old), _bytes(new))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
