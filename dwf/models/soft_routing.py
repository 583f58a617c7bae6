"""Soft values inside hard routing: a mixture whose choice is a weighted sum in its forward pass.

A hard-routed mixture jumps where the route flips, and a straight-through gradient says nothing of
what lies behind the jump. Here the layer itself mixes its experts,

    y[b] = sum_e softmax(log p(x[b]) / T)[e] * expert_e(x[b]),      log p standardized over e

so that later layers see feature maps on the way from one route to another. Attacks differentiate
it; the hard model judges. Temperatures T from 2 (nearly a mean) to 1/4 (nearly a choice).

The view toward the weakest expert steers the gate to the expert that is closest to giving up the
image's class, and attacks that expert at the same time.

Source: the joint router and expert attack of arXiv:2602.01369; the temperatures are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwf.models.experts import ExpertModel
from dwf.models.routed import ForcedExperts, check_rows, combine

TEMPERATURES = (2.0, 1.0, 0.5, 0.25)


def soft_choice(log_scores: Tensor, temperature: float | None) -> Tensor:
    """Softmax of each row [B, E], standardized, over a temperature; rows sum to 1.

    No gradient goes through the standardization, which would cancel much of it. Without a
    temperature it is the softmax of the scores as they are, whose gradient is its derivative.
    """
    if temperature is None:
        return log_scores.softmax(dim=1)
    scores = log_scores.float()
    scores = scores - scores.detach().mean(dim=1, keepdim=True)
    spread = scores.detach().square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    return (scores / spread / temperature).softmax(dim=1)


class SoftLogits(nn.Module):
    """The experts' logits mixed by softened gate weights, for mixtures that choose among logits."""

    def __init__(self, model: ExpertModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.experts = nn.ModuleList(model.expert(e) for e in range(model.num_experts))
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        soft = self.model.soft_gate_weights(images)
        scores = soft.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        weights = soft_choice(scores, self.temperature)
        return combine(weights, torch.stack([expert(images) for expert in self.experts]).float())


class TowardWeakest(nn.Module):
    """One expert for each image, and the gate's will to choose it, as logits of one function.

    The loss of class c grows with the expert's own error and with log s_w, the soft gate weight of
    that expert: z_w = expert_w(x) / |margin of expert w at the clean image|, z_w[c] -= log s_w.

    Args:
        images: [B, C, H, W], clean; row b of an input comes from row b of these.
        place: 0 for the expert of smallest margin, 1 for the next.
    """

    def __init__(self, model: ExpertModel, images: Tensor, place: int = 0) -> None:
        super().__init__()
        self.model = model
        logits = torch.stack([model.expert(e)(images) for e in range(model.num_experts)]).float()
        own = model(images).argmax(dim=1)
        label = own.expand(len(logits), -1).unsqueeze(2)
        others = logits.scatter(2, label, -torch.inf).amax(dim=2)
        margins = (logits.gather(2, label).squeeze(2) - others).T  # [B, E]
        centered = logits - logits.mean(dim=2, keepdim=True)
        size = centered.square().mean(dim=2).sqrt().T.clamp(min=1e-6)
        order = (margins / size).argsort(dim=1)
        self._chosen = order[:, min(place, model.num_experts - 1)]
        self._classes = own.unsqueeze(1)
        own_margin = margins.gather(1, self._chosen.unsqueeze(1)).abs()
        self._scale = own_margin.clamp(min=1e-3)
        self.experts = ForcedExperts(model, self._chosen)

    def forward(self, images: Tensor) -> Tensor:
        check_rows(images, len(self._chosen))
        soft = self.model.soft_gate_weights(images).float()
        steer = soft.gather(1, self._chosen.unsqueeze(1)).clamp(min=1e-12).log()
        logits = self.experts(images).float() / self._scale
        steered: Tensor = logits.scatter_add(1, self._classes, -steer)
        return steered
