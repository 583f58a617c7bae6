"""Attack objects: built once, called on batches, nothing but the functions behind them."""

import dataclasses
import inspect

import pytest
import torch
from small_models import Linear, Mapped, Noisy, SmallNet, make_images, make_labels

import dwf.attacks
from dwf.attacks import FGSM, MIM, PGD, fgsm, load_images, margin, pgd
from dwf.attacks.objects import OBJECTS
from dwf.attacks.setup import Setup
from dwf.checks import CheckpointError, ConfigError

IMAGES, LABELS = make_images(4), make_labels(4)
# What makes an attack short, and what its function has to be told.
SHORT = {
    "FGSM": {},
    "PGD": {"step_size": 2 / 255, "num_steps": 3, "random_start": True},
    "BIM": {"step_size": 2 / 255, "num_steps": 3},
    "MIM": {"step_size": 2 / 255, "num_steps": 3, "decay": 0.7},
    "APGD": {"num_steps": 4, "loss": "dlr"},
    "FAB": {"num_steps": 3},
    "CarliniWagner": {"num_steps": 4, "num_searches": 2},
    "DDN": {"num_steps": 4, "gamma": 0.1},
    "Square": {"num_queries": 20},
    "SimBA": {"num_queries": 20},
    "HopSkipJump": {"num_queries": 200},
    "RayS": {"num_queries": 20},
    "RandomNoise": {"num_draws": 4},
    "AutoAttack": {"version": "rand", "epsilon": 0.001},
}
# Where an attack has a reason for another default than all others.
OTHER_DEFAULTS = {
    ("carlini_wagner", "norm"): "l2",
    ("ddn", "norm"): "l2",
    ("hop_skip_jump", "allow_probabilities"): True,
    ("rays", "allow_probabilities"): True,
}
FUNCTIONS = [kind.function for kind in OBJECTS]
ALL = pytest.mark.parametrize("kind", OBJECTS, ids=lambda kind: kind.__name__)


def negative(logits, labels):
    return -logits[:, 0]


def own_settings(kind):
    finds_the_closest = inspect.signature(kind.function).parameters["epsilon"].default is None
    radius = {} if finds_the_closest else {"epsilon": 8 / 255}
    return {**radius, **SHORT[kind.__name__]}


@ALL
def test_an_object_is_its_function(kind):
    model, settings = SmallNet(), own_settings(kind)
    attack = kind(model, seed=3, **SHORT[kind.__name__])
    index = torch.tensor([7, 1, 4, 2])
    expected = kind.function(model, IMAGES, LABELS, sample_index=index, seed=3, **settings)
    assert torch.equal(attack(IMAGES, LABELS, index), expected)
    assert attack.report().num_images == len(IMAGES)
    assert attack.report().num_forwards > 0


@pytest.mark.parametrize(
    "setting",
    [
        {"epsilon": 0.1, "step_size": 0.03},
        {"num_restarts": 3},
        {"bn_mode": "train"},
        {"eot_samples": 3, "seed": 9},
        {"loss": negative},
        {"loss": "margin"},
        {"norm": "l2", "epsilon": 1.0, "random_start": False},
    ],
    ids="-".join,
)
def test_settings_reach_the_function(setting):
    model = Noisy(SmallNet())
    usual = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10, "random_start": True}
    expected = pgd(model, IMAGES, LABELS, **{**usual, **setting})
    assert torch.equal(PGD(model, **setting)(IMAGES, LABELS), expected)


@ALL
def test_targets_belong_to_a_call(kind):
    model, targets = SmallNet(), (LABELS + 1) % 5
    attack = kind(model, **SHORT[kind.__name__])
    if kind.__name__ == "AutoAttack":
        with pytest.raises(ConfigError, match="targets: AutoAttack takes none"):
            attack(IMAGES, LABELS, targets=targets)
        return
    settings = own_settings(kind)
    expected = kind.function(model, IMAGES, LABELS, targets=targets, **settings)
    assert torch.equal(attack(IMAGES, LABELS, targets=targets), expected)


def test_each_call_draws_new_noise():
    """As a training loop needs it: no row has the same start in every batch and epoch."""

    def starts(seed):
        attack = PGD(lambda x: x.flatten(1)[:, :5] * 0, num_steps=1, step_size=1e-6, seed=seed)
        return [attack(IMAGES, LABELS) for _ in range(3)]

    first, second, third = starts(3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    # reproducible from the constructor's seed, and another for another seed
    assert all(map(torch.equal, starts(3), (first, second, third)))
    assert not torch.equal(starts(4)[1], second)


def test_each_call_draws_new_passes_of_a_random_model():
    attack = MIM(Noisy(SmallNet()), num_steps=2)
    assert not torch.equal(attack(IMAGES, LABELS), attack(IMAGES, LABELS))


def test_a_sample_index_gives_the_same_noise_at_every_call():
    attack, index = PGD(Linear(), num_steps=1, seed=5), torch.arange(4)
    first = attack(IMAGES, LABELS, index)
    attack(IMAGES, LABELS)
    assert torch.equal(attack(IMAGES, LABELS, index), first)
    again = dataclasses.replace(attack, epsilon=8 / 255)
    assert torch.equal(again(IMAGES, LABELS), first)  # counts from the beginning


def test_a_start_belongs_to_a_call():
    attack = PGD(Linear(), num_steps=1, random_start=False)
    start = (IMAGES + 0.02).clamp(0, 1)
    settings = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 1, "random_start": False}
    expected = pgd(Linear(), IMAGES, LABELS, start=start, **settings)
    assert torch.equal(attack(IMAGES, LABELS, start=start), expected)
    with pytest.raises(ConfigError, match="start: MIM takes none"):
        MIM(Linear())(IMAGES, LABELS, start=start)


@ALL
def test_fields_are_the_functions_parameters(kind):
    """Every setting, with the same default where the function has one."""
    parameters = dict(inspect.signature(kind.function).parameters)
    for name in ("model", "images", "labels", "sample_index", "targets", "start", "report"):
        parameters.pop(name, None)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init and f.name != "model"}
    assert list(fields) == list(parameters)
    for name, field in fields.items():
        if parameters[name].default is not inspect.Parameter.empty:
            assert field.default == parameters[name].default


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_keyword_means_the_same_everywhere(function):
    """One type for each common keyword, and the defaults of the setup that all share."""
    parameters = inspect.signature(function).parameters
    for f in dataclasses.fields(Setup):
        if f.name in parameters and f.name != "epsilon":
            assert parameters[f.name].annotation == f.type, f.name
            default = OTHER_DEFAULTS.get((function.__name__, f.name), f.default)
            if f.default is not dataclasses.MISSING:
                assert parameters[f.name].default == default
    if "loss" in parameters:
        assert (parameters["loss"].annotation, parameters["loss"].default) == ("str | Loss", "ce")


def test_every_attack_is_exported():
    for kind in OBJECTS:
        assert getattr(dwf.attacks, kind.__name__) is kind
        assert getattr(dwf.attacks, kind.function.__name__) is kind.function
        assert {kind.__name__, kind.function.__name__} <= set(dwf.attacks.__all__)


@ALL
def test_settings_are_named_and_fixed(kind):
    with pytest.raises(TypeError):
        kind(Linear(), 0.1)
    with pytest.raises(TypeError, match="epsilom"):
        kind(Linear(), epsilom=0.1)
    made = kind(Linear(), epsilon=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.epsilon = 0.2
    assert dataclasses.replace(made, epsilon=0.2).epsilon == 0.2


def test_repr_is_short():
    assert repr(FGSM(Linear())) == "FGSM(Linear, epsilon=0.03137)"
    attack = PGD(Linear(), epsilon=torch.rand(4), num_steps=3, loss=margin, norm="l2")
    assert repr(attack) == "PGD(Linear, epsilon=tensor[4], num_steps=3, norm='l2', loss=margin)"


def test_follows_the_model_as_it_trains():
    model = SmallNet()
    attack = FGSM(model)
    before = attack(IMAGES, LABELS)
    with torch.no_grad():
        model.linear.weight.neg_()
    assert not torch.equal(attack(IMAGES, LABELS), before)


class TestSave:
    def test_what_is_saved_is_what_one_call_gives(self, tmp_path):
        """To the bit, however the images are cut into batches."""
        attack = PGD(Linear(), num_steps=3)
        path = tmp_path / "adversarial.safetensors"
        attack.save(path, zip(IMAGES.split(3), LABELS.split(3), strict=True))
        images, labels = load_images(path)
        assert torch.equal(images, attack(IMAGES, LABELS))
        assert torch.equal(labels, LABELS)
        attack.save(str(path), [(IMAGES[2:], LABELS[2:])], first_index=2)
        assert torch.equal(load_images(path)[0], images[2:])

    def test_nothing_is_left_of_a_failure(self, tmp_path):
        path = tmp_path / "adversarial.safetensors"
        with pytest.raises(ConfigError, match="batches: empty"):
            FGSM(Linear()).save(path, [])
        attack = FGSM(Mapped(Linear(), lambda z: z.softmax(dim=1)))
        with pytest.raises(dwf.checks.ModelOutputError):
            attack.save(path, [(IMAGES, LABELS)])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", [None, b"<html>"])
    def test_load_of_something_else(self, tmp_path, content):
        path = tmp_path / "adversarial.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not saved adversarial images"):
            load_images(path)


def test_sample_index_reaches_the_noise():
    index = torch.tensor([7, 1, 4, 2])
    attack = FGSM(Linear(), random_start=True)
    expected = fgsm(
        Linear(), IMAGES, LABELS, epsilon=8 / 255, random_start=True, sample_index=index
    )
    assert torch.equal(attack(IMAGES, LABELS, index), expected)
    assert not torch.equal(attack(IMAGES, LABELS), expected)
