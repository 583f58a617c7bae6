"""Train one network by single-step attacks that start where something is known: FGSM-PGI and LIET.

    fgsm-pgi    delta: what the epoch before left for this image; at first a corner of the ball
                x0 = clip(x + delta), z0 = f(x0), g = gradient of CE(z0, y) at x0
                x' = clip(x + clamp(delta + epsilon sign(g), -epsilon, epsilon))
                loss = CE(f(x'), y) + weight * mean square of f(x') - z0
                m <- g / ||g||_1 + decay * m;   delta <- clamp(delta + epsilon sign(m)) for later
    liet        u_k = epsilon sign of CE's gradient at a gray image with label k
                x0 = clip(x +- u_y), where noise of the ball replaces a random share of the pixels
                x' = clip(x + clamp(x0 - x + epsilon sign(g), -epsilon, epsilon)), z0 and g as above
                loss = CE(f(x'), y) + weight * (epoch + 1) / epochs * JS(softmax z0, softmax f(x'))

A start that already fools the network keeps the one step from overfitting; the second term of the
loss keeps both outputs alike. Gradients to the weights flow through f(x') and z0, and both passes
are in train mode, as in the papers' code.

| point                   | the papers or their code            | here                            |
|-------------------------|-------------------------------------|---------------------------------|
| fgsm-pgi: variants      | prior of the batch, the epoch, the  | the epoch's with momentum; a    |
|                         | epoch with momentum                 | decay of 0 is without           |
| fgsm-pgi: crops         | one version crops delta alike       | delta stays where its pixels are|
| fgsm-pgi: delta, m      | float32                             | float16, half of the memory     |
| liet: u                 | renewed every 20 batches            | at every batch: one more pass   |
|                         |                                     | of K images, in eval mode       |
| liet: epsilon > 8/255   | wider noise, x' not clamped         | as at 8/255                     |
| label smoothing         | liet: random shares of the others   | equal shares                    |

Sources: FGSM-PGI, Jia et al., arXiv:2207.08859; LIET, Pan et al., "Mitigating catastrophic
overfitting in fast adversarial training via label information elimination" (ICCV 2025), and its
code; settings of fzjcdt/FastAT_Benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels
from dwf.attacks.door import undisturbed
from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_count, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch
from dwf.defenses.adversarial_training import build
from dwf.defenses.building import options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, pretrain_schedule
from dwf.defenses.single_step import check_pixels

__all__ = ["build", "phases"]


@dataclass(frozen=True)
class FgsmPgiOptions(Options, defense="fgsm-pgi"):
    """``weight`` of the squared difference; ``decay`` of m; a new delta every ``reset_epochs``."""

    weight: float = 10.0
    decay: float = 0.3
    reset_epochs: int = 40

    def __post_init__(self) -> None:
        check_positive(self.weight, "options.weight", zero_allowed=True)
        check_positive(self.decay, "options.decay", zero_allowed=True)
        check_count(self.reset_epochs, "options.reset_epochs")


@dataclass(frozen=True)
class LietOptions(Options, defense="liet"):
    """``weight`` of the divergence at the end; noise replaces a share of pixels, drawn between."""

    weight: float = 100.0
    least_noise: float = 0.1
    most_noise: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self.weight, "options.weight", zero_allowed=True)
        if not 0 <= self.least_noise <= self.most_noise <= 1:
            raise ConfigError(
                f"options: least_noise {self.least_noise:g} and most_noise {self.most_noise:g}, "
                "expected shares in ascending order"
            )


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    schedule = pretrain_schedule(config)
    check_pixels(config)
    if config.defense == "liet":
        options = options_of(config, LietOptions)
        step = partial(liet_step, options=options, num_epochs=schedule.num_epochs)
        return [Phase("train", model, schedule, step)]
    state: dict[str, Tensor] = {}
    pgi = partial(pgi_step, options=options_of(config, FgsmPgiOptions), state=state)
    return [Phase("train", model, schedule, pgi, state=state)]


def pgi_step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    options: FgsmPgiOptions,
    state: dict[str, Tensor],
) -> StepResult:
    """The loss of fgsm-pgi; ``state`` keeps delta and m of every image, in units of epsilon."""
    epsilon, images, index = crafter.attack.epsilon, batch.images, batch.sample_index
    block = crafter.epoch // options.reset_epochs
    _make_room(state, batch)
    known = (state["block"][index] == block).view(-1, 1, 1, 1)
    noise = _noise(crafter, "prior", batch)
    delta = epsilon * torch.where(known, state["delta"][index].float(), noise.sign())
    momentum = torch.where(known, state["momentum"][index].float(), 0.0)
    first, gradient = _first_pass(forward, torch.clamp(images + delta, 0, 1), batch)
    logits = forward(_stepped(images, delta, gradient, epsilon))
    loss = F.cross_entropy(logits.float(), batch.wanted)
    loss = loss + options.weight * F.mse_loss(logits.float(), first.float())
    # only its sign counts; at this size it fits into float16
    size = gradient.abs().mean().clamp_min(1e-20)
    momentum = gradient / size + options.decay * momentum
    later = _inside(images, delta + epsilon * momentum.sign(), epsilon) - images
    state["delta"][index] = (later / epsilon).to(torch.float16)
    state["momentum"][index] = momentum.clamp(-1e4, 1e4).to(torch.float16)
    state["block"][index] = block
    return StepResult(loss, logits.detach(), batch.labels, 0)


def liet_step(
    model: nn.Module,
    forward: Model,
    batch: Batch,
    crafter: Crafter,
    *,
    options: LietOptions,
    num_epochs: int,
) -> StepResult:
    """The loss of liet."""
    epsilon, images = crafter.attack.epsilon, batch.images
    draws = moe_kernels.uniform_noise(
        derive_seed(_seed(crafter), "liet"), torch.zeros(1, dtype=torch.int64), (2,)
    )[0].tolist()
    share = options.least_noise + (options.most_noise - options.least_noise) * draws[0]
    with torch.no_grad():
        of_labels = label_information(model, images, batch.labels, epsilon)
    noise = epsilon * _noise(crafter, "noise", batch)
    replaced = (_noise(crafter, "mask", batch) + 1) / 2 < share
    delta = torch.where(replaced, noise, of_labels) * (1 if draws[1] < 0.5 else -1)
    start = torch.clamp(images + delta, 0, 1)
    first, gradient = _first_pass(forward, start, batch)
    logits = forward(_stepped(images, start - images, gradient, epsilon))
    weight = options.weight * (crafter.epoch + 1) / num_epochs
    loss = F.cross_entropy(logits.float(), batch.wanted)
    loss = loss + weight * jensen_shannon(first, logits).mean()
    return StepResult(loss, logits.detach(), batch.labels, 0)


def label_information(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """u_y for each label [B]: a sign of CE's gradient at gray, [B, C, H, W] times epsilon."""
    classes, place = torch.unique(labels, return_inverse=True)
    gray = torch.full((len(classes), *images.shape[1:]), 0.5, device=images.device)
    with undisturbed(model, images.device):
        gray.requires_grad_()
        loss = F.cross_entropy(model(gray).float(), classes, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, gray)
    return epsilon * gradient.sign()[place]


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """(KL(p, m) + KL(q, m)) / 2 of each row [B], m = (p + q) / 2, from logits [B, K]."""
    log_p, log_q = one.float().log_softmax(dim=1), other.float().log_softmax(dim=1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.full_like(log_p, 2.0))
    p_to_m = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    q_to_m = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (p_to_m + q_to_m).sum(dim=1) / 2


def _first_pass(forward: Model, start: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits at the start, with their graph, and the gradient of the loss there."""
    leaf = start.detach().requires_grad_()
    logits: Tensor = forward(leaf)
    loss = F.cross_entropy(logits.float(), batch.wanted, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return logits, gradient


def _stepped(images: Tensor, delta: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    return _inside(images, delta + epsilon * gradient.sign(), epsilon)


def _inside(images: Tensor, delta: Tensor, epsilon: float) -> Tensor:
    return torch.clamp(images + delta.clamp(-epsilon, epsilon), 0, 1)


def _noise(crafter: Crafter, name: str, batch: Batch) -> Tensor:
    """Uniform in [-1, 1), in the images' shape."""
    seed = derive_seed(_seed(crafter), name)
    shape = tuple(batch.images.shape[1:])
    device = batch.images.device
    return 2 * moe_kernels.uniform_noise(seed, batch.sample_index, shape, device=device) - 1


def _seed(crafter: Crafter) -> int:
    assert isinstance(crafter.seed, int)  # only cross-entropy phases run side by side
    return crafter.seed


def _make_room(state: dict[str, Tensor], batch: Batch) -> None:
    """Let the state hold every image of the batch; what is new has block -1."""
    have = len(state["block"]) if state else 0
    need = int(batch.sample_index.max()) + 1
    if need <= have:
        return
    images, device = batch.images, batch.images.device
    shape = (need - have, *images.shape[1:])
    new = {
        "delta": torch.zeros(shape, dtype=torch.float16, device=device),
        "momentum": torch.zeros(shape, dtype=torch.float16, device=device),
        "block": torch.full((need - have,), -1, device=device),
    }
    for name, value in new.items():
        state[name] = torch.cat([state[name], value]) if have else value
