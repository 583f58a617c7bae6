"""Certify the smoothed version of a model: what most answers to noisy copies of an image say.

The smoothed classifier answers with the class that the model gives most often to x + noise, noise
normal with deviation sigma. If a class has probability p > 1/2 there, no change shorter than
sigma Phi^-1(p) in L2 changes that answer. It is another classifier than the model: the model itself
may fall where its smoothed version is certain.

Source: Cohen, Rosenfeld and Kolter, arXiv:1902.02918, their procedure CERTIFY.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model
from dwf.checks import check_count, check_positive
from dwf.config import derive_seed

NUM_GUESSES, NUM_SAMPLES = 100, 1000
ALPHA = 0.001  # chance that a certificate is wrong
_BATCH_SIZE = 500


@dataclass(frozen=True, eq=False)
class Smoothed:
    """What the smoothed classifier of a model does, image by image, on the CPU.

    Attributes:
        correct: [N] bool, images whose most frequent class is certain and right.
        radius: [N] float64, the L2 distance within which that answer holds; 0 where it abstains or
            is wrong.
    """

    correct: Tensor
    radius: Tensor


def smoothed(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    num_guesses: int = NUM_GUESSES,
    num_samples: int = NUM_SAMPLES,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Smoothed:
    """Certify images [N, C, H, W] with labels [N], each wrong with probability at most ``alpha``.

    Noise depends on the seed and on an image's place alone. Noisy images may leave [0, 1].

    Raises:
        ConfigError: ``sigma`` or a number of samples is not positive.
    """
    check_positive(sigma, "sigma")
    check_count(num_guesses, "num_guesses")
    check_count(num_samples, "num_samples")
    correct, radius = [], []
    with undisturbed(model, images.device, seed=seed), torch.no_grad():
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            generator = torch.Generator().manual_seed(derive_seed(seed, "smoothing", str(place)))
            guess = int(_counts(model, image, sigma, num_guesses, generator).argmax())
            count = int(_counts(model, image, sigma, num_samples, generator)[guess])
            least = binomial_lower(count, num_samples, alpha)
            sure = guess == int(label) and least > 0.5
            correct.append(sure)
            radius.append(sigma * NormalDist().inv_cdf(least) if sure else 0.0)
    return Smoothed(torch.tensor(correct), torch.tensor(radius, dtype=torch.float64))


def binomial_lower(successes: int, trials: int, alpha: float) -> float:
    """The lower end of a one-sided interval of a proportion, right with 1 - alpha.

    Clopper and Pearson, 1934: the p at which so many successes or more have probability alpha.
    """
    if successes == 0:
        return 0.0
    k = torch.arange(successes, trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = (ways + k * math.log(p) + (trials - k) * math.log1p(-p)).exp().sum()
        low, high = (p, high) if float(tail) < alpha else (low, p)
    return low


def _counts(
    model: Model, image: Tensor, sigma: float, num_samples: int, generator: torch.Generator
) -> Tensor:
    """[K]: how often each class is the answer to a noisy image."""
    counts: Tensor | None = None
    for start in range(0, num_samples, _BATCH_SIZE):
        size = min(_BATCH_SIZE, num_samples - start)
        noise = torch.randn((size, *image.shape), generator=generator).to(image)
        logits = ask(model, image + sigma * noise)
        found = logits.argmax(dim=1).bincount(minlength=logits.shape[1])
        counts = found if counts is None else counts + found
    assert counts is not None
    return counts
