"""iGAT: an ensemble with ADP's terms; then its errors are handed out, most to its strongest member.

Half of a batch is benign, half is attacked through the ensemble of N members h_i with the mean p of
their probabilities p_i. Over all R rows, of which the ensemble gets O wrong:

    ensemble = members * sum_i mean_r CE(h_i(x), y)
               - entropy * mean H(p) - diversity * mean log det(M^T M + 1e-6 I)
    igat     = ensemble + distributed / R * sum over O of CE(h_m(x), y)
               + rescue / R * sum over O and i of -log(1 - min(max_{c != y} p_i[c], .99))

    m is drawn for each row: the member of rank j by p_i[y], from 0 for the lowest, has the chance
    2^j / (2^N - 1); M [K - 1, N] has each member's probabilities of wrong classes, of length 1

Phase ``ensemble`` is ADP with attacks; phase ``igat`` starts from what it trained. From scratch the
loss ``igat`` stays at chance, on digits at three rates: an untrained ensemble gets nearly all rows
wrong, and `rescue` then holds the answers of every member equal. Cross-entropy is a sum over the
members, as ADP's is: as a mean, with its weight against H(p) an N-th, a constant answer costs less
than a right one.

| point               | its code                                | here                           |
|---------------------|-----------------------------------------|--------------------------------|
| start               | a file with a trained ADP or DVERGE     | phase ``ensemble``             |
|                     | ensemble                                |                                |
| rows                | one program: halves as here, without    | halves, with `members`         |
|                     | `members`; another: each image benign   |                                |
|                     | and attacked, with `members`, ADP's     |                                |
|                     | terms on benign rows alone              |                                |
| regularized members | each; the worst alone is an option      | each                           |
| ensemble            | mean of probabilities, or their largest | the mean                       |
| ensemble's terms    | ADP's entropy and log det, or DVERGE's  | ADP's                          |
| mode in attacks     | train                                   | eval; `attack.bn_mode`         |
| length              | 50 batches of 512 an epoch, rate .001   | see the presets                |

Sources: Deng and Mu, "Understanding and Improving Ensemble Adversarial Defense" (NeurIPS 2023,
arXiv:2310.18477), and its authors' code; ADP, Pang et al., arXiv:1901.08846, with attacks as in the
code of DVERGE, Yang et al. (NeurIPS 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels
from dwf.attacks.losses import Model
from dwf.checks import ConfigError, check_count, check_positive
from dwf.config import Config, Options, derive_seed
from dwf.data import Batch, classes_of
from dwf.defenses.building import ModelFacts, model_of, network_of, options_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.modern import diversity
from dwf.defenses.phase import Phase, StepResult, pretrain_schedule
from dwf.models import AveragedExperts, Normalize
from dwf.models.averaged import AveragedOutput

SUREST = 0.99  # of a wrong class: beyond it the regularizer is flat


@dataclass(frozen=True)
class IgatOptions(Options, defense="igat"):
    """``num_experts``: N. The others weigh the terms of the module's loss; 0 leaves one out."""

    num_experts: int = 8
    members: float = 1.0
    distributed: float = 5.0
    rescue: float = 10.0
    entropy: float = 2.0
    diversity: float = 0.5

    def __post_init__(self) -> None:
        # the draw of a member counts to 2^N in float32
        check_count(self.num_experts, "options.num_experts", maximum=20)
        for name in ("members", "distributed", "rescue", "entropy", "diversity"):
            check_positive(getattr(self, name), f"options.{name}", zero_allowed=True)


def build(config: Config, facts: ModelFacts) -> AveragedExperts:
    """Untrained networks behind one shared normalization."""
    count = options_of(config, IgatOptions).num_experts
    networks = [network_of(config, facts, "expert", e) for e in range(count)]
    return AveragedExperts(networks, Normalize(facts.mean, facts.std))


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """``ensemble`` on the schedule ``pretrain``, then ``igat`` on ``joint``.

    Raises:
        ConfigError: a schedule is missing.
    """
    ensemble = model_of(model, config, AveragedExperts)
    options = options_of(config, IgatOptions)
    schedule = pretrain_schedule(config)
    if config.joint is None:
        raise ConfigError("joint: None, but in it iGAT hands out what the ensemble gets wrong")
    alone = replace(options, distributed=0.0, rescue=0.0)
    return [
        Phase("ensemble", ensemble, schedule, partial(step, options=alone)),
        Phase("igat", ensemble, config.joint, partial(step, options=options)),
    ]


def step(
    model: nn.Module, forward: Model, batch: Batch, crafter: Crafter, *, options: IgatOptions
) -> StepResult:
    """The loss of the module's docstring, on half of the batch as it is and half attacked."""
    benign, *attacked = batch.split(2)
    rows = [benign, *(part._replace(images=crafter.pgd(model, part)) for part in attacked)]
    both = Batch.joined(rows)
    output: AveragedOutput = forward(both.images, return_aux=True)  # type: ignore[call-arg]
    assert isinstance(crafter.seed, int)
    seed = derive_seed(crafter.seed, "member")
    noise = moe_kernels.uniform_noise(seed, both.sample_index, (1,), device=both.images.device)
    loss = igat_loss(output, both.wanted, noise.flatten(), options)
    return StepResult(loss, output.logits.detach(), both.labels, len(benign.images))


def igat_loss(
    output: AveragedOutput, wanted: Tensor, noise: Tensor, options: IgatOptions
) -> Tensor:
    """The module's loss ``igat``, a scalar; weights of 0 for errors leave its ``ensemble``.

    Args:
        wanted: classes [R], or the share of each class [R, K], of which y is the largest.
        noise: [R] in [0, 1), from which members are drawn.
    """
    logits = output.expert_logits.float()  # [N, R, K]
    labels = classes_of(wanted)
    losses = torch.stack([F.cross_entropy(own, wanted, reduction="none") for own in logits])
    loss = options.members * losses.mean(dim=1).sum()
    if options.distributed or options.rescue:
        failed = (output.logits.argmax(dim=1) != labels).float()  # [R]
        member = drawn_member(logits.detach(), labels, noise).unsqueeze(0)
        loss = loss + options.distributed * (failed * losses.gather(0, member)[0]).mean()
        wrong = logits.softmax(dim=2).scatter(2, labels.expand(len(logits), -1).unsqueeze(2), 0.0)
        surest = wrong.amax(dim=2).clamp_max(SUREST)  # [N, R]
        loss = loss + options.rescue * (failed * -torch.log1p(-surest).sum(dim=0)).mean()
    if options.entropy:
        entropy = -(output.logits.exp() * output.logits).sum(dim=1)
        loss = loss - options.entropy * entropy.mean()
    if options.diversity:
        loss = loss - options.diversity * diversity(logits, labels).mean()
    return loss


def drawn_member(expert_logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """The member that each row is handed to, [R], from expert_logits [N, R, K] and noise [R].

    The chance of the member of rank j by its probability of the label is 2^j / (2^N - 1).
    """
    N = len(expert_logits)
    index = labels.expand(N, -1).unsqueeze(2)
    of_label = expert_logits.log_softmax(dim=2).gather(2, index)[..., 0]  # [N, R]
    rank = torch.log2(1 + noise * (2**N - 1)).floor().long().clamp_max(N - 1)
    return of_label.argsort(dim=0).gather(0, rank.unsqueeze(0))[0]
