"""Specimens that change what comes out of a network: saturate, reverse, vote, post-process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwf.evaluation.honest import build_small_network
from dwf.evaluation.zoo.parts import (
    FromFunction,
    Parts,
    Specimen,
    Wrapped,
    label_only,
    plain_inside,
    robust_inside,
    trained,
)


def _saw(logits: Tensor, width: float = 4.0, share: float = 0.7) -> Tensor:
    """The margin reversed inside intervals; the argmax is kept."""
    top, own = logits.topk(2, dim=1)
    margin = top[:, 0] - top[:, 1]
    interval = (margin / width).floor()
    inside = margin - interval * width
    new = interval * width + (width - inside)
    new = torch.where(interval == 0, 0.02 * width + share * (width - inside), new)
    return logits + F.one_hot(own[:, 0], logits.shape[1]).to(logits) * (new - margin)[:, None]


def _reversed(logits: Tensor, floor: float = 1.0, ceiling: float = 30.0) -> Tensor:
    """The margin reversed above a floor: an attack climbs away from the boundary."""
    top, own = logits.topk(2, dim=1)
    margin = top[:, 0] - top[:, 1]
    new = torch.where(margin < floor, margin + ceiling, ceiling + floor - margin).clamp_min(0.05)
    return logits + F.one_hot(own[:, 0], logits.shape[1]).to(logits) * (new - margin)[:, None]


def _saturated(logits: Tensor) -> Tensor:
    middle = logits.topk(2, dim=1).values.mean(dim=1, keepdim=True)
    return (30.0 * (logits - middle)).tanh()


def _stepped(logits: Tensor) -> Tensor:
    return logits.round() + 0.01 * logits


def _one_class_low(logits: Tensor) -> Tensor:
    """Noise, behind a class whose logit stretches every range."""
    noisy = logits + 0.5 * torch.randn_like(logits)
    low = torch.full_like(logits[:, :1], -1e6)
    return torch.cat([noisy, low], dim=1)


def _nan_off_grid(parts: Parts) -> nn.Module:
    """NaN for whatever is no image of 8 bits: a crash that a careless judge calls robust."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        logits: Tensor = model.networks[0](images)
        away = ((images * 255) - (images * 255).round()).abs().amax(dim=(1, 2, 3))
        return logits.masked_fill((away > 1e-3)[:, None], torch.nan)

    return FromFunction([parts.robust], forward)


def _voting(parts: Parts) -> nn.Module:
    """Networks of rounded weights vote by their labels alone."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        votes = [label_only(network(images), 1.0) for network in model.networks]
        soft = torch.stack([network(images) for network in model.networks]).mean(dim=0)
        return torch.stack(votes).sum(dim=0) + 1e-4 * soft.detach()

    return FromFunction([parts.plain, parts.plain_again], forward)


def _mean_of_plain(parts: Parts, model: nn.Module) -> list[nn.Module]:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in model.networks]).mean(dim=0)

    return [FromFunction([parts.plain, parts.plain_again], forward), parts.plain]


def _cross_max(parts: Parts) -> nn.Module:
    """The median over members of logits from which each member's and class's maximum is taken."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        seen = (images, (images * 3).round() / 3, F.avg_pool2d(images, 3, 1, 1))
        logits = torch.stack([network(x) for network in model.networks for x in seen])
        logits = logits - logits.amax(dim=2, keepdim=True)
        logits = logits - logits.amax(dim=0, keepdim=True)
        middle: Tensor = logits.median(dim=0).values
        return (middle * 4).round() / 4 + 1e-3 * middle

    return FromFunction([parts.plain, parts.plain_again], forward)


def _codes(parts: Parts) -> nn.Module:
    """Error-correcting output codes: classes by sixteen saturated bits."""
    generator = torch.Generator().manual_seed(5)
    code = torch.randint(0, 2, (10, 16), generator=generator).float() * 2 - 1
    network = build_small_network(13, width=10, num_classes=16)
    trained(Wrapped(network, after=lambda bits: bits @ code.T / 4))
    return Wrapped(network, after=lambda bits: (12 * bits).tanh() @ code.T)


def _soft_codes(parts: Parts, model: nn.Module) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(5)
    code = torch.randint(0, 2, (10, 16), generator=generator).float() * 2 - 1
    return [Wrapped(model.network, after=lambda bits: bits @ code.T)]  # type: ignore[arg-type]


def _detector(parts: Parts) -> nn.Module:
    """Where a filtered image is answered otherwise, the attack is 'detected': the old answer."""

    def forward(model: FromFunction, images: Tensor) -> Tensor:
        plain, robust = model.networks
        squeezed = (images * 3).round() / 3
        first, second = plain(images), plain(squeezed)
        suspicious = first.argmax(dim=1) != second.argmax(dim=1)
        return torch.where(suspicious[:, None], robust(images).detach(), first)

    return FromFunction([parts.plain, parts.robust], forward)


def _both(parts: Parts, model: nn.Module) -> list[nn.Module]:
    def forward(model: FromFunction, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in model.networks]).mean(dim=0)

    return [parts.plain, parts.robust, FromFunction([parts.plain, parts.robust], forward)]


OUTPUTS: dict[str, Specimen] = {
    "margin_saw": Specimen(
        "the margin reversed inside intervals",
        "adversarial attack on attackers, Chen et al., arXiv:2205.12134",
        lambda parts: Wrapped(parts.plain, after=_saw),
        plain_inside,
    ),
    "margin_reversed": Specimen(
        "the margin of a robust network reversed above a floor",
        "V5; adversarial attack on attackers, Chen et al., arXiv:2205.12134",
        lambda parts: Wrapped(parts.robust, after=_reversed),
        robust_inside,
    ),
    "saturated": Specimen(
        "tanh(30 z) around the middle of the best two logits",
        "V9; saturating outputs, cf. arXiv:1802.00420",
        lambda parts: Wrapped(parts.plain, after=_saturated),
        plain_inside,
    ),
    "distillation": Specimen(
        "logits of a network trained at temperature 100, taken at temperature 1",
        "defensive distillation, Papernot et al., arXiv:1511.04508; broken in arXiv:1608.04644",
        lambda parts: Wrapped(parts.plain, after=lambda logits: 100 * logits),
        plain_inside,
    ),
    "stepped_logits": Specimen(
        "logits rounded to integers, and a trace of what they were",
        "cf. Carlini et al., arXiv:1902.06705",
        lambda parts: Wrapped(parts.plain, after=_stepped),
        plain_inside,
    ),
    "hidden_noise": Specimen(
        "noise on the logits, and a class at -1e6 that stretches their range",
        "cf. Gowal et al., arXiv:2010.03593 (noise on logits)",
        lambda parts: Wrapped(parts.plain, after=_one_class_low),
        plain_inside,
        num_votes=5,
    ),
    "nan_off_grid": Specimen(
        "NaN for every image that is not of 8 bits",
        "cf. Pintor et al., arXiv:2106.09947",
        _nan_off_grid,
        robust_inside,
        eight_bits=True,
    ),
    "votes": Specimen(
        "networks that vote by their labels alone",
        "EMPIR, Sen et al., arXiv:2004.10162; broken in arXiv:2002.08347",
        _voting,
        _mean_of_plain,
    ),
    "cross_max": Specimen(
        "a median over members and resolutions, each freed of its maximum",
        "CrossMax, Fort and Lakshminarayanan, arXiv:2408.05446; attacked in arXiv:2411.14834",
        _cross_max,
        _mean_of_plain,
    ),
    "output_codes": Specimen(
        "classes by sixteen saturated bits",
        "error-correcting codes, Verma and Swami (NeurIPS 2019); broken in arXiv:2002.08347",
        _codes,
        _soft_codes,
    ),
    "detector": Specimen(
        "another network where a filtered image is answered otherwise",
        "feature squeezing as a detector, Xu et al., arXiv:1704.01155; arXiv:1705.07263",
        _detector,
        _both,
    ),
}
