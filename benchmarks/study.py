"""Does a mixture of experts earn its price? Train recipes on digits, each at its own learning rate.

    python benchmarks/study.py                       # all rows, three seeds, then the ideas
    python benchmarks/study.py --rows single-1x dwf-modern --seeds 0

Each row tries three learning rates with seed 0; the one of highest robust accuracy on held-out
training images trains the other seeds. Networks and attacks are those of the presets, and all train
for 20 epochs. One suite judges all on the same test images. An idea is one change of the mixture,
with seed 0 and the mixture's rate; gradient attacks alone judge it, and the other rows as well.

Appends one JSON line per model and seed to results/study_digits.jsonl (or the folder
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
from rows import append, folder, refuse_unbuilt, verdict_of
from torch import Tensor, nn

import dwf
from dwf.config import Config, PhaseConfig
from dwf.data import evaluation_batches, split_validation
from dwf.files import atomic_write_json, read_json
from dwf.models import Mixture, MlpGate
from dwf.presets import find, single
from dwf.progress import read_metrics

NUM_EPOCHS = 20
NUM_MEMBERS = 9
NAME = "study_digits"
SUITE = "quick"
# rows that mix the plain network and another row's model
MIXED = {"mixednuts": "single-9x", "mixednuts-dwf": "dwf-modern"}


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


def rows() -> dict[str, Row]:
    """The recipes that train by themselves."""
    modern = find("dwf_modern_digits")
    plain = replace(single(find("dwf_digits"), "plain"), pretrain=modern.joint)
    # the experts of DWF modern learn nine times as fast as the schedule says
    third = (1 / 3, 1.0, 3.0)
    return {
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
    "Muon at a hundredth of the rate": lambda c: _schedule(
        c, optimizer="muon", learning_rate=c.joint.learning_rate / 100, gate_learning_rate=0.001
    ),
}


def _options(config: Config, **settings: Any) -> Config:
    return replace(config, options=replace(config.options, **settings))


def _schedule(config: Config, **settings: Any) -> Config:
    return replace(config, joint=replace(config.joint, **settings))


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
    return replace(
        config, seed=seed, device="cpu", validation_steps=20, validate_every=NUM_EPOCHS, **changes
    )


def of_equal_length(config: Config) -> Config:
    """A recipe with the study's epochs, over all phases."""
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
    return replace(config, **phases)


class Study:
    """Runs in a folder, and the rows that are judged."""

    def __init__(self, runs: Path, num_images: int) -> None:
        self.runs = runs
        self.num_images = num_images
        self.device = torch.device("cpu")
        self.test_set = dwf.data.load("digits", split="test")

    def trained(self, name: str, config: Config) -> tuple[nn.Module, float]:
        """The model of a recipe and the CPU seconds that it took; trained once."""
        path, cost = self.runs / name, self.runs / f"{name}.json"
        if not cost.exists():
            shutil.rmtree(path, ignore_errors=True)  # half a run has half a cost
            began = time.process_time()
            dwf.train(config, path, quiet=True)
            atomic_write_json(cost, {"cpu_seconds": round(time.process_time() - began, 1)})
            print(f"trained {name}: {read_json(cost)['cpu_seconds']} CPU s", flush=True)
        return dwf.load(path, config.weights), read_json(cost)["cpu_seconds"]

    def validated(self, name: str) -> float:
        """The last robust accuracy on held-out training images; 0 if the run failed."""
        robust = [
            row["robust_accuracy"]
            for row in read_metrics(self.runs / name)
            if row["kind"] == "validation"
        ]
        return robust[-1] if robust else 0.0

    def tuned(self, key: str) -> dict[float, float]:
        """Robust accuracy on held-out images by factor of the learning rate, best first."""
        found, config = {}, rows()[key].config
        for factor in rows()[key].factors:
            name = run_name(key, factor, 0)
            try:
                self.trained(name, at_rate(config, factor, 0))
                found[factor] = self.validated(name)
            except dwf.training.TrainingError as error:
                print(f"{name}: {error}", flush=True)
                found[factor] = 0.0
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def judge(self, row: dict[str, Any], model: nn.Module, *, by_suite: bool = True) -> None:
        """Attack a model, by gradients and by the suite, and append its row."""
        began = time.process_time()
        settings = replace(find("dwf_digits").evaluation, num_images=self.num_images)
        clean, robust = self.by_gradients(model.eval(), settings.epsilon)
        row |= {
            "epsilon": settings.epsilon,
            "num_images": self.num_images,
            "clean": clean,
            "under_gradients": robust,
        }
        if by_suite:
            result = dwf.evaluate(model, self.test_set, settings, suite=SUITE)
            row |= {
                "suite": SUITE,
                **verdict_of(result),
                "flop_per_image": result.flop_per_image,
            }
        row["judge_cpu_seconds"] = round(time.process_time() - began, 1)
        append({"bench": NAME, **row}, self.device, NAME)
        worst = row.get("worst_case", robust)
        print(
            f"{row['title']}, seed {row['seed']}: clean {100 * row['clean']:.1f} %, worst case "
            f"{100 * worst:.1f} %, {row.get('verdict', 'gradient attacks alone')}",
            flush=True,
        )

    def by_gradients(self, model: nn.Module, epsilon: float) -> tuple[float, float]:
        """Shares of the test images that are right, and that APGD-CE and APGD-DLR both leave so."""
        subset = self.test_set.subset(torch.arange(self.num_images))
        images, labels, index = next(evaluation_batches(subset, self.num_images, self.device))

        def right(x: Tensor) -> Tensor:
            with torch.no_grad():
                answers: Tensor = model(x).argmax(dim=1)
            return answers == labels

        stands = right(images)
        clean = float(stands.float().mean())
        for loss in ("ce", "dlr"):
            attacked = dwf.apgd(
                model, images, labels, epsilon=epsilon, loss=loss, sample_index=index
            )
            stands &= right(attacked)
        return clean, float(stands.float().mean())


def run_name(key: str, factor: float, seed: int) -> str:
    return f"{key}-{factor:.2f}-{seed}"


def done() -> list[dict[str, Any]]:
    """The rows that are there."""
    path = folder() / f"{NAME}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def is_done(key: str, seed: int) -> bool:
    return any((row["row"], row["seed"]) == (key, seed) for row in done())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=None, help="keys; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ideas", action="store_true", help="the ideas alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--images", type=int, default=300)
    options = parser.parse_args()
    refuse_unbuilt(torch.device("cpu"))
    study = Study(options.runs, options.images)
    keys = options.rows or [*rows()]
    if options.rows is None:
        keys[4:4] = [*MIXED]
        keys.append("ensemble")
    for seed in [] if options.ideas else options.seeds:
        for key in keys:
            if not is_done(key, seed):
                run_row(study, key, seed)
    if options.ideas or options.rows is None:
        run_ideas(study)
    print("`python docs/make_recipes.py` makes a page of the rows")


def run_row(study: Study, key: str, seed: int) -> None:
    """Train and judge one row with one seed."""
    if key == "ensemble":
        run_ensemble(study, seed)
    elif key in MIXED:
        run_mixednuts(study, key, seed)
    else:
        row = rows()[key]
        rates = study.tuned(key)
        factor = next(iter(rates))
        model, cost = study.trained(run_name(key, factor, seed), at_rate(row.config, factor, seed))
        study.judge(described(key, row.title, seed, cost, row.config, rates), model)


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


def run_ensemble(study: Study, seed: int) -> None:
    """Nine networks of row single-1x with equal weights, each trained alone."""
    config = rows()["single-1x"].config
    rates = study.tuned("single-1x")
    factor, members, total = next(iter(rates)), [], 0.0
    for e in range(NUM_MEMBERS):
        own = seed if e == 0 else 1000 + NUM_MEMBERS * seed + e
        model, cost = study.trained(
            run_name("single-1x", factor, own), at_rate(config, factor, own)
        )
        members.append(model)
        total += cost
    mixture = Mixture(members, MlpGate(study.test_set.image_shape, NUM_MEMBERS, hidden=1))
    title = "nine networks, equal weights, each trained alone"
    study.judge(described("ensemble", title, seed, round(total, 1), config, rates), mixture)


def run_mixednuts(study: Study, key: str, seed: int) -> None:
    """The model of row plain and a robust one, mixed on their held-out training images."""
    networks, total = [], 0.0
    robust = MIXED[key]
    for part in ("plain", robust):
        config = rows()[part].config
        rates = study.tuned(part)
        factor = next(iter(rates))
        model, cost = study.trained(run_name(part, factor, seed), at_rate(config, factor, seed))
        networks.append(model)
        total += cost
    whole = dwf.data.load("digits", split="train")
    held_out = split_validation(whole, config.data.num_validation, seed)[1]
    mixed = dwf.mix(*networks, held_out, epsilon=config.attack.epsilon)
    title = f"MixedNUTS of no attack and {rows()[robust].title}"
    study.judge(described(key, title, seed, round(total, 1), config, rates), mixed)


def run_ideas(study: Study) -> None:
    """Each idea with seed 0, at the rate that the mixture was given."""
    config = rows()["dwf-modern"].config
    rates = study.tuned("dwf-modern")
    factor = next(iter(rates))
    for title, change in IDEAS.items():
        key = "idea: " + title
        if not is_done(key, 0):
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
