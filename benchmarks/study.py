"""Does a mixture of experts earn its price? Train recipes of equal cost, each at its own rate.

    python benchmarks/study.py                       # on digits: all rows, three seeds, the ideas
    python benchmarks/study.py --rows single-1x dwf-modern --seeds 0
    python benchmarks/study.py --cifar10 FILE.npz    # on 10,000 training images of CIFAR-10

Each row on digits tries three learning rates with seed 0; the one of highest robust accuracy on
held-out training images trains the other seeds. On CIFAR-10 each row has the rate of its preset.
All train for 20 epochs. One suite judges all on the same test images. An idea is one change of the
mixture, with seed 0 and the mixture's rate; gradient attacks alone judge it, and the other rows as
well.

Appends one JSON line per model and seed to results/study_<data>.jsonl (or the folder
DWF_BENCH_RESULTS). What is there is not trained again, so a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gradients import left_by_gradients
from rows import append, folder, refuse_unbuilt, verdict_of
from torch import nn

import dwf
from dwf.config import Config, EvaluationConfig, PhaseConfig
from dwf.data import split_validation
from dwf.defenses.mixing import KEEP
from dwf.files import atomic_write_json, read_json
from dwf.models import Mixture, MlpGate
from dwf.presets import find, single
from dwf.progress import read_metrics

NUM_EPOCHS, VALIDATE_EVERY = 20, 4
NUM_MEMBERS = 9
SUITE = "quick"


@dataclass(frozen=True)
class Row:
    """A recipe: its title, what trains it, and the factors of its learning rate that are tried."""

    title: str
    config: Config
    factors: tuple[float, ...] = (1.0, 3.0, 9.0)


def trades(wider: int) -> Config:
    """TRADES on one network, so many times as wide, with the schedule of the mixture."""
    modern = find("dwf_modern_digits")
    config = find("trades_digits")
    return replace(
        config,
        model=replace(config.model, width=wider * config.model.width),
        attack=modern.attack,
        pretrain=modern.joint,
    )


@dataclass(frozen=True)
class Question:
    """The rows that are compared on a data set.

    Attributes:
        data: its name in rows.
        trained: recipes that train by themselves, by key.
        mixed: rows that mix row "plain" and another row's model, by key, and `keep` of `dwf.mix`.
        ensembles: rows that weigh so many networks of another row equally, by key.
        evaluation: radius and attacks of the suite.
    """

    data: str
    trained: dict[str, Row]
    mixed: dict[str, tuple[str, float]]
    ensembles: dict[str, tuple[str, int]]
    evaluation: EvaluationConfig

    @property
    def name(self) -> str:
        """Of the file of rows."""
        return f"study_{self.data}"


def on_digits() -> Question:
    """One network, as wide that it costs as much as nine, and mixtures."""
    modern = find("dwf_modern_digits")
    plain = replace(single(find("dwf_digits"), "plain"), pretrain=modern.joint)
    # the experts of DWF modern learn nine times as fast as the schedule says
    third = (1 / 3, 1.0, 3.0)
    trained = {
        "single-1x": Row("one network, TRADES", of_equal_length(trades(1))),
        "single-9x": Row("one network of 9 x the parameters, TRADES", of_equal_length(trades(3))),
        "dwf-modern": Row("DWF modern", of_equal_length(modern), third),
        "plain": Row("one network, no attack", of_equal_length(plain)),
        "soe": Row("Synergy-of-Experts", of_equal_length(find("soe_digits"))),
        "igat": Row("iGAT", of_equal_length(find("igat_digits"))),
        "advmoe": Row("ADVMoE", of_equal_length(find("advmoe_digits"))),
        "robust-experts": Row("Robust Experts", of_equal_length(find("robust_experts_digits"))),
        "dwf": Row("DWF as published", of_equal_length(find("dwf_digits"))),
    }
    mixed = {"mixednuts": ("single-9x", KEEP), "mixednuts-dwf": ("dwf-modern", KEEP)}
    ensembles = {"ensemble": ("single-1x", NUM_MEMBERS)}
    return Question("digits", trained, mixed, ensembles, find("dwf_digits").evaluation)


def on_cifar10(path: str) -> Question:
    """One network that costs as much as two narrower ones, and such two, mixed or averaged."""
    small = find("dwf_cifar10_small")
    recipe = find("n_fgsm_cifar10")
    recipe = replace(
        recipe,
        data=replace(small.data, name=path),
        model=replace(recipe.model, network="resnet10", width=45),
        weights="ema",
        ema_decay=0.995,
    )
    narrow = replace(recipe, model=replace(recipe.model, width=32))
    half, own_6, narrow_6 = (
        at_radius(recipe, 4 / 255),
        at_radius(recipe, 6 / 255),
        at_radius(narrow, 6 / 255),
    )
    titles = {
        "single-1x": ("one network of 32 channels, N-FGSM", narrow),
        "single-2x": ("one network of 45 channels, N-FGSM", recipe),
        "plain": (
            "one network of 32 channels, no attack",
            replace(narrow, defense="plain", options=None),
        ),
        "single-2x-half": ("one network of 45 channels, N-FGSM at half the radius", half),
        "single-2x-6": ("one network of 45 channels, N-FGSM at 6/255", own_6),
        "single-1x-6": ("one network of 32 channels, N-FGSM at 6/255", narrow_6),
    }
    trained = {
        key: Row(title, of_equal_length(config), (1.0,)) for key, (title, config) in titles.items()
    }
    mixed = {"mixednuts": ("single-1x", KEEP), "mixednuts-6": ("single-1x-6", 0.9)}
    ensembles = {"ensemble": ("single-1x", 2), "ensemble-6": ("single-1x-6", 2)}
    return Question("cifar10_small", trained, mixed, ensembles, small.evaluation)


# what changes in DWF modern, by the idea's name
IDEAS: dict[str, Callable[[Config], Config]] = {
    "experts at the mixture's rate": lambda c: _options(c, expert_rate="shared"),
    "gradients made up for by the gate's own weights": lambda c: _options(c, expert_rate="gate"),
    "equal weights in place of a gate": lambda c: _options(c, trained="experts"),
    "average of the weights (EMA), by validation": lambda c: replace(
        c, weights="best-ema", validate_every=2
    ),
    "gate at the experts' rate": lambda c: _schedule(
        c, gate_learning_rate=NUM_MEMBERS * c.joint.learning_rate
    ),
    "gate entropy rewarded, 0.1": lambda c: _options(c, gate_entropy=0.1),
    "gate entropy punished, 0.1": lambda c: _options(c, gate_entropy=-0.1),
    "diversity of the experts, 0.02": lambda c: _options(c, diversity=0.02),
    "MART in place of TRADES": lambda c: _options(c, objective="mart", beta=5.0),
    "label smoothing 0.1": lambda c: _schedule(c, label_smoothing=0.1),
    "no decay of BatchNorm and biases": lambda c: _schedule(c, decay_vectors=False),
    "one-cycle": lambda c: _schedule(c, schedule="one-cycle"),
    "experts pre-trained by kind": lambda c: replace(
        c,
        pretrain=of_equal_length(find("dwf_digits")).pretrain,
        joint=of_equal_length(find("dwf_digits")).joint,
    ),
    "the same, then frozen: only the gate is trained jointly": lambda c: _options(
        replace(
            c,
            pretrain=of_equal_length(find("dwf_digits")).pretrain,
            joint=of_equal_length(find("dwf_digits")).joint,
        ),
        trained="gate",
    ),
    "three experts of 28 channels": lambda c: _three_wider(c),
    "three experts of 28 channels, at three times the rate": lambda c: _schedule(
        _three_wider(c),
        learning_rate=3 * c.joint.learning_rate,
        gate_learning_rate=3 * c.joint.gate_learning_rate,
    ),
    "Muon at a hundredth of the rate": lambda c: _schedule(
        c, optimizer="muon", learning_rate=c.joint.learning_rate / 100, gate_learning_rate=0.001
    ),
}


def _three_wider(config: Config) -> Config:
    """Three experts of together as many parameters as nine; their own rate is three times that."""
    model = replace(config.model, width=28, num_benign=1, num_fgsm=1, num_pgd=1)
    return replace(config, model=model)


def _options(config: Config, **settings: Any) -> Config:
    return replace(config, options=replace(config.options, **settings))


def _schedule(config: Config, **settings: Any) -> Config:
    return replace(config, joint=replace(config.joint, **settings))


def at_radius(config: Config, epsilon: float) -> Config:
    """A recipe that attacks within another radius."""
    return replace(config, attack=replace(config.attack, epsilon=epsilon))


def at_rate(config: Config, factor: float, seed: int) -> Config:
    """A recipe with its last phase's learning rates times a factor."""

    def scaled(schedule: PhaseConfig) -> PhaseConfig:
        return replace(
            schedule,
            learning_rate=schedule.learning_rate * factor,
            gate_learning_rate=schedule.gate_learning_rate * factor,
        )

    phase = "joint" if config.joint is not None else "pretrain"
    changes: dict[str, Any] = {phase: scaled(getattr(config, phase))}
    return replace(config, seed=seed, device="cpu", **changes)


def of_equal_length(config: Config) -> Config:
    """A recipe with the study's epochs, over all phases, and the study's validations."""
    phases = {
        name: replace(schedule, num_epochs=NUM_EPOCHS)
        for name in ("pretrain", "joint")
        if (schedule := getattr(config, name)) is not None
    }
    if len(phases) == 2:
        phases["joint"] = replace(phases["joint"], num_epochs=NUM_EPOCHS // 3)
        phases["pretrain"] = replace(
            phases["pretrain"], num_epochs=NUM_EPOCHS - phases["joint"].num_epochs
        )
    return replace(config, validation_steps=20, validate_every=VALIDATE_EVERY, **phases)


class Study:
    """Runs in a folder, and the rows that are judged."""

    def __init__(self, question: Question, runs: Path, num_images: int) -> None:
        self.question = question
        self.runs = runs
        self.num_images = num_images
        self.device = torch.device("cpu")
        self.data = next(iter(question.trained.values())).config.data
        self.test_set = dwf.data.load(self.data.name, split="test")

    def trained(self, name: str, config: Config) -> tuple[nn.Module, float]:
        """The model of a recipe and the CPU seconds that it took; trained once.

        A run that may stop at a collapse, and does, leaves its best weights.
        """
        path, cost = self.runs / name, self.runs / f"{name}.json"
        if not cost.exists():
            shutil.rmtree(path, ignore_errors=True)  # half a run has half a cost
            began = time.process_time()
            try:
                dwf.train(config, path, quiet=True)
            except dwf.training.TrainingError:
                if config.on_collapse != "stop" or config.weights != "best":
                    raise
            atomic_write_json(cost, {"cpu_seconds": round(time.process_time() - began, 1)})
            print(f"trained {name}: {read_json(cost)['cpu_seconds']} CPU s", flush=True)
        return dwf.load(path, config.weights), read_json(cost)["cpu_seconds"]

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Seconds of training, and then robust accuracy on held-out images, in the last phase."""
        found, seconds = [], 0.0
        metrics = read_metrics(self.runs / name)
        last = max((row["phase_index"] for row in metrics), default=0)
        for row in metrics:
            if row["kind"] == "train":
                seconds += row["seconds"]
            elif row["kind"] == "validation" and row["phase_index"] == last:
                found.append((round(seconds, 1), row["robust_accuracy"]))
        return found

    def end(self, name: str) -> dict[str, Any]:
        """Epochs that the last phase took, and the warnings of the run."""
        metrics = read_metrics(self.runs / name)
        last = max(row["phase_index"] for row in metrics)
        return {
            "epochs": 1 + max(row["epoch"] for row in metrics if row["phase_index"] == last),
            "warnings": [row["message"] for row in metrics if row["kind"] == "warning"],
        }

    def validated(self, name: str) -> float:
        """The last robust accuracy on held-out training images; 0 if the run failed."""
        curve = self.curve(name)
        return curve[-1][1] if curve else 0.0

    def tuned(self, key: str, row: Row | None = None) -> dict[float, float]:
        """Robust accuracy on held-out images by factor of the learning rate, best first.

        ``row``: what is trained, where the question does not name it.
        """
        found, row = {}, row or self.question.trained[key]
        for factor in row.factors:
            name = run_name(key, factor, 0)
            try:
                self.trained(name, at_rate(row.config, factor, 0))
                found[factor] = self.validated(name)
            except dwf.training.TrainingError as error:
                print(f"{name}: {error}", flush=True)
                found[factor] = 0.0
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def judge(
        self,
        row: dict[str, Any],
        model: nn.Module,
        *,
        by_suite: bool = True,
        l2_epsilon: float | None = None,
    ) -> None:
        """Attack a model, by gradients (in L2 too) and by the suite, and append its row."""
        began = time.process_time()
        settings = replace(self.question.evaluation, num_images=self.num_images)
        judged = model.eval(), self.test_set, self.num_images, self.device
        clean, robust = left_by_gradients(*judged, epsilon=settings.epsilon)
        row |= {
            "epsilon": settings.epsilon,
            "num_images": self.num_images,
            "clean": clean,
            "under_gradients": robust,
        }
        if l2_epsilon is not None:
            _, robust_in_l2 = left_by_gradients(*judged, epsilon=l2_epsilon, norm="l2")
            row |= {"l2_epsilon": l2_epsilon, "under_gradients_l2": robust_in_l2}
        if by_suite:
            result = dwf.evaluate(model, self.test_set, settings, suite=SUITE)
            row |= {
                "suite": SUITE,
                **verdict_of(result),
                "flop_per_image": result.flop_per_image,
            }
        row["judge_cpu_seconds"] = round(time.process_time() - began, 1)
        append({"bench": self.question.name, **row}, self.device, self.question.name)
        worst = row.get("worst_case", robust)
        print(
            f"{row['title']}, seed {row['seed']}: clean {100 * row['clean']:.1f} %, worst case "
            f"{100 * worst:.1f} %, {row.get('verdict', 'gradient attacks alone')}",
            flush=True,
        )

    def is_done(self, key: str, seed: int) -> bool:
        """Whether the row is there."""
        path = folder() / f"{self.question.name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return any((row["row"], row["seed"]) == (key, seed) for row in map(json.loads, lines))


def run_name(key: str, factor: float, seed: int) -> str:
    return f"{key}-{factor:.2f}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=None, help="keys; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ideas", action="store_true", help="the ideas alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--cifar10", metavar="FILE.npz", help="CIFAR-10 in place of digits")
    options = parser.parse_args()
    refuse_unbuilt(torch.device("cpu"))
    question = on_cifar10(options.cifar10) if options.cifar10 else on_digits()
    study = Study(question, options.runs, options.images)
    keys = options.rows or [*question.trained, *question.mixed, *question.ensembles]
    for seed in [] if options.ideas else options.seeds:
        for key in keys:
            if not study.is_done(key, seed):
                run_row(study, key, seed)
    if options.ideas or (options.rows is None and "dwf-modern" in question.trained):
        run_ideas(study)
    print("`python docs/make_recipes.py` makes a page of the rows")


def run_row(study: Study, key: str, seed: int) -> None:
    """Train and judge one row with one seed."""
    if key in study.question.ensembles:
        run_ensemble(study, key, seed)
    elif key in study.question.mixed:
        run_mixednuts(study, key, seed)
    else:
        found, model = trained_row(study, key, study.question.trained[key], seed)
        study.judge(found, model)


def trained_row(study: Study, key: str, row: Row, seed: int) -> tuple[dict[str, Any], nn.Module]:
    """What a row says before it is judged, and its model, at the rate that validation chose."""
    rates = study.tuned(key, row)
    factor = next(iter(rates))
    name = run_name(key, factor, seed)
    model, cost = study.trained(name, at_rate(row.config, factor, seed))
    found = described(key, row.title, seed, cost, row.config, rates)
    return found | {"curve": study.curve(name)} | study.end(name), model


def described(
    key: str, title: str, seed: int, cost: float, config: Config, rates: dict[float, float]
) -> dict[str, Any]:
    schedule = config.joint or config.pretrain
    assert schedule is not None
    return {
        "row": key,
        "title": title,
        "seed": seed,
        "cpu_seconds": cost,
        "learning_rate": round(schedule.learning_rate * next(iter(rates)), 4),
        "validated": {f"{schedule.learning_rate * f:.4g}": v for f, v in rates.items()},
    }


def run_ensemble(study: Study, key: str, seed: int) -> None:
    """Networks of another row with equal weights, each trained alone."""
    of, num_members = study.question.ensembles[key]
    row, rates = study.question.trained[of], study.tuned(of)
    factor, members, total = next(iter(rates)), [], 0.0
    for e in range(num_members):
        own = seed if e == 0 else 1000 + num_members * seed + e
        model, cost = study.trained(run_name(of, factor, own), at_rate(row.config, factor, own))
        members.append(model)
        total += cost
    mixture = Mixture(members, MlpGate(study.test_set.image_shape, num_members, hidden=1))
    title = f"{num_members} times {row.title}, equal weights, each trained alone"
    study.judge(described(key, title, seed, round(total, 1), row.config, rates), mixture)


def run_mixednuts(study: Study, key: str, seed: int) -> None:
    """The model of row plain and a robust one, mixed on their held-out training images."""
    networks, total = [], 0.0
    trained, (robust, keep) = study.question.trained, study.question.mixed[key]
    for part in ("plain", robust):
        config = trained[part].config
        rates = study.tuned(part)
        factor = next(iter(rates))
        model, cost = study.trained(run_name(part, factor, seed), at_rate(config, factor, seed))
        networks.append(model)
        total += cost
    whole = dwf.data.load(study.data.name, split="train")
    held_out = split_validation(whole, config.data.num_validation, seed)[1]
    epsilon = study.question.evaluation.epsilon
    mixed = dwf.mix(*networks, held_out, epsilon=epsilon, keep=keep)
    title = f"MixedNUTS of no attack and {trained[robust].title}, keep {keep:g}"
    study.judge(described(key, title, seed, round(total, 1), config, rates), mixed)


def run_ideas(study: Study) -> None:
    """Each idea with seed 0, at the rate that the mixture was given."""
    config = study.question.trained["dwf-modern"].config
    rates = study.tuned("dwf-modern")
    factor = next(iter(rates))
    for title, change in IDEAS.items():
        key = "idea: " + title
        if not study.is_done(key, 0):
            changed = change(at_rate(config, factor, 0))
            name = "idea-" + "".join(c if c.isalnum() else "-" for c in title.lower())
            try:
                model, cost = study.trained(name, changed)
            except dwf.training.TrainingError as error:
                print(f"{title}: {error}", flush=True)
                continue
            row = described(key, title, 0, cost, config, {factor: 0.0})
            study.judge(row, model, by_suite=False)


if __name__ == "__main__":
    main()
