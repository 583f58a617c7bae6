"""Mix the probabilities of an accurate and a robust network: adaptive smoothing and MixedNUTS.

    f(x) = log( (1 - a) softmax(t g(x)) + a softmax(M(h(x))) )

    g   the accurate network, t its scale;   h   the robust network;   a   the robust share
    M(z) = s |u|^p sign(u),  u = GELU(LN(z) + c),  LN(z) = (z - mean z) / std z      (MixedNUTS)
    M(z) = z                                                              (adaptive smoothing)

With a >= 1/2 the accurate network decides only where the robust one is unsure: where the margin of
softmax(M(h(x))) is less than (1 - a) / a. Robust networks are surer when they are right, even under
attack; M stretches that difference. The share is a number, or a gate's: a = sigmoid(gate(x)).

Sources: adaptive smoothing, Bai et al., arXiv:2301.12554; MixedNUTS, Bai et al., arXiv:2402.02263,
whose code normalizes over the 250 largest logits; here over all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.checks import ConfigError, check_positive
from dwf.models.experts import PlannedExperts, checked_experts, networks_inside
from dwf.models.gates import MlpGate
from dwf.models.planned import Planned, PlanParts


@dataclass(frozen=True)
class Stretch:
    """M of the module's formulas for logits [B, K]; p > 0, s > 0."""

    scale: float
    power: float
    bias: float

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")
        check_positive(self.power, "power")

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        deviation = logits.var(dim=1, keepdim=True).add(1e-8).sqrt()
        centered = (logits - logits.mean(dim=1, keepdim=True)) / deviation
        clamped = F.gelu(centered + self.bias)
        # at 0 the slope of a power may be infinite
        size = clamped.abs().clamp_min(1e-12) ** self.power
        return self.scale * size * clamped.sign()


def _scaled(logits: Tensor, scale: float = 1.0) -> Tensor:
    return scale * logits.float()


class Scored(Planned):
    """A network whose logits [B, K] go through a function: one part of a mixture of two."""

    def __init__(self, network: nn.Module, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.score = score

    def plan_parts(self) -> PlanParts:
        return PlanParts(networks_inside([self.network]), composed=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.network(images))


class MixedModel(PlannedExperts):
    """An accurate and a robust network, mixed by their probabilities; see the module.

    Its experts are t g and M(h), its gate weights (1 - a, a). M is flat where h is sure, so attacks
    also get h without M, as a surrogate.

    Args:
        accurate, robust: images [B, C, H, W] in [0, 1] to logits [B, K]; shared, not copied.
        share: a, in (0, 1); or a gate, a module from images to [B, 1], whose sigmoid it is.
        stretch: M; None leaves the robust logits as they are.
        accurate_scale: t.

    Raises:
        ConfigError: a share outside (0, 1), or something that is no module.
    """

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        share: float | nn.Module = 0.5,
        *,
        stretch: Stretch | None = None,
        accurate_scale: float = 1.0,
    ) -> None:
        super().__init__()
        members, self.expert_names = checked_experts([accurate, robust], ["accurate", "robust"])
        self.experts = nn.ModuleList(members)
        self.gate = share if isinstance(share, nn.Module) else None
        self.share = None if isinstance(share, nn.Module) else share
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(f"share: {self.share:g} is not in (0, 1)")
        self.stretch = stretch
        self.accurate_scale = check_positive(accurate_scale, "accurate_scale")

    def expert(self, index: int) -> nn.Module:
        return Scored(self.experts[index], self._scores[index])

    def surrogates(self) -> dict[str, nn.Module]:
        return {} if self.stretch is None else {"robust, not stretched": self.experts[1]}

    def networks(self) -> Sequence[nn.Module]:
        return networks_inside(self.experts)

    @property
    def _scores(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What becomes of each network's logits before they are mixed."""
        return partial(_scaled, scale=self.accurate_scale), self.stretch or _scaled

    def described_parts(self) -> list[str]:
        share = "a gate's" if self.share is None else f"{self.share:.4g}"
        return [*super().described_parts(), f"robust share {share}"]

    def gate_logits(self, images: Tensor) -> Tensor:
        """log(a / (1 - a)) of each image, [B, 1] float32."""
        if self.gate is not None:
            found: Tensor = self.gate(images)
            return found.float()
        assert self.share is not None
        # of the images' size, so that an exported program takes any number of them
        return torch.full_like(images[:, :1, 0, 0], self.share, dtype=torch.float32).logit()

    def gate_weights(self, images: Tensor) -> Tensor:
        z = self.gate_logits(images)
        return torch.cat([(-z).sigmoid(), z.sigmoid()], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        log_p, log_q = (
            score(network(images)).log_softmax(dim=1)
            for network, score in zip(self.experts, self._scores, strict=True)
        )
        z = self.gate_logits(images)
        return torch.logaddexp(F.logsigmoid(-z) + log_p, F.logsigmoid(z) + log_q)


def share_gate(
    image_shape: Sequence[int], *, hidden: int = 128, start: float = 0.95, seed: int = 0
) -> MlpGate:
    """A gate for :class:`MixedModel`: a perceptron from images to [B, 1], whose share is ``start``.

    ``seed`` fixes its first layer's weights without touching torch's RNG.
    """
    if not 0 < start < 1:
        raise ConfigError(f"start: {start:g} is not in (0, 1)")
    gate = MlpGate(image_shape, 1, hidden=hidden, seed=seed)
    last = gate.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, math.log(start / (1 - start)))
    return gate
