"""List the defenses by name: how a model is built, and what trains it. One file per paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dwf import checkpoint
from dwf.checks import CheckpointError, check_choice
from dwf.config import Config, from_dict
from dwf.data import Batch
from dwf.defenses import (
    adaptive_smoothing,
    adversarial_training,
    advmoe,
    divided_we_fall,
    igat,
    immunity,
    modern,
    more,
    multi_norm,
    multi_step,
    prior_guided,
    robust_experts,
    rt_er,
    single_step,
    soe,
)
from dwf.defenses.building import ModelFacts
from dwf.defenses.crafter import Crafter
from dwf.defenses.phase import Phase, StepResult, Update
from dwf.defenses.side_by_side import Phases, SideBySide
from dwf.files import read_json, require_run
from dwf.typed_json import Place, from_json

__all__ = [
    "DEFENSES",
    "WEIGHTS",
    "Batch",
    "Crafter",
    "Defense",
    "ModelFacts",
    "Phase",
    "Phases",
    "SideBySide",
    "StepResult",
    "Update",
    "get",
    "load",
]

WEIGHTS = ("last", "best", "ema", "best-ema", "pretrained")


class Defense(NamedTuple):
    """A name for tables, ``build(config, facts)``, and ``phases(model, config)`` of that model."""

    title: str
    build: Callable[[Config, ModelFacts], nn.Module]
    phases: Callable[[nn.Module, Config], Phases]


DEFENSES = {
    "adaptive-smoothing": Defense(
        "Adaptive smoothing", adaptive_smoothing.build, adaptive_smoothing.phases
    ),
    "advmoe": Defense("ADVMoE", advmoe.build, advmoe.phases),
    "dwf": Defense("Divided We Fall", divided_we_fall.build, divided_we_fall.phases),
    "dwf-modern": Defense("Divided We Fall, modern", modern.build, modern.phases),
    "igat": Defense("iGAT", igat.build, igat.phases),
    "immunity": Defense("Immunity (reconstructed)", immunity.build, immunity.phases),
    "jtdmoe": Defense("JTDMoE", rt_er.build, rt_er.phases),
    "more": Defense("MoRE (L-inf experts)", more.build, more.phases),
    "plain": Defense("plain", adversarial_training.build, adversarial_training.phases),
    "fgsm-at": Defense("FGSM-AT", adversarial_training.build, adversarial_training.phases),
    "pgd-at": Defense("PGD-AT", adversarial_training.build, adversarial_training.phases),
    "madry-at": Defense("PGD-AT (all images)", multi_step.build, multi_step.phases),
    "trades": Defense("TRADES", multi_step.build, multi_step.phases),
    "mart": Defense("MART", multi_step.build, multi_step.phases),
    "awp": Defense("AWP", multi_step.build, multi_step.phases),
    "trades-awp": Defense("TRADES-AWP", multi_step.build, multi_step.phases),
    "free-at": Defense("Free-AT", single_step.build, single_step.phases),
    "fast-at": Defense("Fast-AT", single_step.build, single_step.phases),
    "n-fgsm": Defense("N-FGSM", single_step.build, single_step.phases),
    "fgsm-pgi": Defense("FGSM-PGI", prior_guided.build, prior_guided.phases),
    "liet": Defense("LIET", prior_guided.build, prior_guided.phases),
    "multi-norm": Defense("L-inf and L2", multi_norm.build, multi_norm.phases),
    "robust-experts": Defense("Robust Experts", robust_experts.build, robust_experts.phases),
    "rt-er": Defense("RT-ER", rt_er.build, rt_er.phases),
    "soe": Defense("Synergy-of-Experts", soe.build, soe.phases),
}


def get(name: str) -> Defense:
    """A defense by name; ConfigError with the nearest known one otherwise."""
    check_choice(name, list(DEFENSES), "defense")
    return DEFENSES[name]


def load(
    run: str | Path, weights: str | None = None, *, model: nn.Module | None = None
) -> nn.Module:
    """The model of a run folder, in eval mode on the CPU: images in [0, 1] to logits.

    Args:
        weights: "last" step, "best" robust validation accuracy, "ema" (the average of the weights),
            "best-ema" (the average at its best robust validation accuracy), or "pretrained" (DWF
            before end-to-end training); by default those that the configuration reports.
        model: the module that was given to ``train``, if one was; its weights are replaced.
    Raises:
        CheckpointError: no run, no such checkpoint, damaged files, or another architecture.
    """
    folder = Path(run)
    if weights is not None:
        check_choice(weights, WEIGHTS, "weights")
    require_run(folder)
    config = from_dict(read_json(folder / "config.json"))
    weights = weights or config.weights
    pointer, stem = checkpoint.place_of(weights)
    path = checkpoint.resolve(folder / "checkpoints", pointer)
    tensors, state = checkpoint.load(path)
    if stem not in tensors:
        raise CheckpointError(f"{path}: holds no average of the weights yet")
    if model is None:
        facts = from_json(ModelFacts, state.get("facts"), Place(path / "state.json", "facts"))
        model = get(config.defense).build(config, facts)
    checkpoint.load_weights(model, tensors[stem], path / f"{stem}.safetensors")
    return model.eval()
