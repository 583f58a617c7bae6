"""Mix an accurate and a robust network of a user without training: MixedNUTS.

    accurate, robust = dwf.load("runs/plain"), dwf.load("runs/trades")
    mixed = dwf.mix(accurate, robust, held_out, epsilon=8 / 255)
    dwf.evaluate(mixed, "cifar10")

The robust network's logits are stretched and the share is set (`dwf.models.MixedModel`) so that of
the images on which it withstands an attack, the share ``keep`` keeps its answer whatever the
accurate network says, and as many of its errors on clean images as possible can be outvoted:

    for s, p, c on a grid:  m(x) = softmax(M(h(x))) at the class of h, less the largest other
        cutoff = the (1 - keep) quantile of m over attacked images that h gets right
        outvoted = share of clean images that h gets wrong with 0 <= m < cutoff
    the s, p, c of most outvoted;  a = 1 / (1 + cutoff)

M is not monotonic: where it gives another class than h, m is negative.

| point                  | the paper or its code                | here                           |
|------------------------|--------------------------------------|--------------------------------|
| attack on h            | AutoAttack                           | PGD on the margin, 40 steps    |
| the accurate network   | one-hot, or scaled logits            | its softmax as it is, so that  |
|                        |                                      | attacks have its gradient      |
| among equal s, p, c    | the user chooses                     | the largest 1 - a              |
| cutoff                 | not limited                          | 0.001 to 0.9999: what has less |
|                        |                                      | weight is lost in float32      |
| which images           | some of the test set                 | the user's, from training data |

Source: MixedNUTS, Bai et al., arXiv:2402.02263 (section 4, and its code).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks import pgd
from dwf.attacks.door import undisturbed
from dwf.checks import ConfigError, DataError, check_epsilon
from dwf.data import as_dataset, evaluation_batches
from dwf.models.mixed import MixedModel, Stretch

KEEP = 0.985
SCALES = tuple(0.05 * 100 ** (i / 7) for i in range(8))  # .05 to 5
POWERS = tuple(1 + 3 * i / 7 for i in range(8))
BIASES = tuple(-2 + 2 * i / 7 for i in range(8))
# beyond these one of the networks has so little weight that float32 loses what it says
SMALLEST_CUTOFF, LARGEST_CUTOFF = 1e-3, 1 - 1e-4


def mix(
    accurate: nn.Module,
    robust: nn.Module,
    held_out: Any,
    *,
    epsilon: float = 8 / 255,
    keep: float = KEEP,
    num_images: int = 1000,
    num_steps: int = 40,
    seed: int = 0,
) -> MixedModel:
    """A MixedNUTS of two trained networks, set on images that neither has seen.

    Args:
        accurate, robust: images [B, C, H, W] in [0, 1] to logits [B, K], on one device.
        held_out: images and labels, as for :func:`dwf.data.as_dataset`; held-out *training* images.
        epsilon: radius in L-inf that the robust network is attacked within.
        keep: share of the withstood attacks that stay withstood whatever the accurate network says.
        num_images: at most so many images, the first ones.
        num_steps: of the attack, each a tenth of epsilon long.
    Returns:
        The mixture, in eval mode; the networks are shared, not copied.
    Raises:
        ConfigError: ``keep`` outside (0, 1), or a test set.
        DataError: the robust network withstands no attack, or errs on no clean image: then there
            is nothing to set; or it is too unsure for ``keep``.
    """
    if not 0 < keep < 1:
        raise ConfigError(f"keep: {keep:g} is not in (0, 1)")
    check_epsilon(epsilon, "epsilon")
    dataset = as_dataset(held_out, split="train", limit=num_images)
    if dataset.split == "test":
        raise ConfigError(f"{dataset.name}: mixing is set on training images, not the test split")
    first = next(robust.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    withstood, wrong = [], []
    for start in range(0, min(num_images, len(dataset)), 250):
        rows = torch.arange(start, min(start + 250, num_images, len(dataset)))
        images, labels, index = next(evaluation_batches(dataset.subset(rows), len(rows), device))
        attacked = pgd(
            robust,
            images,
            labels,
            epsilon=epsilon,
            step_size=epsilon / 10,
            num_steps=num_steps,
            random_start=True,
            loss="margin",
            seed=seed,
            sample_index=index + start,
        )
        with undisturbed(robust, device), torch.no_grad():
            clean, under_attack = robust(images).float(), robust(attacked).float()
        wrong.append(clean[clean.argmax(dim=1) != labels])
        withstood.append(under_attack[under_attack.argmax(dim=1) == labels])
    stretch, share = tuned(torch.cat(withstood).cpu(), torch.cat(wrong).cpu(), keep)
    return MixedModel(accurate, robust, share, stretch=stretch).to(device).eval()


def tuned(withstood: Tensor, wrong: Tensor, keep: float) -> tuple[Stretch, float]:
    """M and the robust share a, from logits of the robust network.

    Args:
        withstood: [N, K], of attacked images that it gets right.
        wrong: [M, K], of clean images that it gets wrong.
        keep: as of :func:`mix`.
    Raises:
        DataError: one of them is empty, or no setting gives the accurate network any weight.
    """
    for name, rows in (("withstands no attack on", withstood), ("makes no error on", wrong)):
        if len(rows) == 0:
            raise DataError(f"held_out: the robust network {name} these images; give more of them")
    candidates: list[tuple[float, float, Stretch]] = []
    for settings in itertools.product(SCALES, POWERS, BIASES):
        stretch = Stretch(*settings)
        cutoff = float(torch.quantile(_margins(withstood, stretch), 1 - keep))
        if not SMALLEST_CUTOFF <= cutoff <= LARGEST_CUTOFF:
            continue
        margins = _margins(wrong, stretch)
        outvoted = float(((margins >= 0) & (margins < cutoff)).double().mean())
        candidates.append((outvoted, cutoff, stretch))
    if not candidates:
        raise DataError(
            f"keep: the robust network is too unsure to keep {keep:g} of the attacks that it "
            "withstands if another one has any say; choose less"
        )
    _, cutoff, stretch = max(candidates, key=lambda one: one[:2])
    return stretch, 1 / (1 + cutoff)


def _margins(logits: Tensor, stretch: Stretch) -> Tensor:
    """m of the module's formulas [N], for logits of the robust network [N, K]."""
    probabilities = stretch(logits).double().softmax(dim=1)
    own = logits.argmax(dim=1, keepdim=True)
    others = probabilities.scatter(1, own, -torch.inf).amax(dim=1)
    return probabilities.gather(1, own).squeeze(1) - others
