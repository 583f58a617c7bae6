"""The settings of a run: frozen dataclasses, checked when made; :class:`Config` holds them all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dwf import checks
from dwf.checks import ConfigError, check_choice, check_epsilon, check_positive, make_plain

PAPER_FGSM_EPSILON = tuple(i / 100 for i in range(1, 10))
PAPER_PGD_STEPS = (10, 20, 30, 40, 50)
# More than these is a damaged file or a slip of the hand, and would exhaust the machine.
MAX_COUNT, MAX_SIZE, MAX_EXPERTS = 10**9, 10**5, 1000
check_count = functools.partial(checks.check_count, maximum=MAX_COUNT)


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are varied during training.

    ``name``: digits, cifar10, cifar100, svhn, a path to an .npz file, or a folder of images.
    ``root``: where named sets lie; else the variable DWF_DATA_ROOT. ``num_validation``: images held
    out of the *training* set for model selection. ``num_train``: use only so many of the rest.

    ``augment``: how images are varied beside crops and flips, see `dwf.data.augment`. ``cutmix``:
    share of the images into which a rectangle of another is put; labels become shares of classes.
    ``extra``: an .npz file of further training images, such as generated ones, which make up the
    share ``extra_fraction`` of each batch; an epoch still counts as many images as the data set.
    """

    name: str = "digits"
    root: str | None = None
    crop_padding: int = 0
    flip: bool = False
    num_validation: int = 1000
    num_train: int | None = None
    augment: Literal["none", "autoaugment", "idbh", "trivial"] = "none"
    cutmix: float = 0.0
    extra: str | None = None
    extra_fraction: float = 0.7

    def __post_init__(self) -> None:
        make_plain(self)
        check_count(self.crop_padding, "data.crop_padding", minimum=0, maximum=MAX_SIZE)
        check_count(self.num_validation, "data.num_validation")
        if self.num_train is not None:
            check_count(self.num_train, "data.num_train")
        _check_literals(self, "data.")
        if not 0 <= self.cutmix <= 1:
            raise ConfigError(f"data.cutmix: {self.cutmix:g} is not a share in [0, 1]")
        if not 0 < self.extra_fraction < 1:
            raise ConfigError(f"data.extra_fraction: {self.extra_fraction:g} is not in (0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """Networks: the experts of a mixture by kind, or the one network of a baseline."""

    network: str = "resnet18"
    width: int = 64
    num_benign: int = 1
    num_fgsm: int = 4
    num_pgd: int = 4
    gate_hidden: int = 128

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("width", "gate_hidden"):
            check_count(getattr(self, name), f"model.{name}", maximum=MAX_SIZE)
        for name in ("num_benign", "num_fgsm", "num_pgd"):
            check_count(getattr(self, name), f"model.{name}", minimum=0, maximum=MAX_EXPERTS)
        if self.num_benign + self.num_fgsm + self.num_pgd == 0:
            raise ConfigError("model: num_benign + num_fgsm + num_pgd is 0, expected an expert")


@dataclass(frozen=True)
class AttackConfig:
    """Attacks seen in training; radii and steps in pixel units of [0, 1].

    ``fgsm_epsilon`` and ``num_steps`` are the sets that training draws from, uniformly, once per
    batch or once per image (``draw``). ``norm`` is that of all radii and steps. ``protocol``
    "paper-compat" attacks normalized images, clamped as ``clamp`` says, to reproduce the published
    tables.
    """

    fgsm_epsilon: tuple[float, ...] = PAPER_FGSM_EPSILON
    fgsm_random_start: bool = False
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: tuple[int, ...] = PAPER_PGD_STEPS
    random_start: bool = False
    draw: Literal["batch", "image"] = "batch"
    bn_mode: Literal["eval", "train"] = "eval"
    norm: Literal["linf", "l2"] = "linf"
    protocol: Literal["pixels", "paper-compat"] = "pixels"
    clamp: Literal["unit", "none"] = "unit"

    def __post_init__(self) -> None:
        make_plain(self)
        _check_literals(self, "attack.")
        for epsilon in (*self.fgsm_epsilon, self.epsilon):
            if self.norm == "linf":
                check_epsilon(epsilon, "attack.epsilon")
            else:
                check_positive(epsilon, "attack.epsilon", zero_allowed=True)
        check_positive(self.step_size, "attack.step_size")
        if self.norm == "l2" and self.protocol != "pixels":
            raise ConfigError(f"attack.norm: 'l2' goes with pixels, not {self.protocol!r}")
        if self.protocol == "pixels" and self.norm == "linf":
            check_epsilon(self.step_size, "attack.step_size")
        for steps in self.num_steps:
            check_count(steps, "attack.num_steps")
        if not self.fgsm_epsilon or not self.num_steps:
            raise ConfigError("attack: fgsm_epsilon and num_steps need at least one value each")


@dataclass(frozen=True)
class PhaseConfig:
    """The optimizer of one phase of training.

    ``batch_size`` counts images over all processes; ``accumulation`` splits a batch into so many
    parts, so that it fits a small machine (BatchNorm then sees the parts). ``momentum`` and
    ``nesterov`` are for SGD; Adam uses (0.9, 0.999).

    ``learning_rate`` is multiplied by a factor of t, the share of iterations that are done:

    - "cosine": (1 + cos(pi t)) / 2
    - "polynomial": (1 - t) ** 0.9
    - "steps": ``factors[i]`` from t = ``at[i]`` on, 1 before
    - "linear": a line through the points (``at[i]``, ``factors[i]``)
    - "one-cycle": from 1/25 up to 1 at t = 0.3, then down to 1/250,000, both along half a cosine,
      as torch's OneCycleLR (whose cycle of the momentum is left out)

    ``warm_up`` is a share of the iterations in which the rate rises linearly from 0; the schedule
    takes the others.

    ``optimizer`` "muon" steps matrices and convolutions along their orthogonalized momentum, other
    parameters by Adam, see `dwf.training.muon`. ``decay_vectors`` False keeps weight decay from
    parameters of one axis: BatchNorm's and biases. ``max_gradient``: a longer gradient, in L2 over
    all parameters, is shortened to this. ``label_smoothing`` s: losses compare with the class by
    1 - s and with all classes by s / K each.
    """

    num_epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    gate_learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    accumulation: int = 1
    optimizer: Literal["sgd", "adam", "muon"] = "sgd"
    nesterov: bool = False
    schedule: Literal["cosine", "polynomial", "steps", "linear", "one-cycle"] = "cosine"
    at: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    warm_up: float = 0.0
    decay_vectors: bool = True
    max_gradient: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("num_epochs", "batch_size", "accumulation"):
            check_count(getattr(self, name), name)
        _check_literals(self)
        self._check_factors()
        for name in ("learning_rate", "gate_learning_rate"):
            check_positive(getattr(self, name), name)
        for name in ("momentum", "weight_decay"):
            check_positive(getattr(self, name), name, zero_allowed=True)
        for name in ("warm_up", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name):g} is not in [0, 1)")
        if self.max_gradient is not None:
            check_positive(self.max_gradient, "max_gradient")
        if self.momentum >= 1:
            raise ConfigError(f"momentum: {self.momentum:g} is not possible, expected less than 1")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} does not divide into accumulation "
                f"{self.accumulation} equal parts"
            )

    def _check_factors(self) -> None:
        wanted = self.schedule in ("steps", "linear")
        if len(self.at) != len(self.factors) or wanted != bool(self.at):
            needs = "one factor for each value of at" if wanted else "no at and no factors"
            raise ConfigError(
                f"schedule {self.schedule!r}: expected {needs}, "
                f"found at={self.at} and factors={self.factors}"
            )
        if list(self.at) != sorted(self.at) or not all(0 <= t <= 1 for t in self.at):
            raise ConfigError(f"at: {self.at}, expected ascending shares of the phase in [0, 1]")
        for factor in self.factors:
            check_positive(factor, "factors", zero_allowed=True)


@dataclass(frozen=True)
class EvaluationConfig:
    """The table that judges a model: the paper's grid, in pixel units.

    Step counts of 0 leave a row out; ``num_images`` uses only the first so many test images.
    ``diagnostic_images``: how many of them show what the experts of a mixture do under PGD of
    ``diagnostic_steps`` steps; 0 is none.
    """

    fgsm_epsilon: tuple[float, ...] = PAPER_FGSM_EPSILON
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: tuple[int, ...] = PAPER_PGD_STEPS
    multi_start_steps: int = 100
    num_restarts: int = 3
    adaptive_steps: int = 100
    eot_samples: int = 1
    num_images: int | None = None
    batch_size: int = 250
    diagnostic_images: int = 200
    diagnostic_steps: int = 20

    def __post_init__(self) -> None:
        make_plain(self)
        for epsilon in (*self.fgsm_epsilon, self.epsilon):
            check_epsilon(epsilon, "evaluation.epsilon")
        check_epsilon(check_positive(self.step_size, "evaluation.step_size"), "step_size")
        for steps in self.num_steps:
            check_count(steps, "evaluation.num_steps")
        for name in ("multi_start_steps", "adaptive_steps", "diagnostic_images"):
            check_count(getattr(self, name), f"evaluation.{name}", minimum=0)
        for name in ("num_restarts", "eot_samples", "batch_size", "diagnostic_steps"):
            check_count(getattr(self, name), f"evaluation.{name}")
        if self.num_images is not None:
            check_count(self.num_images, "evaluation.num_images")


@dataclass(frozen=True)
class Options:
    """Settings of one defense only.

    A defense with such settings makes a subclass: ``class SoeOptions(Options, defense="soe")``.
    """

    def __init_subclass__(cls, *, defense: str) -> None:
        OPTIONS[defense] = cls


OPTIONS: dict[str, type[Options]] = {}


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes.

    ``options``: settings of this defense only, with their defaults if left out; None if it has
    none.

    ``pretrain``: the schedule of each expert, or of a baseline's one network. ``joint``: the
    schedule of end-to-end training. None for a defense without such a phase. Counts are in epochs
    of a phase (``validate_every``; 0 is never) and in optimizer steps (``checkpoint_every``,
    ``log_every``).

    ``average`` of the last phase's weights: "ema", an exponential moving average over steps, of
    decay ``ema_decay``, or "swa", the mean over the ends of epochs; either begins when the share
    ``average_from`` of the phase is done. BatchNorm's statistics are averaged with the weights.

    ``weights``: what training returns and what is judged first: those of the "last" step, of the
    "best" robust validation, the average ("ema"), or the average at its best robust validation
    ("best-ema"). With the last two the average is validated beside the weights. ``patience``: the
    last phase ends after so many validations in a row without a better one of those weights; 0
    never.

    ``on_collapse``: whether a run goes on or stops when validation shows catastrophic overfitting.

    ``precision``: "fp32", or "bf16" for products in bfloat16 on devices that multiply it faster
    than float32; others train in float32.

    ``pretrain_together``: train experts that are attacked alike side by side, so that one attack
    crafts the images of all of them. "auto" does so on GPUs only: a CPU gains nothing, and loses if
    the experts' numbers of attack steps differ. Each expert learns what it would learn alone.
    """

    preset: str
    defense: str
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: float = 0.999
    average: Literal["ema", "swa"] = "ema"
    average_from: float = 0.0
    weights: Literal["last", "best", "ema", "best-ema"] = "last"
    patience: int = 0
    validate_every: int = 1
    validation_steps: int = 10
    on_collapse: Literal["warn", "stop"] = "warn"
    checkpoint_every: int = 500
    log_every: int = 50
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    pretrain: PhaseConfig | None = field(default_factory=PhaseConfig)
    pretrain_together: Literal["auto", "always", "never"] = "auto"
    joint: PhaseConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    options: Options | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        kind = OPTIONS.get(self.defense)
        if self.options is None and kind is not None:
            object.__setattr__(self, "options", kind())
        if type(self.options) is not (kind or type(None)):
            raise ConfigError(
                f"options: defense {self.defense!r} takes "
                f"{kind.__name__ if kind else 'none'}, found {type(self.options).__name__}"
            )
        check_count(self.seed, "seed", minimum=0, maximum=2**63 - 1)
        if not re.fullmatch(r"\w[\w.+-]{0,99}", self.preset):  # it names a folder
            raise ConfigError(
                f"preset: {self.preset!r:.100} is not possible, expected a word of letters, "
                "digits and '-'"
            )
        _check_literals(self)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: {self.ema_decay:g} is not in [0, 1)")
        if not 0 <= self.average_from < 1:
            raise ConfigError(f"average_from: {self.average_from:g} is not in [0, 1)")
        check_count(self.patience, "patience", minimum=0)
        if not self.validate_every and (self.patience or self.weights.startswith("best")):
            raise ConfigError(
                "validate_every: 0, but patience and the weights of the best validation need some"
            )
        for name in ("checkpoint_every", "log_every", "validation_steps"):
            check_count(getattr(self, name), name)
        check_count(self.validate_every, "validate_every", minimum=0)
        if self.pretrain is None and self.joint is None:
            raise ConfigError("pretrain and joint: both are None, there is nothing to train")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; :func:`from_dict` reads it back."""
        return dataclasses.asdict(self)


def _check_literals(settings: object, prefix: str = "") -> None:
    """Require of every field that lists its choices that it has one of them."""
    cls = type(settings)
    if cls not in _LITERALS:
        _LITERALS[cls] = _literals(cls)
    for name, choices in _LITERALS[cls].items():
        check_choice(getattr(settings, name), choices, f"{prefix}{name}")


_LITERALS: dict[type, dict[str, tuple[Any, ...]]] = {}


def _literals(cls: type) -> dict[str, tuple[Any, ...]]:
    """The choices of each field that lists them; slow, because it evaluates annotations."""
    hints = typing.get_type_hints(cls).items()
    return {name: typing.get_args(h) for name, h in hints if typing.get_origin(h) is Literal}


def derive_seed(seed: int, *names: object) -> int:
    """Derive a separate seed for one use of randomness: 63 bits from the run's seed and some names.

    Everything random in a run is a function of such a seed and of counters (epoch, step, sample
    index), never of what was drawn before. That is why a resumed run continues to the same bits.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
