"""Offer an attack other functions to differentiate in place of a mixture: its *views*.

A view supplies gradients; the mixture itself, in float32, judges. So a view can only lower the
robust accuracy, and the worst case over all views is the result. With w = gate_weights(x) [B, E],
s = soft_gate_weights(x) [B, E] and l_e = expert(e)(x) [B, K], the views besides the mixture are

    view                   logits                                   finds
    expert e               l_e                                      experts that fail together
    uniform gate           mean_e l_e                               images that the gate protects
    frozen gate            sum_e w_e(clean) l_e                     images that need no other route
    one-hot gate           l_{e(b)}, e(b) the clean winner          images behind a flipped route
                           or the runner-up
    gate only              sum_e s_e detach(l_e)                    routes that flip easily
    straight-through       sum_e (value w_e, gradient of s_e) l_e   hard and saturated gates
    re-weighted members    sum_e v_e l_e                            uneven experts
    unpermuted gate        the mixture with its learned gate        random gates
    soft inside, T         soft values inside its layers            images behind a jump
    toward weakest expert  its logits and the will to choose it     one weak expert

Soft gate weights s never saturate. All views but "unpermuted" and "soft inside" use only
``expert``, ``gate_weights`` and ``soft_gate_weights`` of a mixture. A gradient of a sum over all
experts costs one pass of each. If a mixture routes in several layers, as SparseModel may, views
change the layer that it shows; "soft inside" changes all. Mixtures may add ``surrogates``.

Re-weighted members follow the idea of MORA, arXiv:2211.08008. Let c be the class that the mixture
gives the clean image, k the other class of largest sum_e s_e(clean) l_e, and m_e = l_e[c] - l_e[k]:

    v_e = s_e(clean) f(m_e / T) / sum of these,   f(m) = exp(m) / (1 + exp(m))^2,   T = mean_e |m_e|

f, the slope of a sigmoid, is largest at an expert's decision boundary, so the gradient comes mostly
from experts that are close to changing their answer. v passes no gradient. T, the factor s and c in
place of the label are ours: MORA has equal experts and a constant T.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwf.models.experts import ExpertModel
from dwf.models.planned import AroundNetworks
from dwf.models.routed import ForcedExperts, check_rows, combine, straight_through
from dwf.models.soft_routing import TEMPERATURES, SoftLogits, TowardWeakest
from moe_kernels import PartPlans
from moe_kernels.plan.modules import evaluated

# Views whose gradient is their derivative, if those of the mixture's parts are.
SOFT_AS_IT_IS, FROZEN = "soft inside", "frozen gate"
# How a view of a mixture is made for clean images.
Make = Callable[[ExpertModel, Tensor], nn.Module]


class View(NamedTuple):
    """One function to attack a mixture through.

    ``make(images)`` gives a module from images [B, C, H, W] to logits [B, K], for attacks that
    start at these clean images. It shares the mixture's weights, and changes neither the mixture
    nor any random state. If ``row_aligned``, row b of its input has to come from row b of
    ``images``: the module raises ImageError at another number of rows, so make it again after
    dropping some. A ``soft`` view computes other values than the mixture, so the mixture is asked
    on the way whether it is fooled.
    """

    name: str
    make: Callable[[Tensor], Callable[[Tensor], Tensor]]
    row_aligned: bool = False
    soft: bool = False


def attack_views(model: ExpertModel) -> list[View]:
    """All views of a mixture besides itself; for a single expert, only that expert.

    The views "expert e" and "unpermuted gate" may offer a plan of their own. Autograd
    differentiates the others, around the plans of the mixture's networks, which they share.
    """
    learned, plans = model.without_chance(), PartPlans()
    soft: list[tuple[str, Make, bool]] = []
    sides: list[tuple[str, Make, bool]] = [
        (_name(learned, e), partial(_expert, index=e), False) for e in range(learned.num_experts)
    ]
    if learned.num_experts > 1:
        sides += [
            ("uniform gate", _uniform_gate, False),
            (FROZEN, _frozen_gate, True),
            ("one-hot gate, winner", partial(_one_hot_gate, place=0), True),
            ("one-hot gate, runner-up", partial(_one_hot_gate, place=1), True),
            ("gate only", _gate_only, False),
            ("straight-through", _straight_through, False),
            ("re-weighted members", _reweighted, True),
        ]
        sides += [(name, partial(_surrogate, name=name), False) for name in learned.surrogates()]
        if learned.softened_inside(None) is not None:
            soft.append((SOFT_AS_IT_IS, partial(_soft, temperature=None), False))
        soft += [
            *(
                (f"soft inside, T {T:g}", partial(_soft, temperature=T), False)
                for T in TEMPERATURES
            ),
            ("toward weakest expert", partial(_toward_weakest, place=0), True),
            ("toward next expert", partial(_toward_weakest, place=1), True),
        ]
    if learned is not model:
        sides.insert(0, ("unpermuted gate", _itself, False))
    made = partial(_made, model, learned, plans)
    views = [View(name, partial(made, make), rows) for name, make, rows in sides]
    return views + [View(name, partial(made, make), rows, soft=True) for name, make, rows in soft]


def _name(model: ExpertModel, index: int) -> str:
    own = model.expert_names[index]
    return own if own == f"expert {index}" else f"expert {index} ({own})"


def _made(
    model: ExpertModel, learned: ExpertModel, plans: PartPlans, make: Make, images: Tensor
) -> nn.Module:
    with _looking_at(model, images.device):
        # modules that are not the model's own, too; they stay in eval mode
        made = make(learned.eval(), images.detach()).eval()
    networks = learned.networks()
    if hasattr(made, "attack_plan") or not networks:
        return made
    return AroundNetworks(made, networks, plans)


@contextlib.contextmanager
def _looking_at(model: nn.Module, device: torch.device) -> Iterator[None]:
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        evaluated(model),
    ):
        yield


def _itself(model: ExpertModel, images: Tensor) -> nn.Module:
    return model


def _expert(model: ExpertModel, images: Tensor, *, index: int) -> nn.Module:
    return model.expert(index)


def _uniform_gate(model: ExpertModel, images: Tensor) -> nn.Module:
    return UniformWeights(model)


def _frozen_gate(model: ExpertModel, images: Tensor) -> nn.Module:
    return FrozenWeights(model, model.gate_weights(images))


def _one_hot_gate(model: ExpertModel, images: Tensor, *, place: int) -> nn.Module:
    # a gate that chooses prefers its choice, whatever two equal soft weights say
    preference = model.soft_gate_weights(images) + model.gate_weights(images)
    return ForcedExperts(model, preference.topk(place + 1, dim=1).indices[:, place])


def _gate_only(model: ExpertModel, images: Tensor) -> nn.Module:
    return GateOnly(model)


def _straight_through(model: ExpertModel, images: Tensor) -> nn.Module:
    return StraightThroughGate(model)


def _reweighted(model: ExpertModel, images: Tensor) -> nn.Module:
    return ReweightedMembers(model, model.soft_gate_weights(images), model(images).argmax(dim=1))


def _surrogate(model: ExpertModel, images: Tensor, *, name: str) -> nn.Module:
    return model.surrogates()[name]


def _soft(model: ExpertModel, images: Tensor, *, temperature: float | None) -> nn.Module:
    inside = model.softened_inside(temperature)
    if inside is not None:
        return inside
    assert temperature is not None
    return SoftLogits(model, temperature)


def _toward_weakest(model: ExpertModel, images: Tensor, *, place: int) -> nn.Module:
    return TowardWeakest(model, images, place)


class _Members(nn.Module):
    """Compute the experts of a model one by one."""

    def __init__(self, model: ExpertModel) -> None:
        super().__init__()
        self.experts = nn.ModuleList(model.expert(e) for e in range(model.num_experts))

    def expert_logits(self, images: Tensor) -> Tensor:
        return torch.stack([expert(images) for expert in self.experts])  # [E, B, K]


class UniformWeights(_Members):
    """The mean of the experts' logits."""

    def forward(self, images: Tensor) -> Tensor:
        return self.expert_logits(images).mean(dim=0)


class FrozenWeights(_Members):
    """The experts' logits mixed by ``weights`` [B, E], whatever the images."""

    def __init__(self, model: ExpertModel, weights: Tensor) -> None:
        super().__init__(model)
        self._weights = weights

    def forward(self, images: Tensor) -> Tensor:
        check_rows(images, len(self._weights))
        return combine(self._weights, self.expert_logits(images))


class GateOnly(_Members):
    """A softly gated mixture whose gradient comes from the gate alone.

    It moves weight to the experts that are worst for the image. If the gate passes no gradient, it
    is zero.
    """

    def __init__(self, model: ExpertModel) -> None:
        super().__init__(model)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            expert_logits = self.expert_logits(images)
        logits = combine(self.model.soft_gate_weights(images), expert_logits)
        # a gate without a gradient is no error: the view then finds nothing
        return logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)


class StraightThroughGate(_Members):
    """The gate's weights with the gradient of its soft weights.

    For a model that mixes its experts' logits, this is the model with another gradient.
    """

    def __init__(self, model: ExpertModel) -> None:
        super().__init__(model)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            hard = self.model.gate_weights(images)
        weights = straight_through(hard, self.model.soft_gate_weights(images))
        return combine(weights, self.expert_logits(images))


class ReweightedMembers(_Members):
    """The experts' logits mixed by how close each is to giving up the class of the clean image.

    Args:
        weights: [B, E], s(clean) of the formulas above.
        classes: [B], the classes to give up.
    """

    def __init__(self, model: ExpertModel, weights: Tensor, classes: Tensor) -> None:
        super().__init__(model)
        self._weights = weights
        self._classes = classes

    def forward(self, images: Tensor) -> Tensor:
        check_rows(images, len(self._weights))
        expert_logits = self.expert_logits(images)
        return combine(self.member_weights(expert_logits.detach()), expert_logits)

    def member_weights(self, expert_logits: Tensor) -> Tensor:
        """v [B, E] for expert_logits [E, B, K]; rows sum to 1."""
        expert_logits = expert_logits.float()
        own = self._classes.unsqueeze(1)  # [B, 1]
        rival = combine(self._weights, expert_logits)
        rival = rival.scatter(1, own, -torch.inf).argmax(dim=1, keepdim=True)
        every = (len(expert_logits), -1, -1)
        margins = expert_logits.gather(2, own.expand(every))
        margins = (margins - expert_logits.gather(2, rival.expand(every))).squeeze(2).T  # [B, E]
        margins = margins / margins.abs().mean(dim=1, keepdim=True).clamp(min=1e-12)
        closeness = self._weights * margins.sigmoid() * (-margins).sigmoid()
        return closeness / closeness.sum(dim=1, keepdim=True)
