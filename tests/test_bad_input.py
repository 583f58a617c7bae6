"""Bad input, through every public entry point: a typed error, at once, and nothing has changed.

Every entry point shares its checks. So the checks that stand for one kind each, of images, labels,
model and settings, are tried at every entry; every other check at one entry, another for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from small_models import (
    SHAPE,
    Mapped,
    SmallNet,
    disordered,
    everything,
    make_dataset,
    make_images,
    make_labels,
)
from torch import Tensor, nn

from dwf.attacks import (
    FGSM,
    PGD,
    apgd,
    autoattack,
    carlini_wagner,
    ddn,
    fab,
    fgsm,
    hop_skip_jump,
    input_gradient,
    mim,
    pgd,
    random_noise,
    rays,
    simba,
    square,
)
from dwf.checks import (
    ConfigError,
    DataError,
    DwfError,
    ImageError,
    ImageTypeError,
    LabelError,
    ModelOutputError,
    PixelRangeError,
)
from dwf.config import EvaluationConfig
from dwf.evaluation import evaluate
from dwf.models import Mixture, MlpGate, Normalize

B = 4
BUDGET = {"epsilon": 0.1, "step_size": 0.03}


def network() -> nn.Module:
    return SmallNet()


def mixture() -> nn.Module:
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return Mixture([SmallNet(seed=e) for e in range(3)], MlpGate(SHAPE, 3), normalize)


# every public function and object that takes a model, images and labels
ENTRIES: dict[str, Callable[..., Any]] = {
    "fgsm": lambda *batch, **options: fgsm(*batch, **{"epsilon": 0.1, **options}),
    "pgd": lambda *batch, **options: pgd(
        *batch, **{**BUDGET, "num_steps": 2, "random_start": True, **options}
    ),
    "mim": lambda *batch, **options: mim(*batch, **{**BUDGET, "num_steps": 2, **options}),
    "apgd": lambda *batch, **options: apgd(
        *batch, **{"epsilon": 0.1, "num_steps": 2, "loss": "dlr", **options}
    ),
    "fab": lambda *batch, **options: fab(*batch, **{"epsilon": 0.1, "num_steps": 2, **options}),
    "square": lambda *batch, **options: square(
        *batch, **{"epsilon": 0.1, "num_queries": 3, **options}
    ),
    "simba": lambda *batch, **options: simba(
        *batch, **{"epsilon": 0.1, "num_queries": 3, **options}
    ),
    "hop_skip_jump": lambda *batch, **options: hop_skip_jump(
        *batch, **{"num_queries": 30, "allow_probabilities": False, **options}
    ),
    "rays": lambda *batch, **options: rays(
        *batch, **{"num_queries": 3, "allow_probabilities": False, **options}
    ),
    "random_noise": lambda *batch, **options: random_noise(
        *batch, **{"epsilon": 0.1, "num_draws": 2, **options}
    ),
    "carlini_wagner": lambda *batch, **options: carlini_wagner(
        *batch, **{"epsilon": 0.5, "num_steps": 2, "num_searches": 1, **options}
    ),
    "ddn": lambda *batch, **options: ddn(*batch, **{"epsilon": 0.5, "num_steps": 2, **options}),
    "autoattack": lambda *batch, **options: autoattack(
        *batch, **{"epsilon": 0.001, "version": "rand", **options}
    ),
    "input_gradient": input_gradient,
    "FGSM": lambda *batch, **options: FGSM(batch[0], **{"epsilon": 0.1, **options})(*batch[1:]),
    "PGD": lambda *batch, **options: PGD(batch[0], **{"num_steps": 2, **options})(*batch[1:]),
}
STEPS = ("pgd", "PGD", "mim")
AIMED = (
    *("fgsm", "pgd", "mim", "apgd", "fab", "square", "random_noise", "carlini_wagner"),
    *("ddn", "simba", "hop_skip_jump", "rays"),
)
IN_TURN = ("apgd", "square", "simba", "random_noise", "autoattack")


class Case(NamedTuple):
    """How a sound batch is damaged, and what is said about it."""

    error: type[Exception]
    message: str
    images: Callable[[Tensor], Any] = lambda images: images
    labels: Callable[[Tensor], Any] = lambda labels: labels
    model: Callable[[nn.Module], nn.Module] = lambda model: model
    options: dict[str, Any] = {}  # noqa: RUF012
    entries: tuple[str, ...] = tuple(ENTRIES)


def with_pixel(value: float) -> Callable[[Tensor], Tensor]:
    def damage(images: Tensor) -> Tensor:
        images[1, 2, 3, 4] = value
        return images

    return damage


def output(function: Callable[[Tensor], Any]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: Mapped(model, function)


CASES = {
    "one NaN pixel": Case(
        PixelRangeError,
        r"images: nan at \[1, 2, 3, 4\], .*; 1 of 768 values",
        with_pixel(torch.nan),
    ),
    "one infinite pixel": Case(PixelRangeError, r"inf at \[1, 2, 3, 4\]", with_pixel(torch.inf)),
    "a pixel below 0": Case(PixelRangeError, r"-0.01 at \[1, 2, 3, 4\]", with_pixel(-0.01)),
    "pixels 0..255": Case(
        PixelRangeError,
        r"expected \[0, 1\].*divide 8-bit pixels by 255",
        lambda x: (x * 255).round(),
    ),
    "uint8 images": Case(
        ImageTypeError,
        r"found torch.uint8; pass images.float\(\) / 255",
        lambda x: (x * 255).to(torch.uint8),
    ),
    "images as an array": Case(ImageTypeError, "found ndarray", lambda x: x.numpy()),
    "one image without a batch": Case(ImageError, r"found \[3, 8, 8\]", lambda x: x[0]),
    "flat images": Case(ImageError, r"expected shape \[B, C, H, W\]", lambda x: x.flatten(1)),
    "images elsewhere": Case(
        ImageError,
        "images on meta, labels on cpu, model on cpu; move all three",
        lambda x: x.to("meta"),
    ),
    "labels elsewhere": Case(
        ImageError, "images on cpu, labels on meta, model on cpu", labels=lambda y: y.to("meta")
    ),
    "model elsewhere": Case(
        ImageError, "images on cpu, labels on cpu, model on meta", model=lambda m: m.to("meta")
    ),
    "label == num_classes": Case(
        LabelError,
        r"labels: 5 at \[2\], expected 0 to 4",
        labels=lambda y: y.index_fill(0, torch.tensor(2), 5),
    ),
    "label -1": Case(
        LabelError, r"labels: -1 at \[0\]", labels=lambda y: y.index_fill(0, torch.tensor(0), -1)
    ),
    "float labels": Case(LabelError, "found torch.float32", labels=lambda y: y.float()),
    "one-hot labels": Case(
        LabelError, r"found \[4, 5\]", labels=lambda y: nn.functional.one_hot(y, 5)
    ),
    "too few labels": Case(
        LabelError, r"expected shape \[4\], one per image, found \[3\]", labels=lambda y: y[:3]
    ),
    "labels as a list": Case(LabelError, "found list", labels=lambda y: y.tolist()),
    "probabilities": Case(
        ModelOutputError,
        "these are probabilities; return logits",
        model=output(lambda logits: logits.softmax(dim=1)),
    ),
    "a tuple": Case(ModelOutputError, "found tuple", model=output(lambda logits: (logits, None))),
    "one number per image": Case(
        ModelOutputError, r"expected logits \[4, K\], found \[4\]", model=output(lambda z: z[:, 0])
    ),
    "logits of one image": Case(
        ModelOutputError, r"found \[1, 5\]", model=output(lambda logits: logits[:1])
    ),
    "classes instead of logits": Case(
        ModelOutputError,
        "expected float logits, found torch.int64",
        model=output(lambda logits: logits.argmax(dim=1, keepdim=True)),
    ),
    "epsilon 8": Case(
        ConfigError,
        r"epsilon: 8 is larger .* did you mean 8/255 = 0.03137",
        options={"epsilon": 8},
        entries=("fgsm", "FGSM", *IN_TURN, *STEPS),
    ),
    **{
        f"epsilon {value}": Case(
            ConfigError,
            f"epsilon: {value} is not",
            options={"epsilon": value},
            entries=("fgsm", "FGSM", *IN_TURN, *STEPS),
        )
        for value in (-0.1, float("nan"), float("inf"), None)
    },
    **{
        f"step_size {value}": Case(
            ConfigError,
            f"step_size: {value} is not possible",
            options={"step_size": value},
            entries=STEPS,
        )
        for value in (0.0, -0.1, float("nan"))
    },
    "step_size 2": Case(
        ConfigError,
        "step_size: 2 is larger.* did you mean 2/255",
        options={"step_size": 2},
        entries=STEPS,
    ),
    "num_steps 0": Case(
        ConfigError, "num_steps: 0", options={"num_steps": 0}, entries=("pgd", "PGD")
    ),
    "num_steps 2.5": Case(
        ConfigError, "num_steps: 2.5", options={"num_steps": 2.5}, entries=("pgd", "PGD")
    ),
    "num_restarts 0": Case(
        ConfigError, "num_restarts: 0", options={"num_restarts": 0}, entries=("pgd", "PGD")
    ),
    "restarts without random starts": Case(
        ConfigError,
        "needs random_start=True",
        options={"num_restarts": 2, "random_start": False},
        entries=("pgd", "PGD"),
    ),
    "eot_samples 0": Case(ConfigError, "eot_samples: 0", options={"eot_samples": 0}, entries=STEPS),
    "bn_mode": Case(ConfigError, "did you mean 'train'", options={"bn_mode": "Train"}),
    "targets too few": Case(
        LabelError,
        r"targets: expected shape \[4\], one per image, found \[3\]",
        options={"targets": torch.tensor([0, 1, 2])},
        entries=AIMED,
    ),
    "a target is the label": Case(
        LabelError,
        r"targets: 1 at \[1\] is the label itself, expected another class; 1 of 4 are",
        labels=lambda labels: torch.tensor([0, 1, 2, 3]),
        options={"targets": torch.tensor([1, 1, 0, 0])},
        entries=(*AIMED, "input_gradient"),
    ),
    "target == num_classes": Case(
        LabelError,
        r"targets: 5 at \[\d\], expected 0 to 4",
        options={"targets": torch.full((B,), 5)},
        entries=AIMED,
    ),
    "sample_index too short": Case(
        ImageError,
        r"sample_index: expected integers \[4\], one per image, found torch.int64 \[3\]",
        options={"sample_index": torch.arange(3)},
        entries=("fgsm", "pgd"),
    ),
    "sample_index of floats": Case(
        ImageError,
        "sample_index: .* found torch.float32",
        options={"sample_index": torch.rand(4)},
        entries=("fgsm", "pgd"),
    ),
}
# one of each kind: these are tried at every entry
OF_EVERY_ENTRY = (
    "one NaN pixel",
    "label == num_classes",
    "probabilities",
    "epsilon 8",
    "bn_mode",
    "a target is the label",
)


def table() -> list[Any]:
    """Each case at its entries, or at one of them; networks and mixtures in turn."""
    rows = []
    for i, (name, case) in enumerate(CASES.items()):
        every = name in OF_EVERY_ENTRY
        entries = case.entries if every else [case.entries[i % len(case.entries)]]
        for j, entry in enumerate(entries):
            make_model = (network, mixture)[(i + j) % 2]
            row_id = f"{name}-{entry}-{make_model.__name__}"
            rows.append(pytest.param(case, entry, make_model, id=row_id))
    return rows


def test_every_entry_meets_every_kind_of_check():
    met = {(row.values[1], row.values[0].error) for row in table()}
    kinds = (PixelRangeError, LabelError, ModelOutputError, ConfigError)
    assert met >= {(entry, kind) for entry in ENTRIES for kind in kinds}
    assert {name for name, case in CASES.items()} == {row.id.rsplit("-", 2)[0] for row in table()}


@pytest.mark.parametrize(("case", "entry", "make_model"), table())
def test_attacks(case, entry, make_model):
    model = case.model(disordered(make_model()))
    images, labels = case.images(make_images(B)), case.labels(make_labels(B))
    untouched = [x.clone() if isinstance(x, Tensor) else x for x in (images, labels)]
    has_bits = next(model.parameters()).device.type == "cpu"  # and not "meta"
    before = everything(model) if has_bits else None
    started = time.process_time()
    with pytest.raises(case.error, match=case.message) as error:
        ENTRIES[entry](model, images, labels, **case.options)
    assert time.process_time() - started < 1.0
    assert isinstance(error.value, DwfError)
    assert isinstance(error.value, (ValueError, TypeError))
    if has_bits:
        assert everything(model) == before
    for now, then in zip((images, labels), untouched, strict=True):
        if isinstance(now, Tensor) and now.device.type == "cpu":
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


CONVERSIONS = {
    "float64": (lambda x: x.double(), lambda y: y),
    "bfloat16": (lambda x: x.bfloat16(), lambda y: y),
    "float16": (lambda x: x.half(), lambda y: y),
    "channels_last": (lambda x: x.to(memory_format=torch.channels_last), lambda y: y),
    "strided": (lambda x: x.repeat_interleave(2, dim=3)[..., ::2], lambda y: y),
    "transposed": (lambda x: x.mT.contiguous().mT, lambda y: y),
    "requires_grad": (lambda x: x.clone().requires_grad_(), lambda y: y),
    "empty": (lambda x: x[:0], lambda y: y[:0]),
    "int32 labels": (lambda x: x, lambda y: y.int()),
    "uint8 labels": (lambda x: x, lambda y: y.to(torch.uint8)),
    "strided labels": (lambda x: x, lambda y: y.repeat_interleave(2)[::2]),
}


# everything at once but "empty", which leaves nothing to compare
AT_ONCE = (
    lambda x: x.double().mT.contiguous().mT.requires_grad_(),
    lambda y: y.int().repeat_interleave(2)[::2],
)


def assert_accepted(entry, make_model, convert_images, convert_labels):
    """As if the caller had passed contiguous float32 and int64."""
    model = make_model()
    images, labels = convert_images(make_images(B)), convert_labels(make_labels(B))
    plain = images.detach().float().contiguous()
    found = ENTRIES[entry](model, images, labels)
    expected = ENTRIES[entry](model, plain, labels.long().contiguous())
    assert found.dtype is torch.float32
    assert found.is_contiguous()
    assert not found.requires_grad
    assert found.shape == images.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_is_accepted(name):
    assert_accepted("pgd", mixture, *CONVERSIONS[name])


@pytest.mark.parametrize("conversion", [AT_ONCE, CONVERSIONS["empty"]], ids=["at once", "empty"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_every_entry_accepts(entry, conversion):
    assert_accepted(entry, network, *conversion)


@pytest.mark.parametrize("entry", ENTRIES)
def test_normalized_models_name_both_channel_counts(entry):
    model = disordered(mixture())
    before = everything(model)
    message = r"images: expected shape \[B, 3, H, W\], found \[4, 1, 8, 8\]"
    with pytest.raises(ImageError, match=message):
        ENTRIES[entry](model, make_images(B, (1, 8, 8)), make_labels(B))
    assert everything(model) == before


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_torch_says_passes_through(entry):
    model = disordered(network())
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"\[4, 1, 8, 8\] to have 3 channels"):
        ENTRIES[entry](model, make_images(B, (1, 8, 8)), make_labels(B))
    assert everything(model) == before


SETTINGS = EvaluationConfig((0.1,), 0.1, 0.03, (2,), 2, 2, 2)


@pytest.mark.parametrize(
    ("error", "message", "change", "damage", "options"),
    [
        (ModelOutputError, "found tuple", {}, lambda z: (z, z), {}),
        (ModelOutputError, "probabilities", {}, lambda z: z.softmax(1), {}),
        (ModelOutputError, r"found \[4\]", {}, lambda z: z[:, 0], {}),
        (ModelOutputError, r"found \[1, 5\]", {}, lambda z: z[:1], {}),
        (
            LabelError,
            r"labels: 5 at \[1\], expected 0 to 4",
            {"labels": torch.tensor([0, 5, 1, 2])},
            None,
            {},
        ),
        (LabelError, "found torch.float32", {"labels": torch.rand(4)}, None, {}),
        (
            ImageTypeError,
            "dataset.images: expected torch.uint8 in 0 to 255, or .* found torch.float64",
            {"images": torch.rand(4, *SHAPE).double()},
            None,
            {},
        ),
        (
            DataError,
            "random: no images to evaluate",
            {"images": torch.zeros(0, *SHAPE, dtype=torch.uint8), "labels": make_labels(0)},
            None,
            {},
        ),
        (ConfigError, "protocol: 'paper' is unknown", {}, None, {"protocol": "paper"}),
        (ConfigError, "clamp: 'pixels' is unknown", {}, None, {"clamp": "pixels"}),
    ],
)
def test_evaluate(error, message, change, damage, options):
    model = disordered(mixture())
    if damage is not None:
        model = Mapped(model, damage)
    dataset = replace(make_dataset(B), **change)
    before = everything(model)
    started = time.process_time()
    with pytest.raises(error, match=message):
        evaluate(model, dataset, SETTINGS, **options)
    assert time.process_time() - started < 1.0
    assert everything(model) == before


def test_not_finite_is_an_answer_and_not_an_error():
    """A NaN model is attacked and judged like any other; its images come back, all broken."""
    for value in (torch.nan, torch.inf):
        model = disordered(Mapped(network(), lambda logits, value=value: logits * value))
        before = everything(model)
        for name, entry in ENTRIES.items():
            found = entry(model, make_images(B), make_labels(B))
            assert name == "input_gradient" or found.isfinite().all()
        result = evaluate(model, make_dataset(B), SETTINGS)
        assert result.clean_accuracy == result.robust_accuracy == 0.0
        assert result.findings[0].severity == "invalid"
        assert everything(model) == before
