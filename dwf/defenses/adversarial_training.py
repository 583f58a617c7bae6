"""Train one network plainly, by FGSM-AT or by PGD-AT: the baselines that DWF is compared with.

| method  | the paper says                         | we assume                        |
|---------|----------------------------------------|----------------------------------|
| plain   | public checkpoints                     | the benign expert's recipe       |
| FGSM-AT | half of every batch attacked by FGSM   | epsilon 8/255; every second row  |
| PGD-AT  | the same by PGD with 10 steps          | 8/255, 2/255; every second row   |

Source: the baselines of section 4 of arXiv:2512.20821; Goodfellow et al., arXiv:1412.6572; Madry et
al., arXiv:1706.06083.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwf.attacks.losses import Model
from dwf.config import Config
from dwf.data import Batch
from dwf.defenses.building import ModelFacts, network_of
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, pretrain_schedule
from dwf.defenses.steps import cross_entropy_step, plain_step
from dwf.models import Normalize, PixelModel


def build(config: Config, facts: ModelFacts) -> PixelModel:
    """One network with its normalization inside."""
    network = network_of(config, facts, "expert", 0)
    return PixelModel(Normalize(facts.mean, facts.std), network)


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase, ``train``, on the schedule ``pretrain``."""
    step = {"plain": plain_step, "fgsm-at": fgsm_at_step, "pgd-at": pgd_at_step}[config.defense]
    schedule = pretrain_schedule(config)
    return [Phase("train", model, schedule, step)]


def fgsm_at_step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
    """CE over a batch of which every second image is attacked by FGSM."""
    clean, other = _halves(batch)
    return _half_attacked_step(forward, clean, other, crafter.fgsm(model, other))


def pgd_at_step(model: nn.Module, forward: Model, batch: Batch, crafter: Crafter) -> StepResult:
    """CE over a batch of which every second image is attacked by PGD."""
    clean, other = _halves(batch)
    return _half_attacked_step(forward, clean, other, crafter.pgd(model, other))


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    # not its first and second half: those would depend on how processes and parts divide it
    return batch.rows(lambda part: part[0::2]), batch.rows(lambda part: part[1::2])


def _half_attacked_step(
    forward: Model, clean: Batch, other: Batch, adversarial: Tensor
) -> StepResult:
    images = torch.cat([clean.images, adversarial])
    wanted = torch.cat([clean.wanted, other.wanted])
    return cross_entropy_step(forward, images, wanted, len(clean.images))
