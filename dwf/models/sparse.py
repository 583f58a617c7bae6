"""Replace a layer of a network by a sparse mixture: k of its E experts compute each image.

    p = gate(x)                                       [B, E], rows sum to 1
    y[b] = sum over the k largest p[b, e] of w[b, e] * expert_e(x)[b]

    k = 1:   w is exactly 1, and its gradient goes to p unchanged (straight-through)
    k >= 2:  w[b, e] = p[b, e] / (sum of the chosen p[b] + 1e-5)

An expert, and so its BatchNorm, sees only the images routed to it. It may be a residual block or a
single convolution.
Source: sections 3.1 and 3.2 of arXiv:2509.05086.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dwf import distributed
from dwf.checks import ConfigError, ModelOutputError, check_count, first_index
from dwf.models.routed import straight_through
from dwf.models.soft_routing import soft_choice

NOISE_STD = 0.1


class GapFcGate(nn.Module):
    """Mean over the map, linear, softmax: [B, C, H, W] to probabilities [B, E]."""

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        gate_logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return _softmax(gate_logits)


class ConvGapGate(nn.Module):
    """3x3 convolution without padding, mean over the map, softmax: [B, C, H, W] to [B, E].

    Raises:
        ConfigError: the map is smaller than the kernel.
    """

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_experts, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        if min(H, W) < 3:
            raise ConfigError(
                f"gate: conv_gap does not pad its 3x3 kernel, and a map of {H} x {W} is smaller; "
                "use gap_fc, an earlier stage, a network with fewer stages, or larger images"
            )
        gate_logits: Tensor = self.conv(x).mean(dim=(2, 3))
        return _softmax(gate_logits)


def _softmax(gate_logits: Tensor) -> Tensor:
    """In float32 at least: bfloat16 probabilities tie."""
    dtype = torch.promote_types(gate_logits.dtype, torch.float32)
    return gate_logits.softmax(dim=1, dtype=dtype)


GATES: dict[str, type[GapFcGate] | type[ConvGapGate]] = {
    "gap_fc": GapFcGate,
    "conv_gap": ConvGapGate,
}


class SparseLayer(nn.Module):
    """Experts of one shape, a gate, and the weighted sum of the k chosen experts.

    Only chosen experts are computed, on the rows that chose them. An expert without a row keeps its
    BatchNorm statistics and gets no gradient (zero, if several processes train together); one with
    a single row uses its running statistics.

    Args:
        gate: maps the experts' input [B, C, H, W] to probabilities [B, E].
        noisy: in train mode, choose by p / std(p) + N(0, .1^2), with the standard deviation over
            all entries of p.

    Raises:
        ConfigError: ``top_k`` is not one of 1 to E.
        ModelOutputError: a probability is not finite.
    """

    def __init__(
        self, experts: list[nn.Module], gate: nn.Module, *, top_k: int = 1, noisy: bool = False
    ) -> None:
        super().__init__()
        check_top_k(top_k, len(experts))
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.top_k = top_k
        self.noisy = noisy

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.gate(x)
        if torch.compiler.is_exporting():
            return self.by_all(x, self.weights_of_all(probabilities))
        chosen, weights = self.route(probabilities)
        B, E, k = len(x), len(self.experts), self.top_k
        experts, weights = chosen.flatten(), weights.flatten()  # [B * k]
        counts = experts.bincount(minlength=E)
        pairs_of = torch.split(experts.argsort(stable=True), counts.tolist())
        # processes that train together take part in the sums of all experts' gradients
        together = self._trains_together()
        rows_of = (distributed.total(counts) if together else counts).tolist()
        out: Tensor | None = None
        for e, pairs in enumerate(pairs_of):
            if len(pairs) == 0 and not together:
                continue
            rows = pairs // k
            with _statistics(self.experts[e], of_batch=rows_of[e] > 1):
                y = self.experts[e](x.index_select(0, rows))
            y = y * weights[pairs].to(y.dtype).view(-1, 1, 1, 1)
            if out is None:
                out = y.new_zeros(B, *y.shape[1:])
            out.index_add_(0, rows, y)
        return self.experts[0](x) if out is None else out  # no image

    def route(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each image and their weights, both [B, k], from probabilities [B, E]."""
        p, finite = probabilities, probabilities.isfinite()
        if not torch.compiler.is_exporting() and not bool(finite.all()):
            b, e = first_index(~finite)
            raise ModelOutputError(f"gate: {p[b, e].item()} at [{b}, {e}], expected probabilities")
        scores = p.detach()
        if self.training and self.noisy:
            # without the mean, which changes no order, equal entries stay small beside the noise
            spread = scores.std(correction=0).clamp(min=1e-12)
            scores = (scores - scores.mean()) / spread + NOISE_STD * torch.randn_like(scores)
        chosen = scores.topk(self.top_k, dim=1).indices
        picked = p.gather(1, chosen)
        if self.top_k == 1:
            return chosen, straight_through(torch.ones_like(picked), picked)
        return chosen, picked / (picked.sum(dim=1, keepdim=True) + 1e-5)

    def weights_of_all(self, probabilities: Tensor) -> Tensor:
        """Weights [B, E] from probabilities [B, E], zero where an expert is not chosen."""
        chosen, weights = self.route(probabilities)
        return torch.zeros_like(probabilities).scatter(1, chosen, weights)

    def by_all(self, x: Tensor, weights: Tensor) -> Tensor:
        """The sum over all E experts with weights [B, E], zero where an expert does not count.

        For a graph, which cannot depend on the choice.
        """
        out: Tensor | None = None
        for expert, its_weights in zip(self.experts, weights.unbind(dim=1), strict=True):
            y = expert(x)
            its_weights = its_weights.to(y.dtype).view(-1, 1, 1, 1)
            # an expert that was not chosen may give anything, infinity too
            y = torch.where(its_weights != 0, y * its_weights, 0.0)
            out = y if out is None else out + y
        assert out is not None
        return out

    def _trains_together(self) -> bool:
        # frozen parameters mean that an attack is running, which communicates nothing
        trains = self.training and next(self.experts.parameters()).requires_grad
        return trains and distributed.world_size() > 1


class SoftSparseLayer(nn.Module):
    """A sparse layer whose experts all compute, mixed by the softened gate: for attacks."""

    def __init__(self, layer: SparseLayer, temperature: float | None) -> None:
        super().__init__()
        self.layer = layer
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        p = self.layer.gate(x)
        scores = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        weights = soft_choice(scores, self.temperature)
        return self.layer.by_all(x, weights)


def check_top_k(top_k: int, num_experts: int, prefix: str = "") -> None:
    """Require 1 <= top_k <= num_experts; ConfigError otherwise."""
    check_count(num_experts, f"{prefix}num_experts")
    check_count(top_k, f"{prefix}top_k")
    if top_k > num_experts:
        raise ConfigError(
            f"{prefix}top_k: {top_k} is not possible, expected at most num_experts, {num_experts}"
        )


@contextlib.contextmanager
def _statistics(expert: nn.Module, *, of_batch: bool) -> Iterator[None]:
    """Let BatchNorm in train mode use running statistics unless ``of_batch``.

    A single row has no statistics, and torch may refuse it.
    """
    norms = [m for m in expert.modules() if isinstance(m, _BatchNorm) and m.training]
    try:
        for norm in norms:
            norm.training = of_batch
        yield
    finally:
        for norm in norms:
            norm.training = True
