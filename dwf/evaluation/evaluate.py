"""Judge a model: accuracy under a suite of attacks, and the worst case per image.

An image counts as robust only if the float32 model in eval mode gives finite logits with the right
argmax. NaN or infinite logits are broken, never class 0. Attacks may search by a faster plan of the
model, which never decides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dwf.attacks.door import undisturbed
from dwf.attacks.losses import Model
from dwf.attacks.norms import NORMS
from dwf.attacks.source import float32_verdicts
from dwf.attacks.target import AttackTarget, inner_model
from dwf.checks import (
    ConfigError,
    DataError,
    ImageTypeError,
    check_choice,
    check_epsilon,
    check_images,
    check_positive,
    check_radius,
    check_seed,
    plain,
)
from dwf.config import EvaluationConfig
from dwf.data import ImageDataset, as_dataset
from dwf.evaluation import findings
from dwf.evaluation.behaviour import untouched_copy
from dwf.evaluation.beside import counted, gate_findings
from dwf.evaluation.budget import Budget
from dwf.evaluation.certificates import certificates
from dwf.evaluation.cost import inference_cost
from dwf.evaluation.diagnostics import diagnose
from dwf.evaluation.job import Job, Judged, Say
from dwf.evaluation.measures import held
from dwf.evaluation.paper import judge_by_grid
from dwf.evaluation.plan_check import trusted
from dwf.evaluation.record import Certified, DataFacts, Finding
from dwf.evaluation.result import Arrays, Evaluation
from dwf.evaluation.sequence import judge_in_turn
from dwf.evaluation.suites import SUITES
from dwf.evaluation.traces import trace
from dwf.evaluation.twins import twins
from dwf.models import ExpertModel, planned

log = logging.getLogger("dwf")

# Images whose attack is traced: one of so many, and no fewer than this.
TRACED = (20, 6)


def evaluate(
    model: Model,
    dataset: Any,
    settings: EvaluationConfig | None = None,
    *,
    suite: str = "standard",
    epsilon: float | Sequence[float] | None = None,
    norm: str = "linf",
    protocol: str = "pixels",
    clamp: str = "unit",
    seed: int = 0,
    device: torch.device | str | None = None,
    allow_probabilities: bool = False,
    budget: Budget | None = None,
    expected_clean: float | None = None,
    sources: Mapping[str, Model] | None = None,
    training_data: ImageDataset | None = None,
    certify: float | None = None,
    partial: Path | None = None,
    progress: Say | None = None,
    shared: bool = False,
) -> Evaluation:
    """Attack a model on a data set with a suite of attacks, and judge it image by image.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K]; any module, or any callable.
        dataset: an ImageDataset, a pair (images, labels) of tensors, a DataLoader or data set of
            such pairs, a name or a path: see :func:`dwf.data.as_dataset`.
        settings: radii, steps and batch size; 8/255 by default.
        suite: "standard" for AutoAttack's attacks and those on a mixture's parts, "quick" for a
            first look, "full" for the standard suite without giving up and its gradient attacks
            at twice the steps, "paper" for the grid of DWF's tables (see
            :mod:`dwf.evaluation.suites`).
        epsilon: one radius or several; by default that of the settings, which is in L-inf. The
            largest is the headline. A curve may begin at 0, the clean accuracy. The paper's grid
            takes one.
        norm: "linf" or "l2"; the paper's grid is in L-inf.
        protocol: "pixels", or "paper-compat" for the grid on normalized images with ``clamp``
            "unit" or "none"; epsilon is then in units of the normalized image.
        device: where the model lives; by default that of its parameters.
        budget: caps on every attack, for a quick trial of the verdict; not for the paper's grid.
        expected_clean: clean accuracy in [0, 1] as its training or its paper says. Far less is a
            finding: images were normalized twice, for example, or are of other data.
        sources: other models by name; images made on each are tried on this one, and count. Not for
            the paper's grid.
        training_data: what the model was trained on; test images that it holds are a finding.
        certify: also certify the model smoothed by normal noise of this deviation, see
            :mod:`dwf.evaluation.smoothing`. Bounds of the model itself (:mod:`..bounds`) need no
            asking.
        partial: a file to keep outcomes in while attacks in turn run, and to continue from if it
            exists; it is left for the caller to remove.
        progress: called with a line of text now and then, which says how long the suite takes at
            most. Without it a suite of a minute or more logs that estimate as a warning.
        shared: with torchrun, if every process calls this alike: each attacks some of the images,
            and rank 0 has the costs. Not for the paper's grid.

    The model, its buffers and all random states are as before. Results depend on ``seed`` and the
    images' places in the data set only. A model may have an attribute ``evaluation_notes``, a list
    of strings: each becomes a finding of severity "note".

    Raises:
        ModelOutputError, LabelError, ImageTypeError, DataError, ConfigError: before any attack
            runs.
    """
    settings = settings or EvaluationConfig()
    seed = check_seed(seed)
    if (
        expected_clean is not None
        and not 0 <= check_positive(expected_clean, "expected_clean") <= 1
    ):
        raise ConfigError(f"expected_clean: {expected_clean}, expected a share in [0, 1]")
    if certify is not None:
        check_positive(certify, "certify")
    epsilons = _radii(epsilon, settings)
    _check_choices(suite, norm, epsilons, protocol, clamp, budget)
    if suite == "paper" and sources:
        raise ConfigError(
            "sources: images made elsewhere go with attacks in turn, not with 'paper'"
        )
    if norm == "linf":
        settings = replace(settings, epsilon=epsilons[-1])
    if norm != "linf" and epsilon is None:
        raise ConfigError(
            f"epsilon: name one for norm {norm!r}, 0.5 for example; that of the settings, "
            f"{settings.epsilon:.4g}, is of L-inf and would break hardly anything"
        )
    dataset = as_dataset(dataset, limit=settings.num_images)
    if dataset.images.dtype is torch.float32:
        check_images(dataset.images, "dataset.images")
    elif dataset.images.dtype is not torch.uint8:
        raise ImageTypeError(
            "dataset.images: expected torch.uint8 in 0 to 255, or torch.float32 in [0, 1], found "
            f"{dataset.images.dtype}"
        )
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to evaluate")
    check_radius(torch.tensor(epsilons), norm, dataset.image_shape)
    # a target is a function; the module in it has a mode, which matters
    model = inner_model(model.model if isinstance(model, AttackTarget) else model)
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = parameter.device if parameter is not None else "cpu"
    if settings.num_images is not None:
        dataset = dataset.subset(torch.arange(min(settings.num_images, len(dataset))))
    say = progress or log.debug
    home = torch.device(device)
    untouched = untouched_copy(model)
    job = Job(
        model=model,
        searched=planned(model),
        dataset=dataset,
        settings=settings,
        seed=seed,
        device=home,
        allow_probabilities=allow_probabilities,
        say=say,
        shared=shared,
        untouched=untouched,
        sources=dict(sources or {}),
    )
    started = time.perf_counter()
    with undisturbed(model, job.device, seed=seed), torch.no_grad(), float32_verdicts(job.device):
        searched, fault = trusted(job.searched, model, *next(job.batches())[:2])
        job = replace(job, searched=searched)
        if suite == "paper":
            judged = judge_by_grid(job, protocol, clamp)
        else:
            announce = log.info if progress else log.warning
            judged = judge_in_turn(job, suite, epsilons, norm, partial, budget, announce)
    cost = inference_cost(model, job.first_images(), seed=seed)
    seconds = time.perf_counter() - started
    diagnostics = traces = None
    beside: Arrays = {}
    if isinstance(model, ExpertModel) and settings.diagnostic_images and norm == "linf":
        diagnostics, arrays = diagnose(
            model,
            dataset,
            settings,
            protocol=protocol,
            clamp=clamp,
            seed=seed,
            device=job.device,
            allow_probabilities=allow_probabilities,
            progress=say,
        )
        beside |= arrays
    if suite != "paper" and settings.diagnostic_images:
        # three long walks, watched by the model itself: on more they would cost as much as Square
        most = max(len(dataset) // TRACED[0], TRACED[1])
        traces, arrays = trace(
            searched,
            dataset,
            replace(settings, diagnostic_images=min(settings.diagnostic_images, most)),
            epsilon=epsilons[-1],
            norm=norm,
            seed=seed,
            device=job.device,
            allow_probabilities=allow_probabilities,
            progress=say,
        )
        beside |= arrays
    judged = counted(judged, diagnostics, traces, beside)
    bounds: list[Certified] = []
    contradictions: list[Finding] = []
    if protocol == "pixels":
        with undisturbed(model, job.device, seed=seed), torch.no_grad():
            stands = torch.stack(
                [row.correct for row in judged.rows if row.spec.epsilon <= epsilons[-1]]
            ).all(dim=0)
            bounds, contradictions = certificates(
                job, stands, epsilon=epsilons[-1], norm=norm, sigma=certify
            )
    return Evaluation(
        suite=suite,
        protocol=protocol,
        clamp=clamp if protocol == "paper-compat" else "pixels",
        data=_data_facts(dataset),
        seed=seed,
        bn_mode="eval",
        precision="float32",
        norm="l2" if norm == "l2" else "linf",
        epsilon=epsilons[-1],
        attack_path=judged.attack_path,
        num_parameters=cost.num_parameters,
        flop_per_image=cost.flop_per_image,
        seconds=round(seconds, 3),
        model="model",
        weights="as given",
        attacks=[row.record() for row in judged.rows],
        worst_case=judged.worst_case,
        worst_case_all=judged.worst_case_all,
        curve=judged.curve,
        doubts=judged.doubts,
        certified=bounds,
        findings=[
            *judged.findings,
            *contradictions,
            *held(
                findings.clean_below(judged.rows[0].correct, expected_clean),
                fault,
                None if training_data is None else findings.twins(twins(dataset, training_data)),
            ),
            *gate_findings(diagnostics),
        ],
        gate=judged.gate,
        experts=judged.experts,
        diagnostics=diagnostics,
        traces=traces,
        arrays=_arrays(judged, len(dataset)) | beside,
    )


def _data_facts(dataset: ImageDataset) -> DataFacts:
    return DataFacts(
        name=dataset.name,
        split=dataset.split,
        num_images=len(dataset),
        digest=dataset.digest,
        notes=list(dataset.notes),
        class_names=list(dataset.class_names),
    )


def _arrays(judged: Judged, num_images: int) -> Arrays:
    """The outcome of each image under each attack, and the example images."""
    return {
        "correct": torch.stack([row.correct for row in judged.rows]).numpy(),
        "sample_index": np.arange(num_images),
        **judged.examples,
    }


def _radii(epsilon: float | Sequence[float] | None, settings: EvaluationConfig) -> list[float]:
    """Ascending, the headline last."""
    if epsilon is None:
        return [settings.epsilon]
    epsilon = plain(epsilon)
    radii = [epsilon] if isinstance(epsilon, int | float | str) else list(epsilon)
    if not radii:
        raise ConfigError("epsilon: an empty list, expected at least one radius")
    for radius in radii:
        check_positive(radius, "epsilon", zero_allowed=len(radii) > 1)
    found = sorted({float(radius) for radius in radii})
    check_positive(found[-1], "epsilon")
    return found


def _check_choices(
    suite: str,
    norm: str,
    epsilons: Sequence[float],
    protocol: str,
    clamp: str,
    budget: Budget | None,
) -> None:
    check_choice(suite, SUITES, "suite")
    check_choice(norm, NORMS, "norm")
    check_choice(protocol, ("pixels", "paper-compat"), "protocol")
    check_choice(clamp, ("unit", "none"), "clamp")
    if norm == "linf":
        check_epsilon(torch.tensor(epsilons))
    if suite == "paper" and (len(epsilons) > 1 or norm != "linf"):
        raise ConfigError(
            "suite 'paper' is a grid of L-inf attacks at one epsilon; several radii and other "
            "norms need attacks in turn, which 'paper' does not run"
        )
    if suite != "paper" and protocol != "pixels":
        raise ConfigError(
            f"protocol {protocol!r} belongs to suite 'paper', found suite {suite!r}, which takes "
            "protocol 'pixels'"
        )
    if suite == "paper" and budget is not None:
        raise ConfigError(
            "budget: caps attacks in turn; the steps of suite 'paper' are in settings"
        )
