"""What does each option of training do? Methods for one network, and one change of each at a time.

    python benchmarks/study_options.py                       # all rows, seed 0
    python benchmarks/study_options.py --rows ema swa --seeds 1 2

On scikit-learn's digits, ResNet-6 of 16 channels, 20 epochs. A method is a preset; it tries three
learning rates as the rows of `study.py` do. An option changes the settings that its row names, at
its method's rate; an optimizer of other rates tries three of its own. Gradient attacks judge all,
in L-inf at the radius of training and in L2 at that of "multi_norm_digits".

Appends one JSON line per row and seed to results/study_options_digits.jsonl (or the folder
DWF_BENCH_RESULTS). What is there is not trained again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rows import refuse_unbuilt
from study import Question, Row, Study, at_rate, of_equal_length, on_digits, trained_row

import dwf
from dwf.config import Config
from dwf.data import split_validation
from dwf.defenses.building import options_of
from dwf.defenses.multi_norm import MultiNormOptions
from dwf.presets import find

BASE = "trades"
HALF = 548  # of the 1,097 images that are left after validation
EXTRA = "OTHER_HALF.npz"  # stands for the file of the other images, in settings and in rows
L2_EPSILON = options_of(find("multi_norm_digits"), MultiNormOptions).l2_epsilon

# by key: title, and the preset
METHODS = {
    "madry-at": ("PGD-AT, all images attacked", "madry_at_digits"),
    "pgd-at": ("PGD-AT, half of each batch attacked", "pgd_at_digits"),
    "fgsm-at": ("FGSM-AT, half of each batch attacked", "fgsm_at_digits"),
    "mart": ("MART", "mart_digits"),
    "awp": ("PGD-AT with AWP", "awp_digits"),
    "trades-awp": ("TRADES with AWP", "trades_awp_digits"),
    "fast-at": ("Fast-AT", "fast_at_digits"),
    "free-at": ("Free-AT, four replays of each batch", "free_at_digits"),
    "n-fgsm": ("N-FGSM", "n_fgsm_digits"),
    "fgsm-pgi": ("FGSM-PGI", "fgsm_pgi_digits"),
    "liet": ("LIET", "liet_digits"),
    "multi-norm": ("L-inf and L2 at once, the worse of both", "multi_norm_digits"),
}
# what makes single steps collapse on digits; few settings do
COLLAPSING = (
    "options.noise=0",
    "attack.epsilon=0.3",
    "attack.bn_mode=train",
    "pretrain.schedule=linear",
    "pretrain.at=0,1",
    "pretrain.factors=1,1",
    "validate_every=1",
)


@dataclass(frozen=True)
class Option:
    """Settings that change a method, and the factors of the learning rate that are tried."""

    title: str
    settings: tuple[str, ...]
    base: str = BASE
    factors: tuple[float, ...] = (1.0,)


STEPS = ("pretrain.at=0.5,0.75", "pretrain.factors=0.1,0.01")
LINE = ("pretrain.at=0,0.4,1", "pretrain.factors=0,1,0")
HALF_AS_LONG = (f"data.num_train={HALF}", "pretrain.num_epochs=42")  # as many steps
IN_L2 = ("attack.norm=l2", f"attack.epsilon={L2_EPSILON}", "attack.step_size=0.15")
THREE = (1 / 3, 1.0, 3.0)
EVERY_EPOCH = "validate_every=1"
OPTIONS = {
    "ema": Option("average of the weights, EMA", ("weights=ema", "ema_decay=0.99")),
    "swa": Option(
        "average of the weights, SWA", ("weights=ema", "average=swa", "average_from=0.5")
    ),
    "best": Option("weights of the best validation", ("weights=best", EVERY_EPOCH)),
    "best-ema": Option(
        "average at its best validation", ("weights=best-ema", "ema_decay=0.99", EVERY_EPOCH)
    ),
    "patience": Option("early stop", ("patience=3", "weights=best", EVERY_EPOCH)),
    "label-smoothing": Option("label smoothing", ("pretrain.label_smoothing=0.1",)),
    "mart-label-smoothing": Option("label smoothing", ("pretrain.label_smoothing=0.1",), "mart"),
    "n-fgsm-label-smoothing": Option(
        "label smoothing", ("pretrain.label_smoothing=0.4",), "n-fgsm"
    ),
    "one-cycle": Option("schedule", ("pretrain.schedule=one-cycle",)),
    "polynomial": Option("schedule", ("pretrain.schedule=polynomial",)),
    "steps": Option("schedule", ("pretrain.schedule=steps", *STEPS)),
    "linear": Option("schedule", ("pretrain.schedule=linear", *LINE)),
    "warm-up": Option("warm-up", ("pretrain.warm_up=0.1",)),
    "decay-vectors": Option("no decay of vectors", ("pretrain.decay_vectors=false",)),
    "max-gradient": Option("gradient clipping", ("pretrain.max_gradient=1",)),
    "nesterov": Option("momentum of Nesterov", ("pretrain.nesterov=true",)),
    "adam": Option(
        "optimizer", ("pretrain.optimizer=adam", "pretrain.learning_rate=0.003"), factors=THREE
    ),
    "muon": Option(
        "optimizer", ("pretrain.optimizer=muon", "pretrain.learning_rate=0.01"), factors=THREE
    ),
    "accumulation": Option("batch in two parts", ("pretrain.accumulation=2",)),
    "crop-padding": Option("crops", ("data.crop_padding=1",)),
    "flip": Option("flips; a mirrored digit is another shape", ("data.flip=true",)),
    "autoaugment": Option("AutoAugment", ("data.augment=autoaugment",)),
    "idbh": Option("IDBH", ("data.augment=idbh",)),
    "trivial": Option("TrivialAugment", ("data.augment=trivial",)),
    "cutmix": Option("CutMix", ("data.cutmix=0.5",)),
    "half": Option("half of the images, as many steps", HALF_AS_LONG),
    "extra": Option(
        "the same, and the other half as extra images",
        (*HALF_AS_LONG, f"data.extra={EXTRA}", "data.extra_fraction=0.5"),
    ),
    "beta-1": Option("weight of the divergence", ("options.beta=1",)),
    "beta-12": Option("weight of the divergence", ("options.beta=12",)),
    "draw": Option(
        "4 to 20 steps, drawn for each image",
        ("attack.num_steps=4,8,12,16,20", "attack.draw=image"),
    ),
    "bn-mode": Option("attacks with the batch's statistics", ("attack.bn_mode=train",)),
    "l2": Option("attacks in L2", IN_L2),
    "madry-at-l2": Option("attacks in L2", IN_L2, "madry-at"),
    "average": Option("mean of both norms' losses", ("options.combine=average",), "multi-norm"),
    "msd": Option("steepest of both norms' steps", ("options.combine=msd",), "multi-norm"),
    "on-collapse": Option("stop", ("on_collapse=stop", "weights=best"), "collapsing"),
    "width": Option("network", ("model.width=32",)),
    "resnet10": Option("network", ("model.network=resnet10",)),
    "wrn16-4": Option("network", ("model.network=wrn16_4",)),
    "preactresnet18": Option("network", ("model.network=preactresnet18",)),
}


def on_options() -> Question:
    """The methods; options are made of them once their rates are known."""
    digits = on_digits()
    trained = {BASE: digits.trained["single-1x"]}
    trained |= {
        key: Row(title, of_equal_length(find(preset))) for key, (title, preset) in METHODS.items()
    }
    far = dwf.apply_overrides(of_equal_length(find("n_fgsm_digits")), COLLAPSING)
    title = "FGSM at twice the radius, constant rate, attacks with the batch's statistics"
    trained["collapsing"] = Row(title, far, (3.0,))
    return Question("options_digits", trained, {}, 0, digits.evaluation)


def changed(option: Option, config: Config, extra: Path) -> Config:
    """The configuration of a method with an option; ``extra`` is the file of the other images."""
    return dwf.apply_overrides(
        config, [text.replace(EXTRA, str(extra)) for text in option.settings]
    )


def write_other_half(study: Study, path: Path, seed: int) -> None:
    """The training images that ``data.num_train=HALF`` leaves out; none of validation or test."""
    whole = dwf.data.load(study.data.name, split="train")
    rest, _ = split_validation(whole, study.data.num_validation, seed)
    other = rest.subset(torch.arange(HALF, len(rest)))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x_train=other.images.numpy(), y_train=other.labels.numpy())


def run_method(study: Study, key: str, seed: int) -> None:
    """Train and judge a method with one seed."""
    found, model = trained_row(study, key, study.question.trained[key], seed)
    study.judge(
        found | {"base": BASE, "settings": []}, model, by_suite=False, l2_epsilon=L2_EPSILON
    )


def run_option(study: Study, key: str, seed: int) -> None:
    """Train and judge an option with one seed; seed 0, which chooses the rate, comes first."""
    if seed and not study.is_done(key, 0):
        run_option(study, key, 0)
    option = OPTIONS[key]
    factor = next(iter(study.tuned(option.base)))
    config = at_rate(study.question.trained[option.base].config, factor, seed)
    extra = study.runs / f"other_half_{seed}.npz"
    if any(EXTRA in text for text in option.settings):
        write_other_half(study, extra, seed)
    row = Row(option.title, changed(option, config, extra), option.factors)
    found, model = trained_row(study, key, row, seed)
    found |= {"base": option.base, "settings": list(option.settings)}
    study.judge(found, model, by_suite=False, l2_epsilon=L2_EPSILON)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    question = on_options()
    keys = [*question.trained, *OPTIONS]
    parser.add_argument("--rows", nargs="+", choices=keys, default=keys, metavar="KEY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study_options"))
    parser.add_argument("--images", type=int, default=300)
    options = parser.parse_args()
    refuse_unbuilt(torch.device("cpu"))
    study = Study(question, options.runs, options.images)
    for seed in options.seeds:
        for key in options.rows:
            if not study.is_done(key, seed):
                run = run_method if key in question.trained else run_option
                run(study, key, seed)
    print("`python docs/make_recipes.py` makes a page of the rows")


if __name__ == "__main__":
    main()
